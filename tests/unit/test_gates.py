"""Gates against the paper's text, written out again with torch's own layers in float64."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import skipnet
from skipnet import FFGateI, FFGateII, RNNGate, StaticGate
from skipnet.routing.gates import GATES, Gate

CHANNELS = (4, 4, 6)


def perturbed(gate: Gate, seed: int = 0) -> Gate:
    """In float64 and evaluation, with no parameter or statistic left at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    gate = gate.double().eval()
    with torch.no_grad():
        for name, tensor in [*gate.named_parameters(), *gate.named_buffers()]:
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) / 3)
    return gate


def feature_maps(
    size: tuple[int, int], batch: int = 3, channels: Sequence[int] = CHANNELS
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, width, *size, dtype=torch.float64, generator=generator)
        for width in channels
    ]


def logits_of(gate: Gate, maps: list[Tensor]) -> Tensor:
    state, logits = None, []
    for index, features in enumerate(maps):
        logit, state = gate(index, features, state)
        logits.append(logit)
    return torch.stack(logits, dim=1)


def halve_decisions(gate: Gate, logits: Tensor) -> None:
    """Move the last biases so that about half of the decisions are to run."""
    with torch.no_grad():
        if isinstance(gate, RNNGate):
            gate.project.bias -= logits.mean()
        elif isinstance(gate, StaticGate):
            gate.logits[1] *= -1
        else:
            for unit, column in zip(gate.units, logits.T, strict=True):
                unit.linear.bias[1] -= column.mean()


def torch_lstm(gate: RNNGate) -> nn.LSTM:
    """torch's own sequence LSTM with the gate's weights."""
    cell = gate.lstm
    lstm = nn.LSTM(cell.input_size, cell.hidden_size).double()
    lstm.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return lstm


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 3), (8, 8)])
def test_rnn_gate_is_one_lstm_over_the_sequence_of_embedded_pooled_features(
    size: tuple[int, int],
) -> None:
    gate = perturbed(RNNGate(CHANNELS))
    assert isinstance(gate, RNNGate)
    maps = feature_maps(size)
    embedded = [
        functional.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1), e.weight, e.bias)
        for x, e in zip(maps, gate.embed, strict=True)
    ]
    hidden, _ = torch_lstm(gate)(torch.stack(embedded))
    expected = (hidden @ gate.project.weight[0] + gate.project.bias).T
    torch.testing.assert_close(logits_of(gate, maps), expected, rtol=0, atol=1e-12)


def reference_unit(unit: nn.Module, kind: str) -> nn.Sequential:
    """The layers as the paper lists them, softmax included, holding the unit's weights."""
    width = unit.linear.in_features

    def conv(stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(width), nn.ReLU()]

    layers = {
        "ff1": [nn.MaxPool2d(2, ceil_mode=False), *conv(1), *conv(2)],
        "ff2": conv(2),
    }[kind]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2), nn.Softmax(dim=1)]
    reference = nn.Sequential(*layers, *head).double().eval()
    for name, own in zip(reference.state_dict(), unit.state_dict(), strict=True):
        assert name.split(".")[-1] == own.split(".")[-1]
    values = zip(reference.state_dict(), unit.state_dict().values(), strict=True)
    reference.load_state_dict(dict(values))
    return reference


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (7, 7), (8, 8)])
@pytest.mark.parametrize("kind", ["ff1", "ff2"])
def test_ff_gate_probability_is_the_softmax_of_the_layers_in_the_paper(
    kind: str, size: tuple[int, int]
) -> None:
    gate = perturbed(GATES[kind](CHANNELS))
    maps = feature_maps(size)
    for index, features in enumerate(maps):
        logit, state = gate(index, features, None)
        execute = reference_unit(gate.units[index], kind)(features)[:, 1]
        assert state is None
        torch.testing.assert_close(torch.sigmoid(logit), execute, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1)])
def test_ff_gate_1_leaves_out_the_pooling_that_would_leave_nothing(size: tuple[int, int]) -> None:
    gate = perturbed(FFGateI(CHANNELS))
    for index, features in enumerate(feature_maps(size)):
        logit, _ = gate(index, features, None)
        without_pool = reference_unit(gate.units[index], "ff1")[1:]
        expected = without_pool(features)[:, 1]
        torch.testing.assert_close(torch.sigmoid(logit), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", GATES)
def test_gate_logits_are_one_a_row_and_rows_do_not_mix(kind: str) -> None:
    gate = perturbed(GATES[kind](CHANNELS))
    maps = feature_maps((5, 4), batch=3)
    together = logits_of(gate, maps)
    assert together.shape == (3, 3)
    for row in range(3):
        alone = logits_of(gate, [x[row : row + 1] for x in maps])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-12)


def test_rnn_gate_remembers_earlier_blocks_and_ff_gates_do_not() -> None:
    maps = feature_maps((4, 4))
    changed = [maps[0] + torch.rand_like(maps[0]), *maps[1:]]
    for kind, remembers in [("rnn", True), ("ff1", False), ("ff2", False)]:
        gate = perturbed(GATES[kind](CHANNELS))
        before, after = logits_of(gate, maps)[:, 1:], logits_of(gate, changed)[:, 1:]
        assert torch.equal(before, after) != remembers


@pytest.mark.parametrize("initial_keep", [None, 0.5, 0.99])
@pytest.mark.parametrize("kind", GATES)
def test_initial_keep_probability_when_nothing_but_the_bias_speaks(
    kind: str, initial_keep: float | None
) -> None:
    options = {} if initial_keep is None else {"initial_keep": initial_keep}
    gate = GATES[kind](CHANNELS, **options).double().eval()
    with torch.no_grad():
        for name, parameter in gate.named_parameters():
            if not name.endswith(("project.bias", "linear.bias", "logits")):
                parameter.zero_()
    probability = torch.sigmoid(logits_of(gate, feature_maps((4, 4))))
    expected = torch.full_like(probability, initial_keep or 0.9)
    torch.testing.assert_close(probability, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", GATES)
def test_fresh_gates_leave_blocks_open(kind: str) -> None:
    torch.manual_seed(0)
    gate = GATES[kind](CHANNELS).double()
    maps = [x.relu() for x in feature_maps((8, 8), batch=16)]
    assert (logits_of(gate, maps) > 0).float().mean() > 0.9


@pytest.mark.parametrize("initial_keep", [0.0, 1.0, -0.1, 2.0])
@pytest.mark.parametrize("kind", GATES)
def test_initial_keep_must_be_a_probability_with_a_logit(kind: str, initial_keep: float) -> None:
    with pytest.raises(ValueError, match="initial_keep"):
        GATES[kind](CHANNELS, initial_keep=initial_keep)


@pytest.mark.parametrize("factor", [0.1, 1.0, 7.3])
@pytest.mark.parametrize("kind", GATES)
def test_scale_logits_multiplies_every_logit_and_changes_no_decision(
    kind: str, factor: float
) -> None:
    gate = perturbed(GATES[kind](CHANNELS))
    maps = feature_maps((5, 5), batch=32)
    halve_decisions(gate, logits_of(gate, maps))
    scaled = copy.deepcopy(gate)
    scaled.scale_logits_(factor)
    before, after = logits_of(gate, maps), logits_of(scaled, maps)
    assert 0.3 < (before > 0).float().mean() < 0.7
    torch.testing.assert_close(after, before * factor, rtol=1e-12, atol=1e-12)
    assert torch.equal(after > 0, before > 0)
    assert all(parameter.requires_grad for parameter in scaled.parameters())


def test_rnn_gate_has_one_lstm_and_one_projection_and_an_embedding_a_block() -> None:
    shapes = {name: tuple(p.shape) for name, p in RNNGate((16, 16, 32, 64)).named_parameters()}
    assert shapes == {
        "embed.0.weight": (10, 16),
        "embed.0.bias": (10,),
        "embed.1.weight": (10, 16),
        "embed.1.bias": (10,),
        "embed.2.weight": (10, 32),
        "embed.2.bias": (10,),
        "embed.3.weight": (10, 64),
        "embed.3.bias": (10,),
        "lstm.weight_ih": (40, 10),
        "lstm.weight_hh": (40, 10),
        "lstm.bias_ih": (40,),
        "lstm.bias_hh": (40,),
        "project.weight": (1, 10),
        "project.bias": (1,),
    }


@pytest.mark.parametrize(("gate", "convolutions"), [(FFGateI, 2), (FFGateII, 1)])
def test_ff_gates_share_nothing(gate: type[Gate], convolutions: int) -> None:
    wide = sum(p.numel() for p in gate((16, 32)).parameters())
    apart = sum(p.numel() for width in (16, 32) for p in gate((width,)).parameters())
    assert wide == apart
    by_hand = sum(convolutions * (9 * c * c + 2 * c) + 2 * c + 2 for c in (16, 32))
    assert wide == by_hand


@pytest.mark.parametrize("kind", GATES)
def test_every_gate_parameter_gets_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    gate = GATES[kind](CHANNELS).double()
    maps = [x.requires_grad_() for x in feature_maps((4, 4))]
    logits_of(gate, maps).square().sum().backward()
    read = [] if kind == "static" else list(enumerate(maps))
    for name, tensor in [*gate.named_parameters(), *read]:
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name


def test_static_gate_sees_nothing_and_costs_nothing() -> None:
    gate = perturbed(StaticGate(CHANNELS))
    logits = logits_of(gate, feature_maps((4, 4), batch=5))
    assert torch.equal(logits, gate.logits.expand(5, -1))
    assert skipnet.create("cifar_resnet20", gate="static").cost(3, 32, 32).gates == (0,) * 8


@pytest.mark.parametrize("kind", GATES)
def test_set_keep_is_the_initial_keep(kind: str) -> None:
    torch.manual_seed(0)
    fresh = GATES[kind](CHANNELS, initial_keep=0.3)
    torch.manual_seed(0)
    changed = GATES[kind](CHANNELS)
    changed.set_keep_(0.3)
    for (name, one), other in zip(fresh.named_parameters(), changed.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", GATES)
def test_shift_adds_to_every_logit(kind: str) -> None:
    gate, maps = perturbed(GATES[kind](CHANNELS)), feature_maps((4, 4))
    before = logits_of(gate, maps)
    gate.shift_logits_(-0.75)
    torch.testing.assert_close(logits_of(gate, maps), before - 0.75, rtol=0, atol=1e-12)
