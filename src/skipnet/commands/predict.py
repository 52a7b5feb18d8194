"""`skipnet predict`: an exported network on image files, without torch."""

import json
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from skipnet.data.decode import IMAGE_SUFFIXES, decode_images, image_files
from skipnet.errors import UserError
from skipnet.execution.session import InferenceSession

ROW = "{:<40}  {:<16}  {:>11}  {:>10}  {:>9}  {:>8}"


@dataclass(kw_only=True)
class Prediction:
    """What a network says of one image, and what that cost.

    Attributes:
        image: The file.
        label: Name of the most probable class.
        probability: Its probability.
        blocks_run: Residual blocks that ran, the first, which always does, counted.
        num_blocks: Residual blocks of the network.
        macs: Multiply-adds executed, gates included.
        ms: Time to classify it, reading and decoding not counted.
    """

    image: str
    label: str
    probability: float
    blocks_run: int
    num_blocks: int
    macs: int
    ms: float


def predict(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL.onnx")],
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE…")],
    *,
    threads: int | None = None,
    optimize: bool = True,
    on_bad_image: Literal["stop", "skip"] = "stop",
    json_lines: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> list[Prediction]:
    """Classify image files with an exported network: class, probability, blocks run, MACs, ms.

    Images are scaled and cut to the size that the network was trained on; where that is not square,
    they must have it.

    Args:
        model: A file that skipnet export wrote.
        images: Image files, or folders of them.
        threads: Threads; as many as there are cores if not given.
        optimize: Build an engine for this machine first (kept beside the file for the next time),
            or run the file as it is.
        on_bad_image: Stop at an image that cannot be read, or leave it out with a warning.
        json_lines: Print one JSON object an image instead of a table.
    """
    files = list(_files(images))
    session = InferenceSession(model, threads=threads, optimize=optimize)
    shape = (session.info.architecture["in_channels"], *session.info.image_size)
    session.run(np.zeros((1, *shape), np.uint8))  # The first run makes what later ones use again.
    predictions = []
    if not json_lines:
        print(ROW.format("image", "class", "probability", "blocks run", "MACs", "ms"))
    for file in files:
        pixels = _read(file, shape, on_bad_image)
        if pixels is None:
            continue
        prediction = _predict(session, file, pixels)
        predictions.append(prediction)
        print(json.dumps(asdict(prediction)) if json_lines else _row(prediction), flush=True)
    if len(predictions) > 1 and not json_lines:
        _print_summary(session, predictions)
    return predictions


def _predict(session: InferenceSession, file: Path, pixels: np.ndarray) -> Prediction:
    begin = time.perf_counter()
    logits, routing = session.run(pixels)
    ms = 1e3 * (time.perf_counter() - begin)
    powers = np.exp(logits[0] - logits[0].max())
    best = int(powers.argmax())
    blocks, gates = len(session.info.cost.blocks), routing.decisions.shape[1]
    return Prediction(
        image=str(file),
        label=session.info.classes[best],
        probability=float(powers[best] / powers.sum()),
        blocks_run=blocks - gates + int(routing.executed.sum()),
        num_blocks=blocks,
        macs=int(routing.macs[0]),
        ms=ms,
    )


def _row(prediction: Prediction) -> str:
    name, label = prediction.image, prediction.label
    return ROW.format(
        name if len(name) <= 40 else f"…{name[-39:]}",
        label if len(label) <= 16 else f"{label[:15]}…",
        f"{100 * prediction.probability:.1f} %",
        f"{prediction.blocks_run}/{prediction.num_blocks}",
        f"{prediction.macs / 1e6:,.1f}M",
        f"{prediction.ms:.2f}",
    )


def _print_summary(session: InferenceSession, predictions: list[Prediction]) -> None:
    macs = float(np.mean([prediction.macs for prediction in predictions]))
    ms = float(np.median([prediction.ms for prediction in predictions]))
    print(
        f"{len(predictions)} images, {session.engine} engine: {macs / 1e6:,.1f}M multiply-adds an "
        f"image ({100 * macs / session.info.cost.dense:.1f} % of dense), median {ms:.2f} ms"
    )


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """Image files, and those in folders, in order of name.

    Raises:
        UserError: When there is no such file, or a folder has no images.
    """
    empty = True
    for path in paths:
        empty = False
        if path.is_dir():
            found = image_files(path)
            if not found:
                raise UserError(f"the folder {path} has no images ({', '.join(IMAGE_SUFFIXES)})")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise UserError(f"there is no image file or folder {path}")
    if empty:
        raise UserError("name image files or folders: skipnet predict MODEL.onnx IMAGE…")


def _read(
    file: Path, shape: tuple[int, int, int], on_bad_image: Literal["stop", "skip"]
) -> np.ndarray | None:
    """Pixels, uint8 [1, C, H, W]; None for an image that is left out."""
    channels, height, width = shape
    try:
        pixels, _ = decode_images(
            [file],
            1,
            channels=channels,
            image_size=height if height == width else None,
            on_bad_image="stop",
            where=lambda row: str(file),
        )
    except UserError as error:
        if on_bad_image == "stop":
            raise
        warnings.warn(f"left out: {error}", stacklevel=2)
        return None
    if pixels.shape[1:] != shape:
        found = f"{pixels.shape[2]}×{pixels.shape[3]}"
        raise UserError(f"{file} is {found} pixels, and the network takes {height}×{width} only")
    return pixels
