"""Inference without torch: a portable ONNX file, run as fast as this machine can."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from skipnet.errors import UserError
from skipnet.execution import optimized
from skipnet.execution.native import DoesNotFit
from skipnet.execution.portable import (
    IMAGES,
    errors_as,
    load_onnx,
    onnxruntime,
    open_session,
)
from skipnet.routing.trace import Routing


class InferenceSession:
    """Runs a file that `skipnet export` wrote; safe to call from several threads.

    Args:
        path: The portable file.
        threads: Threads that share the work of one call; as many as there are cores if not given.
        optimize: Build an engine for this machine, see `execution.optimized`. Without it, or where
            there can be none (a warning says why), the portable file itself is run.
        providers: ONNX Runtime's execution providers; CUDA's if there, else the CPU's. The
            optimised engine is for the CPU alone.
        spin: Let threads wait for the next call by spinning: it starts sooner, and they keep their
            cores from other work meanwhile.

    Attributes:
        info: What the file says about itself: image size, preprocessing, classes, multiply-adds.
        engine: "optimized" or "portable": what is run.

    Raises:
        UserError: When there is no such file, it is damaged, or is not one of `skipnet export`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        optimize: bool = True,
        providers: list[str] | None = None,
        spin: bool = True,
    ) -> None:
        self._path = path = Path(path)
        if threads is not None and threads < 1:
            raise UserError(f"threads must be at least 1, not {threads}")
        self._threads = threads or _cores()
        data, self.info = load_onnx(path)
        self._runner: _Portable | _Optimized | None = None
        if providers is None:
            providers = ["CPUExecutionProvider"]
            if "CUDAExecutionProvider" in onnxruntime().get_available_providers():
                # Compiled in, but perhaps without a GPU: then it falls back to the CPU.
                both = ["CUDAExecutionProvider", *providers]
                portable = _Portable(path, data, self._threads, both, spin)
                if "CUDAExecutionProvider" in portable.session.get_providers():
                    self._runner, providers = portable, both
        else:
            _demand_providers(providers)
        if optimize and self.info.cost.gates:
            try:
                if providers != ["CPUExecutionProvider"]:
                    raise DoesNotFit(f"the engine is for the CPU alone, not {providers[0]}")
                self._runner = _Optimized(
                    optimized.build(path, data, self.info), self._threads, spin
                )
            except DoesNotFit as reason:
                warnings.warn(f"{path} is run as it is, not optimised: {reason}", stacklevel=2)
        if self._runner is None:
            self._runner = _Portable(path, data, self._threads, providers, spin)
        self.engine = "optimized" if isinstance(self._runner, _Optimized) else "portable"

    def run(self, images: np.ndarray) -> tuple[np.ndarray, Routing]:
        """Classify a batch.

        Args:
            images: [batch, channels, height, width]: float32, normalised as in training, or uint8
                pixels, which are normalised by the file's mean and standard deviation.

        Returns:
            Class logits, float32 [batch, classes], and what was decided: `decisions` are bool
            [batch, gates]. The gates' logits stay in the engine: `Routing.logits` is [batch, 0].

        Raises:
            UserError: On a wrong shape or kind of numbers, an empty batch, or images that contain
                NaN or infinity.
        """
        feed = self._check(images)
        assert self._runner is not None
        with errors_as(lambda reason: UserError(f"{self._path} cannot be run: {reason}")):
            logits, decisions = self._runner.run(feed)
        _demand_finite(logits)
        none = np.zeros((len(feed), 0), np.float32)
        return logits, Routing(logits=none, decisions=decisions, cost=self.info.cost)

    def _check(self, images: Any) -> np.ndarray:
        expected = (self.info.architecture["in_channels"], *self.info.image_size)
        if not isinstance(images, np.ndarray) or images.dtype not in (np.float32, np.uint8):
            kind = getattr(images, "dtype", type(images).__name__)
            raise UserError(f"images must be a float32 or uint8 array, not {kind}")
        if images.ndim != 4 or images.shape[1:] != expected or not len(images):
            raise UserError(
                f"images must be of shape [batch, {', '.join(map(str, expected))}] with at least "
                f"one row, not {list(images.shape)}"
            )
        if images.dtype == np.uint8:
            mean = np.array(self.info.mean, np.float32).reshape(-1, 1, 1)
            std = np.array(self.info.std, np.float32).reshape(-1, 1, 1)
            images = (images / np.float32(255) - mean) / std
        _demand_finite(images)
        return np.ascontiguousarray(images)


def _demand_finite(values: np.ndarray) -> None:
    if np.isfinite(values).all():
        return
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    row = int(np.flatnonzero(bad)[0])
    raise UserError(f"image {row} of the batch holds NaN, infinity or far too large numbers")


class _Portable:
    """The file as it is, in ONNX Runtime."""

    def __init__(
        self, path: Path, data: bytes, threads: int, providers: list[str], spin: bool
    ) -> None:
        with errors_as(lambda reason: UserError(f"{path} is damaged: ONNX Runtime says {reason}")):
            self.session = open_session(data, threads=threads, providers=providers, spin=spin)

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, *decisions = self.session.run(None, {IMAGES: images})
        return logits, decisions[0] if decisions else np.zeros((len(images), 0), bool)


class _Optimized:
    """The engine for this machine: one image with all threads, or a thread an image in a batch."""

    def __init__(self, engine: optimized.Engine, threads: int, spin: bool) -> None:
        self.engine, self.threads = engine, threads
        self.lock = threading.Lock()
        self.single = engine.open(threads=threads, spin=spin)
        # What runs rows side by side; made when the first batch comes.
        self.row = self.single if threads == 1 else None
        self.pool: ThreadPoolExecutor | None = None

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(images) == 1:
            return self._rows(self.single, images, range(1))[0]
        session, pool = self._side_by_side()
        if pool is None:
            parts = self._rows(session, images, range(len(images)))
        else:
            # Every worker takes the next row when it is done: rows differ in how long they take.
            rows = iter(range(len(images)))
            work = [pool.submit(self._take, session, images, rows) for _ in range(self.threads)]
            found = dict(item for future in work for item in future.result())
            parts = [found[row] for row in range(len(images))]
        logits, decisions = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(decisions)

    def _side_by_side(self) -> tuple[Any, ThreadPoolExecutor | None]:
        if self.threads == 1:
            return self.single, None
        with self.lock:
            if self.row is None:
                self.row = self.engine.open(threads=1)
                self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="skipnet")
        return self.row, self.pool

    def _rows(self, session: Any, images: np.ndarray, rows: Any) -> list[Any]:
        thresholds = self.engine.thresholds
        return [
            session.run(
                None,
                {
                    IMAGES: images[row : row + 1],
                    optimized.THRESHOLDS: thresholds[row : row + 1]
                    if len(thresholds) > 1
                    else thresholds,
                },
            )
            for row in rows
        ]

    def _take(self, session: Any, images: np.ndarray, rows: Any) -> list[tuple[int, Any]]:
        return [(row, self._rows(session, images, (row,))[0]) for row in rows]


def _demand_providers(providers: list[str]) -> None:
    known = onnxruntime().get_available_providers()
    unknown = [name for name in providers if name not in known]
    if unknown or not providers:
        raise UserError(
            f"this ONNX Runtime has no provider {', '.join(unknown) or 'of no name'}: use some of "
            f"{', '.join(known)}"
        )


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Not on macOS.
        return os.cpu_count() or 1
