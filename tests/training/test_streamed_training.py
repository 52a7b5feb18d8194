"""Training on images that worker processes decode: the numbers of a set in memory, no process left.

What is stopped, however and whenever, ends as if it had not been.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    Command,
    Rank,
    assert_same_run,
    flags,
    free_port,
    metrics,
    tiny_config,
    weights,
    write_cifar10,
    write_parquet,
)

from skipnet import TrainConfig
from skipnet.data.sources import DataConfig

TAKE = "skipnet.data.streaming:Ahead.take"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("data"), num_train=64, num_test=20, size=12)


def streamed(data: Path, **options: Any) -> TrainConfig:
    """All three stages, two epochs each, with an evaluation in between."""
    settings = {"stream": "always", "workers": 2, "padding": 2, "image_size": 8} | options
    config = tiny_config(data=DataConfig(name=str(data), **settings), evaluate_every=1)
    config.hrl.alpha_rate = 0.1
    return config


def train(config: TrainConfig, folder: Path, **options: Any) -> Command:
    words = ("train", "digits", *flags(config), "--output", folder / "run")
    return Command(words, folder, daemon=False, **options)


def finish(command: Command) -> Path:
    assert (command.wait(), command.stderr) == (0, "")
    return command.folder / "run"


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random-resized crops, decoded by two workers."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return finish(train(streamed(data, crop="random-resized"), folder))


@dataclass(frozen=True)
class Recorded:
    """Writes the pids of the process's children to a file, and sends it signals, at the n-th batch.

    Attributes:
        file: Where to.
        call: Which batch, from 1.
        signals: What to send.
    """

    file: Path
    call: int
    signals: tuple[int, ...]

    def set(self) -> None:
        from skipnet.data.streaming import Ahead

        take, calls = Ahead.take, 0

        def recorded(self_: Ahead, step: int) -> Any:
            nonlocal calls
            calls += 1
            batch = take(self_, step)
            if calls == self.call:
                pid = os.getpid()
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                self.file.write_text(children)
                for number in self.signals:
                    os.kill(pid, number)
            return batch

        Ahead.take = recorded  # type: ignore[method-assign]


def assert_gone(pids: list[int], seconds: float = 30) -> None:
    """A worker looks every five seconds whether its parent is there."""
    assert len(pids) == 2
    deadline = time.monotonic() + seconds
    while running := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"{running} are left"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def pids_in(file: Path) -> list[int]:
    return [int(word) for word in file.read_text().split()]


def test_a_streamed_run_is_the_run_in_memory(data: Path, tmp_path: Path) -> None:
    two = finish(train(streamed(data), tmp_path / "two"))
    assert_same_run(finish(train(streamed(data, workers=0), tmp_path / "none")), two)
    assert_same_run(finish(train(streamed(data, stream="never"), tmp_path / "memory")), two)
    lines = metrics(two, timings=True)
    assert all(line["images_per_s"] > 0 for line in lines if "loss" in line)


def test_random_resized_without_workers(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    config = streamed(data, crop="random-resized", workers=0)
    assert_same_run(finish(train(config, tmp_path)), uninterrupted)


@pytest.mark.parametrize("call", [2, 9, 16])
def test_killed_and_resumed(data: Path, uninterrupted: Path, tmp_path: Path, call: int) -> None:
    config = streamed(data, crop="random-resized")
    trap = Recorded(tmp_path / "pids", call, (signal.SIGKILL,))
    assert train(config, tmp_path, before=[trap]).wait() == -signal.SIGKILL
    assert_gone(pids_in(tmp_path / "pids"))
    again = ("train", "--resume", tmp_path / "run")
    resumed = Command(again, tmp_path, daemon=False, name="resumed-")
    assert (resumed.wait(), resumed.stderr) == (0, "")
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("signals", "said"),
    [
        ((signal.SIGINT,), "stopped in stage sp at step 2 of 6; continue with: "),
        ((signal.SIGTERM,), "stopped in stage sp at step 2 of 6; continue with: "),
        (
            (signal.SIGINT, signal.SIGINT),
            "stopped at once; continue from the last checkpoint with: ",
        ),
    ],
)
def test_asked_to_stop(data: Path, tmp_path: Path, signals: tuple[int, ...], said: str) -> None:
    config = streamed(data, crop="random-resized")
    command = train(config, tmp_path, before=[Recorded(tmp_path / "pids", 8, signals)])
    assert command.wait() == 130
    assert command.stderr == f"skipnet: {said}skipnet train --resume {tmp_path / 'run'}\n"
    assert_gone(pids_in(tmp_path / "pids"), seconds=5)


def test_a_bad_image_ends_the_run_in_one_line(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    write_parquet(bad / "train.parquet", [i % 10 for i in range(64)], bad_rows=[40])
    write_parquet(bad / "test.parquet", [i % 10 for i in range(20)], bad_rows=[3], seed=1)
    config = streamed(bad)
    command = train(config, tmp_path / "stop")
    assert command.wait() == 2
    assert command.stderr.startswith("skipnet: error: row 40 of ") and "skip" in command.stderr
    assert command.stderr.count("\n") == 1
    config.data.on_bad_image = "skip"
    command = train(config, tmp_path / "skip")
    assert command.wait() == 0
    warned = sorted(line.split(" of ")[0] for line in command.stderr.splitlines())
    assert warned == ["skipnet: warning: left out row 3", "skipnet: warning: left out row 40"]
    evaluated = Command(("evaluate", tmp_path / "skip/run"), tmp_path, daemon=False)
    assert evaluated.wait() == 0
    assert '"num_images": 19' in evaluated.stdout and "left out row 3 of" in evaluated.stderr


def test_two_processes_do_what_one_does(data: Path, tmp_path: Path) -> None:
    """Without batch norm; the test set, which they share, has a number of images that is odd."""
    write_parquet(tmp_path / "odd/train.parquet", [i % 10 for i in range(64)], size=12)
    write_parquet(tmp_path / "odd/test.parquet", [i % 10 for i in range(21)], size=12, seed=1)
    config = streamed(tmp_path / "odd", crop="random-resized")
    config.stages, config.model.name, config.log_every = ("dense", "sp"), "tiny_plain", 1
    one = finish(train(config, tmp_path / "one"))
    port, folder = free_port(), tmp_path / "two"
    both = [
        train(config, folder, before=[Rank(rank, 2, port)], name=f"{rank}-") for rank in range(2)
    ]
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    two = folder / "run"
    for stage in ("dense", "sp"):
        alone = weights(one / f"{stage}.safetensors")
        for name, tensor in weights(two / f"{stage}.safetensors").items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)
    evaluations = [line for line in metrics(two) if "evaluation" in line]
    assert evaluations and all(line["evaluation"]["num_images"] == 21 for line in evaluations)
    for a, b in zip(metrics(two), metrics(one), strict=True):
        if "evaluation" in a:
            a, b = a["evaluation"], b["evaluation"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["macs"] == pytest.approx(b["macs"], rel=0.05)
        else:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow  # starts of real processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_whole_group(data: Path, tmp_path: Path, number: int) -> None:
    """As a terminal's Ctrl-C, and as some job managers end a job: workers say nothing."""
    config = streamed(data, crop="random-resized")
    config.recipe, config.stages, config.model.name = "digits", ("sp",), "cifar_resnet20"
    config.sp.iterations = 100_000
    words = ["train", "digits", *flags(config), "--output", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-m", "skipnet.cli", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 200
            while not (tmp_path / "run" / "checkpoint.safetensors").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            pids = pids_in(Path(f"/proc/{process.pid}/task/{process.pid}/children"))
            os.killpg(process.pid, number)
            _, errors = process.communicate(timeout=100)
        finally:
            if process.poll() is None:
                process.kill()
    assert process.returncode == 130
    assert errors.startswith("skipnet: stopped in stage sp at step ")
    assert errors.count("\n") == 1
    assert_gone(pids, seconds=5)
