"""The run directory: everything a training run leaves behind, and what it needs to go on.

config.json           the whole configuration
environment.json      versions, commit, hardware, threads
metrics.jsonl         one line a log interval and an evaluation
results.json          evaluation of every finished stage
checkpoint.safetensors  training state of the stage in progress
dense.safetensors, sp.safetensors, hrl.safetensors   model of every finished stage
model.safetensors     model of the last finished stage
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipnet.errors import UserError
from skipnet.files import write_atomically
from skipnet.models.weights import read_tensors, write_tensors
from skipnet.training.config import StageName, TrainConfig, differences, from_dict, to_dict


class RunDirectory:
    """A directory of one run. Nothing in it is pickled; every file but the log is atomic.

    Args:
        path: The directory, which must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: Any = None
        self.results: dict[str, Any] = self._read_json("results.json") or {}
        if not _are_results(self.results):
            raise UserError(f"{path / 'results.json'} does not hold the results of stages")

    @staticmethod
    def create(config: TrainConfig, path: Path | None = None) -> "RunDirectory":
        """Make a new directory, `runs/<recipe>-<time>` unless named, and write the configuration.

        Raises:
            UserError: When a run is already there, or the directory cannot be made.
        """
        if path is None:
            name = f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
            path = Path("runs") / name
            while path.exists():  # Begun in the same second.
                path = path.with_name(f"{name}-{os.urandom(2).hex()}")
        RunDirectory.demand_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run directory {path}: {error.strerror}") from None
        run = RunDirectory(path)
        run.write_config(config)
        return run

    def write_config(self, config: TrainConfig) -> None:
        """Write the configuration that the run is to be resumed with."""
        self._write_json("config.json", to_dict(config))

    def record_environment(self) -> None:
        """Write versions, commit and hardware of the run's beginning, once."""
        if not (self.path / "environment.json").exists():
            self._write_json("environment.json", environment())

    @staticmethod
    def demand_new(path: Path) -> None:
        """Check that a directory holds no run yet.

        Raises:
            UserError: When it does.
        """
        if (path / "config.json").exists():
            raise UserError(
                f"{path} already holds a run: continue it with --resume {path}, or name another "
                "directory with --output"
            )

    @staticmethod
    def open(path: Path) -> tuple["RunDirectory", TrainConfig]:
        """Open the directory of a run, finished or not, and read its configuration.

        Raises:
            UserError: When there is no run.
        """
        if not path.is_dir():
            raise UserError(f"there is no run directory {path}")
        values = RunDirectory(path)._read_json("config.json")
        if values is None:
            raise UserError(f"{path} is no run directory: it has no config.json")
        return RunDirectory(path), from_dict(TrainConfig, values)

    def demand_same(self, config: TrainConfig) -> None:
        """Check that a resume asks for the configuration the run was started with.

        Raises:
            UserError: When it differs, with the fields that do.
        """
        saved = from_dict(TrainConfig, self._read_json("config.json") or {})
        fields = differences(saved, config)
        if fields:
            raise UserError(
                f"{self.path} was started with another {', '.join(fields)}: resume it unchanged "
                "(skipnet train --resume RUN alone does), or start a new run"
            )

    def model_path(self, stage: StageName | None = None) -> Path:
        """Return where the model of a stage is, or of the last finished one."""
        return self.path / f"{stage or 'model'}.safetensors"

    def finish_stage(self, stage: StageName, results: dict[str, Any]) -> None:
        """Record the results of a stage whose model file is written; drop its checkpoint."""
        write_atomically(self.model_path(), self.model_path(stage).read_bytes())
        self.results[stage] = results
        self._write_json("results.json", self.results)
        self._checkpoint.unlink(missing_ok=True)

    def finished(self, stage: StageName) -> bool:
        """Return whether a stage has come to its end."""
        return stage in self.results and self.model_path(stage).exists()

    def write_results(self) -> None:
        """Write `results` as they are now."""
        self._write_json("results.json", self.results)

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the training state atomically; the previous one survives a failure."""
        write_tensors(self._checkpoint, tensors, state)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training here; the lock goes with the process, however it ends.

        Raises:
            UserError: When another process trains here.
        """
        with open(self.path / "config.json", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training in {self.path}: wait for it, or stop it first"
                ) from None
            yield

    def sweep(self) -> None:
        """Remove what a run that was killed had begun to write."""
        for unfinished in self.path.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)

    def load_checkpoint(self, stage: StageName) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the training state of a stage in progress; None if there is none."""
        if not self._checkpoint.exists():
            return None
        tensors, state = read_tensors(self._checkpoint)
        return (tensors, state) if state["stage"] == stage else None

    def checkpoint_step(self, stage: StageName) -> int | None:
        """Return the step of a stage's checkpoint; None if there is none."""
        saved = self.load_checkpoint(stage)
        return None if saved is None else saved[1]["step"]

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    def open_tensorboard(self) -> None:
        """Write TensorBoard events beside metrics.jsonl from now on, if it is installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._events = SummaryWriter(str(self.path / "tensorboard"))

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and its numbers to the TensorBoard events."""
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        if self._events is not None:
            metrics = line | line.get("evaluation", {})
            for key, value in metrics.items():
                if isinstance(value, float):
                    kind = "test" if "evaluation" in line else "train"
                    self._events.add_scalar(f"{line['stage']}/{kind}/{key}", value, line["step"])

    def forget_after(self, stage: StageName, step: int) -> None:
        """Drop the log lines of a stage beyond a step: a resumed run writes them again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # The last line of a run that was killed may be cut short.
                continue
            if line["stage"] != stage or line["step"] <= step:
                kept.append(text + "\n")
        write_atomically(path, "".join(kept).encode())

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from None

    def _write_json(self, name: str, values: Any) -> None:
        write_atomically(self.path / name, (json.dumps(values, indent=2) + "\n").encode())


def _are_results(values: Any) -> bool:
    try:
        return all({"accuracy", "macs_fraction"} <= set(v["evaluation"]) for v in values.values())
    except (AttributeError, KeyError, TypeError):
        return False


def environment() -> dict[str, Any]:
    """Return versions, commit and hardware: what a figure needs beside it to mean anything."""
    packages = ("skipnet", "torch", "torchvision", "lightning-fabric", "datasets", "numpy")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "platform": platform.platform(),
    }


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with a mark if files were changed."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout, which says nothing of it.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
