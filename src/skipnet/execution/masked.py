"""Masked execution: every row runs every block, g chooses afterwards. Differentiable through g."""

import torch
from torch import Tensor, nn


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
    # One pass, and exact where g is 0 or 1.
    return torch.lerp(bypass, output, weight.to(output.dtype))
