"""Running statistics of batch norms, estimated anew with the decisions of inference."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from skipnet.routing.network import SkipNet


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
