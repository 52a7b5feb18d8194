"""Gates: features in, the logit of executing the next block out.

A gate module serves a whole network: gate `i` reads the output of block `i` and decides about block
`i + 1` (SkipNet, section 3.1). All kinds follow one protocol, `Gate`; `p(execute) = sigmoid(logit)`
for each of them.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipnet.errors import UserError

GateName = Literal["rnn", "ff1", "ff2", "static"]
Layout = Literal["maps", "tokens"]
"""Of features: [batch, channels, height, width], or channels last, of any number of dimensions."""

# What a gate carries from one block to the next: nothing, or an LSTM's (hidden, cell).
State = tuple[Tensor, Tensor] | None

INITIAL_KEEP = 0.9


class Gate(nn.Module):
    """The protocol of every gate.

    Attributes:
        channels: Number of channels each gate reads, one entry a gate.
    """

    channels: tuple[int, ...]

    def forward(self, index: int, features: Tensor, state: State) -> tuple[Tensor, State]:
        """Decide how strongly block `index + 1` wants to run.

        Args:
            index: Which gate, 0 to `len(channels) - 1`.
            features: Output of block `index`, [batch, channels[index], height, width].
            state: What the previous gate returned; None for the first.

        Returns:
            The logit of executing the next block, [batch], and the state for the next gate.
        """
        raise NotImplementedError

    def scale_logits_(self, factor: float) -> None:
        """Multiply every logit by `factor`, in place, by scaling the last layer.

        No hard decision changes; probabilities move away from (factor > 1) or towards one half.
        """
        raise NotImplementedError

    def shift_logits_(self, amount: float) -> None:
        """Add `amount` to every logit, in place: more blocks run, or fewer."""
        raise NotImplementedError

    def set_keep_(self, keep: float) -> None:
        """Set the bias of every logit, in place, to that of this probability of execution.

        Raises:
            UserError: When the probability is not between 0 and 1.
        """
        raise NotImplementedError

    def open_(self) -> None:
        """Let every block run on every input, in place, until something is learned."""
        self.scale_logits_(0.0)
        self.set_keep_(INITIAL_KEEP)


class RNNGate(Gate):
    """Recurrent gate (SkipNet, section 3.1): pooling, a linear a block, one LSTM shared by all.

    Global average pool, a per-block linear to `hidden` features, one step of a single-layer LSTM of
    `hidden` units, a shared linear to one logit. Costs about 0.03 % of a block.

    Args:
        channels: Number of channels each gate reads.
        hidden: Width of the embedding and of the LSTM; 10 in the paper.
        initial_keep: Probability of execution at initialisation when all else is zero. The bias of
            the last layer is set to its logit, so blocks start open.
        layout: Of the features.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        hidden: int = 10,
        initial_keep: float = INITIAL_KEEP,
        layout: Layout = "maps",
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.layout = layout
        self.embed = nn.ModuleList(nn.Linear(width, hidden) for width in self.channels)
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.project = nn.Linear(hidden, 1)
        self.set_keep_(initial_keep)

    def forward(self, index: int, features: Tensor, state: State) -> tuple[Tensor, State]:
        pooled = _average(features) if self.layout == "maps" else features.flatten(1, -2).mean(1)
        state = self.lstm(self.embed[index](pooled), state)
        assert state is not None
        return self.project(state[0]).squeeze(1), state

    def scale_logits_(self, factor: float) -> None:
        with torch.no_grad():
            self.project.weight.mul_(factor)
            self.project.bias.mul_(factor)

    def shift_logits_(self, amount: float) -> None:
        with torch.no_grad():
            self.project.bias.add_(amount)

    def set_keep_(self, keep: float) -> None:
        nn.init.constant_(self.project.bias, _logit(keep))


def _average(features: Tensor) -> Tensor:
    """Global average pool, [batch, channels]."""
    in_training = features.requires_grad and torch.is_grad_enabled()
    if in_training and not torch.compiler.is_compiling():  # A compiler does as much by itself.
        return _Average.apply(features)
    return features.mean(dim=(2, 3))


class _Average(torch.autograd.Function):
    """The mean over the map, with a gradient that is a view of one number a channel.

    PyTorch's own writes the gradient of every pixel, in another memory layout than channels_last
    features have, before it is added to the others: four times the time.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.shape = features.shape
        return features.mean(dim=(2, 3))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _, _, height, width = ctx.shape
        return (grad / (height * width)).view(*grad.shape, 1, 1).expand(ctx.shape)


class _FFGateUnit(nn.Module):
    """Convolutions, global average pool and a linear to (skip, execute) for one block."""

    def __init__(self, channels: int, strides: Sequence[int], pool: bool) -> None:
        super().__init__()
        self.pool = pool
        layers: list[nn.Module] = []
        for stride in strides:
            conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, 2)

    def forward(self, features: Tensor) -> Tensor:
        # Halves, rounding down; a map one pixel high or wide has nothing left to halve.
        if self.pool and min(features.shape[2:]) >= 2:
            features = functional.max_pool2d(features, 2)
        skip, execute = self.linear(self.layers(features).mean(dim=(2, 3))).unbind(dim=1)
        # softmax((skip, execute))[execute] == sigmoid(execute - skip)
        return execute - skip


class _FFGate(Gate):
    """One convolutional gate a block; nothing shared, no state."""

    _strides: tuple[int, ...]
    _pool: bool

    def __init__(self, channels: Sequence[int], *, initial_keep: float = INITIAL_KEEP) -> None:
        super().__init__()
        self.channels = tuple(channels)
        units = [_FFGateUnit(width, self._strides, self._pool) for width in self.channels]
        self.units = nn.ModuleList(units)
        self.set_keep_(initial_keep)

    def forward(self, index: int, features: Tensor, state: State) -> tuple[Tensor, State]:
        return self.units[index](features), None

    def scale_logits_(self, factor: float) -> None:
        with torch.no_grad():
            for unit in self.units:
                assert isinstance(unit, _FFGateUnit)
                unit.linear.weight.mul_(factor)
                unit.linear.bias.mul_(factor)

    def shift_logits_(self, amount: float) -> None:
        with torch.no_grad():
            for unit in self.units:
                assert isinstance(unit, _FFGateUnit)
                unit.linear.bias.add_(torch.tensor([-amount / 2, amount / 2]).to(unit.linear.bias))

    def set_keep_(self, keep: float) -> None:
        half = _logit(keep) / 2
        with torch.no_grad():
            for unit in self.units:
                assert isinstance(unit, _FFGateUnit)
                unit.linear.bias.copy_(torch.tensor([-half, half]))


class FFGateI(_FFGate):
    """Feed-forward gate I (SkipNet, section 3.1), for networks of fewer than 100 layers.

    Max-pool 2x2, conv 3x3 stride 1, BN, ReLU, conv 3x3 stride 2, BN, ReLU, global average pool,
    linear to 2, softmax. About 15.6 % of a basic block of the same width.

    Args:
        channels: Number of channels each gate reads.
        initial_keep: Probability of execution that the bias of the linear stands for.
    """

    _strides = (1, 2)
    _pool = True


class FFGateII(_FFGate):
    """Feed-forward gate II (SkipNet, section 3.1), for networks of more than 100 layers.

    Conv 3x3 stride 2, BN, ReLU, global average pool, linear to 2, softmax. 12.5 % of a basic block
    of the same width.

    Args:
        channels: Number of channels each gate reads.
        initial_keep: Probability of execution that the bias of the linear stands for.
    """

    _strides = (2,)
    _pool = False


class StaticGate(Gate):
    """One learned logit a block, which sees no input: what per-input routing is held against.

    Trained as any other gate, it learns the best fixed subset of blocks of a budget; left untrained
    and sampled, it is stochastic depth at a constant rate (the paper's SDV). Costs nothing.

    Args:
        channels: Number of channels of the features, one entry a gate; only counted.
        initial_keep: Probability of execution at initialisation.
    """

    def __init__(self, channels: Sequence[int], *, initial_keep: float = INITIAL_KEEP) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.logits = nn.Parameter(torch.empty(len(self.channels)))
        self.set_keep_(initial_keep)

    def forward(self, index: int, features: Tensor, state: State) -> tuple[Tensor, State]:
        return self.logits[index].expand(len(features)), None

    def scale_logits_(self, factor: float) -> None:
        with torch.no_grad():
            self.logits.mul_(factor)

    def shift_logits_(self, amount: float) -> None:
        with torch.no_grad():
            self.logits.add_(amount)

    def set_keep_(self, keep: float) -> None:
        nn.init.constant_(self.logits, _logit(keep))


GATES: dict[str, type[Gate]] = {
    "rnn": RNNGate,
    "ff1": FFGateI,
    "ff2": FFGateII,
    "static": StaticGate,
}


def make_gate(name: GateName, channels: Sequence[int], layout: Layout = "maps") -> Gate:
    """Return a fresh gate.

    Args:
        name: Of its kind.
        channels: Number of channels each gate reads.
        layout: Of the features.

    Raises:
        UserError: When gates of this kind cannot read such features.
    """
    if name == "rnn":
        return RNNGate(channels, layout=layout)
    if layout == "tokens" and name in ("ff1", "ff2"):
        raise UserError(f"gate {name} convolves maps, and this network has tokens: use rnn")
    return GATES[name](channels)


def _logit(probability: float) -> float:
    if not 0 < probability < 1:
        raise UserError(f"initial_keep must lie between 0 and 1, not {probability}")
    return math.log(probability / (1 - probability))
