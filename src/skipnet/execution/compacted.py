"""Compacted execution: a block, and its batch norms, see only the rows that run it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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


def gather_rows(features: Tensor, rows: Tensor) -> Tensor:
    """Return `features[rows]` in the same memory format, without gradients.

    A row is copied as one piece of memory: three times as fast as indexing on a CPU.
    """
    flat = _flat(features)
    if flat is None:
        return features[rows]
    return _unflat(flat.index_select(0, rows), features)


def scatter_rows(features: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Put `values` into `features[rows]`, in place, and return `features`; no gradients.

    On a CPU through NumPy, which copies a row as one piece of memory: one and a half to six times
    as fast as `index_copy_`.
    """
    into, source = _flat(features), _flat(values)
    if (
        into is None
        or source is None
        or into.device.type != "cpu"
        or _is_channels_last(features) != _is_channels_last(values)
    ):
        return features.index_copy_(0, rows, values)
    # As bytes: NumPy has no bfloat16.
    into.view(torch.uint8).numpy()[rows.numpy()] = source.view(torch.uint8).numpy()
    return features


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.ndim == 4


def _flat(x: Tensor) -> Tensor | None:
    """A view [batch, numbers] with the numbers in the order of memory; None where there is none."""
    if x.is_contiguous():
        return x.flatten(1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(1)
    return None


def _unflat(flat: Tensor, like: Tensor) -> Tensor:
    if like.is_contiguous():
        return flat.view(len(flat), *like.shape[1:])
    _, channels, height, width = like.shape
    return flat.view(len(flat), height, width, channels).permute(0, 3, 1, 2)


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
