"""Supervised training: cross-entropy alone, through decisions."""

import math

import pytest
import torch
from torch import Tensor

from skipnet import Fixed, SkipNet
from skipnet.models.resnet_cifar import cifar_resnet
from skipnet.tasks.budget import Budget, Landing
from skipnet.tasks.criterion import Criterion
from skipnet.tasks.rewards import CostName
from skipnet.tasks.supervised import DecideName, Supervised


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
    task = Supervised(decide=Fixed(mask), criterion=Criterion(label_smoothing=smoothing))
    metrics = task(network, images, labels, 0)
    logits = network(images, decide=Fixed(mask), execute="compacted")[0].tolist()
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
    assert set(metrics) == {"loss", "cross_entropy", "accuracy"}


def test_metrics_are_detached_scalars() -> None:
    for name, value in Supervised()(small(), *batch(), 0).items():
        assert value.ndim == 0 and value.requires_grad == (name == "loss"), name


@pytest.mark.parametrize("decide", ["sample", "threshold"])
def test_decisions_without_gradient_leave_the_gates_alone(decide: DecideName) -> None:
    network = small().train()
    Supervised(decide=decide)(network, *batch(), 0)["loss"].backward()
    assert network.gate is not None
    # None, not zero: weight decay would move what has a gradient of zero.
    assert all(p.grad is None for p in network.gate.parameters())
    assert network.blocks[0].conv1.weight.grad.any()


@pytest.mark.parametrize("costs", ["uniform", "macs"])
def test_price_is_alpha_times_the_mean_cost_of_what_runs(costs: CostName) -> None:
    network = small().train()
    free = Supervised(alpha=0.0)(network, *batch(), 0)
    paid = Supervised(alpha=0.7, costs=costs)(network, *batch(), 0)
    _, routing = network(batch()[0], decide="straight-through")
    macs = network.cost(1, 6, 6).blocks[1:]
    weights = [1.0, 1.0] if costs == "uniform" else [2 * m / sum(macs) for m in macs]
    rates = routing.executed.double().mean(dim=0).tolist()
    expected = 0.7 * sum(w * rate for w, rate in zip(weights, rates, strict=True)) / 2
    assert paid["loss"].item() - free["loss"].item() == pytest.approx(expected, rel=1e-9)


def test_diversity_is_subtracted() -> None:
    network = small().train()
    plain = Supervised()(network, *batch(), 0)
    diverse = Supervised(diversity=2.0)(network, *batch(), 0)
    difference = plain["loss"] - diverse["loss"]
    assert difference.item() == pytest.approx(2 * plain["information"].item(), rel=1e-9)
    assert plain["information"] > 0


def test_decisions_depend_on_seed_and_step_alone() -> None:
    def losses(seed: int) -> list[float]:
        network = small().eval()
        task = Supervised(decide="sample", seed=seed)
        return [task(network, *batch(), step)["loss"].item() for step in (0, 1, 0)]

    first = losses(0)
    assert first[0] == first[2] != first[1]
    assert losses(0) == first != losses(1)


def test_state_is_that_of_the_budget() -> None:
    def task() -> Supervised:
        return Supervised(decide="gumbel", budget=Budget(0.3, 5, 0.5, 2.0), alpha=0.1)

    whole, network = task(), small().train()
    for step in range(3):
        whole(network, *batch(), step)
    resumed = task()
    resumed.load_state_dict(whole.state_dict())
    assert resumed.alpha == whole.alpha != 0.1
    assert resumed.state_dict() == whole.state_dict()


def test_a_checkpoint_without_state_leaves_alpha() -> None:
    task = Supervised(alpha=0.3)
    task.load_state_dict({})
    assert task.alpha == 0.3


def test_a_budget_of_soft_gates_is_told_what_they_decide_at_test() -> None:
    """Every block runs in training, whatever g: counting that, no price would ever be enough."""
    network = small().train()
    network.gate.set_keep_(0.01)
    budget = Budget(0.5, 1, 0.5, 2.0)
    metrics = Supervised(decide="soft", budget=budget)(network, *batch(), 0)
    cost = network.cost(1, 6, 6)
    assert metrics["macs_fraction"].item() == pytest.approx(cost.always / cost.dense)
    assert budget.average == metrics["macs_fraction"].item()


@pytest.mark.parametrize("decide", ["straight-through", "gumbel", "soft"])
def test_after_landing_gates_decide_as_at_inference_and_learn_no_more(decide: DecideName) -> None:
    network, (images, labels) = small().train(), batch()
    calls: list[int] = []
    budget = Budget(target=0.5, ramp_steps=1, rate=1.0, damping=1.0)
    landing = Landing(gate=network.gate, step=1, land=lambda: calls.append(1))
    task = Supervised(decide=decide, budget=budget, diversity=0.5, landing=landing)
    task(network, images, labels, 0)
    assert not calls
    alpha = task.alpha
    for step in (1, 2):
        logits, _ = network(images, decide="threshold", execute="compacted")
        loss = task(network, images, labels, step)["loss"]
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
        loss.backward()
        assert all(p.grad is None for p in network.gate.parameters())  # type: ignore[union-attr]
    assert len(calls) == 1 and task.alpha == alpha
