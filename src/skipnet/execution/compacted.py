"""Compacted execution: a block, and its batch norms, see only the rows that run it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipnet.execution.rows import gather_rows, scatter_rows


def compacted(
    block: nn.Module, features: Tensor, bypass: Tensor, g: Tensor, *, in_place: bool = False
) -> Tensor:
    """Gather the rows that run, run the block on them, scatter the results over the bypass.

    A block that no row runs is not called: it costs nothing and its parameters get no gradient.

    Args:
        block: Residual block, `(features, bypass) -> output`.
        features: Input of the block, [batch, ...].
        bypass: Output of its shortcut, of the block's output shape.
        g: Whether a row runs the block, bool [batch].
        in_place: Write the results into `bypass`, which nobody else may be using; no gradients.
    """
    assert g.dtype == torch.bool, "SkipNet.forward refuses soft decisions"
    rows = g.nonzero().squeeze(1)
    if len(rows) == 0:
        return bypass
    if len(rows) == len(g):
        return block(features, bypass)
    gather = gather_rows if in_place else _Gather.apply
    active = gather(features, rows)
    active_bypass = active if bypass is features else gather(bypass, rows)
    with _normalisable(block, len(rows) * bypass[0, 0].numel()):
        output = block(active, active_bypass).to(bypass.dtype)
    if in_place:
        return scatter_rows(bypass, rows, output)
    # index_put, not index_copy: the latter turns channels_last into contiguous.
    return bypass.index_put((rows,), output)


class _Gather(torch.autograd.Function):
    """`features[rows]` for rows that are all different, so that the backward need not add up.

    The backward of plain indexing accumulates, which takes over ten times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.batch = len(features)
        return features[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        # new_empty would lose channels_last.
        spread = torch.zeros_like(grad[:1]).expand(ctx.batch, *grad.shape[1:])
        return spread.index_put((rows,), grad), None


@contextmanager
def _normalisable(block: nn.Module, values: int) -> Iterator[None]:
    """Let batch norms use their running statistics where one value a channel has no variance.

    Happens in training when a single row runs a block whose output is one pixel.
    """
    norms = [
        layer
        for layer in block.modules()
        if values == 1 and isinstance(layer, _BatchNorm) and layer.training
    ]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
