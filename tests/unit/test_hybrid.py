"""HRL's terms against plain loops, its value by hand, and the budget on a simulated network.

That its gradient is that of the objective is proven in parity/test_estimator.py.
"""

import copy
import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import skipnet
from skipnet import Fixed, SkipNet, UserError
from skipnet.models.resnet_cifar import cifar_resnet
from skipnet.routing.cost import Cost
from skipnet.routing.decisions import Flip
from skipnet.seeding import DECISIONS, sub_seed
from skipnet.tasks.budget import Budget, HeadStart, Landing
from skipnet.tasks.criterion import Criterion
from skipnet.tasks.hybrid import Hybrid
from skipnet.tasks.rewards import (
    block_costs,
    entropy,
    flip_loss,
    gate_returns,
    information,
    log_probability,
    others_mean,
    policy_loss,
    reward_to_go,
    skip_rewards,
)
from skipnet.tasks.supervised import Supervised

COST = Cost(stem=7, blocks=(1000, 20, 60, 40), shortcuts=(0, 5, 0, 0), gates=(1, 1, 1), head=3)


def matrices(low: float = -5, high: float = 5) -> st.SearchStrategy[list[list[float]]]:
    return st.integers(1, 5).flatmap(
        lambda gates: st.lists(
            st.lists(st.floats(low, high), min_size=gates, max_size=gates), min_size=1, max_size=4
        )
    )


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_block_costs_by_hand() -> None:
    assert block_costs(COST, "uniform").tolist() == [1, 1, 1]
    # The first block has no gate; the others' mean is 40.
    assert block_costs(COST, "macs").tolist() == [0.5, 1.5, 1]


def test_skip_rewards_by_hand() -> None:
    rewards = skip_rewards(double([[0, 1, 0], [1, 1, 0]]), double([0.5, 1.5, 1]))
    assert rewards.tolist() == [[0.5, 0, 1], [0, 0, 1]]


@settings(max_examples=25, deadline=None)
@given(values=matrices())
def test_reward_to_go_is_the_sum_from_here_on(values: list[list[float]]) -> None:
    expected = [[sum(row[i:]) for i in range(len(row))] for row in values]
    torch.testing.assert_close(reward_to_go(double(values)), double(expected))


@settings(max_examples=25, deadline=None)
@given(rewards=matrices(0, 2), alpha=st.floats(0, 4), beta=st.floats(0, 2))
def test_gate_returns_are_those_of_the_paper(
    rewards: list[list[float]], alpha: float, beta: float
) -> None:
    losses = [0.5 + row for row in range(len(rewards))]
    num_gates = len(rewards[0])
    expected = [
        [-(beta * loss - alpha / num_gates * sum(row[i:])) for i in range(num_gates)]
        for loss, row in zip(losses, rewards, strict=True)
    ]
    returns = gate_returns(double(losses), double(rewards), alpha, beta)
    torch.testing.assert_close(returns, double(expected))


def test_gate_returns_are_constants() -> None:
    losses = double([1.0]).requires_grad_()
    assert not gate_returns(losses, double([[1.0, 0.0]]), 1.0, 1.0).requires_grad


@settings(max_examples=25, deadline=None)
@given(logits=matrices(-30, 30), data=st.data())
def test_log_probability_is_bernoullis(logits: list[list[float]], data: st.DataObject) -> None:
    decisions = [[float(data.draw(st.booleans())) for _ in row] for row in logits]
    expected = [
        # log(sigmoid(x)) and log(1 - sigmoid(x)).
        [-math.log1p(math.exp(-x if g else x)) for x, g in zip(row, chosen, strict=True)]
        for row, chosen in zip(logits, decisions, strict=True)
    ]
    actual = log_probability(double(logits), double(decisions))
    torch.testing.assert_close(actual, double(expected), rtol=1e-9, atol=1e-12)


def test_score_is_decision_less_probability() -> None:
    logits = double([[-2.0, 0.0, 3.0]]).requires_grad_()
    decisions = double([[1.0, 0.0, 1.0]])
    log_probability(logits, decisions).sum().backward()
    expected = [[g - 1 / (1 + math.exp(-x)) for x, g in ((-2, 1), (0, 0), (3, 1))]]
    torch.testing.assert_close(logits.grad, double(expected))


@settings(max_examples=25, deadline=None)
@given(values=matrices(-20, 20))
def test_entropy_and_its_gradient(values: list[list[float]]) -> None:
    logits = double(values).requires_grad_()
    result = entropy(logits)
    result.sum().backward()
    for row, line in enumerate(values):
        for column, x in enumerate(line):
            p, q = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))
            expected = -p * math.log(p) - q * math.log(q)
            assert result[row, column].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
            # dH/dx = -x p (1 - p)
            gradient = logits.grad[row, column].item()
            assert gradient == pytest.approx(-x * p * q, rel=1e-9, abs=1e-12)


def test_entropy_of_the_undecided_and_of_the_certain() -> None:
    result = entropy(torch.tensor([[0.0, -200.0, 200.0]])).tolist()[0]
    assert result == pytest.approx([math.log(2), 0, 0], abs=1e-6)


def test_log_probability_of_the_certain_is_finite() -> None:
    logits = torch.tensor([[-200.0, 200.0]])
    assert log_probability(logits, torch.tensor([[1.0, 0.0]])).tolist() == [[-200, -200]]
    assert log_probability(logits, torch.tensor([[0.0, 1.0]])).tolist() == [[0, 0]]


@settings(max_examples=25, deadline=None)
@given(values=matrices())
def test_others_mean_leaves_each_row_out_of_its_own(values: list[list[float]]) -> None:
    expected = []
    for row in range(len(values)):
        others = values[:row] + values[row + 1 :]
        columns = zip(*others, strict=True) if others else [[0.0]] * len(values[0])
        expected.append([sum(column) / len(column) for column in columns])
    torch.testing.assert_close(others_mean(double(values)), double(expected))


def test_others_mean_over_samples() -> None:
    # [samples, images, gates]: only the image's own samples count.
    returns = double([[[1.0], [10.0]], [[2.0], [20.0]], [[6.0], [60.0]]])
    assert others_mean(returns).tolist() == [[[4], [40]], [[3.5], [35]], [[1.5], [15]]]


@settings(max_examples=25, deadline=None)
@given(logits=matrices(), seed=st.integers(0, 1000))
def test_policy_loss_is_a_sum_over_gates_and_a_mean_over_images(
    logits: list[list[float]], seed: int
) -> None:
    source = random.Random(seed)
    decisions = [[float(source.random() < 0.5) for _ in row] for row in logits]
    advantages = [[source.uniform(-3, 3) for _ in row] for row in logits]
    total = 0.0
    for row in range(len(logits)):
        for x, g, a in zip(logits[row], decisions[row], advantages[row], strict=True):
            p = 1 / (1 + math.exp(-x))
            total -= a * math.log(p if g else 1 - p)
    result = policy_loss(double(logits), double(decisions), double(advantages)).item()
    assert result == pytest.approx(total / len(logits), rel=1e-9, abs=1e-12)


# Hybrid as a whole.


def small(gate: str | None = "rnn") -> SkipNet:
    torch.manual_seed(0)
    return cifar_resnet(8, gate=gate, num_classes=3, in_channels=1, widths=(2, 3, 4)).double()


def batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 1, 6, 6, dtype=torch.float64, generator=generator)
    return images, torch.arange(rows) % 3


class Recorder(nn.Module):
    """Keeps what a network decided."""

    def __init__(self, network: SkipNet) -> None:
        super().__init__()
        self.network = network
        self.routings: list[skipnet.Routing] = []

    def forward(self, images: Tensor, **options: Any) -> Any:
        logits, routing = self.network(images, **options)
        self.routings.append(routing)
        return logits, routing


def cross_entropy_by_hand(row: list[float], label: int, smoothing: float) -> float:
    log_total = math.log(sum(math.exp(x) for x in row))
    target = [smoothing / len(row) + (1 - smoothing) * (i == label) for i in range(len(row))]
    return sum(t * (log_total - x) for t, x in zip(target, row, strict=True))


def returns_by_hand(
    losses: list[float], decisions: list[list[float]], costs: list[float], alpha: float, beta: float
) -> list[list[float]]:
    rewards = [[(1 - g) * c for g, c in zip(row, costs, strict=True)] for row in decisions]
    return [
        [alpha / len(costs) * sum(row[i:]) - beta * loss for i in range(len(costs))]
        for loss, row in zip(losses, rewards, strict=True)
    ]


@pytest.mark.parametrize(
    ("baseline", "samples"),
    [
        ("none", 1),
        ("none", 2),
        ("batch-mean", 1),
        ("batch-mean", 2),
        ("greedy", 1),
        ("greedy", 2),
        ("leave-one-out", 2),
        ("leave-one-out", 3),
    ],
)
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_value_by_hand(
    baseline: str, samples: int, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"alpha": 0.7}
    if variant == "everything":
        options |= {"beta": None, "policy_weight": 0.3, "entropy_bonus": 0.2}
        options |= {"costs": "macs", "criterion": Criterion(label_smoothing=0.1)}
    network, (images, labels) = small().train(), batch()
    rows = len(images) * samples
    mask = torch.rand(rows, 2, generator=torch.Generator().manual_seed(5)) < 0.6
    again = copy.deepcopy(network)
    monkeypatch.setattr("skipnet.tasks.hybrid.Sample", lambda generator: Fixed(mask))
    hybrid = Hybrid(baseline=baseline, samples=samples, **options)
    metrics = hybrid(network, images, labels, 0)

    alpha, smoothing = 0.7, 0.1 if "criterion" in options else 0.0
    beta = alpha / 2 if variant == "everything" else 1.0
    macs = network.cost(1, 6, 6).blocks
    costs = [2 * m / sum(macs[1:]) for m in macs[1:]] if "costs" in options else [1.0, 1.0]
    everything = torch.cat([images] * samples)
    truths = labels.tolist() * samples
    logits, routing = again(everything, decide=Fixed(mask), execute="compacted")

    def losses_of(logits: Tensor) -> list[float]:
        return [
            cross_entropy_by_hand(row, label, smoothing)
            for row, label in zip(logits.tolist(), truths, strict=True)
        ]

    losses = losses_of(logits)
    returns = returns_by_hand(losses, mask.double().tolist(), costs, alpha, beta)
    with torch.no_grad():
        greedy_logits, greedy = again.eval()(everything)
    greedy_returns = returns_by_hand(
        losses_of(greedy_logits), greedy.decisions.tolist(), costs, alpha, beta
    )
    policy = uncertainty = 0.0
    for row in range(rows):
        for i, x in enumerate(routing.logits[row].tolist()):
            others = {
                "none": [0.0],
                "batch-mean": [returns[r][i] for r in range(rows) if r != row],
                "greedy": [greedy_returns[row][i]],
                "leave-one-out": [
                    returns[r][i] for r in range(rows) if r != row and r % 3 == row % 3
                ],
            }[baseline]
            p = 1 / (1 + math.exp(-x))
            log_p = math.log(p if mask[row, i] else 1 - p)
            policy -= log_p * (returns[row][i] - sum(others) / len(others)) / rows
            uncertainty -= (p * math.log(p) + (1 - p) * math.log(1 - p)) / rows
    expected = sum(losses) / rows
    expected += options.get("policy_weight", 1.0) * policy
    expected -= options.get("entropy_bonus", 0.0) * uncertainty

    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-9)
    assert metrics["cross_entropy"].item() == pytest.approx(sum(losses) / rows, rel=1e-9)
    right = [
        row.index(max(row)) == label for row, label in zip(logits.tolist(), truths, strict=True)
    ]
    assert metrics["accuracy"].item() == pytest.approx(sum(right) / rows, abs=1e-6)
    assert metrics["keep_rate"].item() == pytest.approx(mask.double().mean().item(), abs=1e-6)
    assert metrics["entropy"].item() == pytest.approx(uncertainty / 2, rel=1e-9)
    assert metrics["macs_fraction"].item() == pytest.approx(routing.macs_fraction, rel=1e-9)
    assert metrics["alpha"].item() == pytest.approx(0.7)


def test_all_metrics_but_the_loss_are_detached_scalars() -> None:
    metrics = Hybrid(budget=Budget(0.5, 10, 0.1, 1.0))(small(), *batch(), 0)
    assert set(metrics) == {
        *("loss", "cross_entropy", "accuracy", "keep_rate", "macs_fraction", "macs_thresholded"),
        *("entropy", "information", "alpha"),
    }
    for name, value in metrics.items():
        assert value.ndim == 0 and value.requires_grad == (name == "loss"), name


@pytest.mark.parametrize("baseline", ["none", "batch-mean", "greedy"])
def test_one_image_is_enough(baseline: str) -> None:
    network = small().train()
    images, labels = batch(1)
    loss = Hybrid(baseline=baseline)(network, images, labels, 0)["loss"]
    loss.backward()
    assert loss.isfinite() and network.gate.project.weight.grad.isfinite().all()


OTHER_SEEDS = itertools.count()


def decisions_drawn(seed: int, step: int, baseline: str = "batch-mean") -> Tensor:
    recorder = Recorder(small().train())
    torch.manual_seed(next(OTHER_SEEDS))
    Hybrid(seed=seed, baseline=baseline)(recorder, *batch(64), step)
    return recorder.routings[0].decisions


def test_decisions_depend_on_seed_and_step_alone() -> None:
    first = decisions_drawn(3, 5)
    assert 0 < first.mean() < 1
    assert torch.equal(decisions_drawn(3, 5), first)
    assert torch.equal(decisions_drawn(3, 5, baseline="greedy"), first)
    for seed, step in [(3, 6), (4, 5), (5, 3)]:
        assert not torch.equal(decisions_drawn(seed, step), first)


def test_earlier_steps_leave_no_trace_in_the_decisions() -> None:
    drawn = []
    for steps in ([0, 1, 2], [2]):
        recorder, hybrid = Recorder(small().train()), Hybrid()
        for step in steps:
            hybrid(recorder, *batch(32), step)
        drawn.append(recorder.routings[-1].decisions)
    assert torch.equal(*drawn)


def test_torchs_own_random_numbers_are_left_alone() -> None:
    network = small()
    state = torch.get_rng_state()
    Hybrid(baseline="leave-one-out", samples=2)(network, *batch(), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_of_an_image_differ() -> None:
    recorder = Recorder(small().train())
    Hybrid(samples=4)(recorder, *batch(16), 0)
    decisions = recorder.routings[0].decisions
    assert decisions.shape == (64, 2)
    assert len({str(part.tolist()) for part in decisions.view(4, 16, 2)}) == 4


def test_greedy_baseline_leaves_no_trace() -> None:
    """Same statistics of batch norms as without it, and no gradient of its own."""
    states = []
    for baseline in ("none", "greedy"):
        network = small("ff2").train()
        Hybrid(baseline=baseline)(network, *batch(), 0)
        assert network.training
        states.append(network.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_greedy_baseline_leaves_frozen_batch_norms_frozen() -> None:
    network = small().train()
    network.stem.eval()
    Hybrid(baseline="greedy")(network, *batch(), 0)
    assert not network.stem[1].training and network.blocks[0].bn1.training


def test_blocks_see_the_rows_that_run_them_only() -> None:
    network = small().train()
    network.cost(1, 6, 6)
    seen = []
    network.blocks[1].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    recorder = Recorder(network)
    Hybrid(baseline="none")(recorder, *batch(32), 0)
    assert seen == [recorder.routings[0].decisions[:, 0].sum().item()] and 0 < seen[0] < 32


def test_a_dense_network_has_nothing_to_reinforce() -> None:
    with pytest.raises(UserError, match=r"no.*gate"):
        Hybrid()(small(None), *batch(), 0)


@pytest.mark.parametrize("samples", [0, 1])
def test_leave_one_out_needs_another_sample(samples: int) -> None:
    with pytest.raises(UserError, match="at least 2 samples"):
        Hybrid(baseline="leave-one-out", samples=samples)


@pytest.mark.parametrize("options", [{"baseline": "batch_mean"}, {"costs": "flops"}], ids=str)
def test_unknown_names_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="one of"):
        Hybrid(**options)


# The estimator that flips one gate an image.


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_flip_by_hand(beta: float) -> None:
    """Every alternative is a forward pass of its own, one image at a time, in evaluation."""
    network = small().eval()
    images, labels = batch(8)
    gates = torch.randint(2, (8,), generator=torch.Generator().manual_seed(sub_seed(3, 2, 5)))
    assert DECISIONS == 2 and len(set(gates.tolist())) == 2
    with torch.no_grad():
        network.gate.project.bias.sub_(network(images)[1].logits.mean())  # Some run, some do not.
    hybrid = Hybrid(estimator="flip", alpha=0.6, beta=beta, policy_weight=0.3, seed=3)
    result = hybrid(network, images, labels, 5)

    def price(row: int, flipped: int | None) -> tuple[float, list[float], list[float]]:
        decide = "threshold" if flipped is None else Flip(torch.tensor([flipped]))
        logits, routing = network(images[row : row + 1], decide=decide)
        loss = cross_entropy_by_hand(logits[0].tolist(), labels[row].item(), 0.0)
        decisions = routing.decisions[0].tolist()
        return beta * loss + 0.6 * sum(decisions) / 2, decisions, routing.logits[0].tolist()

    policy = losses = 0.0
    for row, gate in enumerate(gates.tolist()):
        now, decisions, logits = price(row, None)
        other, others, _ = price(row, gate)
        assert others[gate] == 1 - decisions[gate] and others[:gate] == decisions[:gate]
        better = decisions[gate] if now < other else 1 - decisions[gate]
        p = 1 / (1 + math.exp(-logits[gate]))
        policy -= 2 * abs(other - now) * math.log(p if better else 1 - p) / 8
        losses += (now - 0.6 * sum(decisions) / 2) / beta / 8
    assert result["cross_entropy"].item() == pytest.approx(losses, rel=1e-9)
    assert result["loss"].item() == pytest.approx(losses + 0.3 * policy, rel=1e-9)
    assert result["macs_fraction"].item() == result["macs_thresholded"].item()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_flipped_decisions_are_learned_from(share: float) -> None:
    """Gates learn as without them; blocks from the passes drawn, one image at a time."""
    network = small().eval()
    images, labels = batch(8)
    with torch.no_grad():
        network.gate.project.bias.sub_(network(images)[1].logits.mean())
    options: dict[str, Any] = {"estimator": "flip", "alpha": 0.6, "seed": 3}
    plain = Hybrid(**options)(network, images, labels, 5)
    result = Hybrid(**options, flipped_share=share)(network, images, labels, 5)
    generator = torch.Generator().manual_seed(sub_seed(3, 2, 5))
    gates = torch.randint(2, (8,), generator=generator)
    flipped = torch.rand(8, generator=generator) < share
    assert flipped.any() and (share == 1 or not flipped.all())
    losses, macs = 0.0, 0
    for row in range(8):
        decide = Flip(gates[row : row + 1]) if flipped[row] else "threshold"
        logits, routing = network(images[row : row + 1], decide=decide)
        losses += cross_entropy_by_hand(logits[0].tolist(), labels[row].item(), 0.0) / 8
        macs += routing.macs.item()
    assert result["cross_entropy"].item() == pytest.approx(losses, rel=1e-9)
    dense = network.cost(*images.shape[1:]).dense
    assert result["macs_fraction"].item() == pytest.approx(macs / 8 / dense, rel=1e-9)
    # What the gates learn by, and what the drive sees, is the same in whichever pass it was found.
    assert result["macs_thresholded"].item() == plain["macs_thresholded"].item()
    policy = result["loss"].item() - losses
    assert policy == pytest.approx(plain["loss"].item() - plain["cross_entropy"].item(), rel=1e-9)


def test_closed_blocks_learn_from_flips() -> None:
    def gradients(share: float) -> list[bool]:
        network = small().train()
        with torch.no_grad():
            network.gate.project.bias.fill_(-9.0)
        hybrid = Hybrid(estimator="flip", flipped_share=share)
        hybrid(network, *batch(16), 0)["loss"].backward()
        return [any(p.grad is not None for p in block.parameters()) for block in network.blocks]

    assert gradients(0.0) == [True, False, False] and gradients(0.5) == [True, True, True]


def test_flips_leave_no_trace_in_statistics() -> None:
    flipping, plain = small().train(), small().train()
    Hybrid(estimator="flip")(flipping, *batch(), 0)
    Supervised(decide="threshold")(plain, *batch(), 0)
    for (name, one), other in zip(flipping.named_buffers(), plain.buffers(), strict=True):
        assert name.endswith("num_batches_tracked") or torch.equal(one, other), name
    norms = [part for part in flipping.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms and all(norm.momentum == 0.1 for norm in norms)


@settings(max_examples=50, deadline=None)
@given(changes=st.lists(st.floats(-3, 3), min_size=1, max_size=6), decision=st.booleans())
def test_flip_loss_is_least_at_the_sign_of_the_mean_advantage(
    changes: list[float], decision: bool
) -> None:
    """Images that look alike have one logit: its gradient at 0 points to the better decision."""
    logit = torch.zeros((), dtype=torch.float64, requires_grad=True)
    rows = len(changes)
    decisions = torch.full((rows,), float(decision), dtype=torch.float64)
    flip_loss(logit.expand(rows), decisions, double(changes)).backward()
    advantage = sum(changes) / rows * (1 if decision else -1)  # Of executing.
    assert logit.grad is not None
    assert logit.grad.item() == pytest.approx(-advantage / 2, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(logits=matrices(-8, 8))
def test_information_by_hand(logits: list[list[float]]) -> None:
    def h(p: float) -> float:
        return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)

    told = information(double(logits)).tolist()
    for gate, value in enumerate(told):
        rates = [1 / (1 + math.exp(-row[gate])) for row in logits]
        mean = sum(rates) / len(rates)
        assert value == pytest.approx(h(mean) - sum(map(h, rates)) / len(rates), abs=1e-6)
        assert -1e-6 <= value <= math.log(2) + 1e-6


def test_a_negative_alpha_does_not_make_losses_welcome() -> None:
    """beta = alpha / N (ImageNet), and a budget that pays for running blocks."""
    budget = Budget(target=0.9, ramp_steps=0, rate=0.0, damping=1.0)
    hybrid = Hybrid(beta=None, budget=budget, baseline="none", policy_weight=1.0)
    hybrid.alpha = -2.0
    network = small().eval()
    metrics = hybrid(network, *batch(), 0)
    # Only the cost is left in the returns: every decision to run is paid, whatever the loss.
    returns = gate_returns(torch.tensor([0.1, 5.0]), torch.ones(2, 2), -2.0, 0.0)
    assert torch.equal(returns[0], returns[1])
    assert metrics["loss"].isfinite()
    plain = Hybrid(beta=0.0, baseline="none")
    plain.alpha = -2.0
    assert metrics["loss"].item() == pytest.approx(plain(network, *batch(), 0)["loss"].item())


# Budget.


def test_budget_by_hand() -> None:
    budget = Budget(target=0.5, ramp_steps=4, rate=0.1, damping=2.0, momentum=0.5, integral=0.3)
    # The first step defines the start: no error yet.
    assert budget.update(0.9, 0) == pytest.approx(0.3)
    # average 0.9 + (0.7 - 0.9) / 2 = 0.8; goal 0.9 - 0.4 / 4 = 0.8.
    assert budget.update(0.7, 1) == pytest.approx(0.3)
    # average 0.85; goal 0.7; error 3 / 14.
    assert budget.update(0.9, 2) == pytest.approx(0.3 + 0.3 / 14 + 6 / 14)
    # average 0.875; goal 0.5 from the end of the ramp on; error 0.75.
    assert budget.update(0.9, 4) == pytest.approx(0.3 + 0.3 / 14 + 0.075 + 1.5)
    # average 0.8875; error 0.775.
    assert budget.update(0.9, 100) == pytest.approx(0.3 + 0.3 / 14 + 0.075 + 0.0775 + 1.55)


def test_below_the_target_blocks_are_paid_to_run() -> None:
    budget = Budget(target=0.9, ramp_steps=0, rate=0.1, damping=2.0, momentum=0.0)
    budget.update(0.9, 0)
    assert budget.update(0.2, 1) == pytest.approx(-2.1 * 7 / 9)


def test_without_a_ramp_the_target_is_in_force_at_once() -> None:
    budget = Budget(target=0.5, ramp_steps=0, rate=0.0, damping=1.0, momentum=0.0)
    budget.update(1.0, 0)
    assert budget.update(1.0, 1) == pytest.approx(1.0)


def test_the_same_miss_weighs_more_where_less_is_left() -> None:
    def alpha(target: float) -> float:
        budget = Budget(target=target, ramp_steps=0, rate=0.0, damping=1.0, momentum=0.0)
        budget.update(1.0, 0)
        return budget.update(target + 0.1, 1)

    assert alpha(0.3) == pytest.approx(3 * alpha(0.9))


def simulate(budget: Budget, steps: int, start: float, alpha: float, seed: int = 0) -> list[float]:
    """Computation of each step of a network whose gates give way slowly, measured with noise.

    Blocks are worth less and less the more of them run: at alpha it settles at exp(-alpha / 2).
    """
    noise = random.Random(seed)
    computation, measured = start, []
    for step in range(steps):
        computation += 0.002 * (math.exp(-alpha / 2) - computation)
        measured.append(computation + noise.gauss(0, 0.02))
        alpha = budget.update(measured[-1], step)
    return measured


def smooth(values: list[float], width: int = 50) -> list[float]:
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_budget_meets_its_target_without_swinging(target: float, seed: int) -> None:
    budget = Budget(target=target, ramp_steps=1000, rate=0.05, damping=10.0)
    course = smooth(simulate(budget, 4000, start=0.95, alpha=0.1, seed=seed))
    end = course[-1000:]
    assert sum(end) / len(end) == pytest.approx(target, abs=0.01)
    assert max(end) - min(end) < 0.03
    assert min(course) > target - 0.08


def test_budget_without_damping_swings() -> None:
    """What the docstring claims, and that the test above can see it."""
    budget = Budget(target=0.5, ramp_steps=1000, rate=0.025, damping=0.0, momentum=0.98)
    course = smooth(simulate(budget, 4000, start=0.95, alpha=0.1))
    assert max(course[-1000:]) - min(course[-1000:]) > 0.06
    assert min(course) < 0.5 - 0.08


def test_budget_lets_alpha_go_when_the_network_is_below_the_target() -> None:
    budget = Budget(target=0.9, ramp_steps=0, rate=0.05, damping=10.0, integral=3.0)
    course = simulate(budget, 3000, start=0.3, alpha=3.0)
    assert sum(course[-500:]) / 500 == pytest.approx(0.9, abs=0.02)


def test_alpha_of_a_step_is_that_of_the_step_before() -> None:
    """The reward must not depend on the decisions of its own step but through R."""
    budget = Budget(target=0.1, ramp_steps=0, rate=1.0, damping=1.0, momentum=0.0)
    hybrid, network = Hybrid(alpha=0.25, budget=budget), small().train()
    alphas = [hybrid(network, *batch(), step)["alpha"].item() for step in range(3)]
    twin = Budget(target=0.1, ramp_steps=0, rate=1.0, damping=1.0, momentum=0.0)
    network, expected, hybrid = small().train(), [0.25], Hybrid(alpha=0.25)
    for step in range(2):
        metrics = hybrid(network, *batch(), step)
        expected.append(twin.update(metrics["macs_fraction"].item(), step))
        hybrid.alpha = expected[-1]
    assert alphas == pytest.approx(expected, rel=1e-6)
    assert alphas[2] > 0


def test_without_a_budget_alpha_stays() -> None:
    hybrid = Hybrid(alpha=0.4)
    hybrid(small(), *batch(), 0)
    assert hybrid.alpha == 0.4
    assert hybrid.state_dict() == {"alpha": 0.4}


def test_state_goes_on_where_it_stopped() -> None:
    def make() -> Hybrid:
        return Hybrid(alpha=0.2, budget=Budget(0.3, 5, 0.5, 2.0, integral=0.2))

    network = small().train()
    whole = make()
    for step in range(3):
        whole(network, *batch(), step)
    state = whole.state_dict()
    assert all(type(value) is float for value in state.values())
    resumed = make()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    twin = copy.deepcopy(network)
    ours = [whole(network, *batch(), step)["alpha"].item() for step in (3, 4)]
    theirs = [resumed(twin, *batch(), step)["alpha"].item() for step in (3, 4)]
    assert ours == theirs and ours[0] != ours[1]
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("estimator", ["reinforce", "flip"])
def test_after_landing_the_prediction_loss_alone_is_minimised(estimator: Any) -> None:
    torch.manual_seed(0)
    network = cifar_resnet(8, gate="rnn", num_classes=3, in_channels=1, widths=(2, 3, 4)).double()
    images, labels = torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.arange(6) % 3
    calls: list[int] = []
    budget = Budget(target=0.5, ramp_steps=1, rate=1.0, damping=1.0)
    assert network.gate is not None
    task = Hybrid(
        estimator=estimator,
        samples=2,
        entropy_bonus=0.5,
        diversity=0.5,
        budget=budget,
        landing=Landing(gate=network.gate, step=2, land=lambda: calls.append(len(calls))),
    )
    batches: list[int] = []
    network.stem.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    for step in (0, 1):
        task(network.train(), images, labels, step)
    assert not calls
    alpha, at = task.alpha, copy.deepcopy(budget)
    before = len(batches)
    for step in (2, 3):
        network.zero_grad(set_to_none=True)
        copied = copy.deepcopy(network)
        copied.stem._forward_hooks.clear()
        metrics = task(network, images, labels, step)
        logits, routing = copied(images, decide="threshold", execute="compacted")
        expected = nn.functional.cross_entropy(logits, labels)
        torch.testing.assert_close(metrics["loss"], expected)
        assert metrics["macs_fraction"] == routing.macs_fraction
        metrics["loss"].backward()
        assert all(p.grad is None for p in network.gate.parameters()), "not even weight decay"
    assert calls == [0], "once, at its step"
    assert (task.alpha, budget) == (alpha, at)
    assert batches[before:] == [6, 6], "no other samples, no flips"


@pytest.mark.parametrize("task", ["reinforce", "flip", "straight-through"])
def test_gates_first(task: Any) -> None:
    """Until a step gates alone learn, beside blocks as they are at inference."""
    torch.manual_seed(0)
    network = cifar_resnet(8, gate="rnn", num_classes=3, in_channels=1, widths=(2, 3, 4)).train()
    images, labels = torch.randn(6, 1, 6, 6), torch.arange(6) % 3
    assert network.gate is not None
    head_start = HeadStart(network, 2)
    if task == "straight-through":
        objective: Any = Supervised(head_start=head_start)
    else:
        objective = Hybrid(estimator=task, diversity=0.1, head_start=head_start)
    gates = list(network.gate.parameters())
    blocks = [p for name, p in network.named_parameters() if not name.startswith("gate.")]
    for step in range(4):
        before = {name: value.clone() for name, value in network.named_buffers()}
        network.zero_grad(set_to_none=True)
        objective(network, images, labels, step)["loss"].backward()
        assert any(p.grad is not None and p.grad.any() for p in gates)
        learn = step >= 2
        assert any(p.grad is not None and p.grad.any() for p in blocks) == learn
        moved = any(not torch.equal(before[name], value) for name, value in network.named_buffers())
        assert moved == learn, "running statistics"
        network.train()  # As after an evaluation.
