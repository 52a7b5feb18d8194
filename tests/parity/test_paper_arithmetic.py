"""Multiply-adds against the papers' arithmetic, written out, and against torch's own counter."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import skipnet
from skipnet import Fixed, Random
from skipnet.models import describe
from skipnet.routing.cost import Cost

WIDTHS = (16, 32, 64)


def depth(name: str) -> int:
    return int(name.removeprefix("cifar_resnet"))


def cost_of(name: str, gate: str | None = None, size: tuple[int, int] = (32, 32)) -> Cost:
    return skipnet.create(name, gate=gate).cost(3, *size)


def convolutions_by_hand(depth: int) -> int:
    """He et al. 2015, table 6: 1 + 2n layers on 32x32x16, 2n on 16x16x32, 2n on 8x8x64."""
    n = (depth - 2) // 6
    stem = 9 * 3 * 16 * 32**2
    # Every convolution within a stage costs the same; the first of stages 2 and 3 has half
    # as many input channels.
    full = 9 * 16 * 16 * 32**2
    return stem + 2 * n * full + 2 * ((2 * n - 1) * full + full // 2)


PROJECTIONS = 16 * 32 * 16**2 + 32 * 64 * 8**2


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar_resnet32", 68.9),
        ("cifar_resnet38", 83.0),
        ("cifar_resnet74", 168.0),
        ("cifar_resnet110", 252.9),
    ],
)
def test_dense_multiply_adds_of_the_paper(name: str, millions: float) -> None:
    assert round(cost_of(name).dense_without_projections / 1e6, 1) == millions


@pytest.mark.parametrize("name", skipnet.list_models("cifar_resnet*"))
def test_dense_multiply_adds_by_hand(name: str) -> None:
    cost = cost_of(name)
    assert cost.dense_without_projections == convolutions_by_hand(depth(name))
    assert sum(cost.shortcuts) == PROJECTIONS
    assert cost.head == 64 * 10
    assert cost.dense == convolutions_by_hand(depth(name)) + PROJECTIONS + 640


@pytest.mark.parametrize("name", skipnet.list_models("cifar_resnet*"))
def test_documented_figures(name: str) -> None:
    match = re.fullmatch(
        r"ResNet-(\d+): (\d+) blocks, ([\d.]+)M multiply-adds at 32x32\.", describe(name)
    )
    assert match
    cost = cost_of(name)
    assert int(match[1]) == depth(name)
    assert int(match[2]) == len(cost.blocks) == (depth(name) - 2) // 2
    assert match[3] == f"{cost.dense_without_projections / 1e6:.1f}"


def same_width_blocks(cost: Cost) -> list[int]:
    """Gates i whose own channels are those of the block they decide about."""
    n = len(cost.blocks) // 3
    return [i for i in range(len(cost.gates)) if (i + 1) % n]


@pytest.mark.parametrize(
    ("name", "gate", "percent"),
    [("cifar_resnet38", "ff1", 15.6), ("cifar_resnet110", "ff2", 12.5)],
)
def test_ff_gate_share_of_a_block(name: str, gate: str, percent: float) -> None:
    cost = cost_of(name, gate)
    shares = [100 * cost.gates[i] / cost.blocks[i + 1] for i in same_width_blocks(cost)]
    assert len(shares) == len(cost.blocks) - 3
    assert [round(share, 1) for share in shares] == [percent] * len(shares)


def test_rnn_gate_share_of_a_block_is_at_most_0_04_percent() -> None:
    cost = cost_of("cifar_resnet110", "rnn")
    shares = [100 * cost.gates[i] / cost.blocks[i + 1] for i in same_width_blocks(cost)]
    assert max(shares) <= 0.04


def test_gates_by_hand() -> None:
    # (channels, pixels) of the output of blocks 0 to 7.
    maps = [(16, 32**2)] * 3 + [(32, 16**2)] * 3 + [(64, 8**2)] * 2
    rnn = [10 * c + 4 * 10 * (10 + 10) + 10 for c, _ in maps]
    ff1 = [9 * c * c * pixels // 4 + 9 * c * c * pixels // 16 + 2 * c for c, pixels in maps]
    ff2 = [9 * c * c * pixels // 4 + 2 * c for c, pixels in maps]
    for kind, expected in {"rnn": rnn, "ff1": ff1, "ff2": ff2}.items():
        assert list(cost_of("cifar_resnet20", kind).gates) == expected


def test_gates_leave_the_dense_figure_alone() -> None:
    dense = cost_of("cifar_resnet20")
    assert dense.gates == ()
    for kind in ("rnn", "ff1", "ff2"):
        gated = cost_of("cifar_resnet20", kind)
        assert gated.dense == dense.dense and gated.blocks == dense.blocks


@pytest.mark.parametrize("size", [(32, 32), (9, 13), (8, 8), (5, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2", None])
def test_executed_multiply_adds_are_those_torch_counts(
    gate: str | None, size: tuple[int, int]
) -> None:
    # FlopCounterMode counts convolutions and matrix products, an LSTM cell being two of them, at
    # two a multiply-add; biases, normalisation, activations and pooling it leaves out as we do.
    network = skipnet.create("cifar_resnet20", gate=gate).eval()
    network.cost(3, *size)
    images = torch.randn(4, 3, *size)
    sample = torch.Generator().manual_seed(0)
    decisions = [Random(0.5, sample), Fixed(torch.zeros(8)), Fixed(torch.ones(8))]
    totals = []
    for decide in decisions:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _, routing = network(images, decide=decide, execute="compacted")
        totals.append(2 * routing.macs.sum().item())
        assert counter.get_total_flops() == totals[-1]
    if gate is not None:
        assert totals[1] < totals[0] < totals[2]


@pytest.mark.parametrize("size", [(8, 8), (9, 13)], ids=str)
def test_masked_execution_runs_the_dense_network_and_its_gates(size: tuple[int, int]) -> None:
    network = skipnet.create("cifar_resnet20", gate="ff1").eval()
    cost = network.cost(3, *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.randn(3, 3, *size), decide=Fixed(torch.zeros(8)), execute="masked")
    assert counter.get_total_flops() == 2 * 3 * (cost.dense + sum(cost.gates))


def test_row_by_row_multiply_adds_are_those_of_the_row_alone() -> None:
    network = skipnet.create("cifar_resnet20", gate="ff2").eval()
    network.cost(3, 8, 8)
    images = torch.randn(3, 3, 8, 8)
    mask = torch.tensor([[0] * 8, [1, 0] * 4, [1] * 8])
    _, routing = network(images, decide=Fixed(mask))
    for row in range(3):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(images[row : row + 1], decide=Fixed(mask[row]), execute="compacted")
        assert counter.get_total_flops() == 2 * routing.macs[row].item()
