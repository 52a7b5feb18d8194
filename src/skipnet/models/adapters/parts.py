"""Parts: what an adapter takes a trained residual network apart into."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from skipnet.errors import UserError
from skipnet.routing.counting import skeleton
from skipnet.routing.gates import Layout


@dataclass(kw_only=True)
class Block:
    """A residual block.

    Attributes:
        block: `(x, shortcut) -> output`, given the shortcut's output; or `x -> output`, wrapped in
            `Whole`, where the shortcut is the identity.
        shortcut: `x -> shortcut`: what is left of a block that is skipped. Always runs.
    """

    block: nn.Module
    shortcut: nn.Module = field(default_factory=nn.Identity)


@dataclass(kw_only=True)
class Parts:
    """A residual network taken apart: `head(block_k(… block_1(stem(images))))`.

    Attributes:
        stem: Images to features.
        blocks: In order.
        head: Features to class logits.
        layout: Of the features: "maps", [batch, channels, height, width], or "tokens", channels
            last.
        input_size: (channels, height, width) of an image that the network takes.
    """

    stem: nn.Module
    blocks: list[Block]
    head: nn.Module
    layout: Layout = "maps"
    input_size: tuple[int, int, int] = (3, 224, 224)


class Whole(nn.Module):
    """A block that adds its own input: `(x, shortcut) -> block(shortcut)`.

    Where something that always runs comes before it (a downsampling), that is its shortcut.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.block(shortcut)


class Sum(nn.Module):
    """A block that adds its shortcut to a branch: `activation(branch(x) + shortcut)`."""

    def __init__(self, branch: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.branch, self.activation = branch, activation

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.activation(self.branch(x) + shortcut)


class FirstToken(nn.Module):
    """What a class token has gathered: tokens [batch, tokens, channels] to [batch, channels]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def shell(model: nn.Module, without: Iterable[str]) -> nn.Module:
    """Return a shallow copy of a module, on the same weights, that lacks some of its own.

    For stems and heads that are methods of a model and need what belongs to it.

    Args:
        model: Any module; not changed.
        without: Names of submodules, which become identities, and of parameters, which are dropped.
    """
    copied = copy.copy(model)
    for kind in ("_modules", "_parameters", "_buffers"):
        setattr(copied, kind, dict(getattr(model, kind)))
    for name in without:
        if name in copied._modules:
            copied._modules[name] = nn.Identity()
        else:
            copied._parameters.pop(name, None)
    return copied


def shapes(parts: Parts) -> list[tuple[torch.Size, torch.Size]]:
    """Return the shapes of every block's shortcut and output, [batch, …], for one image.

    Raises:
        UserError: When the parts do not fit together.
    """
    modules = nn.ModuleList([parts.stem])
    for entry in parts.blocks:
        modules.append(nn.ModuleList([entry.shortcut, entry.block]))
    modules.append(parts.head)
    bare = skeleton(modules)
    found = []
    try:
        with torch.no_grad():
            dtype = next((p.dtype for p in bare.parameters() if p.is_floating_point()), None)
            x = bare[0](torch.empty(2, *parts.input_size, device="meta", dtype=dtype))
            for pair in bare[1:-1]:
                assert isinstance(pair, nn.ModuleList)
                shortcut = pair[0](x)
                x = pair[1](x, shortcut)
                found.append((shortcut.shape, x.shape))
            bare[-1](x)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        size = "x".join(map(str, parts.input_size))
        raise UserError(
            f"the parts do not fit together on an image of {size}: {error} (name the size that the "
            "model takes with input_size, or its parts with stem, blocks and head)"
        ) from None
    return found


Adapter = Callable[[Any], Parts]
AdapterT = TypeVar("AdapterT", bound=Adapter)

_ADAPTERS: dict[str, Adapter] = {}


def adapter(*classes: str) -> Callable[[AdapterT], AdapterT]:
    """Register a function that takes models of some classes apart.

    Args:
        *classes: Full names, "package.module.Class": a package need not be there.
    """

    def register(function: AdapterT) -> AdapterT:
        for name in classes:
            _ADAPTERS[name] = function
        return function

    return register


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return the adapter for a model's class, or for the nearest class that it derives from."""
    for cls in type(model).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in _ADAPTERS:
            return _ADAPTERS[name]
    return None


def list_adapters() -> list[str]:
    """Return the full names of the classes that can be taken apart."""
    return sorted(_ADAPTERS)


def in_sequence(modules: Sequence[nn.Module]) -> nn.Module:
    """Return modules one after the other, without those that do nothing."""
    busy = [module for module in modules if not isinstance(module, nn.Identity)]
    if len(busy) == 1:
        return busy[0]
    return nn.Sequential(*busy) if busy else nn.Identity()
