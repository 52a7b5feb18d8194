"""The gradient of HRL, proven: it is that of SkipNet's objective (section 3.3).

    J = E_x E_g [ L - (alpha / N) sum_i R_i ]

A network of 4 blocks has N = 3 gates, hence 8 decision vectors an image: few enough to write the
expectation out. Its terms are weighted by the probabilities along each path (a gate reads what the
decisions before it led to) and differentiated by autograd; nothing of `tasks.hybrid` takes part.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from skipnet import Fixed, SkipNet
from skipnet.routing.gates import GATES
from skipnet.tasks.hybrid import Hybrid

NUM_GATES = 3
BASELINES = ("none", "batch-mean", "greedy", "leave-one-out")
Gradient = dict[str, Tensor]


class Block(nn.Module):
    """A residual block without batch norm: rows do not mix."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + shortcut)


# Multiply-adds of a block on one pixel: 2 x 2 channels and the area of the kernel.
KERNELS = (1, 3, 1, 3)
COSTS = {
    "uniform": torch.ones(NUM_GATES, dtype=torch.float64),
    "macs": torch.tensor([36, 4, 36], dtype=torch.float64) / (76 / 3),
}


def tiny(gate: str) -> SkipNet:
    """Undecided gates, and decisions that matter to the next ones.

    In evaluation, since the FF gates have batch norms.
    """
    network = SkipNet(
        stem=nn.Conv2d(1, 2, 1, bias=False),
        blocks=[Block(kernel) for kernel in KERNELS],
        shortcuts=[nn.Identity() for _ in KERNELS],
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)),
        gate=GATES[gate]((2,) * NUM_GATES),
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        logits = torch.stack([gates for _, _, gates in paths(network.eval(), data()[0])])
        if gate == "rnn":
            network.gate.project.bias -= logits.mean()
        else:
            for unit, mean in zip(network.gate.units, logits.mean(dim=(0, 1)), strict=True):
                unit.linear.bias[1] -= mean
    return network


def data(images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 1, 3, 3, dtype=torch.float64, generator=generator)
    return pixels, torch.arange(images) % 3


def paths(network: SkipNet, images: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every decision vector, the class logits it leads to and the gates' logits on its way."""
    for bits in itertools.product((0.0, 1.0), repeat=NUM_GATES):
        mask = torch.tensor(bits, dtype=torch.float64)
        logits, routing = network(images, decide=Fixed(mask), execute="masked")
        yield mask, logits, routing.logits


def probability(mask: Tensor, gate_logits: Tensor) -> Tensor:
    """Of a decision vector, [batch]."""
    execute = 1 / (1 + torch.exp(-gate_logits))
    return torch.where(mask > 0, execute, 1 - execute).prod(dim=1)


def collect(network: SkipNet) -> Gradient:
    """Take the gradients from the network; the rows of a call leave out blocks and so have none."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in network.named_parameters()
    }
    network.zero_grad(set_to_none=True)
    return found


def objective_gradient(
    network: SkipNet, images: Tensor, labels: Tensor, alpha: float, costs: str
) -> Gradient:
    """Gradient of J, all dependencies followed."""
    total = torch.zeros((), dtype=torch.float64)
    for mask, logits, gate_logits in paths(network, images):
        loss = functional.cross_entropy(logits, labels, reduction="none")
        reward = ((1 - mask) * COSTS[costs]).sum()
        total = (
            total + (probability(mask, gate_logits) * (loss - alpha / NUM_GATES * reward)).mean()
        )
    total.backward()
    return collect(network)


def expected_gradient(
    monkeypatch: pytest.MonkeyPatch,
    network: SkipNet,
    images: Tensor,
    labels: Tensor,
    hybrid: Hybrid,
) -> Gradient:
    """Mean of the gradient that `hybrid` computes, over all that it could have drawn."""
    rows = images.repeat(hybrid.samples, 1, 1, 1)
    with torch.no_grad():
        table = [(mask, probability(mask, gates)) for mask, _, gates in paths(network, rows)]
    for joint in itertools.product(table, repeat=len(rows)):
        decide = Fixed(torch.stack([mask for mask, _ in joint]))
        chance = math.prod(chances[row].item() for row, (_, chances) in enumerate(joint))
        monkeypatch.setattr("skipnet.tasks.hybrid.Sample", lambda generator, d=decide: d)
        network.eval()
        (chance * hybrid(network, images, labels, 0)["loss"]).backward()
    monkeypatch.undo()
    network.eval()
    return collect(network)


def distance(first: Gradient, second: Gradient) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def drawn_at_once(baseline: str) -> tuple[int, int]:
    """Images and samples, 2 rows in all: 64 joint decisions."""
    return (1, 2) if baseline == "leave-one-out" else (2, 1)


SETTINGS = [("rnn", 0.0, "uniform"), ("rnn", 0.5, "uniform"), ("rnn", 4.0, "macs")]
SETTINGS += [("ff1", 2.0, "macs"), ("ff2", 2.0, "uniform")]


@pytest.mark.parametrize(("gate", "alpha", "costs"), SETTINGS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_expected_gradient_is_that_of_the_objective(
    baseline: str, gate: str, alpha: float, costs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_images, samples = drawn_at_once(baseline)
    network, (images, labels) = tiny(gate), data(num_images)
    hybrid = Hybrid(alpha=alpha, baseline=baseline, samples=samples, costs=costs)
    expected = expected_gradient(monkeypatch, network, images, labels, hybrid)
    exact = objective_gradient(network, images, labels, alpha, costs)
    assert distance(expected, exact) < 1e-9
    # Every weight but those of the last block's reach counts: there is something to get wrong.
    assert all(part.abs().max() > 1e-6 for part in exact.values())


def test_two_samples_an_image_share_the_batch_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    network, (images, labels) = tiny("rnn"), data(1)
    hybrid = Hybrid(alpha=1.0, baseline="batch-mean", samples=2)
    expected = expected_gradient(monkeypatch, network, images, labels, hybrid)
    assert distance(expected, objective_gradient(network, images, labels, 1.0, "uniform")) < 1e-9


def weighted_gradient(
    network: SkipNet,
    images: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    policy_weight: float,
    entropy_bonus: float,
) -> Gradient:
    """E[grad L] + policy_weight * grad_p E_p[beta L - (alpha / N) sum R] - bonus * E[grad H]."""
    total = torch.zeros((), dtype=torch.float64)
    for mask, logits, gate_logits in paths(network, images):
        loss = functional.cross_entropy(logits, labels, reduction="none")
        chance = probability(mask, gate_logits)
        execute = torch.sigmoid(gate_logits)
        uncertainty = -(execute * execute.log() + (1 - execute) * (1 - execute).log()).sum(dim=1)
        price = beta * loss.detach() - alpha / NUM_GATES * (1 - mask).sum()
        supervised = chance.detach() * (loss - entropy_bonus * uncertainty)
        total = total + (supervised + policy_weight * chance * price).mean()
    total.backward()
    return collect(network)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(
    ("beta", "policy_weight", "entropy_bonus"),
    [(0.3, 1.0, 0.0), (None, 1.0, 0.0), (1.0, 0.01, 0.0), (1.0, 1.0, 0.2)],
)
def test_expected_gradient_with_other_weights(
    baseline: str,
    beta: float | None,
    policy_weight: float,
    entropy_bonus: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_images, samples = drawn_at_once(baseline)
    network, (images, labels) = tiny("rnn"), data(num_images)
    hybrid = Hybrid(
        alpha=1.2,
        beta=beta,
        policy_weight=policy_weight,
        entropy_bonus=entropy_bonus,
        baseline=baseline,
        samples=samples,
    )
    expected = expected_gradient(monkeypatch, network, images, labels, hybrid)
    exact = weighted_gradient(
        network,
        images,
        labels,
        alpha=1.2,
        beta=1.2 / NUM_GATES if beta is None else beta,
        policy_weight=policy_weight,
        entropy_bonus=entropy_bonus,
    )
    assert distance(expected, exact) < 1e-9


def test_policy_gradient_reaches_the_blocks_and_the_stem() -> None:
    """What a gate reads depends on the blocks before it; the last block no gate reads."""
    network, (images, labels) = tiny("rnn"), data()
    options = {"alpha": 4.0, "beta": 1.0, "entropy_bonus": 0.0}
    both, supervised = (
        weighted_gradient(network, images, labels, policy_weight=weight, **options)
        for weight in (1.0, 0.0)
    )
    policy = {name: (both[name] - supervised[name]).abs().max().item() for name in both}
    reached = ["stem.weight", *(f"blocks.{i}.conv.weight" for i in range(3))]
    assert all(policy[name] > 1e-3 for name in reached)
    assert policy["blocks.3.conv.weight"] == policy["head.2.weight"] == 0
    assert all(supervised[name].abs().max() > 1e-3 for name in reached)


def own_included(returns: Tensor) -> Tensor:
    return returns.mean(dim=0, keepdim=True) + torch.zeros_like(returns)


def from_the_beginning(rewards: Tensor) -> Tensor:
    return rewards.cumsum(dim=1)


def without_itself(rewards: Tensor) -> Tensor:
    return rewards.flip(1).cumsum(dim=1).flip(1) - rewards


WRONG: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "batch mean with its own return": ("batch-mean", "hybrid.others_mean", own_included),
    "leave-one-out leaving none out": ("leave-one-out", "hybrid.others_mean", own_included),
    "rewards of the past": ("none", "rewards.reward_to_go", from_the_beginning),
    "rewards of the future only": ("none", "rewards.reward_to_go", without_itself),
}


@pytest.mark.parametrize(("baseline", "function", "wrong"), WRONG.values(), ids=WRONG)
def test_enumeration_finds_a_wrong_estimator(
    baseline: str,
    function: str,
    wrong: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_images, samples = drawn_at_once(baseline)
    network, (images, labels) = tiny("rnn"), data(num_images)
    hybrid = Hybrid(alpha=2.0, baseline=baseline, samples=samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"skipnet.tasks.{function}", wrong)
        expected = expected_gradient(monkeypatch, network, images, labels, hybrid)
    assert distance(expected, objective_gradient(network, images, labels, 2.0, "uniform")) > 1e-3


# From here on Hybrid draws for itself.

ROWS, STEPS = 400, 40


def drawn_gradients(network: SkipNet, hybrid: Hybrid) -> list[Gradient]:
    """One gradient a step, each the mean over many rows of the two images."""
    images, labels = data()
    images, labels = images.repeat(ROWS // 2, 1, 1, 1), labels.repeat(ROWS // 2)
    gradients = []
    for step in range(STEPS):
        network.eval()
        hybrid(network, images, labels, step)["loss"].backward()
        gradients.append(collect(network))
    network.eval()
    return gradients


def deviations(drawn: list[Gradient], exact: Gradient) -> dict[str, float]:
    """For every parameter, how many standard errors the mean lies off, along some directions."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, truth in exact.items():
        size = truth.numel()
        directions = torch.randn(3, size, dtype=torch.float64, generator=generator)
        directions = torch.cat([directions, truth.view(1, size)])
        draws = torch.stack([gradient[name].flatten() for gradient in drawn])
        along = (draws - truth.flatten()) @ directions.T
        error = along.std(dim=0) / math.sqrt(len(drawn))
        found[name] = (along.mean(dim=0).abs() / error).max().item()
    return found


@pytest.mark.parametrize("gate", ["rnn", "ff2"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_mean_of_drawn_gradients_is_that_of_the_objective(baseline: str, gate: str) -> None:
    network = tiny(gate)
    hybrid = Hybrid(alpha=2.0, baseline=baseline, samples=2 if baseline == "leave-one-out" else 1)
    exact = objective_gradient(network, *data(), 2.0, "uniform")
    off = deviations(drawn_gradients(network, hybrid), exact)
    assert max(off.values()) < 5, off


@pytest.mark.parametrize("error", ["no loss in the reward", *list(WRONG)[1:]])
def test_mean_of_drawn_gradients_finds_a_wrong_estimator(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny("rnn")
    exact = objective_gradient(network, *data(), 2.0, "uniform")
    if error in WRONG:
        baseline, function, wrong = WRONG[error]
        monkeypatch.setattr(f"skipnet.tasks.{function}", wrong)
        hybrid = Hybrid(alpha=2.0, baseline=baseline, samples=2)
    else:
        hybrid = Hybrid(alpha=2.0, beta=0.0)
    off = deviations(drawn_gradients(network, hybrid), exact)
    assert max(off.values()) > 8, off


def spread(drawn: list[Gradient]) -> float:
    draws = torch.stack([torch.cat([part.flatten() for part in g.values()]) for g in drawn])
    return draws.var(dim=0).sum().item()


def test_batch_mean_reduces_the_variance() -> None:
    # Returns far from 0: without a baseline every draw is pushed the same way.
    network = tiny("rnn")
    without, with_baseline = (
        spread(drawn_gradients(network, Hybrid(alpha=8.0, baseline=name)))
        for name in ("none", "batch-mean")
    )
    assert with_baseline < 0.7 * without
