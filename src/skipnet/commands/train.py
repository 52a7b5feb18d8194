"""`skipnet train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from skipnet.errors import UserError
from skipnet.recipes import list_families, recipe
from skipnet.training.config import TrainConfig
from skipnet.training.run import RunDirectory
from skipnet.training.train import train as train_run


def train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    *,
    output: Path | None = None,
    resume: Path | None = None,
) -> RunDirectory:
    """Train a recipe's stages in order and leave one run directory.

    Args:
        config: What to do.
        output: The run directory to make; runs/RECIPE-TIME if not given.
        resume: A run directory to continue to the same numbers as if it had not stopped.
    """
    return train_run(config, output=output, resume=resume)


def main(words: Sequence[str]) -> None:
    """Read `RECIPE [flags]`, or `--resume RUN`, which reads the run's configuration, and train."""
    if not words or words[0] in ("-h", "--help"):
        print(_train_usage())
        return
    if words[0].startswith("-"):
        resume = resume_argument(words)
        if resume is None:
            raise UserError(
                "train needs a recipe (digits, for instance) or --resume RUN; see skipnet list "
                "recipes"
            )
        _, config = RunDirectory.open(resume)
        title = "--resume"
    else:
        config = recipe(words[0])
        title = words[0]
        words = words[1:]

    def command(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = config,
        *,
        output: Path | None = None,
        resume: Path | None = None,
    ) -> None:
        train(config, output=output, resume=resume)

    command.__doc__ = train.__doc__
    tyro.cli(command, prog=f"skipnet train {title}", args=words)


def resume_argument(words: Sequence[str]) -> Path | None:
    """Return the directory after --resume, None if there is none."""
    for index, word in enumerate(words):
        if word == "--resume" and index + 1 < len(words):
            return Path(words[index + 1])
        if word.startswith("--resume="):
            return Path(word.removeprefix("--resume="))
    return None


def _train_usage() -> str:
    families = list_families()
    width = max(map(len, families))
    lines = [f"  {name:{width}s}  {summary}" for name, summary in families.items()]
    return "\n".join(
        [
            "usage: skipnet train RECIPE [--field value …] [--output RUN]",
            "       skipnet train --resume RUN",
            "",
            (train.__doc__ or "").split("\n")[0],
            "",
            "recipes:",
            *lines,
            "",
            "skipnet train RECIPE --help lists every field with the recipe's value.  Example:",
            "  skipnet train digits --hrl.target-compute 0.5 --seed 1",
        ]
    )
