"""`skipnet sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from skipnet.commands.study import numbers, read_arguments, run_study
from skipnet.studies.plot import draw
from skipnet.studies.results import Results
from skipnet.studies.study import Study
from skipnet.studies.sweep import sweep_children, sweep_settings
from skipnet.training.config import TrainConfig


def sweep(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    *,
    targets: Annotated[str | None, tyro.conf.arg(metavar="0.3,0.5,…")] = None,
    alphas: Annotated[str | None, tyro.conf.arg(metavar="0,0.1,…")] = None,
    seeds: Annotated[str | None, tyro.conf.arg(metavar="0,1,…")] = None,
    no_dense: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    jobs: int | None = None,
    output: Path | None = None,
    resume: Path | None = None,
) -> Results:
    """Train the curve of accuracy against computation: one SP a seed, and HRL to every target.

    The same command again, or --resume DIR, goes on where it stopped; new targets and seeds join
    those that are there. Every flag of skipnet train is one here.

    Args:
        config: What the runs share.
        targets: Shares of dense multiply-adds to aim at, a run each. Give these or alphas.
        alphas: Fixed weights of skipping, a run each.
        seeds: A whole curve each; that of --seed if not given.
        no_dense: Leave out the dense run to compare with.
        jobs: Runs at once: one a GPU, or one on a CPU (they share the cores), if not given.
        output: The directory to make, or to go on with; runs/RECIPE-sweep if not given.
        resume: A sweep's directory to go on with; its configuration is the default then.
    """
    asked: dict[str, Any] = {
        "targets": numbers("targets", targets, float),
        "alphas": numbers("alphas", alphas, float),
        "seeds": numbers("seeds", seeds, int),
    }
    if resume is not None:
        there = Study.read(resume).settings
        no_dense = no_dense or not there.get("dense")
        if not asked["targets"] and not asked["alphas"]:
            asked |= {name: there.get(name, []) for name in ("targets", "alphas")}
        asked["seeds"] = asked["seeds"] or there.get("seeds", [])
    settings = sweep_settings(config, **asked, dense=not no_dense)
    return run_study(
        "sweep",
        config,
        settings,
        sweep_children,
        jobs=jobs,
        output=output,
        resume=resume,
        draw=draw,
    )


def main(words: Sequence[str]) -> None:
    """Read `RECIPE [flags]`, or `--resume DIR`, and train."""
    read_arguments(sweep, words, "skipnet sweep digits --targets 0.4,0.6,0.8 --seeds 0,1 --jobs 2")
