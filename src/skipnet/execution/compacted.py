"""Compacted execution: a block, and its batch norms, see only the rows that run it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipnet.execution.rows import gather_rows, new_rows, scatter_rows


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
    return scatter_rows(bypass, rows, output) if in_place else _Scatter.apply(bypass, rows, output)


class _Gather(torch.autograd.Function):
    """`features[rows]` for rows that are all different, so that the backward need not add up.

    The backward of plain indexing accumulates, which takes over ten times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.batch = len(features)
        return gather_rows(features, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _Spread.apply(grad, rows, ctx.batch), None


class _Spread(torch.autograd.Function):
    """Rows of zeros with `values` in some of them, which are all different."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, batch: int) -> Tensor:
        ctx.save_for_backward(rows)
        return scatter_rows(new_rows(values, batch).zero_(), rows, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _Gather.apply(grad, rows), None, None


class _Scatter(torch.autograd.Function):
    """A copy of `features` with `values` in some rows, which are all different."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return scatter_rows(features.clone(), rows, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (rows,) = ctx.saved_tensors
        return grad.index_fill(0, rows, 0), None, _Gather.apply(grad, rows)


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
