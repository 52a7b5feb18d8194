"""What a person sees of a study's runs: a live bar a run, and a line an event."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from skipnet.studies.study import Child, Study

# Of the end of metrics.jsonl; a line has a few hundred bytes.
_TAIL_BYTES = 8192


class View:
    """Bars on a terminal; elsewhere a line when a run begins and when it ends.

    Args:
        console: Where to print.
        study: Whose runs to look at.
        total: Number of its runs.
        finished: How many of them are finished already.
    """

    def __init__(self, console: Console, study: Study, total: int, finished: int) -> None:
        self.console = console
        self._study = study
        self._total, self._finished = total, finished
        self._began: dict[str, float] = {}
        self._bars: dict[str, tuple[TaskID, Child]] = {}
        self._lock = threading.Lock()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=600,
        )

    def __enter__(self) -> "View":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def begun(self, child: Child) -> None:
        """Show a run that begins or goes on."""
        with self._lock:
            self._began[child.name] = time.monotonic()
            self._bars[child.name] = self._progress.add_task(child.name, total=1.0, note=""), child
        if not self.console.is_terminal:
            self.say(f"{child.name} begins, log in {self._study.path / child.name}.log")

    def ended(self, child: Child, success: bool) -> None:
        """Say how a run has ended, and take its bar away."""
        with self._lock:
            bar = self._bars.pop(child.name, None)
        if bar is not None:
            self._progress.remove_task(bar[0])
        if not success:
            self.say(f"{child.name} has not come to its end")
            return
        self._finished += 1
        seconds = time.monotonic() - self._began[child.name]
        run = self._study.finished(child)
        assert run is not None
        result = run.results[child.config.stages[-1]]["evaluation"]
        self.say(
            f"{child.name} finished ({self._finished} of {self._total})  test accuracy "
            f"{result['accuracy']:.2f} %  computation {100 * result['macs_fraction']:.1f} %  "
            f"({seconds / 60:.1f} min)"
        )

    def update(self) -> None:
        """Draw the bars again."""
        if self._progress.disable:
            return
        with self._lock:
            bars = list(self._bars.values())
        for task, child in bars:
            line = last_line(self._study.path / child.name / "metrics.jsonl")
            if line is not None:
                self._progress.update(task, completed=share_done(child, line), note=_note(line))


def share_done(child: Child, line: dict[str, Any]) -> float:
    """Return how much of its stages a run has done when it logs a line."""
    stage = child.config.stage(line["stage"])
    if stage.iterations is not None:
        done = line["step"] / stage.iterations
    else:
        assert stage.epochs is not None
        done = line["epoch"] / stage.epochs
    stages = child.config.stages
    return min(1.0, (stages.index(line["stage"]) + done) / len(stages))


def last_line(path: Path) -> dict[str, Any] | None:
    """Return the last whole line of training metrics; None if there is none yet."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            texts = file.read().splitlines()
    except OSError:
        return None
    for text in reversed(texts):
        try:
            line = json.loads(text)
        except ValueError:  # Cut at the beginning of what was read, or still being written.
            continue
        if isinstance(line, dict) and "loss" in line:
            return line
    return None


def _note(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.3f}"]
    for key, title, factor, unit in (
        ("accuracy", "accuracy", 100, " %"),
        ("macs_fraction", "computation", 100, " %"),
        ("alpha", "alpha", 1, ""),
    ):
        if key in line:
            parts.append(f"{title} {factor * line[key]:.{2 if unit == '' else 1}f}{unit}")
    return "  ".join(parts)
