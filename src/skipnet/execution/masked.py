"""Masked execution: every row runs every block, g chooses afterwards. Differentiable through g."""

from typing import Any

import torch
from torch import Tensor, nn

from skipnet.execution.rows import flat, is_channels_last, unflat


def masked(block: nn.Module, features: Tensor, bypass: Tensor, g: Tensor) -> Tensor:
    """Run the block on every row and return `g * block + (1 - g) * bypass`, row by row.

    Args:
        block: Residual block, `(features, bypass) -> output`.
        features: Input of the block, [batch, ...].
        bypass: Output of its shortcut, of the block's output shape.
        g: Weight of the block's output, [batch]: bool, or float with gradient flowing through it.
    """
    output = block(features, bypass)
    weight = g.view(-1, *[1] * (output.ndim - 1))
    if g.dtype == torch.bool:
        return torch.where(weight, output, bypass)
    weight = weight.to(output.dtype)
    if torch.compiler.is_compiling():  # It needs no help with passes over memory.
        return torch.lerp(bypass, output, weight)
    # Rows as one piece of memory: half the time of broadcasting g over four dimensions on a CPU.
    rows, bypass_rows = flat(output), flat(bypass)
    if rows is None or bypass_rows is None or is_channels_last(output) != is_channels_last(bypass):
        return torch.lerp(bypass, output, weight)
    # Most gates of SP are open for every row of a batch: then there is nothing to merge. To ask a
    # GPU would be to wait for it.
    all_run = g.device.type == "cpu" and bool((g == 1).all())
    return unflat(_Merge.apply(bypass_rows, rows, weight.flatten(1), all_run), output)


class _Merge(torch.autograd.Function):
    """`torch.lerp` of rows, exact where g is 0 or 1, with fewer passes over memory backwards."""

    @staticmethod
    def forward(ctx: Any, bypass: Tensor, output: Tensor, weight: Tensor, all_run: bool) -> Tensor:
        ctx.save_for_backward(bypass, output, weight)
        ctx.all_run = all_run
        return output.view_as(output) if all_run else torch.lerp(bypass, output, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        bypass, output, weight = ctx.saved_tensors
        to_weight = (output - bypass).mul_(grad).sum(1, keepdim=True)
        if ctx.all_run:
            return None, grad, to_weight, None
        to_output = grad * weight
        return grad - to_output, to_output, to_weight, None
