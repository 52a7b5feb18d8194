"""Two processes with gloo on the CPU do what one does, and agree at every step."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import (
    Command,
    Preparation,
    Rank,
    Trap,
    assert_same_weights,
    flags,
    free_port,
    metrics,
    run_command,
    tiny_config,
    weights,
)
from torch import Tensor

from skipnet import TrainConfig
from skipnet.training.config import ModelConfig

BATCH = "skipnet.data.loaders:TrainLoader.batch"


def train(
    config: TrainConfig,
    folder: Path,
    *more: str | Path,
    before: Sequence[Sequence[Preparation]] = ((), ()),
    expected: int = 0,
) -> list[Command]:
    """Run `skipnet train` in as many processes as `before` has entries."""
    port = free_port()
    words = more or ("train", "digits", *flags(config), "--output", folder / "run")
    commands = [
        Command(words, folder, [Rank(rank, len(before), port), *own], name=f"{folder.name}{rank}-")
        for rank, own in enumerate(before)
    ]
    codes = [command.wait() for command in commands]
    assert codes == [expected] * len(before), "\n".join(command.stderr for command in commands)
    return commands


def assert_same_numbers(one: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a.pop("stage") == b.pop("stage")
        for line in (a, b):  # Of the images of one process: the mean is not that of all.
            line.pop("information", None)
        assert a == pytest.approx(b, rel=tolerance)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_same_curve_as_one_process(tmp_path: Path, accumulate: int) -> None:
    """Without batch norm, which sees only the images of its own process."""
    config = tiny_config(stages=("dense", "sp"), log_every=1, checkpoint_seconds=1000)
    config.model.name = "tiny_plain"
    config.dense.accumulate = config.sp.accumulate = accumulate
    one = tmp_path / "one" / "run"
    run_command("train", "digits", *flags(config), "--output", one, folder=tmp_path / "one")
    train(config, tmp_path / "two")
    two = tmp_path / "two" / "run"
    assert_same_numbers(two, one, 1e-4)
    for stage in ("dense", "sp"):
        alone_weights = weights(one / f"{stage}.safetensors")
        for name, tensor in weights(two / f"{stage}.safetensors").items():
            torch.testing.assert_close(tensor, alone_weights[name], rtol=1e-4, atol=1e-5)
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for stage in ("dense", "sp"):
        evaluations = [result[stage]["evaluation"] for result in results]
        assert evaluations[1]["macs"] == pytest.approx(evaluations[0]["macs"], rel=0.01)


@dataclass(frozen=True)
class Uneven:
    """Runs block 1 on rank 0 alone, block 2 nowhere, the others as sampled; records alpha."""

    folder: Path

    def set(self) -> None:
        from skipnet.routing.decisions import Sample
        from skipnet.tasks.hybrid import Hybrid

        rank = int(os.environ["RANK"])
        sample, step = Sample.__call__, Hybrid.__call__

        @functools.wraps(sample)
        def uneven(self: Sample, logit: Tensor, index: int, training: bool) -> Tensor:
            g = sample(self, logit, index, training)
            runs = {0: 1 - rank, 1: 0}
            return torch.full_like(g, runs[index]) if training and index in runs else g

        @functools.wraps(step)
        def recorded(self: Hybrid, *arguments: Any) -> dict[str, Tensor]:
            result = step(self, *arguments)
            with open(Path(self_folder) / f"alpha{rank}", "a") as file:
                file.write(f"{self.alpha!r}\n")
            return result

        self_folder = self.folder
        Sample.__call__ = uneven  # type: ignore[method-assign]
        Hybrid.__call__ = recorded  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("model", "baseline", "samples", "accumulate"),
    [
        ("tiny_plain", "batch-mean", 1, 1),
        ("tiny_resnet", "greedy", 1, 2),
        ("tiny_resnet", "leave-one-out", 2, 1),
    ],
)
def test_blocks_that_one_process_does_not_run(
    tmp_path: Path, model: str, baseline: Any, samples: int, accumulate: int
) -> None:
    """No process waits for a gradient that another one has not, and all drive the same alpha."""
    config = tiny_config(stages=("hrl",), log_every=1)
    config.model.name = model
    config.hrl = replace(
        config.hrl, baseline=baseline, samples=samples, accumulate=accumulate, target_compute=0.5
    )
    train(config, tmp_path, before=[[Uneven(tmp_path)], [Uneven(tmp_path)]])
    alphas = [(tmp_path / f"alpha{rank}").read_text().split() for rank in (0, 1)]
    assert alphas[0] == alphas[1]
    assert len(alphas[0]) == 6 * accumulate
    assert len(set(alphas[0])) > 1
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    logged = [float(alpha) for alpha in alphas[0][accumulate - 1 :: accumulate]]
    if accumulate == 1:  # a line tells what its step was done with
        settled = [0.0, 0.0, 0.0]
        assert [line["alpha"] for line in lines[1:]] == pytest.approx([*logged[:2], *settled])


@pytest.mark.parametrize("decide", ["sample", "threshold"])
def test_gates_that_do_not_learn(tmp_path: Path, decide: Any) -> None:
    """No process waits for the gradient of gates that decide, and have none."""
    config = tiny_config(stages=("sp",))
    config.sp = replace(config.sp, decide=decide)
    train(config, tmp_path)
    before, after = (line["loss"] for line in metrics(tmp_path / "run"))
    assert before != after


@dataclass(frozen=True)
class SlowClock:
    """A process whose time hardly passes."""

    def set(self) -> None:
        from skipnet.training import loop

        loop.time = SimpleNamespace(monotonic=lambda: time.monotonic() * 1e-9)  # type: ignore[assignment]


def test_processes_whose_clocks_differ(tmp_path: Path) -> None:
    """When it is time to save must not depend on the process."""
    config = tiny_config(stages=("sp",), checkpoint_seconds=1e-6)
    train(config, tmp_path, before=[[], [SlowClock()]])
    train(config, tmp_path / "other", before=[[SlowClock()], []])
    assert_same_weights(tmp_path / "run/sp.safetensors", tmp_path / "other/run/sp.safetensors")


def test_one_process_is_asked_to_stop(tmp_path: Path) -> None:
    """All stop at the same step; resumed, they end as if they had not."""
    config = tiny_config(stages=("sp", "hrl"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    # The terminal and torchrun both send the signal: the second one must not stop at once.
    trap = Trap(BATCH, 9, (signal.SIGINT, signal.SIGINT))
    for command in train(config, parts, before=[[], [trap]], expected=130):
        assert "stopped in stage hrl at step 2 of 6; continue with" in command.stderr
    train(config, parts, "train", "--resume", parts / "run")
    for stage in ("sp", "hrl"):
        name = f"run/{stage}.safetensors"
        assert_same_weights(whole / name, parts / name)
    assert_same_numbers(parts / "run", whole / "run", 1e-9)


def test_divergence_ends_all_processes(tmp_path: Path) -> None:
    config = tiny_config(stages=("dense",), log_every=2)
    config.dense = replace(config.dense, iterations=40, ema_decay=None)
    config.dense.optimizer.lr, config.dense.optimizer.clip_norm = 1e12, None
    for command in train(config, tmp_path, expected=2):
        assert "skipnet: error: stage dense diverged by step" in command.stderr


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "message"),
    [
        (15, 1, "cannot be split evenly over 2 processes"),
        (10, 10, "the 5 images of each of 2 processes cannot be split evenly into 10"),
    ],
)
def test_batch_that_cannot_be_split(
    tmp_path: Path, batch_size: int, accumulate: int, message: str
) -> None:
    config = tiny_config(stages=("dense",))
    config.dense = replace(config.dense, batch_size=batch_size, accumulate=accumulate)
    for command in train(config, tmp_path, expected=2):
        assert message in command.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # torchrun, twice
@pytest.mark.timeout(600)
def test_torchrun_and_interrupt(tmp_path: Path) -> None:
    """As README says it, with Ctrl-C as a terminal sends it: to all processes at once."""
    config = tiny_config(recipe="digits", stages=("sp",), model=ModelConfig(name="cifar_resnet20"))
    config.sp = replace(config.sp, iterations=1000)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, "-m", "skipnet.cli", "train"]
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    words = ["digits", *flags(config), "--output", str(tmp_path / "run")]
    with subprocess.Popen([*command, *words], **options) as process:
        try:
            deadline = time.monotonic() + 240
            while not (tmp_path / "run" / "checkpoint.safetensors").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "continue with: skipnet train --resume" in errors

    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    stored["sp"]["iterations"] = 2  # the rest of it would take too long
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    done = subprocess.run([*command, "--resume", "run"], **options, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "sp.safetensors").exists()
