"""The time of a training step: dense against SP against HRL with half of the blocks, compacted.

    python benchmarks/training.py measure --out benchmarks/training_<hardware>_<date>.json
    python benchmarks/training.py profile --model cifar_resnet110 --stage hrl

A step is what the loop does with a batch: objective, backward and optimizer. The stages take turns
in one process, so ratios within a case hold whatever else the machine does. The file is written
after every case (a network and a number of threads), and the same command adds those it lacks.
"""

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import skipnet
from skipnet import SkipNet, UserError
from skipnet.files import write_atomically
from skipnet.tasks.budget import Budget
from skipnet.tasks.hybrid import Hybrid
from skipnet.tasks.supervised import Supervised
from skipnet.tasks.task import Task
from skipnet.training.config import OptimizerConfig
from skipnet.training.loop import build_optimizer
from skipnet.training.run import environment

Stage = Literal["dense", "sp", "hrl"]
STAGES: tuple[Stage, ...] = ("dense", "sp", "hrl")
TARGETS = {"sp": 1.15, "hrl": 0.80}
"""What a step may take of the dense one, at most: the aims."""

WARM_UP = 2
PAUSE_SECONDS = 0.01
"""Between turns with several threads: those of the stage before wait for more work by spinning."""


def measure(
    *,
    out: Path,
    models: tuple[str, ...] = ("cifar_resnet38", "cifar_resnet110"),
    threads: tuple[int, ...] = (1, 2),
    batch_size: int = 128,
    image_size: int = 32,
    keep: float = 0.5,
    turns: int = 15,
    seed: int = 0,
) -> None:
    """Time a step of every stage, taking turns, and write one file.

    Args:
        out: The JSON file; cases that it has are not timed again.
        models: Networks, all with recurrent gates in SP and HRL.
        threads: Numbers of threads; those the process has no cores for are left out.
        batch_size: Images a step.
        image_size: Their height and width.
        keep: Probability with which a row runs a gated block in HRL.
        turns: Of each stage.
        seed: Of weights, images and decisions.
    """
    if not 0 < keep < 1:
        raise UserError(f"keep must lie between 0 and 1, not {keep}")
    settings = {"batch_size": batch_size, "image_size": image_size, "keep": keep, "seed": seed}
    # Once, before the file that is written makes the working tree a changed one.
    here = environment()
    kept: dict[str, Any] = {"environment": here, "settings": settings, "cases": []}
    if out.exists():
        kept = json.loads(out.read_text(encoding="utf-8"))
        if (kept["environment"]["commit"], kept["settings"]) != (here["commit"], settings):
            raise UserError(f"{out} is of another commit or other settings: name another file")
    done = {(case["model"], case["threads"]) for case in kept["cases"]}
    cores = len(os.sched_getaffinity(0))
    for case in ((model, number) for number in threads for model in models):
        if case in done:
            continue
        if case[1] > cores:
            print(f"{case[0]}: {case[1]} threads need as many cores, and there are {cores}")
            continue
        # A process each: what one leaves in memory or in thread pools is not the next one's.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            result = pool.submit(time_case, *case, turns=turns, **settings).result()
        kept["cases"].append(result)
        write_atomically(out, (json.dumps(kept, indent=1) + "\n").encode())
        print(summary(result), flush=True)


def profile(
    *,
    model: str = "cifar_resnet38",
    stage: Stage = "hrl",
    threads: int = 1,
    batch_size: int = 128,
    keep: float = 0.5,
    steps: int = 3,
    rows: int = 25,
    seed: int = 0,
) -> None:
    """Print where the time of a stage's step goes, by operator.

    Args:
        model: The network.
        stage: Which stage's step.
        threads: Number of threads.
        batch_size: Images a step.
        keep: Probability with which a row runs a gated block in HRL.
        steps: How many to profile, after one that warms up.
        rows: Lines of the table.
        seed: Of weights, images and decisions.
    """
    torch.set_num_threads(threads)
    step = steps_of(model, batch_size, 32, keep, seed)[stage]
    step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for number in range(steps):
            step(number)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows))


def time_case(
    model: str,
    threads: int,
    *,
    batch_size: int,
    image_size: int,
    keep: float,
    seed: int,
    turns: int,
) -> dict[str, Any]:
    """Return the times of every stage's step, taking turns."""
    torch.set_num_threads(threads)
    steps = steps_of(model, batch_size, image_size, keep, seed)
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    cpu_times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    kept = []
    for turn in range(WARM_UP + turns):
        for stage, step in steps.items():
            if threads > 1:
                time.sleep(PAUSE_SECONDS)
            start, cpu_start = time.perf_counter(), time.process_time()
            metrics = step(turn)
            if turn >= WARM_UP:
                times[stage].append(time.perf_counter() - start)
                cpu_times[stage].append(time.process_time() - cpu_start)
                if stage == "hrl":
                    kept.append((metrics["keep_rate"].item(), metrics["macs_fraction"].item()))
    keep_rate, macs_fraction = (statistics.mean(column) for column in zip(*kept, strict=True))
    rows = []
    for stage, taken in times.items():
        row: dict[str, Any] = {"stage": stage, "median_s": statistics.median(taken)}
        quartiles = statistics.quantiles(taken, n=4, method="inclusive")
        row |= {"quartiles_s": [quartiles[0], quartiles[2]], "min_s": min(taken)}
        row["images_per_s"] = batch_size / row["median_s"]
        row["ratio_to_dense"] = ratio(taken, times["dense"])
        # Without the time that other processes had the core.
        row["cpu_ratio_to_dense"] = ratio(cpu_times[stage], cpu_times["dense"])
        row["target"] = TARGETS.get(stage)
        rows.append(row)
    return {
        "model": model,
        "threads": threads,
        "turns": turns,
        "keep_rate": keep_rate,
        "macs_fraction": macs_fraction,
        "stages": rows,
    }


def ratio(times: list[float], base: list[float]) -> float:
    """Return the median ratio, turn by turn: what slows the machine for seconds slows both."""
    return statistics.median(one / other for one, other in zip(times, base, strict=True))


def steps_of(
    model: str, batch_size: int, image_size: int, keep: float, seed: int
) -> dict[Stage, Callable[[int], dict[str, Tensor]]]:
    """Return a function for each stage that makes one step, given its number."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch_size,), generator=generator)
    # Only its cost matters: alpha may go wherever it wants.
    budget = Budget(target=keep, ramp_steps=1, rate=0.05, damping=10.0)
    tasks: dict[Stage, Task] = {
        "dense": Supervised(),
        "sp": Supervised(),
        "hrl": Hybrid(budget=budget, seed=seed),
    }
    steps = {}
    for stage, task in tasks.items():
        torch.manual_seed(seed)
        network = skipnet.create(model, gate=None if stage == "dense" else "rnn")
        network.to(memory_format=torch.channels_last).train()
        if stage == "hrl":
            hold_keep_rate(network, keep)
        steps[stage] = step_of(network, task, images, labels)
    return steps


def step_of(
    network: SkipNet, task: Task, images: Tensor, labels: Tensor
) -> Callable[[int], dict[str, Tensor]]:
    """Return a function that does what the loop does with a batch."""
    optimizer = build_optimizer(network, OptimizerConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # The same arithmetic, and the keep rate stays.

    def step(number: int) -> dict[str, Tensor]:
        metrics = task(network, images, labels, number)
        metrics["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return metrics

    return step


def hold_keep_rate(network: SkipNet, keep: float) -> None:
    """Let every recurrent gate say `keep`, whatever it sees."""
    project = network.gate.project
    torch.nn.init.zeros_(project.weight)
    torch.nn.init.constant_(project.bias, math.log(keep / (1 - keep)))


def summary(case: dict[str, Any]) -> str:
    """Return a case's line for the eye."""
    parts = [f"{case['model']}, {case['threads']} thread(s), keep {case['keep_rate']:.3f}:"]
    for row in case["stages"]:
        parts.append(
            f"{row['stage']} {1e3 * row['median_s']:.0f} ms ({row['ratio_to_dense']:.3f}, "
            f"of CPU time {row['cpu_ratio_to_dense']:.3f})"
        )
    return "  ".join(parts)


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"measure": measure, "profile": profile})
    except UserError as error:
        raise SystemExit(f"training.py: error: {error}") from None
