"""The paper's CIFAR-10 table on one GPU, in pieces of a few minutes that go on where they stopped.

    python benchmarks/gpu/cifar10.py --data DATA --state STATE            # 8.5 minutes of it
    python benchmarks/gpu/cifar10.py --data DATA --state STATE --plan     # what is done
    python benchmarks/gpu/cifar10.py --data DATA --state STATE --timing   # images/s of every way
    python benchmarks/gpu/cifar10.py --state STATE --tiny                 # on a CPU, to try it

A piece is a training run: ResNet-110, -38 and -74, each SP, dense, and HRL from SP at several
targets. All there is lies in STATE, which may be moved between calls:

    timing.json          images/s, and the way of training that was chosen by them
    runs/seed0/sp-110/   a run directory a piece, and sp-110.log
    results/sp-110.json  a finished piece: configuration, environment, results, curve
"""

import dataclasses
import json
import math
import os
import signal
import statistics
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from lightning_fabric import Fabric
from rich.console import Console
from rich.table import Table

import skipnet
from skipnet import TrainConfig, UserError
from skipnet.data.loaders import TrainLoader
from skipnet.data.sources import ImageSet
from skipnet.files import write_atomically
from skipnet.studies.children import places, run_children
from skipnet.studies.study import Child, Study
from skipnet.studies.view import View
from skipnet.tasks.hybrid import Hybrid
from skipnet.tasks.supervised import Supervised
from skipnet.training.config import (
    HybridConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    StageName,
    SupervisedConfig,
    to_dict,
)
from skipnet.training.loop import StopRequest, build_optimizer, compile_network
from skipnet.training.run import RunDirectory, environment

Entry = dict[str, Any]
Precision = Literal["32-true", "bf16-mixed"]
Schedule = Literal["paper", "short"]

RESERVE_S = 30
"""Kept of the minutes for the checkpoints of what still runs, and for the processes to end."""

GRACE_S = 20
"""After which what has not ended by then is killed; its last checkpoint is a minute old at most."""

WORTH_IT = 1.1
"""How much faster bfloat16 must be than float32 to be chosen: it costs some accuracy."""

TIMING_S = 2.0
"""Seconds that each way of training is timed for."""

CURVE_LINES = 200
"""Lines of metrics that a result keeps, evaluations apart."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained.

    Attributes:
        depths: Of the ResNets, the most valuable first.
        targets: Shares of the dense multiply-adds, likewise.
        compile: Whether compiling is among the ways that are timed.
        accelerator: Where.
    """

    depths: tuple[int, ...]
    targets: tuple[float, ...]
    compile: bool
    accelerator: Literal["cpu", "cuda"]


FULL = Plan(
    depths=(110, 38, 74),
    targets=(0.4, 0.6, 0.5, 0.7, 0.3, 0.8),
    compile=True,
    accelerator="cuda",
)
TINY = Plan(depths=(20,), targets=(0.6,), compile=False, accelerator="cpu")


def main(
    *,
    state: Path,
    data: Path | None = None,
    minutes: float = 8.5,
    only: tuple[str, ...] = (),
    plan: bool = False,
    timing: bool = False,
    schedule: Schedule = "paper",
    targets: tuple[float, ...] = (),
    depths: tuple[int, ...] = (),
    way: Literal["auto", "eager", "compile"] = "auto",
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    jobs: int = 4,
    seed: int = 0,
    tiny: bool = False,
) -> None:
    """Train what is not trained yet, for a while.

    Args:
        state: The folder of all results; made if it is not there.
        data: Folder with CIFAR-10 as train.parquet and test.parquet.
        minutes: When to stop, with checkpoints, all included.
        only: Pieces to do, as --plan names them (dense-110, hrl-38-0.5); all if not given.
        plan: Print the pieces and what is done, and how long the rest will take; train nothing.
        timing: Time every way of training, for as long as --minutes allows; train nothing.
        schedule: paper (64k iterations dense and SP, 10k HRL) or short (16k and 6k, one cycle).
        targets: Of HRL, the most valuable first.
        depths: Of the networks, the most valuable first.
        way: eager, compile (dense and SP), or whichever was faster.
        precision: 32-true, bf16-mixed, or whichever was faster by a tenth.
        jobs: Pieces at once, sharing the GPU.
        seed: Of everything.
        tiny: A small network, generated images and a few steps on the CPU.
    """
    end = time.monotonic() + 60 * minutes - (0 if tiny else RESERVE_S)
    what = TINY if tiny else FULL
    what = replace(what, targets=targets or what.targets, depths=depths or what.depths)
    if not tiny and not plan and not torch.cuda.is_available():
        raise UserError("this needs a CUDA device; --tiny tries it on the CPU")
    if data is None:
        if not tiny:
            raise UserError("--data names the folder with train.parquet and test.parquet")
        data = state / "data"
        if not data.exists():
            generate(data)
    state.mkdir(parents=True, exist_ok=True)
    known = Timing(state / "timing.json")
    if timing or (not plan and not known.chosen):
        # Unless timing is all that is asked for, it shall take little of the minutes.
        limit = end if timing else min(end, time.monotonic() + 60 * minutes / 5)
        known.measure(what, end=limit)
        print(known.table(), end="")
    if timing:
        return
    if not known.chosen and not plan:
        known.choose(way, precision)

    children = [
        child
        for depth in what.depths
        for child in pieces(depth, what, known, schedule, data.resolve(), seed, tiny)
    ]
    names = [child.label for child in children]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"no piece is called {', '.join(unknown)}: they are {', '.join(names)}")
    study = Study(path=state / "runs", kind="sweep", config=children[0].config, settings={})
    if plan:
        Console(width=100).print(plan_table(study, children, known))
        return
    wanted = with_what_they_start_from(children, only)
    with StopRequest(), study.locked():
        find_data(study, wanted)
        over = threading.Event()
        watch = threading.Thread(target=stop_myself, args=(end, over), daemon=True)
        watch.start()
        try:
            done = [child for child in wanted if study.finished(child)]
            result = run_children(
                study,
                wanted if end > time.monotonic() else [],
                environments=places(wanted[0].config, jobs),
                view=View(Console(width=100), study, len(wanted), len(done)),
                finished=lambda: collect(study, wanted, state / "results"),
            )
        finally:
            over.set()
            watch.join()
    collect(study, wanted, state / "results")
    for failure in result.failures:
        print(f"{failure.name} failed:\n{failure.text}")
    left = [child.label for child in wanted if not study.finished(child)]
    print(f"Left: {', '.join(left)}" if left else "Nothing is left.")
    if result.failures:
        raise UserError(f"{len(result.failures)} of {len(wanted)} pieces failed")


# Pieces


def pieces(
    depth: int,
    what: Plan,
    timing: "Timing",
    schedule: Schedule,
    data: Path,
    seed: int,
    tiny: bool,
) -> list[Child]:
    """Return the runs of a network: SP, which HRL waits for, then dense, then HRL."""
    base = skipnet.recipe("cifar10-resnet110-rnn" if depth >= 110 else "cifar10-resnet38-rnn")
    base = replace(
        base,
        recipe=f"cifar10-resnet{depth}-rnn-{schedule}",
        model=replace(base.model, name=f"cifar_resnet{depth}"),
        data=replace(base.data, name=str(data)),
        hrl=hybrid(10_000, weight_decay=1e-4),
        seed=seed,
        accelerator=what.accelerator,
        precision=timing.chosen.get("precision", "32-true"),
        log_every=100,  # Numbers for the log are waited for.
        evaluate_every=10.0,
        tensorboard=False,
    )
    if schedule == "short":
        optimizer = OptimizerConfig(lr=0.2, nesterov=True, weight_decay=5e-4, clip_norm=5.0)
        one_cycle = ScheduleConfig(name="one-cycle")
        length: Entry = {"iterations": 16_000, "optimizer": optimizer, "schedule": one_cycle}
        base = replace(
            base,
            dense=StageConfig(**length),
            sp=SupervisedConfig(**length),
            hrl=hybrid(6_000, weight_decay=5e-4),
        )
    if tiny:
        short = {"iterations": 6, "batch_size": 8}
        base = replace(
            base,
            dense=replace(base.dense, **short),
            sp=replace(base.sp, **short),
            hrl=replace(base.hrl, **short),
            log_every=2,
        )

    def child(stage: StageName, label: str, config: TrainConfig, after: str | None = None) -> Child:
        compiled = stage != "hrl" and timing.chosen.get("way") == "compile"
        config = replace(config, stages=(stage,), compile=compiled)
        return Child(name=f"seed{seed}/{label}", label=label, config=config, after=after)

    sp = child("sp", f"sp-{depth}", base)
    return [
        sp,
        child("dense", f"dense-{depth}", base),
        *(
            child(
                "hrl",
                f"hrl-{depth}-{target}",
                replace(base, hrl=replace(base.hrl, target_compute=target)),
                sp.name,
            )
            for target in what.targets
        ),
    ]


def hybrid(iterations: int, weight_decay: float) -> HybridConfig:
    """HRL from an SP network whose learning rate has come down: up again a little, and down."""
    optimizer = OptimizerConfig(
        lr=0.02, gate_lr=0.1, nesterov=True, weight_decay=weight_decay, clip_norm=5.0
    )
    return HybridConfig(
        iterations=iterations,
        optimizer=optimizer,
        schedule=ScheduleConfig(name="one-cycle", peak=0.05),
        alpha=0.0,
        target_ramp=0.4,
        estimator="flip",
        diversity=0.1,
    )


def with_what_they_start_from(children: list[Child], only: tuple[str, ...]) -> list[Child]:
    """Return the children of these labels, all if there are none, and what they wait for."""
    labels = set(only) or {child.label for child in children}
    names = {child.name for child in children if child.label in labels}
    names |= {child.after for child in children if child.name in names and child.after}
    return [child for child in children if child.name in names]


def find_data(study: Study, children: list[Child]) -> None:
    """Let runs that have begun know where the data are now: they may have been moved."""
    for child in children:
        path = study.path / child.name / "config.json"
        if not path.exists():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        config["data"]["name"] = child.config.data.name
        if child.after is not None:
            config["start"] = str(study.path / child.after)
        write_atomically(path, (json.dumps(config, indent=2) + "\n").encode())


def stop_myself(end: float, over: threading.Event) -> None:
    """Do as Ctrl-C does at `end`, and again where a child does not come to rest: it may compile."""
    for moment in (end, end + GRACE_S):
        if over.wait(max(0, moment - time.monotonic())):
            return
        os.kill(os.getpid(), signal.SIGTERM)


def collect(study: Study, children: list[Child], folder: Path) -> None:
    """Write the JSON of every finished piece, and drop what resuming does not need."""
    folder.mkdir(exist_ok=True)
    for child in children:
        run = study.finished(child)
        out = folder / f"{child.label}.json"
        if run is None or out.exists():
            continue
        run.model_path().unlink(missing_ok=True)  # The same as its stage's.
        config = to_dict(child.config)
        config["data"]["name"] = child.config.data.name.rpartition("/")[2]
        result = {
            "piece": child.label,
            "config": config,
            "seed": child.config.seed,
            "environment": json.loads((run.path / "environment.json").read_text(encoding="utf-8")),
            "results": run.results,
        }
        write_atomically(out, (json.dumps(result | curve_of(run), indent=1) + "\n").encode())


def curve_of(run: RunDirectory) -> Entry:
    """Return the median images/s of training, and a curve of not too many lines."""
    text = (run.path / "metrics.jsonl").read_text(encoding="utf-8")
    steps, curve = [], []
    for line in map(json.loads, text.splitlines()):
        if "evaluation" in line:
            result = line.pop("evaluation")
            line |= {key: result[key] for key in ("accuracy", "macs_fraction", "blocks_fraction")}
            curve.append(line)
        else:
            steps.append(line)
    rates = [line["images_per_s"] for line in steps]
    curve += steps[:: math.ceil(len(steps) / CURVE_LINES)]
    curve.sort(key=lambda line: line["step"])
    rounded = [
        {key: round(x, 5) if isinstance(x, float) else x for key, x in line.items()}
        for line in curve
    ]
    return {"train_images_per_s": round(statistics.median(rates), 1), "curve": rounded}


def plan_table(study: Study, children: list[Child], timing: "Timing") -> Table:
    """Return the pieces: what is done, and about how long the rest takes, one at a time."""
    table = Table("piece", "state", "minutes left")
    for child in children:
        (stage,) = child.config.stages
        total = child.config.stage(stage).iterations
        assert total is not None
        run, step = study.finished(child), 0
        path = study.path / child.name
        if run is None and (path / "config.json").exists():
            step = RunDirectory.open(path)[0].checkpoint_step(stage) or 0
        left = "" if run else timing.minutes(child.config, stage, total - step)
        table.add_row(child.label, "done" if run else f"step {step} of {total}", left)
    return table


# Timing


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of training that is timed.

    Attributes:
        depth: Of the network.
        stage: Which objective.
        compiled: Whether it is compiled.
        precision: Of the arithmetic.
    """

    depth: int
    stage: StageName
    compiled: bool
    precision: Precision


class Timing:
    """Images/s of each way of training, and what was chosen by them.

    Args:
        path: The JSON file, read if it is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Entry = {"rows": [], "chosen": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))

    @property
    def chosen(self) -> Entry:
        """The way and the precision of all pieces; empty before there is a choice."""
        return self.content["chosen"]

    def measure(self, what: Plan, *, end: float) -> None:
        """Time what is not timed yet, the quickest to prepare first, until `end`."""
        self.content["environment"] = environment()
        images = random_images(50_000 if what.accelerator == "cuda" else 256, 32)
        images = images.to(what.accelerator)
        for way in ways(what):
            if any(self._is(row, way) for row in self.content["rows"]):
                continue
            if time.monotonic() > end:
                break
            try:
                row = time_way(way, images, what.accelerator)
            except Exception as error:  # Of the compiler, or out of memory: the others may do.
                row = {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            self.content["rows"].append(dataclasses.asdict(way) | row)
            self._write()

    def choose(
        self,
        way: Literal["auto", "eager", "compile"],
        precision: Literal["auto", "32-true", "bf16-mixed"],
    ) -> None:
        """Fix how all pieces are trained: a run cannot change it midway."""
        if precision == "auto":
            gain = self._gain("precision", "bf16-mixed", "32-true")
            precision = "bf16-mixed" if gain > WORTH_IT else "32-true"
        if way == "auto":
            way = "compile" if self._gain("compiled", True, False) > 1 else "eager"
        self.content["chosen"] = {"way": way, "precision": precision}
        self._write()
        print(f"All pieces: {way}, {precision}")

    def minutes(self, config: TrainConfig, stage: StageName, steps: int) -> str:
        """Return about how long steps take; empty if nothing like it was timed."""
        depth = int(config.model.name.removeprefix("cifar_resnet"))
        rows = [
            row
            for row in self._timed()
            if (row["stage"], row["precision"]) == (stage, config.precision)
            and row["compiled"] == config.compile
        ]
        if not rows:
            return ""
        # The nearest depth, scaled: time goes with the number of blocks.
        row = min(rows, key=lambda row: abs(row["depth"] - depth))
        seconds = steps * row["step_ms"] / 1e3 * depth / row["depth"] + row["prepare_s"]
        return f"{seconds / 60:.1f}"

    def table(self) -> str:
        """Return the rows for the eye."""
        lines = []
        for row in self.content["rows"]:
            name = f"ResNet-{row['depth']:<4}{row['stage']:6}"
            name += f"{'compile' if row['compiled'] else 'eager':8}{row['precision']:11}"
            if "step_ms" in row:
                name += f"{row['images_per_s']:9,.0f} images/s  {row['step_ms']:8.2f} ms a step"
                name += f"  {row['prepare_s']:6.1f} s to prepare"
            lines.append(f"{name}{row.get('note', '')}\n")
        return "".join(lines)

    def _timed(self) -> list[Entry]:
        return [row for row in self.content["rows"] if "step_ms" in row]

    def _gain(self, field: str, new: Any, old: Any) -> float:
        """How many times as fast dense and SP are for another value of a field; 0 if unknown."""
        rates = {
            tuple(row[key] for key in ("depth", "stage", "compiled", "precision")): row
            for row in self._timed()
        }
        gains = []
        for row in rates.values():
            if row[field] != new or row["stage"] == "hrl":
                continue
            other = row | {field: old}
            key = tuple(other[key] for key in ("depth", "stage", "compiled", "precision"))
            if key in rates:
                gains.append(row["images_per_s"] / rates[key]["images_per_s"])
        return statistics.geometric_mean(gains) if gains else 0.0

    def _write(self) -> None:
        write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())

    @staticmethod
    def _is(row: Entry, way: Way) -> bool:
        return all(row[key] == value for key, value in dataclasses.asdict(way).items())


def ways(what: Plan) -> list[Way]:
    """Return what is timed: eager takes 20 seconds in all, compiling may take minutes."""
    stages: tuple[StageName, ...] = ("dense", "sp", "hrl")
    precisions: tuple[Precision, ...] = ("32-true", "bf16-mixed")
    depths = sorted(set(what.depths) & {38, 110}) or list(what.depths)
    eager = [
        Way(depth=depth, stage=stage, compiled=False, precision=precision)
        for depth in depths
        for precision in precisions
        for stage in stages
    ]
    compiled = [
        Way(depth=depth, stage=stage, compiled=True, precision=precision)
        for depth in depths
        for precision in precisions
        for stage in stages[:2]
    ]
    return eager + (compiled if what.compile else [])


def time_way(way: Way, images: ImageSet, device: str) -> Entry:
    """Time steps as the loop makes them, loader included, with half of the blocks run in HRL."""
    fabric = Fabric(accelerator=device, devices=1, precision=way.precision)
    batch_size = 128 if device == "cuda" else 8
    loader = TrainLoader(
        images,
        batch_size=batch_size,
        seed=0,
        padding=4,
        flip=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    network = skipnet.create(
        f"cifar_resnet{way.depth}", gate=None if way.stage == "dense" else "rnn"
    )
    network.to(fabric.device, memory_format=torch.channels_last).train()
    task = Hybrid() if way.stage == "hrl" else Supervised()
    if network.gate is not None:
        network.gate.set_keep_(0.5 if way.stage == "hrl" else 0.9)
    optimizer = build_optimizer(network, OptimizerConfig(lr=1e-6))  # Half of them to the end.
    module = compile_network(network, fabric.device) if way.compiled else network
    model, optimizer = fabric.setup(module, optimizer)

    def step(number: int) -> None:
        pixels, labels = loader.batch(number)
        metrics = task(model, pixels.to(memory_format=torch.channels_last), labels, number)
        fabric.backward(metrics["loss"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The compiler's own.
        for number in range(5):  # A CUDA graph is recorded in the third.
            step(number)
    wait()
    prepare_s = time.monotonic() - start
    seconds = TIMING_S if device == "cuda" else 0.0
    done, start = 0, time.monotonic()
    while done == 0 or time.monotonic() - start < seconds:
        for _ in range(10 if device == "cuda" else 1):
            step(done)
            done += 1
        wait()
    step_s = (time.monotonic() - start) / done
    return {
        "images_per_s": round(batch_size / step_s, 1),
        "step_ms": round(1e3 * step_s, 3),
        "prepare_s": round(prepare_s, 1),
    }


# Images to try it with


def random_images(count: int, size: int) -> ImageSet:
    """Return images of noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 10
    return ImageSet(pixels, labels, tuple(map(str, range(10))))


def generate(folder: Path) -> None:
    """Write images of noise as CIFAR-10 is stored."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir(parents=True)
    for split, count in (("train", 64), ("test", 20)):
        images = random_images(count, 16)
        encoded = []
        for pixels in images.images.permute(0, 2, 3, 1).numpy():
            stream = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
            encoded.append({"bytes": stream.getvalue(), "path": None})
        table = pa.table({"img": encoded, "label": images.labels.tolist()})
        pq.write_table(table, folder / f"{split}.parquet")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        raise SystemExit(f"cifar10.py: error: {error}") from None
