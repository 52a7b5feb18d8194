"""Automatic execution: a block at a time, whichever of the others is faster; for inference."""

from torch import Tensor, nn

from skipnet.execution.compacted import compacted
from skipnet.execution.masked import masked

CUDA_NUMBERS = 2**22
"""Below so many numbers of output a GPU runs all rows in the time that compaction takes.

Launching the gather and the scatter costs it as much as a small block. An estimate, not yet
measured: benchmarks/gpu/execution.py does that."""


def auto(
    block: nn.Module, features: Tensor, bypass: Tensor, g: Tensor, *, in_place: bool = False
) -> Tensor:
    """Run the block on the rows that run it, or on all of them where that is faster.

    On a CPU compaction is never slower by more than noise, whatever the batch and the keep rate
    (docs/log.md), so it is always chosen there. Rows do not see each other at inference: the
    results are the same.

    Args:
        block: Residual block, `(features, bypass) -> output`.
        features: Input of the block, [batch, ...].
        bypass: Output of its shortcut, of the block's output shape.
        g: Whether a row runs the block, bool [batch].
        in_place: See `compacted`.
    """
    # By sizes alone: a look at g would wait for the GPU.
    if bypass.is_cuda and len(g) > 1 and bypass.numel() < CUDA_NUMBERS:
        return masked(block, features, bypass, g)
    return compacted(block, features, bypass, g, in_place=in_place)
