"""What every library of networks offers: each module of this package is one."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from skipnet.errors import UserError

Options = dict[str, Any]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

FILE = ".safetensors"
DEFAULT = "DEFAULT"
"""The weights that a library thinks best."""


class Library(Protocol):
    """Where networks come from; names are without the library's own."""

    def build(
        self, name: str, num_classes: int, in_channels: int, options: Options, /
    ) -> nn.Module:
        """Build a network with fresh weights."""

    def trained(self, name: str, weights: str, /) -> Mapping[str, Tensor]:
        """Return the state dict of a network as its authors trained it."""

    def statistics(self, name: str, weights: str, /) -> Statistics | None:
        """Return mean and standard deviation that its images are normalised by, if known."""

    def options(self, name: str, image_size: tuple[int, int] | None, /) -> Options:
        """Return what `build` has to be told for this network, or for images of another size."""

    def image_size(self, name: str, /) -> tuple[int, int]:
        """Return height and width of the images that a network is known for."""

    def names(self) -> list[str]:
        """Return the names of networks that can be made skippable, as far as they can be listed."""


def demand_known(name: str, options: Options, known: set[str]) -> None:
    """Refuse what a file says of a constructor, but for what is known to be a size.

    Others name files to open and code to fetch.
    """
    if strange := sorted(set(options) - known):
        raise UserError(f"{name} has options that are not read: {', '.join(strange)}")
