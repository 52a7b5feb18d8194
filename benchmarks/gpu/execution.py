"""Skipping in real time on one GPU, against the best dense engine: ResNet-110 and ResNet-101.

    python benchmarks/gpu/execution.py --out benchmarks/gpu/execution_<hardware>_<date>.json
    python benchmarks/gpu/execution.py --out FILE --tiny  # small networks on the CPU, to try it

Weights are fresh and decisions are drawn; the gates are computed all the same. A time runs from the
call to the end of the last kernel, images already on the device. The file is written after every
case (a network and a batch size), and the same command again adds the cases it lacks.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import skipnet
from skipnet import SkipNet, UserError
from skipnet.analysis.benchmark import hardware, settle, versions
from skipnet.files import write_atomically
from skipnet.seeding import sub_seed

# In the order in which they are prepared: the most valuable first, since time may run out.
ENGINES = (
    "masked",
    "compacted",
    "dense-torch",
    "dense-graph",
    "pruned-graph",  # The dense network without the skipped blocks: a bound for batch 1.
    "dense-compile",
    "dense-compile-graph",
    "masked-compile",
    "bound",  # The best dense engine's time × the share of multiply-adds executed.
)

OUT_OF_TIME = "out of time"
RESERVE = 0.05
"""Share of the minutes that is kept for what takes longer than foreseen."""

WARM_UP = 3
MIN_TURNS = 5
SEED_TAG = 7002

TOLERANCES = {"cpu": {"32": 1e-4, "bf16": 0.1}, "cuda": {"32": 0.02, "bf16": 0.1}}
"""How far a row's logits may lie from those of masked execution, as a share of their length.

On these networks bfloat16 is up to 0.04 off float32, TF32 has 3 bits more, and the logits of two
rows are 0.12 and more apart.
"""

# Logits, decisions, and the gates' logits, which a compiler would otherwise leave out.
Output = tuple[Tensor, Tensor, Tensor]
Run = Callable[[], Output]
Entry = dict[str, Any]
Key = tuple[str, int]  # A case: name of the network, batch size.


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is timed.

    Attributes:
        networks: Name, image size and number of classes.
        batch_sizes: The most valuable first.
        settle_images: Images whose batch statistics the fresh networks take.
        backend: Of torch.compile.
        max_turns: Turns of each engine, if time allows.
        turns_s: Seconds for all turns of a case.
        case_s: Seconds that a case takes without compiling, about.
        compile_s: Seconds that compiling takes, until it has been measured.
    """

    networks: tuple[tuple[str, int, int], ...]
    batch_sizes: tuple[int, ...]
    settle_images: int
    backend: str
    max_turns: int
    turns_s: float
    case_s: float
    compile_s: dict[str, float]


FULL = Plan(
    networks=(("cifar_resnet110", 32, 10), ("resnet101", 224, 1000)),
    batch_sizes=(1, 256, 32, 1024),
    settle_images=32,
    backend="inductor",
    max_turns=100,
    turns_s=6,
    case_s=12,
    compile_s={"dense-compile": 35, "masked-compile": 70},
)
TINY = Plan(
    networks=(("cifar_resnet20", 32, 10), ("resnet18", 32, 10)),
    batch_sizes=(1, 4),
    settle_images=8,
    backend="eager",  # It traces as the default does, and builds no kernels.
    max_turns=5,
    turns_s=0.5,
    case_s=1,
    compile_s={"dense-compile": 3, "masked-compile": 6},
)


def measure(
    *,
    out: Path,
    tiny: bool = False,
    minutes: float = 8,
    keep: float = 0.5,
    seed: int = 0,
    precision: Literal["32", "bf16"] = "32",
) -> None:
    """Time dense, masked and compacted execution, taking turns, and write the times as JSON.

    Args:
        out: The JSON file; an earlier one of the same settings and machine is completed.
        tiny: Small networks on the CPU, to try the script.
        minutes: What does not fit is recorded as out of time.
        keep: Probability with which a gated block runs.
        seed: Of weights, images and decisions.
        precision: float32 (TF32 on a GPU), or bfloat16 throughout.
    """
    end = time.monotonic() + 60 * minutes * (1 - RESERVE)
    if not 0 <= keep <= 1:
        raise UserError(f"keep must lie in [0, 1], not {keep}")
    if not tiny and not torch.cuda.is_available():
        raise UserError("this needs a CUDA device; --tiny tries it on the CPU")
    device = torch.device("cpu" if tiny else "cuda")
    plan = TINY if tiny else FULL
    if device.type == "cuda":
        # TF32 for every product of every engine; convolutions have it anyway.
        torch.set_float32_matmul_precision("high")
    settings = {"tiny": tiny, "keep": keep, "seed": seed, "precision": precision}
    results = Results(out, {"settings": settings | backends(plan, device)} | machine(device), plan)

    builder = Builder(plan, device, keep, seed, precision)
    untimed, incomplete = results.missing()
    for position, (name, batch_size) in enumerate(untimed + incomplete):
        start = time.monotonic()
        is_again = position >= len(untimed)
        later = [] if is_again else untimed[position + 1 :]
        prospect = Prospect(results, name, later, end)
        if is_again and not prospect.allows_all():
            print(f"{name}, batch {batch_size}: as before, {OUT_OF_TIME} for the rest", flush=True)
            continue
        facts: Entry = {}
        if end - start < plan.case_s:
            rows = all_rows(batch_size, OUT_OF_TIME)
        else:
            facts, rows = time_case(builder, name, batch_size, prospect)
            clear(device)
        facts |= {"seconds": round(time.monotonic() - start, 1), "commit": commit()}
        results.add(name, batch_size, facts, rows)
        print(f"{name}, batch {batch_size}: {summary(rows)} ({facts['seconds']} s)", flush=True)
    if not untimed + incomplete:
        print("Nothing is missing.")
    Console(width=max(Console().width, 110)).print(results.table())
    print(out)
    results.demand_right()


# Results


class Results:
    """The JSON file: what was measured so far, on what and with which settings.

    Args:
        path: Where it is, or will be.
        header: What an earlier file must have in common with this run.
        plan: What is timed.

    Raises:
        UserError: When the file cannot be read or written, or has another header.
    """

    def __init__(self, path: Path, header: Entry, plan: Plan) -> None:
        self.path, self.header, self.plan = path, header, plan
        self.keys = [(n, size) for size in plan.batch_sizes for n, _, _ in plan.networks]
        self.cases: dict[Key, Entry] = {}
        self.rows: dict[Key, list[Entry]] = {}
        if not path.exists():
            self.write()  # Rather fail now than after the first case.
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            for case in earlier["cases"]:
                self.cases[case["network"], case["batch_size"]] = case
            for row in earlier["rows"]:
                self.rows.setdefault((row["network"], row["batch_size"]), []).append(row)
            different = [key for key, value in header.items() if earlier[key] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{path} is not a file of this script ({error!r}): name another"
            raise UserError(message) from None
        if different:
            raise UserError(f"{path} has other {' and '.join(different)}: name another file")

    def missing(self) -> tuple[list[Key], list[Key]]:
        """Cases without times, and those that lack some: time ran out, or has not begun."""
        untimed: list[Key] = []
        incomplete: list[Key] = []
        for key in self.keys:
            rows = self.rows.get(key, all_rows(key[1], OUT_OF_TIME))
            if any(row["note"] == OUT_OF_TIME for row in rows):
                timed = any(row["median_ms"] is not None for row in rows)
                (incomplete if timed else untimed).append(key)
        return untimed, incomplete

    def add(self, name: str, batch_size: int, facts: Entry, rows: list[Entry]) -> None:
        """Record a case and write the file."""
        case = {"network": name, "batch_size": batch_size}
        self.cases[name, batch_size] = case | facts
        self.rows[name, batch_size] = [case | row for row in rows]
        self.write()

    def write(self) -> None:
        """Put what was measured so far into the file."""
        content = self.header | {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "cases": [self.cases[key] for key in self.keys if key in self.cases],
            "rows": [row for key in self.keys for row in self.rows.get(key, [])],
        }
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def prepare_s(self, name: str, engine: str) -> float:
        """Seconds that preparing an engine for a network takes: the longest it took so far."""
        seen = [
            (row["network"] == name, row["prepare_s"])
            for rows in self.rows.values()
            for row in rows
            if row["engine"] == engine and row["prepare_s"] is not None
        ]
        same = [seconds for is_same, seconds in seen if is_same]
        others = [seconds for _, seconds in seen]
        return max(same or others or [self.plan.compile_s.get(engine, 0)])

    def table(self) -> Table:
        """Return all rows for the eye."""
        heads = ("network, batch", "engine", "median ms", "of dense", "images/s", "note")
        table = Table()
        for head in heads:
            table.add_column(head, justify="right" if head in heads[2:5] else "left")
        for key in self.keys:
            for position, row in enumerate(self.rows.get(key, [])):
                ratio = row["ratio_to_best_dense"]
                timed = row["median_ms"] is not None
                table.add_row(
                    "{}, {}".format(*key) if position == 0 else "",
                    row["engine"],
                    f"{row['median_ms']:.3f}" if timed else "",
                    "" if ratio is None else f"{ratio:.3f}",
                    f"{row['images_per_s']:,.0f}" if timed else "",
                    row["note"],
                )
            table.add_section()
        return table

    def demand_right(self) -> None:
        """Raise when an engine's results were wrong."""
        for (name, batch_size), rows in self.rows.items():
            for row in rows:
                if row["note"].startswith("wrong"):
                    where = f"{row['engine']} of {name}, batch {batch_size}"
                    raise UserError(f"{where}, is {row['note']}: this is a defect")


@dataclass(frozen=True)
class Prospect:
    """What is still to be done, and by when.

    Attributes:
        results: What was measured so far.
        network: Name of the present case's network.
        later: The cases after it.
        end: Of `time.monotonic`.
    """

    results: Results
    network: str
    later: list[Key]
    end: float

    def allows(self, engine: str) -> bool:
        """Whether there is time for an engine and for all that is more valuable, here and later."""
        plan, expected = self.results.plan, self.results.prepare_s
        seconds = plan.case_s * (1 + len(self.later))
        if engine in plan.compile_s:
            seconds += expected(self.network, engine)
        if engine == "masked-compile":
            seconds += sum(expected(name, "dense-compile") for name, _ in self.later)
        return time.monotonic() + seconds <= self.end

    def allows_all(self) -> bool:
        """Whether there is time for every engine of the present case."""
        plan, expected = self.results.plan, self.results.prepare_s
        seconds = plan.case_s + sum(expected(self.network, engine) for engine in plan.compile_s)
        return time.monotonic() + seconds <= self.end

    def turns_s(self) -> float:
        """Seconds for all turns of the present case."""
        left = self.end - time.monotonic()
        return min(self.results.plan.turns_s, left / (1 + len(self.later)))


# One case


class UnavailableError(Exception):
    """An engine cannot be had here; the message says why."""


class WrongError(Exception):
    """An engine's results differ; the message says how."""


class Builder:
    """Builds networks and cases.

    Args:
        plan: What is timed.
        device: Where.
        keep: Probability with which a gated block runs.
        seed: Of weights, images and decisions.
        precision: "32" or "bf16".
    """

    def __init__(
        self, plan: Plan, device: torch.device, keep: float, seed: int, precision: str
    ) -> None:
        self.plan, self.device, self.keep, self.seed = plan, device, keep, seed
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.tolerance = TOLERANCES[device.type][precision]
        self.sizes = {name: (size, classes) for name, size, classes in plan.networks}
        self.networks: dict[str, SkipNet] = {}

    def case(self, name: str, batch_size: int) -> "Case":
        """Return a batch with its network, which is built once."""
        size, num_classes = self.sizes[name]
        if name not in self.networks:
            self.networks[name] = self._network(name, size, num_classes)
        network = self.networks[name]
        drawn = np.random.default_rng(sub_seed(self.seed, SEED_TAG, batch_size))
        mask = torch.from_numpy(drawn.random((batch_size, network.num_gates)) < self.keep)
        images = self._images(batch_size, size).to(self.dtype, memory_format=torch.channels_last)
        return Case(network, images, mask.to(self.device), self.tolerance, self.plan.backend)

    def _network(self, name: str, size: int, num_classes: int) -> SkipNet:
        torch.manual_seed(self.seed)
        network = skipnet.create(name, gate="rnn", num_classes=num_classes)
        for block in network.blocks:
            # Small branches, or a hundred fresh layers multiply rounding errors until comparing
            # logits means nothing: in bfloat16, ResNet-101 would be 45 % off.
            norms = [layer for layer in block.modules() if isinstance(layer, _BatchNorm)]
            nn.init.constant_(norms[-1].weight, 0.2)
        network.to(self.device)
        settle(network, self._images(self.plan.settle_images, size))
        return network.fuse().to(self.dtype).to(memory_format=torch.channels_last)

    def _images(self, batch_size: int, size: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(batch_size, 3, size, size, generator=generator, device=self.device)


class Case:
    """One batch and the engines that classify it; they are to be called in inference mode.

    Args:
        network: The routed network, fused.
        images: The batch, on the network's device.
        mask: Which gated blocks run, bool [batch, gates].
        tolerance: How far a row's logits may lie from those of masked execution.
        backend: Of torch.compile.
    """

    def __init__(
        self, network: SkipNet, images: Tensor, mask: Tensor, tolerance: float, backend: str
    ) -> None:
        self.network, self.images, self.mask = network, images, mask
        self.tolerance, self.backend = tolerance, backend
        self.cuda = images.device.type == "cuda"
        # Graphs may share memory: they run one after the other, and their outputs are kept apart.
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None
        self.dense = without_gates(network, [True] * len(network.blocks))
        self.dense_compiled: Run | None = None
        cost = network.cost(*images.shape[1:])
        self.macs_fraction = int(cost.executed(mask).sum()) / len(mask) / cost.dense
        with torch.inference_mode():
            self.expected = self._eager(network, mask)()
            self.expected_dense = self._eager(network, torch.ones_like(mask))()

    def prepare(self, engine: str) -> tuple[Run, float]:
        """Return an engine as a function, and how far its logits are off.

        Raises:
            UnavailableError: When it cannot be had here.
            WrongError: When it computes something else than masked execution.
        """
        self.tune(engine)
        plain = engine.removesuffix("-graph")
        run = self._plain(plain)
        error = self._check(plain, run)
        if plain != engine:
            run = self._captured(run)
            error = self._check(plain, run)
        return run, error

    def tune(self, engine: str) -> None:
        """Let cuDNN try its algorithms where shapes stay the same from batch to batch.

        How many rows run a compacted block does not, unless there is but one.
        """
        if self.cuda:
            torch.backends.cudnn.benchmark = engine != "compacted" or len(self.images) == 1

    def synchronize(self) -> None:
        """Wait for the last kernel."""
        if self.cuda:
            torch.cuda.synchronize()

    def _plain(self, engine: str) -> Run:
        match engine:
            case "masked" | "compacted":
                return self._eager(self.network, self.mask, engine)
            case "masked-compile":
                return self._eager(self.network, self.mask, compiled=True)
            case "pruned":
                kept = [True, *self.mask[0].tolist()]
                return self._eager(without_gates(self.network, kept))
            case "dense-compile":
                if self.dense_compiled is None:
                    self.dense_compiled = self._eager(self.dense, compiled=True)
                return self.dense_compiled
            case _:
                return self._eager(self.dense)

    def _eager(
        self,
        network: SkipNet,
        mask: Tensor | None = None,
        execute: Any = "masked",
        *,
        compiled: bool = False,
    ) -> Run:
        decide: Any = "threshold" if mask is None else skipnet.Fixed(mask)
        images = self.images
        network.cost(*images.shape[1:])  # Counted once, here, where no compiler looks on.

        def forward(batch: Tensor) -> Output:
            logits, routing = network(batch, decide=decide, execute=execute)
            return logits, routing.decisions, routing.logits

        function: Callable[[Tensor], Output] = forward
        if compiled:
            function = torch.compile(forward, backend=self.backend, dynamic=False, fullgraph=True)
        return lambda: function(images)

    def _captured(self, run: Run) -> Run:
        """Record a run as a CUDA graph; its input and output stay where they are."""
        if not self.cuda:
            raise UnavailableError("no CUDA")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = run()

        def replay() -> Output:
            graph.replay()
            return output

        return replay

    def _check(self, engine: str, run: Run) -> float:
        logits, decisions, gates = run()
        is_dense = engine.startswith("dense")
        expected, decided, opened = self.expected_dense if is_dense else self.expected
        error = distance(logits, expected)
        if decisions.numel():
            if not torch.equal(decisions, decided):
                raise WrongError("it decides otherwise than masked execution")
            error = max(error, distance(gates, opened))
        if not error <= self.tolerance:
            raise WrongError(f"its logits are {error:.2g} off, and may be {self.tolerance:g}")
        return error


def without_gates(network: SkipNet, kept: list[bool]) -> SkipNet:
    """Return the dense network on the same weights, some of its blocks left out."""
    blocks = [block if keep else Bypass() for block, keep in zip(network.blocks, kept, strict=True)]
    return SkipNet(network.stem, blocks, list(network.shortcuts), network.head).eval()


class Bypass(nn.Module):
    """A block that is not there."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Return the shortcut."""
        return shortcut


def distance(values: Tensor, expected: Tensor) -> float:
    """How far a row lies from what is expected, at most, as a share of the latter's length."""
    difference = (values.float() - expected.float()).norm(dim=1)
    return (difference / expected.float().norm(dim=1)).nan_to_num(torch.inf).max().item()


def time_case(
    builder: Builder, name: str, batch_size: int, prospect: Prospect
) -> tuple[Entry, list[Entry]]:
    """Prepare, check and time the engines on one batch.

    Returns:
        What there is to say of the case as a whole, and a row an engine.
    """
    if builder.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        case = builder.case(name, batch_size)
    except RuntimeError as failure:  # Out of memory, also where a library is the one to say so.
        return {}, all_rows(batch_size, reason(failure))
    rows = {row["engine"]: row for row in all_rows(batch_size, "")}
    with torch.inference_mode():
        runs = prepare_all(case, rows, prospect)
        times = take_turns(case, runs, rows, prospect)

    medians = {engine: statistics.median(values) for engine, values in times.items()}
    dense = {engine: value for engine, value in medians.items() if engine.startswith("dense")}
    best = min(dense, key=dense.__getitem__, default=None)
    if best is None:
        rows["bound"]["note"] = "no dense engine was timed"
    else:
        times["bound"] = [case.macs_fraction * value for value in times[best]]
        rows["bound"]["note"] = f"{case.macs_fraction:.3f} of {best}"
    for engine, values in times.items():
        median = statistics.median(values)
        rows[engine] |= {
            "median_ms": round(median, 4),
            "p95_ms": round(float(np.percentile(values, 95)), 4),
            "min_ms": round(min(values), 4),
            "ratio_to_best_dense": None if best is None else round(median / dense[best], 4),
            "images_per_s": round(1e3 * batch_size / median, 1),
        }
    facts = {
        "image_size": case.images.shape[-1],
        "macs_fraction": round(case.macs_fraction, 6),
        "keep_rate": round(case.mask.float().mean().item(), 6),
        "best_dense": best,
        "turns": max(map(len, times.values()), default=0),
        # With what all engines keep at once, the memory of the graphs among it.
        "peak_memory_mib": torch.cuda.max_memory_allocated() >> 20 if case.cuda else None,
    }
    return facts, list(rows.values())


def prepare_all(case: Case, rows: dict[str, Entry], prospect: Prospect) -> dict[str, Run]:
    """Prepare and check what there is time for; the others' rows say why not."""
    runs: dict[str, Run] = {}
    for engine, row in rows.items():
        if engine == "bound":
            continue
        if not prospect.allows(engine):
            row["note"] = OUT_OF_TIME
            continue
        if engine == "dense-compile-graph" and "dense-compile" not in runs:
            row["note"] = rows["dense-compile"]["note"]
            continue
        start = time.monotonic()
        try:
            runs[engine], error = case.prepare(engine)
            row["error"] = float(f"{error:.2g}")
        except Exception as failure:  # Whatever a compiler does: the other engines are timed.
            row["note"] = reason(failure)
            if case.cuda:
                torch.cuda.empty_cache()
        row["prepare_s"] = round(time.monotonic() - start, 2)
    return runs


def take_turns(
    case: Case, runs: dict[str, Run], rows: dict[str, Entry], prospect: Prospect
) -> dict[str, list[float]]:
    """Milliseconds of every turn of every engine; each turn starts with another one."""
    times: dict[str, list[float]] = {engine: [] for engine in runs}
    end = 0.0
    for turn in range(-WARM_UP, prospect.results.plan.max_turns):
        if turn == 0:
            end = time.monotonic() + prospect.turns_s()
        if turn >= MIN_TURNS and time.monotonic() > end:
            break
        engines = list(times)
        start = turn % max(len(engines), 1)
        for engine in engines[start:] + engines[:start]:
            case.tune(engine)
            case.synchronize()
            begin = time.perf_counter()
            try:
                runs[engine]()
                case.synchronize()
            except RuntimeError as failure:
                rows[engine]["note"] = reason(failure)
                del times[engine]
                continue
            if turn >= 0:
                times[engine].append(1e3 * (time.perf_counter() - begin))
    return times


def reason(failure: Exception) -> str:
    """Say in a line why an engine has no times."""
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(failure, UnavailableError):
        return str(failure)
    if isinstance(failure, WrongError):
        return f"wrong: {failure}"
    first = next(iter(str(failure).strip().splitlines()), "")
    return f"{type(failure).__name__}: {first}"[:200]


def all_rows(batch_size: int, note: str) -> list[Entry]:
    """Return a row for every engine of a case, without times."""
    figures = ("median_ms", "p95_ms", "min_ms", "ratio_to_best_dense", "images_per_s")
    empty = dict.fromkeys((*figures, "error", "prepare_s"))
    # Rows of a larger batch skip different blocks: there is no one pruned network.
    engines = [name for name in ENGINES if batch_size == 1 or name != "pruned-graph"]
    return [{"engine": engine} | empty | {"note": note} for engine in engines]


def summary(rows: list[Entry]) -> str:
    """Return a case's medians on one line."""
    timed = [row for row in rows if row["median_ms"] is not None]
    return ", ".join(f"{row['engine']} {row['median_ms']:.2f}" for row in timed) or rows[0]["note"]


def clear(device: torch.device) -> None:
    """Free what a case took; forget compiled functions, of which torch keeps but a few."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Surroundings


def backends(plan: Plan, device: torch.device) -> Entry:
    """Return the settings of torch that bear on speed."""
    tuned = "all but compacted; that too for batch 1" if device.type == "cuda" else None
    return {
        "networks": [list(entry) for entry in plan.networks],
        "batch_sizes": list(plan.batch_sizes),
        "memory_format": "channels_last",
        "compile": {"backend": plan.backend, "dynamic": False, "fullgraph": True},
        "threads": torch.get_num_threads(),
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn.benchmark": tuned,
    }


def machine(device: torch.device) -> Entry:
    """Return hardware and versions: what a time needs beside it to mean anything."""
    gpu: Entry = dict.fromkeys(("gpu", "memory_mib", "driver", "cuda", "cudnn"))
    if device.type == "cuda":
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "memory_mib": torch.cuda.get_device_properties(device).total_memory >> 20,
            "driver": output_of("nvidia-smi", *query),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {"hardware": {"cpu": hardware(), **gpu}, "versions": versions()}


def commit() -> str | None:
    """Return the commit of the checkout, with a mark if files were changed."""
    return output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def output_of(*command: str) -> str | None:
    """Return the first line that a program prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


if __name__ == "__main__":
    try:
        tyro.cli(measure)
    except UserError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
