"""A study: the directory of a named set of training runs, and how to go on with it.

study.json             what is studied: the kind, the configuration that runs share, the settings
seed0/sp/ …            a run directory a run
seed0/sp.log …         what it printed
results.json           every finished run's results
curve.png, path.png …  the plots (and .svg)
"""

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipnet.errors import UserError
from skipnet.files import write_atomically
from skipnet.training.config import TrainConfig, differences, from_dict, to_dict
from skipnet.training.run import RunDirectory

Settings = dict[str, Any]
"""What a kind of study is asked for by name: lists (targets, seeds …) and switches."""

SP = "sp"


@dataclass(frozen=True, kw_only=True)
class Child:
    """One run of a study.

    Attributes:
        name: Its directory within the study's.
        label: What it is a run of, whatever the seed.
        config: Its configuration; `start` is given when it is made.
        after: Name of the child whose weights it starts from, if any.
    """

    name: str
    label: str
    config: TrainConfig
    after: str | None = None


def plan(
    base: TrainConfig, variants: Mapping[str, TrainConfig], seeds: Sequence[int]
) -> list[Child]:
    """Lay out the runs of every variant and seed, those that others start from first.

    Variants of stages sp and hrl become two runs, and those with the same sp share one.

    Args:
        base: The configuration that variants change.
        variants: Configurations by label, their stages dense, sp, hrl, or sp and hrl.
        seeds: Of the runs.
    """
    children: dict[str, Child] = {}

    def add(label: str, seed: int, config: TrainConfig, after: str | None = None) -> str:
        name = f"seed{seed}/{label}"
        config = dataclasses.replace(config, seed=seed)
        children.setdefault(name, Child(name=name, label=label, config=config, after=after))
        return name

    for seed in seeds:
        for label, config in variants.items():
            if config.stages != ("sp", "hrl"):
                add(label, seed, config)
                continue
            # What HRL will do is no part of it, so that variants can share it.
            alone = dataclasses.replace(config, stages=("sp",), hrl=base.hrl)
            shared = not differences(alone, dataclasses.replace(base, stages=("sp",)))
            first = add(SP if shared else f"{label}-{SP}", seed, alone)
            add(label, seed, dataclasses.replace(config, stages=("hrl",), start=None), first)
    return list(children.values())


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study on the disk.

    Attributes:
        path: Its directory.
        kind: The command that makes it.
        config: The configuration its runs share, with seed 0.
        settings: What was asked for, in all commands so far.
    """

    path: Path
    kind: str
    config: TrainConfig
    settings: Settings

    @staticmethod
    def read(path: Path) -> "Study":
        """Read a study's description.

        Raises:
            UserError: When there is none, or it cannot be read.
        """
        file = path / "study.json"
        if not file.exists():
            raise UserError(f"{path} is no directory of a sweep or ablations: it has no study.json")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            kind, config, settings = values["kind"], values["config"], values["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {file}: {error!r}") from None
        return Study(path=path, kind=kind, config=from_dict(TrainConfig, config), settings=settings)

    def demand_same(self, kind: str, config: TrainConfig) -> None:
        """Check that a command goes on with this study.

        Raises:
            UserError: When it is of another kind, recipe or configuration, with the differences.
        """
        if kind != self.kind:
            raise UserError(
                f"{self.path} holds {_A[self.kind]}, not {_A[kind]}: name another directory with "
                "--output"
            )
        fields = differences(self.config, dataclasses.replace(config, seed=0))
        if fields:
            changed = [
                f"{name} ({_field(self.config, name)}, now {_field(config, name)})"
                for name in fields
            ]
            raise UserError(
                f"{self.path} was started with another {', '.join(changed)}: go on with it "
                f"unchanged (skipnet {kind} --resume {self.path} alone does), or name another "
                "directory with --output"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory, if need be, and keep other commands away; write the description.

        Raises:
            UserError: When the directory cannot be made or written, or another command is at it.
        """
        if (self.path / "config.json").exists():
            raise UserError(f"{self.path} holds a single run: name another directory with --output")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot make the directory {self.path}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another command is at work in {self.path}: wait for it, or stop it first"
                ) from None
            for unfinished in self.path.glob(".*.tmp"):  # Of a command that was killed.
                unfinished.unlink(missing_ok=True)
            description = {
                "kind": self.kind,
                "config": to_dict(self.config),
                "settings": self.settings,
            }
            write_json(self.path / "study.json", description)
            yield
        finally:
            os.close(folder)

    def finished(self, child: Child) -> RunDirectory | None:
        """Return a child's run if it has come to its end."""
        path = self.path / child.name
        if not (path / "config.json").exists():
            return None
        run, _ = RunDirectory.open(path)
        return run if all(run.finished(stage) for stage in child.config.stages) else None

    def prepare(self, child: Child) -> Path:
        """Make a child's run directory, or check that the one that is there is its own.

        Raises:
            UserError: When it is of another configuration, or cannot be made.
        """
        path = self.path / child.name
        start = child.config.start if child.after is None else self.path / child.after
        config = dataclasses.replace(child.config, start=start)
        if not (path / "config.json").exists():
            RunDirectory.create(config, path)
            return path
        run, saved = RunDirectory.open(path)
        run.demand_same(dataclasses.replace(config, start=saved.start))
        if saved.start != start:  # The study was moved, and its weights with it.
            run.write_config(config)
        return path


def study_of(path: Path, kind: str, config: TrainConfig, settings: Settings) -> Study:
    """Describe a new study, or one that is there and gets what it was not asked for before.

    Args:
        path: Its directory, which need not exist.
        kind: The command.
        config: The configuration that runs share.
        settings: What the command asks for; lists are joined with what is there.

    Raises:
        UserError: When another study is there.
    """
    if not (path / "study.json").exists():
        return Study(
            path=path,
            kind=kind,
            config=dataclasses.replace(config, seed=0),
            settings=settings,
        )
    there = Study.read(path)
    there.demand_same(kind, config)
    for one, other in (("targets", "alphas"), ("alphas", "targets")):
        if there.settings.get(one) and settings.get(other):
            raise UserError(
                f"{path} was started with {one}, not {other}: name another directory with --output"
            )
    for name, value in settings.items():
        if value is False and there.settings.get(name):
            raise UserError(
                f"{path} was started with {name}: leave out --no-{name}, or name another directory "
                "with --output"
            )
    joined = {name: _join(there.settings.get(name), value) for name, value in settings.items()}
    return dataclasses.replace(there, settings=joined)


def distinct(name: str, values: Sequence[Any], *, least: float | None = None) -> list[Any]:
    """Check that no value is given twice, or is below the least.

    Raises:
        UserError: When one is.
    """
    for index, value in enumerate(values):
        if value in values[:index]:
            raise UserError(f"{name} has {value} twice: give each once")
        if least is not None and not least <= value < math.inf:
            raise UserError(f"{name} must be at least {least}, and {value} is not")
    return list(values)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        UserError: When it cannot be written.
    """
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())


def _join(old: Any, new: Any) -> Any:
    if isinstance(new, list):
        return [*(old or []), *(item for item in new if item not in (old or []))]
    return old or new


def _field(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


_A = {"sweep": "a sweep", "ablations": "ablations"}
