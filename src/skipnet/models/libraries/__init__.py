"""Networks of other libraries by name: torchvision/NAME, timm/NAME and transformers/ID."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch

from skipnet.errors import UserError, extras_named
from skipnet.models.adapters import skippable
from skipnet.models.libraries.library import FILE, Library, Options, Statistics
from skipnet.routing.network import SkipNet

LIBRARIES = ("torchvision", "timm", "transformers")
"""Names of libraries, and of the modules of this package."""


def is_library_name(name: str) -> bool:
    """Whether a name is that of another library's network."""
    return name.split("/")[0] in LIBRARIES and "/" in name


def build(
    name: str,
    gate: Any,
    num_classes: int,
    in_channels: int,
    blocks: tuple[int, ...] | None,
    options: Options,
    *,
    verify: bool,
) -> SkipNet:
    """Build a network of another library with fresh weights, taken apart; see `skippable`.

    Raises:
        UserError: When the library is not installed, does not know the name or an option, or the
            network is of no family that can be taken apart.
    """
    with _library(name) as (library, own):
        model = library.build(own, num_classes, in_channels, options)
    return skippable(model, gate, blocks, verify=verify)


def options(name: str, image_size: tuple[int, int] | None = None) -> Options:
    """Return what else a model file has to say for the network to be built again.

    Args:
        name: Of the network; one of our own needs nothing.
        image_size: (height, width) that it is to take; what it is known for if not given.

    Raises:
        UserError: When the library is not installed or does not know the name.
    """
    if not is_library_name(name):
        return {}
    with _library(name) as (library, own):
        return library.options(own, image_size)


def image_size(name: str) -> tuple[int, int]:
    """Return height and width of the images that a network is known for."""
    with _library(name) as (library, own):
        return library.image_size(own)


def names(pattern: str) -> list[str]:
    """Return the known names of the libraries that a shell pattern with a slash may match."""
    found = []
    for prefix in LIBRARIES:
        if pattern.split("/")[0] in (prefix, "*"):
            with _library(prefix) as (library, _):
                found += [f"{prefix}/{name}" for name in library.names()]
    return found


def statistics(name: str, weights: str) -> Statistics | None:
    """Return mean and standard deviation that trained weights expect, None where nothing says."""
    if weights.endswith(FILE):
        return None
    with _library(name, f" with weights {weights}") as (library, own):
        return library.statistics(own, weights)


def load_trained(network: SkipNet, name: str, weights: str) -> list[str]:
    """Copy trained weights into a network that `build` has made.

    Args:
        network: Changed in place.
        name: Of the network.
        weights: A safetensors file with the library's own names, or what the library calls its
            weights; DEFAULT for its best.

    Returns:
        The names of the tensors that stay as they were initialised: the classifier's, where the
        weights are of other classes.

    Raises:
        UserError: When there are no such weights, or more than the classifier does not fit.
    """
    path = Path(weights)
    if path.exists() and not weights.endswith(FILE):
        raise UserError(
            f"--weights takes {FILE} files with the library's names, and {weights} is none: a run "
            "of skipnet's is named with --start, and a .pth file's state dict is written anew by "
            "safetensors.torch.save_file"
        )
    if weights.endswith(FILE):
        try:
            tensors = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as a safetensors file: {error}") from None
    else:
        with _library(name, f" with weights {weights}") as (library, own):
            tensors = dict(library.trained(own, weights))
    try:
        return network.load_original_state_dict(tensors, new_classes=True)
    except UserError as error:
        raise UserError(f"{name} with weights {weights}: {error}") from None


@contextmanager
def _library(name: str, wanted: str = "") -> Iterator[tuple[Library, str]]:
    """Yield a network's library and its name there, and say what the library's errors mean.

    Args:
        name: Of the network, or of a library.
        wanted: What of it cannot be had where there is an error.
    """
    prefix, _, own = name.partition("/")
    try:
        with extras_named():
            # Not sooner: a library takes seconds to import, and need not be installed.
            yield cast(Library, importlib.import_module(f"{__name__}.{prefix}")), own
    except UserError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        AssertionError,
    ) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}{wanted} cannot be had: {why[0]}") from None
