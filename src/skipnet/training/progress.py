"""What a person sees of a run: one live line a stage, and a line an evaluation."""

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from skipnet.analysis.evaluate import Evaluation

REFRESH_SECONDS = 0.5


class Progress:
    """A live line on a terminal; evaluations only where stdout is none.

    Args:
        console: Where to print.
        enabled: False prints nothing at all, as on all processes but the first.
    """

    def __init__(self, console: Console, *, enabled: bool = True) -> None:
        self.console = console
        self.enabled = enabled
        self._live: Live | None = None
        self._name = ""
        self._first = self._total = 0
        self._started = self._refreshed = 0.0

    def start(self, name: str, first: int, total: int) -> None:
        """Begin a stage of `total` steps at step `first`."""
        self._name, self._first, self._total = name, first, total
        self._started = time.monotonic()
        self._refreshed = 0.0
        self.stop()
        if self.enabled and sys.stdout.isatty():
            self._live = Live(console=self.console, transient=True, auto_refresh=False)
            self._live.start()

    def doing(self, text: str) -> None:
        """Draw the live line while there are no steps: what takes a while after them."""
        if self._live is not None:
            self._live.update(Text(text), refresh=True)

    def due(self) -> bool:
        """Whether the live line is old enough to be drawn again."""
        return self._live is not None and time.monotonic() - self._refreshed >= REFRESH_SECONDS

    def update(self, step: int, means: dict[str, float]) -> None:
        """Draw the live line after a step, with the metrics since the last log line."""
        if self._live is None:
            return
        self._refreshed = time.monotonic()
        elapsed = self._refreshed - self._started
        rate = (step - self._first) / elapsed if elapsed > 0 else 0.0
        left = (self._total - step) / rate if rate else 0.0
        parts = [
            f"{self._name:5s} step {step}/{self._total}",
            f"{rate:.1f} steps/s",
            f"ETA {_duration(left)}",
            f"loss {means['loss']:.3f}",
            f"accuracy {100 * means['accuracy']:.1f} %",
        ]
        if "keep_rate" in means:
            parts.append(f"keep {100 * means['keep_rate']:.1f} %")
        self._live.update(Text("  ".join(parts)), refresh=True)

    def evaluated(self, step: int, total: int, result: Evaluation) -> None:
        """Print the result of an evaluation after a step."""
        if self.enabled:
            self.console.print(
                f"{self._name:5s} step {step}/{total}  test accuracy {result.accuracy:.2f} %  "
                f"computation {100 * result.macs_fraction:.1f} %  "
                f"({_duration(time.monotonic() - self._started)})",
                highlight=False,
            )

    def finished(self, name: str, result: Evaluation, seconds: float) -> None:
        """Print the result of a whole stage, and end its live line."""
        self.stop()
        if self.enabled:
            self.console.print(
                f"{name:5s} finished  test accuracy {result.accuracy:.2f} %  "
                f"computation {100 * result.macs_fraction:.1f} %  ({_duration(seconds)} in all)",
                highlight=False,
            )

    def note(self, text: str) -> None:
        """Print what the user should know of a result."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
