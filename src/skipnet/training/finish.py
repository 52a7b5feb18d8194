"""What is adjusted beside training: statistics of batch norms, and the gates' threshold."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from skipnet.routing.cost import Cost
from skipnet.routing.network import SkipNet
from skipnet.tasks.budget import mean_over_processes

_FARTHEST = 8.0
_HALVINGS = 20
_PASSES = 20
CLOSE = 0.002
"""A computation this near the target is left alone."""


def recalibrate(network: SkipNet, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every batch norm by the mean over some batches.

    In training the gates of a network sample, or change while the statistics are averaged; here
    they decide as at inference, and a block's batch norms see the rows that run it. Statistics of a
    block that no row runs stay as they were. The network ends in evaluation mode.

    Args:
        network: Changed in place.
        batches: Normalised images, [batch, channels, height, width], on the network's device.
    """
    network.eval()
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    before = [{name: x.clone() for name, x in norm.named_buffers()} for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # A plain average over the batches.
        norm.train()
    with torch.no_grad():
        for images in batches:
            network(images, decide="threshold", execute="compacted")
    for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
        norm.momentum = momentum
        norm.eval()
        assert norm.num_batches_tracked is not None
        if norm.num_batches_tracked == 0:
            norm.load_state_dict(buffers, strict=False)


def land(
    network: SkipNet, batches: Sequence[Tensor], target: float, *, reach: float = math.inf
) -> float:
    """Shift the logits of all gates by one number so that the computation meets a target.

    What training was driven to is met only roughly: the drive sees batches in training, and loses
    its hold as learning rates fall. A gate that is all but constant, too, has logits that differ a
    little between images, so that a shift opens it for as many as are needed.

    Args:
        network: Changed in place.
        batches: Normalised images, [batch, channels, height, width], on the network's device.
        target: Share of the dense multiply-adds.
        reach: From farther away nothing is changed.

    Returns:
        The computation on the batches afterwards, as a share of dense.
    """
    assert network.gate is not None
    training = network.training
    network.eval()

    def run() -> tuple[Tensor, Cost]:
        with torch.no_grad():
            routings = [
                network(images, decide="threshold", execute="compacted")[1] for images in batches
            ]
        return torch.cat([routing.logits for routing in routings]), routings[0].cost

    best, least, shift = 0.0, math.inf, 0.0
    low, high = -_FARTHEST, _FARTHEST
    for _ in range(_PASSES):
        logits, cost = run()
        found = _computation(logits, cost)
        if abs(found - target) < abs(least - target):
            best, least = shift, found
        if abs(least - target) <= CLOSE or abs(least - target) > reach:
            break
        low, high = (low, shift) if found > target else (shift, high)
        # A shift changes later features, and their logits with them, but seldom by much. The next
        # is what would do if it did not; a small step thrice, to have the target between two.
        step = _crossing(logits, cost, target, low - shift, high - shift)
        if abs(step) < (high - low) / 8:
            step *= 3
        wanted = shift + step if low < shift + step < high else (low + high) / 2
        network.gate.shift_logits_(wanted - shift)
        shift = wanted
    network.gate.shift_logits_(best - shift)
    network.train(training)
    return least


def _computation(logits: Tensor, cost: Cost) -> float:
    """Share of dense that thresholded logits cost, over all processes, whose images differ."""
    return mean_over_processes(cost.executed(logits).double().mean() / cost.dense)


def _crossing(logits: Tensor, cost: Cost, target: float, low: float, high: float) -> float:
    """The shift between two others at which logits, if nothing else changed, meet the target."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _computation(logits + middle, cost) > target:
            high = middle
        else:
            low = middle
    return (low + high) / 2
