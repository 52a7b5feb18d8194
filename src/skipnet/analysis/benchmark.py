"""Benchmark: every engine on the same images, taking turns, against the best dense one."""

import copy
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipnet.errors import UserError
from skipnet.execution.portable import first_line
from skipnet.models.weights import ModelInfo
from skipnet.routing.decisions import Fixed
from skipnet.routing.network import SkipNet
from skipnet.seeding import sub_seed

EngineName = Literal[
    "dense-torch",
    "dense-compile",
    "dense-onnx",
    "dense-openvino",
    "masked",
    "compacted",
    "portable",
    "optimized",
    "bound",
]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

TOLERANCE = 1e-4
"""How far logits may lie from those of masked execution, as a share of their largest magnitude.

A deep network may amplify rounding beyond that: then three times what float32 costs masked
execution itself, against float64."""

WARM_UP = 3
PAUSE_SECONDS = 0.01
"""Between turns with several threads: those of the engine before wait for more work by spinning."""

BENCHMARK_SEED_TAG = 7001

SURE = 1e-4
"""How far a gate's logit must be from the threshold for its decision to be compared."""

# The number of a batch in; logits out, and decisions of engines that skip.
Run = Callable[[int], tuple[np.ndarray, np.ndarray | None]]


@dataclass(kw_only=True)
class Row:
    """One engine's times for a batch.

    Attributes:
        engine: Its name.
        median_ms: Median time.
        p95_ms: 95th percentile.
        min_ms: Shortest time.
        ratio_to_dense_onnx: Median over that of ONNX Runtime on the dense network.
    """

    engine: str
    median_ms: float
    p95_ms: float
    min_ms: float
    ratio_to_dense_onnx: float


def benchmark(
    network: SkipNet,
    info: ModelInfo,
    images: Tensor,
    *,
    batch_size: int | None = None,
    keep: float | None = None,
    seed: int = 0,
    threads: int = 1,
    repeats: int = 50,
    engines: Sequence[EngineName] = ENGINES,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time batches in every engine.

    Every engine's logits and decisions are compared with masked execution before it is timed. The
    engines take turns, batch by batch, so that whatever else the machine does falls on all of them.

    Args:
        network: A network with gates.
        info: Its preprocessing and image size.
        images: One batch or several, [images, channels, height, width], normalised; those that do
            not fill a batch are left out.
        batch_size: Images a batch; all of them if not given.
        keep: Share of the gated blocks that each image runs, drawn at random, whatever the gates
            say (they are computed all the same); None lets the gates decide.
        seed: Of the random decisions, which are the same for every batch.
        threads: Threads of every engine.
        repeats: Turns of every engine.
        engines: Which to time. `dense-onnx` is timed always. One that cannot be had here
            is left out: `dense-openvino` where it is not installed, others with a warning.
        report: Is told what is being done.

    Returns:
        The fields of the JSON object of `skipnet benchmark`.

    Raises:
        UserError: When the network has no gates, a setting is out of range, or an engine's results
            are wrong.
    """
    batch_size = len(images) if batch_size is None else batch_size
    _demand(network, len(images), batch_size, keep, threads, repeats)
    batches = images[: len(images) // batch_size * batch_size].split(batch_size)
    network = network.fuse().cpu()
    mask = None
    if keep is not None:
        drawn = np.random.default_rng(sub_seed(seed, BENCHMARK_SEED_TAG, 0))
        ranks = drawn.random((batch_size, network.num_gates)).argsort(axis=1).argsort(axis=1)
        mask = ranks < round(keep * network.num_gates)
    with _threads(threads), tempfile.TemporaryDirectory() as folder:
        bench = _Bench(network, info, batches, mask, threads, Path(folder))
        runs: dict[str, Run] = {}
        for name in [engine for engine in ENGINES if engine in engines or engine == "dense-onnx"]:
            report(f"preparing {name}")
            run = bench.prepare(name)
            if run is not None:
                bench.check(name, run)
                runs[name] = run
        times = _take_turns(runs, len(batches), repeats, report)
    fraction = bench.macs_fraction
    if "bound" in engines and "bound" not in times:
        times["bound"] = [value * fraction for value in times["dense-onnx"]]
    base = statistics.median(times["dense-onnx"])
    rows = [_row(name, times[name], base) for name in ENGINES if name in times]
    return {
        "model": info.architecture.name,
        "gate": info.architecture.gate,
        "keep": keep,
        "keep_rate": bench.keep_rate,
        "batch_size": batch_size,
        "threads": threads,
        "image_size": list(images.shape[2:]),
        "macs_fraction": fraction,
        "repeats": repeats,
        "hardware": hardware(),
        "versions": versions(),
        "rows": [vars(row) for row in rows],
    }


def _demand(
    network: SkipNet,
    num_images: int,
    batch_size: int,
    keep: float | None,
    threads: int,
    repeats: int,
) -> None:
    if not network.num_gates:
        raise UserError("a dense network has no blocks to skip: benchmark one with gates")
    for name, value in (("batch_size", batch_size), ("threads", threads), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if num_images < batch_size:
        raise UserError(f"{num_images} images do not fill a batch of {batch_size}")
    if keep is not None and not 0 <= keep <= 1:
        raise UserError(f"keep must lie in [0, 1], not {keep}")


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle(network: SkipNet, images: Tensor) -> None:
    """Give a network with fresh weights batch statistics, so that its numbers stay in bounds."""
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    with torch.no_grad():
        network(images, decide="threshold", execute="masked")
    network.eval()
    for norm in norms:
        norm.momentum = 0.1


class _Bench:
    """Prepares and checks engines.

    Attributes:
        macs_fraction: Multiply-adds executed, mean over all images, as a share of dense.
        keep_rate: Share of gated blocks run.
    """

    def __init__(
        self,
        network: SkipNet,
        info: ModelInfo,
        batches: Sequence[Tensor],
        mask: np.ndarray | None,
        threads: int,
        folder: Path,
    ) -> None:
        self.network, self.mask, self.threads, self.folder = network, mask, threads, folder
        height, width = batches[0].shape[2:]
        self.info = replace(info, image_size=(height, width))
        self.batches = batches
        self.arrays = [batch.numpy() for batch in batches]
        with torch.inference_mode():
            self.expected = [
                network(batch, decide=_decision(mask), execute="masked") for batch in batches
            ]
            self.tolerance = max(
                TOLERANCE * max(1.0, float(self.expected[0][0].abs().max())),
                3 * self._rounding(batches[0][:4]),
            )
        routings = [routing for _, routing in self.expected]
        self.macs_fraction = statistics.fmean(routing.macs_fraction for routing in routings)
        self.keep_rate = statistics.fmean(float(routing.keep_rates.mean()) for routing in routings)

    def _rounding(self, images: Tensor) -> float:
        """What float32 costs in the logits, with the blocks that run and with all."""
        exact = copy.deepcopy(self.network).double()
        executed = self.expected[0][1].executed[: len(images)]
        losses = [
            self.network(images, decide=decide)[0] - exact(images.double(), decide=decide)[0]
            for decide in (Fixed(executed), Fixed(torch.ones_like(executed)))
        ]
        return max(float(loss.abs().max()) for loss in losses)

    def prepare(self, name: str) -> Run | None:
        """An engine as a function; None where it cannot be had, or is derived from another."""
        match name:
            case "dense-torch":
                return self._torch(self._dense(), execute="masked")
            case "dense-compile":
                return self._compiled()
            case "dense-onnx":
                return self._onnx(self._dense())
            case "dense-openvino":
                return self._openvino()
            case "masked" | "compacted":
                return self._torch(self.network, execute=name)
            case "portable" | "optimized":
                return self._session(optimize=name == "optimized")
            case _:
                if self.mask is None or len(self.mask) > 1:
                    return None
                return self._onnx(self._pruned(self.mask[0]))

    def check(self, name: str, run: Run) -> None:
        """Compare an engine with masked execution, or with the dense network.

        Raises:
            UserError: When it differs.
        """
        for index, batch in enumerate(self.batches):
            logits, decisions = run(index)
            expected, routing = self.expected[index]
            sure = np.ones(len(batch), bool)
            if name.startswith("dense"):
                with torch.inference_mode():
                    expected, _ = self._dense()(batch)
            elif decisions is not None:
                if self.mask is None:
                    sure = (routing.logits.abs() > SURE).all(dim=1).numpy()
                if not np.array_equal(decisions[sure], routing.executed.numpy()[sure]):
                    raise UserError(f"{name} decides otherwise than masked execution: a defect")
            error = np.abs(logits - expected.numpy())[sure].max(initial=0.0)
            if not error <= self.tolerance:
                raise UserError(f"{name} gives logits that are {error:.2g} off: a defect")

    def _dense(self) -> SkipNet:
        network = self.network
        return SkipNet(
            network.stem, list(network.blocks), list(network.shortcuts), network.head
        ).eval()

    def _pruned(self, executed: np.ndarray) -> SkipNet:
        """The network without the blocks that are skipped, and without gates."""
        kept = [True, *executed.tolist()]
        network = self.network
        blocks = [
            block if keep else _Bypass() for block, keep in zip(network.blocks, kept, strict=True)
        ]
        return SkipNet(network.stem, blocks, list(network.shortcuts), network.head).eval()

    def _torch(self, network: SkipNet, *, execute: Any, compiled: bool = False) -> Run:
        batches = [batch.to(memory_format=torch.channels_last) for batch in self.batches]
        network = network.to(memory_format=torch.channels_last)
        decide = _decision(self.mask if network.num_gates else None)

        def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
            logits, routing = network(batch, decide=decide, execute=execute)
            return logits, routing.decisions

        function: Any = forward
        if compiled:
            function = torch.compile(forward, options={"freezing": True})

        def run(index: int) -> tuple[np.ndarray, np.ndarray | None]:
            with torch.inference_mode():
                logits, decisions = function(batches[index])
            return logits.numpy(), decisions.numpy() > 0 if network.num_gates else None

        return run

    def _compiled(self) -> Run | None:
        run = self._torch(self._dense(), execute="masked", compiled=True)
        try:
            run(0)  # Compiles; what is wrong with the results is for `check`.
        except Exception as error:  # Of the compiler, or that there is none.
            warnings.warn(f"dense-compile is left out: {first_line(error)}", stacklevel=2)
            return None
        return run

    def _onnx(self, network: SkipNet) -> Run:
        from skipnet.execution.export import to_onnx
        from skipnet.execution.portable import IMAGES, open_session

        model = to_onnx(network, self._info_of_dense()).SerializeToString()
        session = open_session(
            model, threads=self.threads, providers=["CPUExecutionProvider"], spin=False
        )
        return lambda index: (session.run(None, {IMAGES: self.arrays[index]})[0], None)

    def _openvino(self) -> Run | None:
        if importlib.util.find_spec("openvino") is None:
            return None
        import openvino  # type: ignore[import-not-found,import-untyped,unused-ignore]

        from skipnet.execution.export import to_onnx

        path = self.folder / "dense.onnx"
        path.write_bytes(to_onnx(self._dense(), self._info_of_dense()).SerializeToString())
        model = openvino.Core().read_model(path)
        model.reshape(list(self.arrays[0].shape))
        hints = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = openvino.compile_model(model, "CPU", hints)
        request = compiled.create_infer_request()

        def run(index: int) -> tuple[np.ndarray, None]:
            return request.infer({0: self.arrays[index]})[compiled.output(0)], None

        return run

    def _session(self, *, optimize: bool) -> Run | None:
        from skipnet.execution.export import to_onnx
        from skipnet.execution.session import InferenceSession

        path = self.folder / "routed.onnx"
        if not path.exists():
            path.write_bytes(to_onnx(self.network, self.info, forced=self.mask).SerializeToString())
        session = InferenceSession(
            path,
            threads=self.threads,
            optimize=optimize,
            providers=["CPUExecutionProvider"],
            spin=False,
        )
        if optimize and session.engine != "optimized":  # It has said why.
            return None

        def run(index: int) -> tuple[np.ndarray, np.ndarray | None]:
            logits, routing = session.run(self.arrays[index])
            return logits, routing.decisions

        return run

    def _info_of_dense(self) -> ModelInfo:
        return replace(self.info, architecture=replace(self.info.architecture, gate=None))


class _Bypass(nn.Module):
    """A block that is not there."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return shortcut


def _decision(mask: np.ndarray | None) -> Any:
    return "threshold" if mask is None else Fixed(torch.from_numpy(mask))


def _take_turns(
    runs: dict[str, Run], num_batches: int, repeats: int, report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Milliseconds of every turn of every engine; each turn has its own order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = np.random.default_rng(0)
    for turn in range(-WARM_UP, repeats):
        report(f"turn {turn + 1} of {repeats}" if turn >= 0 else "warming up")
        for name in order.permutation(list(runs)).tolist():
            if torch.get_num_threads() > 1:
                time.sleep(PAUSE_SECONDS)
            begin = time.perf_counter()
            runs[name](turn % num_batches)
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def _row(name: str, times: list[float], base: float) -> Row:
    median = statistics.median(times)
    return Row(
        engine=name,
        median_ms=round(median, 4),
        p95_ms=round(float(np.percentile(times, 95)), 4),
        min_ms=round(min(times), 4),
        ratio_to_dense_onnx=round(median / base, 4),
    )


def hardware() -> str:
    """Name of the processor and number of cores available."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    """Versions of what was timed."""
    found = {"python": platform.python_version()}
    for name in ("skipnet", "torch", "onnxruntime", "openvino"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
