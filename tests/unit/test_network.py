"""SkipNet: what it is put together from, what it records, and the names of its weights."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import skipnet
from skipnet import FFGateII, RNNGate, SkipNet, UserError
from skipnet.routing.cost import Cost
from skipnet.routing.trace import Routing


class Block(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + shortcut)


def parts(num_blocks: int, num_shortcuts: int | None = None, bias: bool = False) -> dict:
    return {
        "stem": nn.Conv2d(3, 2, 3, padding=1, bias=bias),
        "blocks": [Block(bias) for _ in range(num_blocks)],
        "shortcuts": [nn.Identity() for _ in range(num_shortcuts or num_blocks)],
        "head": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4)),
    }


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_fewer_than_two_blocks_leave_nothing_to_route(num_blocks: int) -> None:
    with pytest.raises(UserError, match="at least 2"):
        SkipNet(**parts(num_blocks))


@pytest.mark.parametrize("num_shortcuts", [2, 4])
def test_a_shortcut_a_block(num_shortcuts: int) -> None:
    with pytest.raises(UserError, match=f"3 blocks but {num_shortcuts} shortcuts"):
        SkipNet(**parts(3, num_shortcuts))


@pytest.mark.parametrize("num_gates", [1, 3])
def test_one_gate_fewer_than_blocks(num_gates: int) -> None:
    with pytest.raises(UserError, match=f"3 blocks need 2 gates, not {num_gates}"):
        SkipNet(**parts(3), gate=RNNGate((2,) * num_gates))


@pytest.mark.parametrize(
    "gate", [None, RNNGate((2, 2)), FFGateII((2, 2))], ids=lambda g: type(g).__name__
)
def test_routing_has_a_row_an_image_and_a_column_a_gate(gate: nn.Module | None) -> None:
    network = SkipNet(**parts(3), gate=gate)
    logits, routing = network(torch.randn(5, 3, 4, 4))
    num_gates = 0 if gate is None else 2
    assert network.num_gates == num_gates
    assert logits.shape == (5, 4)
    assert routing.logits.shape == routing.decisions.shape == (5, num_gates)
    assert routing.executed.shape == (5, num_gates) and routing.executed.dtype == torch.bool
    assert routing.macs.shape == (5,) and routing.macs.dtype == torch.int64
    assert routing.keep_rates.shape == (num_gates,)
    assert not routing.decisions.requires_grad
    assert routing.logits.requires_grad == bool(num_gates)


@pytest.mark.parametrize("execute", ["masked", "compacted"])
def test_dense_network_runs_everything(execute: str) -> None:
    network = skipnet.create("cifar_resnet20").eval()
    _, routing = network(torch.randn(3, 3, 8, 8), execute=execute)
    assert routing.blocks_fraction == 1
    assert routing.macs_fraction == 1
    assert routing.macs.tolist() == [network.cost(3, 8, 8).dense] * 3


@pytest.mark.parametrize("name", ["compact", "", "Masked"])
def test_unknown_executor_names_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="masked, compacted"):
        SkipNet(**parts(2))(torch.zeros(1, 3, 4, 4), execute=name)


def test_unknown_decision_is_refused() -> None:
    with pytest.raises(UserError, match="unknown decision 'hard'"):
        SkipNet(**parts(2))(torch.zeros(1, 3, 4, 4), decide="hard")


def test_threshold_and_masked_are_the_defaults() -> None:
    network = skipnet.create("cifar_resnet20", gate="rnn").eval()
    images = torch.randn(3, 3, 8, 8)
    expected, _ = network(images, decide="threshold", execute="masked")
    assert torch.equal(network(images)[0], expected)


COST = Cost(stem=100, blocks=(10, 20, 30), shortcuts=(0, 3, 0), gates=(1, 2), head=5)


def test_cost_arithmetic() -> None:
    assert COST.dense == 100 + 60 + 3 + 5
    assert COST.dense_without_projections == 160
    # Everything but the two gated blocks, the projection of the first of them included.
    assert COST.always == 100 + 10 + 3 + 3 + 5
    decisions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.2, 0.0]])
    assert COST.executed(decisions).tolist() == [121, 141, 151, 171, 141]
    dense = COST._replace(gates=())
    assert dense.always == dense.dense
    assert dense.executed(torch.zeros(2, 0)).tolist() == [168, 168]


def routing_of(decisions: list[list[float]]) -> Routing:
    return Routing(
        logits=torch.zeros(len(decisions), 2), decisions=torch.tensor(decisions).float(), cost=COST
    )


def test_routing_fractions_by_hand() -> None:
    routing = routing_of([[0, 0], [1, 0], [1, 0], [1, 1]])
    assert routing.keep_rates.tolist() == [0.75, 0.25]
    # Blocks run, the first counted: 1, 2, 2 and 3 of 3.
    assert routing.blocks_fraction == pytest.approx(8 / 12)
    assert routing.macs_fraction == pytest.approx((121 + 141 + 141 + 171) / 4 / 168)


def test_soft_weights_run_a_block_unless_they_are_0() -> None:
    routing = routing_of([[0.3, 0.0], [1.0, 1e-6]])
    assert routing.executed.tolist() == [[True, False], [True, True]]
    assert routing.macs.tolist() == [141, 171]


def test_cost_leaves_the_network_as_it_was() -> None:
    network = skipnet.create("cifar_resnet20", gate="ff1").train()
    before = copy.deepcopy(network.state_dict())
    network.cost(3, 10, 7)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [None, "rnn", "ff1", "ff2"])
def test_cost_does_not_depend_on_the_precision_of_the_weights(
    gate: str | None, dtype: torch.dtype
) -> None:
    network = skipnet.create("cifar_resnet20", gate=gate)
    assert network.to(dtype).cost(3, 9, 5) == skipnet.create("cifar_resnet20", gate=gate).cost(
        3, 9, 5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_biased_convolutions_works_in_any_precision(dtype: torch.dtype) -> None:
    network = SkipNet(**parts(3, bias=True), gate=RNNGate((2, 2))).to(dtype)
    logits, _ = network(torch.zeros(2, 3, 4, 4, dtype=dtype))
    assert logits.dtype == dtype


def test_cost_knows_groups_strides_and_dilation() -> None:
    grouped = nn.Conv2d(
        4, 8, (3, 5), stride=(2, 1), padding=1, groups=2, dilation=(1, 2), bias=False
    )
    network = SkipNet(
        stem=nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), grouped, nn.Conv2d(8, 2, 1, bias=False)),
        **{name: part for name, part in parts(2).items() if name != "stem"},
    )
    height, width = 9, 12
    out_height = math.floor((height + 2 - 3) / 2) + 1
    out_width = width + 2 - 2 * 4
    pixels = out_height * out_width
    expected = 3 * 4 * height * width + 8 * 2 * 15 * pixels + 8 * 2 * pixels
    assert network.cost(3, height, width).stem == expected


def test_a_layer_without_a_rule_is_not_counted_as_free() -> None:
    network = SkipNet(**{**parts(2), "stem": nn.ConvTranspose2d(3, 2, 3, padding=1)})
    assert network.cost(3, 4, 4).stem == 4 * 4 * 3 * 2 * 9


def test_names_of_the_weights_are_stable() -> None:
    network = skipnet.create("cifar_resnet20", gate="rnn")
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = [
        "conv1.weight",
        *(f"bn1.{n}" for n in norm),
        "conv2.weight",
        *(f"bn2.{n}" for n in norm),
    ]
    projection = ["0.weight", *(f"1.{n}" for n in norm)]
    expected = [
        *("stem.0.weight", *(f"stem.1.{n}" for n in norm)),
        *(f"blocks.{i}.{name}" for i in range(9) for name in block),
        *(f"shortcuts.{i}.{name}" for i in (3, 6) for name in projection),
        *("head.2.weight", "head.2.bias"),
        *(f"gate.embed.{i}.{name}" for i in range(8) for name in ("weight", "bias")),
        *(f"gate.lstm.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *("gate.project.weight", "gate.project.bias"),
    ]
    assert list(network.state_dict()) == expected


@pytest.mark.parametrize(("gate", "convolutions"), [("ff1", (0, 3)), ("ff2", (0,))])
def test_names_of_the_ff_gates_weights_are_stable(gate: str, convolutions: tuple[int, ...]) -> None:
    names = skipnet.create("cifar_resnet20", gate=gate).gate.state_dict()
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    unit = [
        *(
            n
            for i in convolutions
            for n in (f"layers.{i}.weight", *(f"layers.{i + 1}.{x}" for x in norm))
        ),
        *("linear.weight", "linear.bias"),
    ]
    assert list(names) == [f"units.{i}.{name}" for i in range(8) for name in unit]


@pytest.mark.slow
def test_torch_compile_of_a_network_never_run_before() -> None:
    """Its cost is counted on the first forward, which the compiler must leave alone."""
    network = skipnet.create("cifar_resnet20", gate="rnn").eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        logits, routing = torch.compile(network, backend="eager")(images)
        expected, _ = network(images)
    torch.testing.assert_close(logits, expected)
    assert routing.cost == network.cost(3, 8, 8)
