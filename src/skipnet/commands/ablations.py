"""`skipnet ablations`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from skipnet.commands.study import numbers, read_arguments, run_study, words_of
from skipnet.studies.ablations import (
    VARIANTS,
    ablation_children,
    ablation_settings,
    describe_variant,
)
from skipnet.studies.results import Results
from skipnet.studies.study import Study
from skipnet.training.config import TrainConfig


def ablations(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    *,
    only: Annotated[str | None, tyro.conf.arg(metavar="hrl,soft,…")] = None,
    seeds: Annotated[str | None, tyro.conf.arg(metavar="0,1,…")] = None,
    jobs: int | None = None,
    output: Path | None = None,
    resume: Path | None = None,
) -> Results:
    """Train a recipe with one thing left out or swapped at a time, and leave one table.

    The same command again, or --resume DIR, goes on where it stopped; new variants and seeds join
    those that are there. Every flag of skipnet train is one here.

    Args:
        config: The recipe; its target is everybody's.
        only: Variants to train (skipnet ablations -h lists them); all if not given.
        seeds: Each variant with each of them; that of --seed if not given.
        jobs: Runs at once: one a GPU, or one on a CPU (they share the cores), if not given.
        output: The directory to make, or to go on with; runs/RECIPE-ablations if not given.
        resume: A directory of ablations to go on with; its configuration is the default then.
    """
    names, asked_seeds = words_of(only), numbers("seeds", seeds, int)
    if resume is not None:
        there = Study.read(resume).settings
        names = names or there.get("variants", [])
        asked_seeds = asked_seeds or there.get("seeds", [])
    settings = ablation_settings(config, only=names, seeds=asked_seeds)
    return run_study(
        "ablations",
        config,
        settings,
        ablation_children,
        jobs=jobs,
        output=output,
        resume=resume,
    )


def main(words: Sequence[str]) -> None:
    """Read `RECIPE [flags]`, or `--resume DIR`, and train."""
    read_arguments(
        ablations,
        words,
        "skipnet ablations digits --only hrl,soft,sdv,static --hrl.epochs 10",
        lists={"variants": {name: describe_variant(name) for name in VARIANTS}},
    )
