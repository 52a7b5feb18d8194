"""The registry: networks by name."""

import fnmatch
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from skipnet.errors import UserError, unknown
from skipnet.models import libraries
from skipnet.routing.gates import GATES, GateName
from skipnet.routing.network import SkipNet

Builder = Callable[[GateName | None, int, int], SkipNet]


class Defaults(NamedTuple):
    """The data set a network is known for.

    Attributes:
        image_size: Height and width of its images.
        num_classes: Number of its classes.
    """

    image_size: int
    num_classes: int


CIFAR10, IMAGENET = Defaults(32, 10), Defaults(224, 1000)

# Not written where they say nothing, so that files of our own networks are as they always were.
_OPTIONAL = ("blocks", "options")

_BUILDERS: dict[str, Builder] = {}
_DEFAULTS: dict[str, Defaults] = {}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What `create` needs to build a network again: it is written into every model file.

    Attributes:
        name: Name in the registry, or of another library's network: torchvision/NAME, timm/NAME,
            transformers/ID.
        gate: Kind of gate, or None for the dense network.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        blocks: Of another library's network, the numbers of the blocks that may be skipped, see
            `skippable`; all that can be if None.
        options: Of another library's network, what else its constructor needs.
    """

    name: str
    gate: GateName | None = None
    num_classes: int = 10
    in_channels: int = 3
    blocks: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.blocks is not None:  # A list, from a file.
            object.__setattr__(self, "blocks", tuple(self.blocks))

    def build(self, *, verify: bool = False) -> SkipNet:
        """Build the network with fresh weights.

        Args:
            verify: Hold another library's network, taken apart, against itself. That costs two
                passes of an image, and has been done before a model file is written.

        Raises:
            UserError: On an unknown name or gate, with the nearest known ones, or a network of
                another library that cannot be had or taken apart.
        """
        self.demand_known()
        if self.num_classes < 1 or self.in_channels < 1:
            raise UserError(
                f"num_classes and in_channels must be positive, not {self.num_classes} and "
                f"{self.in_channels}"
            )
        if libraries.is_library_name(self.name):
            return libraries.build(
                self.name,
                self.gate,
                self.num_classes,
                self.in_channels,
                self.blocks,
                self.options,
                verify=verify,
            )
        if self.blocks is not None or self.options:
            raise UserError(
                f"blocks and options are for other libraries' networks, not {self.name}"
            )
        return _BUILDERS[self.name](self.gate, self.num_classes, self.in_channels)

    def demand_known(self) -> None:
        """Check name and gate; of another library's network, the gate and the library's name.

        Raises:
            UserError: When one is unknown, with the nearest known ones.
        """
        if self.name not in _BUILDERS and not libraries.is_library_name(self.name):
            raise UserError(unknown("model", self.name, _BUILDERS))
        if self.gate is not None and self.gate not in GATES:
            raise UserError(unknown("gate", self.gate, GATES))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, without those that say nothing."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in _OPTIONAL or value}


def register(builder: Builder, defaults: Defaults = CIFAR10) -> Builder:
    """Put a function `(gate, num_classes, in_channels) -> SkipNet` into the registry.

    Args:
        builder: The function; its name is the network's.
        defaults: Of the data set the network is known for.
    """
    name = builder.__name__
    if name in _BUILDERS and _BUILDERS[name].__module__ != builder.__module__:
        raise UserError(f"{name} is already the name of a network: choose another")
    _BUILDERS[name] = builder
    _DEFAULTS[name] = defaults
    return builder


def create(
    name: str,
    *,
    gate: GateName | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
) -> SkipNet:
    """Build a network with fresh weights.

    Args:
        name: Name in the registry, see `list_models`.
        gate: "rnn", "ff1", "ff2", "static", or None for the dense network.
        num_classes: Number of classes; that of the data set the network is known for (10 or 1000)
            if not given.
        in_channels: Channels of the images.

    Raises:
        UserError: On an unknown name or gate, with the nearest known ones.
    """
    if num_classes is None:
        num_classes = defaults_of(name).num_classes
    return Architecture(
        name=name,
        gate=gate,
        num_classes=num_classes,
        in_channels=in_channels,
        options=libraries.options(name),
    ).build(verify=True)


def defaults_of(name: str) -> Defaults:
    """Return the defaults of a registered network.

    Raises:
        UserError: On an unknown name, with the nearest known ones.
    """
    Architecture(name=name).demand_known()
    if libraries.is_library_name(name):
        return Defaults(libraries.image_size(name)[0], IMAGENET.num_classes)
    return _DEFAULTS[name]


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that match a shell pattern, in order of registration.

    Other libraries' networks are listed for a pattern with a slash, "torchvision/*" for instance.
    """
    known = libraries.names(pattern) if "/" in pattern else _BUILDERS
    return [name for name in known if fnmatch.fnmatchcase(name, pattern)]


def describe(name: str) -> str:
    """Return the first line of a registered model's documentation."""
    if libraries.is_library_name(name):
        return ""
    return (_BUILDERS[name].__doc__ or "").split("\n")[0]
