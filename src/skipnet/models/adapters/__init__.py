"""Any residual network, trained elsewhere, as a routed one on the same weights."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from skipnet.errors import UserError
from skipnet.models.adapters import timm as timm
from skipnet.models.adapters import torchvision as torchvision
from skipnet.models.adapters import transformers as transformers
from skipnet.models.adapters.parts import Block as Block
from skipnet.models.adapters.parts import Parts as Parts
from skipnet.models.adapters.parts import Whole as Whole
from skipnet.models.adapters.parts import adapter as adapter
from skipnet.models.adapters.parts import adapter_of, in_sequence, shapes
from skipnet.models.adapters.parts import list_adapters as list_adapters
from skipnet.routing.gates import GateName, Layout, make_gate
from skipnet.routing.network import SkipNet

_TOLERANCE = 1e-3


def skippable(
    model: nn.Module,
    gate: GateName | None = "rnn",
    blocks: Sequence[int] | Sequence[nn.Module] | None = None,
    *,
    stem: nn.Module | None = None,
    head: nn.Module | None = None,
    layout: Layout = "maps",
    input_size: tuple[int, int, int] | None = None,
    verify: bool = True,
) -> SkipNet:
    """Return a trained residual network as one whose blocks can be skipped, on the same weights.

    All gates start open: it computes what the model computes, until the gates learn. A block that
    changes the shape of its features and has no projection always runs, as does the first.

        network = skippable(torchvision.models.resnet50(weights="DEFAULT"))
        network = skippable(model, stem=model.conv, blocks=list(model.body), head=model.top)

    Args:
        model: A model of a known family (see `list_adapters`), or any other with stem, blocks and
            head named.
        gate: Kind of gate, or None for the same network without gates.
        blocks: Of a known family, the numbers of the blocks that may be skipped, 0 being the first,
            which always runs; all others if not given. Of another model, its blocks in order, each
            of which adds its own input.
        stem: What comes before the blocks, images to features, of another model.
        head: What comes after them, features to class logits.
        layout: Of another model's features: "maps", or "tokens", channels last.
        input_size: (channels, height, width) of an image that the model takes; that of its family
            if not given.
        verify: Hold the result against the model, on an image of noise.

    Raises:
        UserError: When nothing can be skipped, the parts are not the model's or do not fit, or they
            compute something else than the model does.
    """
    if stem is None and head is None:
        find = adapter_of(model)
        if find is None:
            raise UserError(
                f"{type(model).__name__} is of no known family: name its parts with stem, blocks "
                "and head, or write an adapter; known are "
                + ", ".join(name.rsplit(".", 1)[1] for name in list_adapters())
            )
        parts = find(model)
        wanted = _numbers(blocks, len(parts.blocks))
    elif stem is None or head is None or blocks is None:
        raise UserError("name all three parts: stem, blocks and head")
    else:
        parts = _named_parts(model, stem, blocks, head, layout)
        wanted = set(range(len(parts.blocks)))
    if input_size is not None:
        parts.input_size = input_size
    network = _assemble(model, parts, gate, wanted)
    if verify:
        _demand_same(model, network, parts.input_size)
    return network


def _assemble(
    model: nn.Module, parts: Parts, gate: GateName | None, wanted: Iterable[int]
) -> SkipNet:
    if not parts.blocks:
        raise UserError(f"{type(model).__name__} has no residual blocks")
    found = shapes(parts)
    blocks: list[Block] = []
    entries: list[nn.Module] = []
    channels: list[int] = []
    fixed: list[int] = []
    before: list[nn.Module] = []  # What always runs since the last block that may be skipped.
    for index, block in enumerate(parts.blocks):
        shortcut, output = found[index]
        if index > 0 and (index not in wanted or shortcut != output):
            before.append(_AlwaysRuns(block))
            fixed.append(index)
            continue
        blocks.append(block)
        entries.append(in_sequence(before))
        before = []
        if index > 0:
            features = found[index - 1][1]
            channels.append(features[1] if parts.layout == "maps" else features[-1])
    if len(blocks) < 2:
        raise UserError(
            f"no block of {type(model).__name__} can be skipped: the first always runs, and "
            "another needs an output of the shape of its shortcut's"
        )
    network = SkipNet(
        stem=parts.stem,
        blocks=[block.block for block in blocks],
        shortcuts=[block.shortcut for block in blocks],
        entries=entries,
        head=in_sequence([*before, parts.head]),
        gate=None if gate is None else make_gate(gate, channels, parts.layout),
    )
    if network.gate is not None:
        network.gate.open_()
        network.gate.to(next(model.parameters()))
    network.sources, network.fixed_blocks = _sources(network, model), tuple(fixed)
    return network.train(model.training)


def _demand_same(model: nn.Module, network: SkipNet, size: tuple[int, int, int]) -> None:
    """Hold the network with all gates open against the model, on an image of noise.

    A subclass of a known family may have a forward of its own, which no adapter sees.
    """
    reference = next(model.parameters())
    if reference.is_meta:
        return
    noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(reference)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    network.eval()
    try:
        with torch.no_grad():
            expected, (logits, _) = model(noise), network(noise)
    finally:
        for module, training in modes:
            module.training = training
    expected = getattr(expected, "logits", expected)
    if not isinstance(expected, Tensor):
        raise UserError(
            f"{type(model).__name__} returns {type(expected).__name__}, not logits that the parts "
            "could be held against: wrap it in a module that returns them"
        )
    error = (logits - expected).abs().max() if logits.shape == expected.shape else math.inf
    if not error <= _TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UserError(
            f"the parts of {type(model).__name__} compute something else than it does: check what "
            "stem, blocks and head leave out, or name them if it is a variant of a known family"
        )


class _AlwaysRuns(nn.Module):
    """A block that cannot be skipped, with its shortcut."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self.shortcut = block.block, block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.shortcut(x))


def _numbers(blocks: Sequence[int] | Sequence[nn.Module] | None, count: int) -> set[int]:
    if blocks is None:
        return set(range(count))
    numbers = [block for block in blocks if isinstance(block, int)]
    if len(numbers) < len(blocks):
        raise UserError("blocks of a known family are numbers; name stem and head for others")
    strange = [number for number in numbers if not 0 < number < count]
    if strange:
        raise UserError(
            f"blocks that may be skipped are from 1 to {count - 1}, and "
            f"{', '.join(map(str, strange))} is not (the first, 0, always runs)"
        )
    return set(numbers)


def _named_parts(
    model: nn.Module,
    stem: nn.Module,
    blocks: Sequence[int] | Sequence[nn.Module],
    head: nn.Module,
    layout: Layout,
) -> Parts:
    modules = [block for block in blocks if isinstance(block, nn.Module)]
    if len(modules) < len(blocks):
        raise UserError("with stem and head, blocks are the modules themselves, in order")
    own = {id(parameter) for parameter in model.parameters()}
    for what, module in (("stem", stem), ("head", head), *(("a block", one) for one in modules)):
        if any(id(parameter) not in own for parameter in module.parameters()):
            raise UserError(
                f"{what} ({type(module).__name__}) has weights that are not the model's"
            )
    return Parts(
        stem=stem, blocks=[Block(block=Whole(one)) for one in modules], head=head, layout=layout
    )


def _sources(network: SkipNet, model: nn.Module) -> dict[str, str]:
    """The names that the model has for what the network has, by the network's names."""
    names: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), name)
    own = network.state_dict(keep_vars=True)
    return {name: names[id(value)] for name, value in own.items() if id(value) in names}
