"""Evaluation: accuracy and computation on a test set, and throughput on this machine."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from skipnet.data.augment import normalize
from skipnet.data.images import Images
from skipnet.data.loaders import eval_batches
from skipnet.errors import UserError
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
        macs_spread: Standard deviation of the multiply-adds over the images, as a share of the
            dense network's: 0 for a network that treats all alike.
        num_paths: How many different decision vectors occurred.
        gate_information: What each decision tells about the image, bits: its entropy over the
            images, for a decision is a function of the image (a sampled one is not: then it is an
            upper bound).
        class_information: What each decision tells about the image's class, bits.
        gates_by_input: Number of gates that depend on the input: open for 5 to 95 % of the images.
    """

    accuracy: float
    loss: float
    macs: float
    macs_fraction: float
    blocks_fraction: float
    keep_rates: list[float]
    num_images: int
    macs_spread: float
    num_paths: int
    gate_information: list[float]
    class_information: list[float]
    gates_by_input: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; None for a loss that is not finite, as in JSON."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}


def evaluate(
    model: SkipNet,
    images: Images,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    decide: str | Decision = "threshold",
    execute: ExecutorName = "compacted",
    batch_size: int = 500,
    channels_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Classify every image and sum up, in evaluation mode; the model's mode is restored.

    Several processes that hold the same model share the images: each takes its part.

    Args:
        model: The network, on the device of the images.
        images: The test set.
        mean: Mean of each channel, for pixels in 0 to 1.
        std: Standard deviation of each channel.
        decide: How gates decide, see `SkipNet.forward`.
        execute: Which executor runs the blocks; the result is the same.
        batch_size: Images a batch.
        channels_last: Memory layout of the images.
        rank: Index of this process.
        world_size: Number of processes.
        gather: Returns the rows of all processes' tables, float64 [n, columns], in one; needed
            with several.

    Raises:
        UserError: When an image of a streamed set cannot be read, or none can.
    """
    assert world_size == 1 or gather is not None
    training = model.training
    model.eval()
    # One row an image: right or wrong, loss, multiply-adds, class, which gated blocks ran. Whole
    # numbers below 2^53 are exact in float64.
    parts = [torch.empty(0, 4 + model.num_gates, dtype=torch.float64, device=images.device)]
    try:
        with torch.inference_mode():
            for pixels, labels in eval_batches(
                images, batch_size=batch_size, mean=mean, std=std, rank=rank, world_size=world_size
            ):
                pixels = _layout(pixels, channels_last)
                logits, routing = model(pixels, decide=decide, execute=execute)
                losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
                columns = [logits.argmax(dim=1) == labels, losses, routing.macs, labels]
                row = torch.stack([column.double() for column in columns], dim=1)
                parts.append(torch.cat([row, routing.executed.double()], dim=1))
    finally:
        model.train(training)
    table = torch.cat(parts)
    if gather is not None:
        table = gather(table)
    if len(table) == 0:
        raise UserError(f"none of the {len(images)} test images can be read")
    correct, losses, macs, classes = table[:, :4].unbind(dim=1)
    executed = table[:, 4:].bool()
    dense = model.cost(*images.shape).dense
    keep_rates = executed.double().mean(dim=0)
    return Evaluation(
        accuracy=100 * correct.sum().item() / len(table),
        loss=losses.mean().item(),
        macs=macs.mean().item(),
        macs_fraction=macs.mean().item() / dense,
        blocks_fraction=(keep_rates.sum().item() + 1) / (model.num_gates + 1),
        keep_rates=keep_rates.tolist(),
        num_images=len(table),
        macs_spread=macs.std(correction=0).item() / dense,
        num_paths=len(executed.unique(dim=0)) if model.num_gates else 1,
        gate_information=_bits(keep_rates).tolist(),
        class_information=class_information(executed, classes.long()).tolist(),
        gates_by_input=int(((keep_rates >= 0.05) & (keep_rates <= 0.95)).sum()),
    )


def class_information(executed: Tensor, labels: Tensor) -> Tensor:
    """Mutual information of each gate's decision and the class, bits, float64 [gates].

    A plug-in estimate: with n images and k classes it is too high by about (k - 1) / (2 n ln 2)
    for a gate that knows nothing, 0.0006 bits for 10 classes and 10,000 images.

    Args:
        executed: Which image ran which gated block, bool [images, gates].
        labels: int64 [images].
    """
    classes, counts = labels.unique(return_counts=True)
    rates = torch.stack([executed[labels == name].double().mean(dim=0) for name in classes])
    shares = (counts.double() / len(labels)).unsqueeze(1)
    told = _bits((shares * rates).sum(dim=0)) - (shares * _bits(rates)).sum(dim=0)
    return told.clamp(min=0)


def _bits(rates: Tensor) -> Tensor:
    """Entropy of Bernoulli variables of these rates, in bits."""
    bits = torch.special.xlogy(rates, rates) + torch.special.xlogy(1 - rates, 1 - rates)
    return bits.abs() / math.log(2)  # abs: they are at most 0, and -0 would be printed.


def throughput(
    models: Mapping[str, SkipNet],
    images: Images,
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
    first = images.take(torch.arange(min(batch_size, len(images))))
    pixels = _layout(normalize(first, mean, std), channels_last)
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
