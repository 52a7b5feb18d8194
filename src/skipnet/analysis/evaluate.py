"""Evaluation: accuracy and computation on a test set, and throughput on this machine."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from skipnet.data.loaders import eval_batches
from skipnet.data.sources import ImageSet
from skipnet.routing.decisions import Decision
from skipnet.routing.network import ExecutorName, SkipNet


@dataclass(kw_only=True)
class Evaluation:
    """What a network did on a set of images.

    Attributes:
        accuracy: Percent of the images classified right.
        loss: Mean cross-entropy, nats.
        macs: Mean multiply-adds an image, gates included.
        macs_fraction: `macs` as a share of the dense network's.
        blocks_fraction: The paper's computation: share of blocks run, the first counted as run.
        keep_rates: Share of the images that ran each gated block.
        num_images: Number of images.
    """

    accuracy: float
    loss: float
    macs: float
    macs_fraction: float
    blocks_fraction: float
    keep_rates: list[float]
    num_images: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; None for a loss that is not finite, as in JSON."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}


def evaluate(
    model: SkipNet,
    images: ImageSet,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    decide: str | Decision = "threshold",
    execute: ExecutorName = "compacted",
    batch_size: int = 500,
    channels_last: bool = True,
) -> Evaluation:
    """Classify every image and sum up, in evaluation mode; the model's mode is restored.

    Args:
        model: The network, on the device of the images.
        images: The test set.
        mean: Mean of each channel, for pixels in 0 to 1.
        std: Standard deviation of each channel.
        decide: How gates decide, see `SkipNet.forward`.
        execute: Which executor runs the blocks; the result is the same.
        batch_size: Images a batch.
        channels_last: Memory layout of the images.
    """
    training = model.training
    model.eval()
    device = images.images.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    macs = torch.zeros((), dtype=torch.int64, device=device)
    runs = torch.zeros(model.num_gates, dtype=torch.int64, device=device)
    with torch.inference_mode():
        for pixels, labels in eval_batches(images, batch_size=batch_size, mean=mean, std=std):
            logits, routing = model(_layout(pixels, channels_last), decide=decide, execute=execute)
            correct += (logits.argmax(dim=1) == labels).sum()
            loss += torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            macs += routing.macs.sum()
            runs += routing.executed.sum(dim=0)
    model.train(training)
    count = len(images)
    cost = model.cost(*images.images.shape[1:])
    return Evaluation(
        accuracy=100 * correct.item() / count,
        loss=loss.item() / count,
        macs=macs.item() / count,
        macs_fraction=macs.item() / count / cost.dense,
        blocks_fraction=(runs.sum().item() / count + 1) / (model.num_gates + 1),
        keep_rates=(runs.double() / count).tolist(),
        num_images=count,
    )


def throughput(
    models: Mapping[str, SkipNet],
    images: ImageSet,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 128,
    seconds: float = 6.0,
    channels_last: bool = True,
) -> dict[str, float]:
    """Measure images a second of several networks, taking turns, so that their ratio holds.

    Each network classifies the same batch, compacted, until `seconds` are over in all; the median
    is reported, after one unmeasured turn.

    Args:
        models: Networks by name, all on the device of the images.
        images: Where the batch is taken from.
        mean: Mean of each channel, for pixels in 0 to 1.
        std: Standard deviation of each channel.
        batch_size: Images a batch, or fewer if there are not as many.
        seconds: Time for all of it.
        channels_last: Memory layout of the images.
    """
    pixels, _ = next(eval_batches(images, batch_size=batch_size, mean=mean, std=std))
    pixels = _layout(pixels, channels_last)
    for model in models.values():
        model.eval()
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        end = time.perf_counter() + seconds
        turn = 0
        while turn < 4 or time.perf_counter() < end:
            for name, model in models.items():
                start = time.perf_counter()
                logits, _ = model(pixels, execute="compacted")
                logits.sum().item()  # waits for the device
                if turn > 0:
                    times[name].append(time.perf_counter() - start)
            turn += 1
    return {name: len(pixels) / statistics.median(taken) for name, taken in times.items()}


def _layout(pixels: Tensor, channels_last: bool) -> Tensor:
    return pixels.to(memory_format=torch.channels_last) if channels_last else pixels
