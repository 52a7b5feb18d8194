"""`skipnet benchmark`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from skipnet.analysis.benchmark import ENGINES, EngineName, settle
from skipnet.analysis.benchmark import benchmark as time_engines
from skipnet.commands.models import locate, open_model, test_source
from skipnet.data.augment import normalize
from skipnet.data.sources import load_split
from skipnet.errors import UserError
from skipnet.models import list_models
from skipnet.models.libraries import is_library_name
from skipnet.models.weights import ModelInfo
from skipnet.routing.gates import GateName
from skipnet.seeding import WEIGHTS, sub_seed
from skipnet.training.config import StageName

DEFAULT_KEEP = 0.5
NUM_BATCHES = 16
MAX_IMAGES = 256
SETTLING_IMAGES = 16
"""Enough for well-conditioned batch statistics of the last stage."""


def benchmark(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    *,
    keep: float | None = None,
    seed: int = 0,
    batch_size: int = 1,
    threads: int = 1,
    image_size: int | None = None,
    repeats: int = 50,
    engines: tuple[EngineName, ...] = ENGINES,
    data: str | None = None,
    stage: StageName | None = None,
    gate: GateName | None = None,
) -> dict[str, Any]:
    """Time a network in every engine, in turns; the last line of stdout is one JSON object.

    dense-torch, dense-compile, dense-onnx and dense-openvino run the network without gates; masked,
    compacted, portable (ONNX Runtime on the exported file) and optimized (skipnet.InferenceSession)
    run it with them. bound is dense-onnx on the network with exactly the skipped blocks removed
    (--keep and batch 1), or dense-onnx times the share of the multiply-adds. Every engine's results
    are held against masked before it is timed. Quiet cores make good figures: compare the ratios.

    Args:
        model: A run directory, a model file, or a name of skipnet list weights or of skipnet list
            models (random weights).
        keep: Let each image run this share of the gated blocks, drawn at random, whatever the
            gates say; they are computed all the same. If not given, the gates of a trained network
            decide on its test images, and a network of the registry runs half of its blocks.
        seed: Of weights and decisions that are drawn.
        batch_size: Images a batch.
        threads: Threads of every engine.
        image_size: Height and width of the images; those trained on, or 32 or 224, if not given.
        repeats: Turns of every engine.
        engines: Which to time; dense-onnx always is.
        data: Test images for a trained network: a data set's name or folder; those of its run if
            not given.
        stage: Which stage of a run; its last finished one if not given.
        gate: Kind of gate, for a name of the registry; rnn if not given.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}; set it to 1 or more pixels")
    torch.manual_seed(sub_seed(seed, WEIGHTS, 0))
    named = model in list_models() or is_library_name(model)
    if data is not None and (named or keep is not None):
        raise UserError(
            "--data is for a trained network whose gates decide: leave it or --keep out"
        )
    network, about = open_model(
        model, stage=stage, gate=(gate or "rnn") if named else gate, image_size=image_size
    )
    size = about.image_size if image_size is None else (image_size, image_size)
    if named and keep is None:
        keep = DEFAULT_KEEP
    if keep is None:
        path = locate(Path(model), stage)
        if size != about.image_size:
            raise UserError("--image-size needs --keep: the gates know their own size alone")
        images = _test_images(path, about, data, batch_size)
    else:
        images = torch.randn(batch_size, about.architecture.in_channels, *size)
    if named:
        settle(network, torch.randn(SETTLING_IMAGES, *images.shape[1:]))
    console = Console(stderr=True)
    with console.status("", spinner="line") as status:
        quiet = not console.is_terminal

        def report(text: str) -> None:
            if not quiet:
                status.update(f"{about.architecture.name}: {text}")

        result = time_engines(
            network,
            about,
            images,
            batch_size=batch_size,
            keep=keep,
            seed=seed,
            threads=threads,
            repeats=repeats,
            engines=engines,
            report=report,
        )
    _print(result)
    sys.stdout.flush()
    print(json.dumps(result))
    return result


def _test_images(path: Path, about: ModelInfo, data: str | None, batch_size: int) -> Tensor:
    """Some batches of test images, normalised."""
    source = test_source(path, about, data)
    images = load_split(source, "test", about.classes)
    if len(images) < batch_size:
        raise UserError(f"the test set has {len(images)} images, fewer than a batch: {batch_size}")
    wanted = max(batch_size, min(NUM_BATCHES * batch_size, MAX_IMAGES, len(images)))
    # Spread over the set: data sets are often sorted by class.
    chosen = torch.linspace(0, len(images) - 1, wanted).long()
    return normalize(images.take(chosen), about.mean, about.std)


def _print(result: dict[str, Any]) -> None:
    height, width = result["image_size"]
    how = "gates decide" if result["keep"] is None else f"--keep {result['keep']:g}"
    print(
        f"{result['model']}, gate {result['gate']}, {height}×{width}, batch "
        f"{result['batch_size']}, threads {result['threads']}; {how}: "
        f"{100 * result['keep_rate']:.1f} % of the gated blocks, "
        f"{100 * result['macs_fraction']:.1f} % of dense multiply-adds"
    )
    print(f"{result['hardware']}; median of {result['repeats']} turns")
    table = Table()
    table.add_column("engine")
    for title in ("median ms", "p95 ms", "min ms", "of dense-onnx", "of bound"):
        table.add_column(title, justify="right")
    bound = next((row["median_ms"] for row in result["rows"] if row["engine"] == "bound"), None)
    for row in result["rows"]:
        table.add_row(
            row["engine"],
            f"{row['median_ms']:.3f}",
            f"{row['p95_ms']:.3f}",
            f"{row['min_ms']:.3f}",
            f"{row['ratio_to_dense_onnx']:.3f}",
            f"{row['median_ms'] / bound:.3f}" if bound else "",
        )
    Console(highlight=False).print(table)
