"""What a person sees: little in a file, a live line on a terminal, and a cursor at the end."""

import os
import pty
import re
import signal
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import Command, Preparation, Terminal, Trap, flags, run_command, tiny_config

from skipnet import TrainConfig
from skipnet.training.progress import _duration

BATCH = "skipnet.data.loaders:TrainLoader.batch"
LIVE = r"{stage} +step 3/6  \d+\.\d steps/s  ETA [\d:]+  loss -?\d+\.\d+  accuracy \d+\.\d %{keep}"


def small() -> TrainConfig:
    return tiny_config(evaluate_every=2 / (1437 // 16), checkpoint_seconds=1000)


def test_only_results_where_stdout_is_no_terminal(tmp_path: Path) -> None:
    words = ("train", "digits", *flags(small()), "--output", tmp_path / "run")
    lines = run_command(*words, folder=tmp_path).stdout.splitlines()
    number = r"\d+\.\d+ %"
    expected = []
    for stage in ("dense", "sp   ", "hrl  "):
        result = rf"test accuracy {number}  computation {number}  \(\d:\d\d"
        expected += [rf"{stage} step {step}/6  {result}\)" for step in (2, 4)]
        if stage == "hrl  ":  # Six steps are not enough for the target of 60 %.
            expected += [rf"{stage} ends at {number} of the dense .* --hrl.alpha-rate"]
        expected += [rf"{stage} finished  {result} in all\)"]
    for line, pattern in zip(lines, expected, strict=False):
        assert re.fullmatch(pattern, line)
    assert lines[len(expected)].strip() == "digits: tiny_resnet, gate rnn"
    assert len(lines) == len(expected) + 10
    assert "\x1b" not in "".join(lines)


def on_terminal(
    words: Sequence[str | Path], folder: Path, before: Sequence[Preparation] = ()
) -> tuple[Command, str]:
    """Run a command on a terminal and return what was drawn there."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    command = Command(words, folder, before=[Terminal(os.ttyname(terminal)), *before])
    drawn = b""
    # This end of the terminal stays open until the process has opened its own.
    while chunk := _read(controller, terminal, command):
        drawn += chunk
    os.close(controller)
    command.wait()
    return command, drawn.decode()


def _read(controller: int, terminal: int, command: Command) -> bytes:
    import select

    while True:
        ready, _, _ = select.select([controller], [], [], 0.05)
        if ready:
            return os.read(controller, 65536)
        if command.process.exitcode is not None:
            os.close(terminal)
            return b""


def test_live_line_on_a_terminal(tmp_path: Path) -> None:
    words = ("train", "digits", *flags(small()), "--output", tmp_path / "run")
    command, drawn = on_terminal(words, tmp_path)
    assert command.process.exitcode == 0, command.stderr
    for stage, keep in (("dense", ""), ("sp", r"  keep \d+\.\d %"), ("hrl", r"  keep \d+\.\d %")):
        assert re.search(LIVE.format(stage=stage, keep=keep), drawn), drawn
        assert re.search(rf"{stage} +finished  test accuracy", drawn)
    assert_cursor_is_shown(drawn)
    assert "Next: skipnet evaluate" in drawn


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGINT, signal.SIGINT)])
def test_cursor_comes_back_after_an_interrupt(tmp_path: Path, signals: tuple[int, ...]) -> None:
    words = ("train", "digits", *flags(small()), "--output", tmp_path / "run")
    command, drawn = on_terminal(words, tmp_path, [Trap(BATCH, 4, signals)])
    assert command.process.exitcode == 130
    assert "--resume" in command.stderr
    assert_cursor_is_shown(drawn)


def test_cursor_comes_back_after_a_mistake(tmp_path: Path) -> None:
    config = small()
    config.dense.optimizer.lr, config.dense.iterations = 1e12, 40
    config.dense.optimizer.clip_norm = None
    words = ("train", "digits", *flags(config), "--output", tmp_path / "run")
    command, drawn = on_terminal(words, tmp_path)
    assert command.process.exitcode == 2
    assert "diverged" in command.stderr
    assert_cursor_is_shown(drawn)


def assert_cursor_is_shown(drawn: str) -> None:
    hidden, shown = drawn.rfind("\x1b[?25l"), drawn.rfind("\x1b[?25h")
    assert -1 < hidden < shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
