"""Rows of a batch as pieces of memory: one a row, whatever the layout, to be copied or merged."""

import torch
from torch import Tensor


def gather_rows(features: Tensor, rows: Tensor) -> Tensor:
    """Return `features[rows]` in the same memory format, without gradients.

    A row is copied as one piece of memory: three times as fast as indexing on a CPU.
    """
    pieces = flat(features)
    if pieces is None:
        return features[rows]
    return unflat(pieces.index_select(0, rows), features)


def scatter_rows(features: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Put `values` into `features[rows]`, in place, and return `features`; no gradients.

    On a CPU through NumPy, which copies a row as one piece of memory: one and a half to six times
    as fast as `index_copy_`.
    """
    into, source = flat(features), flat(values)
    if (
        into is None
        or source is None
        or into.device.type != "cpu"
        or is_channels_last(features) != is_channels_last(values)
    ):
        return features.index_copy_(0, rows, values)
    # As bytes: NumPy has no bfloat16.
    into.view(torch.uint8).numpy()[rows.numpy()] = source.view(torch.uint8).numpy()
    return features


def new_rows(like: Tensor, number: int) -> Tensor:
    """Return `number` rows of unset numbers, of the shape and layout of those of `like`."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(
        number, *like.shape[1:], dtype=like.dtype, device=like.device, memory_format=layout
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether `flat` views a tensor with the channels last."""
    return not x.is_contiguous() and x.ndim == 4


def flat(x: Tensor) -> Tensor | None:
    """Return a view [batch, numbers], numbers in the order of memory; None where there is none."""
    if x.is_contiguous():
        return x.flatten(1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(1)
    return None


def unflat(pieces: Tensor, like: Tensor) -> Tensor:
    """View what `flat` gives, of any number of rows, in the shape and layout of `like`."""
    if like.is_contiguous():
        return pieces.view(len(pieces), *like.shape[1:])
    _, channels, height, width = like.shape
    return pieces.view(len(pieces), height, width, channels).permute(0, 3, 1, 2)
