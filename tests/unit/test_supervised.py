"""Supervised training: cross-entropy alone, through decisions."""

import math

import pytest
import torch
from torch import Tensor

from skipnet import Fixed, SkipNet, UserError
from skipnet.models.resnet_cifar import cifar_resnet
from skipnet.tasks.supervised import Supervised


def small(gate: str | None = "rnn") -> SkipNet:
    torch.manual_seed(0)
    return cifar_resnet(8, gate=gate, num_classes=3, in_channels=1, widths=(2, 3, 4)).double()


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 1, 6, 6, dtype=torch.float64, generator=generator)
    return images, torch.arange(rows) % 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_cross_entropy(smoothing: float) -> None:
    network, (images, labels) = small().train(), batch()
    mask = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    metrics = Supervised(decide=Fixed(mask), label_smoothing=smoothing)(network, images, labels, 0)
    logits = network(images, decide=Fixed(mask))[0].tolist()
    total = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        log_total = math.log(sum(math.exp(x) for x in row))
        for index, x in enumerate(row):
            share = smoothing / 3 + (1 - smoothing) * (index == label)
            total += share * (log_total - x) / len(logits)
    assert metrics["loss"].item() == pytest.approx(total, rel=1e-9)
    assert metrics["keep_rate"].item() == 0.5
    right = [row.index(max(row)) == label for row, label in zip(logits, labels, strict=True)]
    assert metrics["accuracy"].item() == pytest.approx(sum(right) / 4)


def test_straight_through_by_default_reaches_gates_and_blocks() -> None:
    network = small().train()
    Supervised()(network, *batch(), 0)["loss"].backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.gate.project.bias.grad.abs() > 0
    assert network.gate.embed[0].weight.grad.abs().sum() > 0


def test_there_is_no_cost_term() -> None:
    """Where executing a block changes nothing, its gate is left alone."""
    network, (images, labels) = small().train(), batch()
    with torch.no_grad():
        network.head[-1].weight.zero_()
    Supervised()(network, images, labels, 0)["loss"].backward()
    assert not any(p.grad.any() for p in network.gate.parameters())


def test_a_dense_network_has_no_keep_rate() -> None:
    metrics = Supervised()(small(None), *batch(), 0)
    assert set(metrics) == {"loss", "accuracy"}


def test_metrics_are_detached_scalars() -> None:
    for name, value in Supervised()(small(), *batch(), 0).items():
        assert value.ndim == 0 and value.requires_grad == (name == "loss"), name


def test_compacted_straight_through_is_refused() -> None:
    with pytest.raises(UserError, match="masked"):
        Supervised(execute="compacted")(small().train(), *batch(), 0)


def test_nothing_to_save() -> None:
    assert Supervised().state_dict() == {}
    Supervised().load_state_dict({})
