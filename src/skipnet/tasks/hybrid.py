"""Hybrid reinforcement learning, HRL (SkipNet, section 3.3): cross-entropy plus REINFORCE.

Minimises J = E_x E_g [ L - (alpha / N) sum_i R_i ] over N gates, R_i = (1 - g_i) C_i, by

    grad J = E[ grad L ] - E[ sum_i grad log p(g_i | x) r_i ],
    r_i = -[ beta L - (alpha / N) sum_{j >= i} R_j ].

The terms are pure functions; `Hybrid` puts them together for the loop.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from skipnet.errors import UserError
from skipnet.routing.cost import Cost
from skipnet.routing.decisions import Sample
from skipnet.seeding import DECISIONS, sub_seed
from skipnet.tasks.task import Metrics

BaselineName = Literal["none", "batch-mean", "greedy", "leave-one-out"]
CostName = Literal["uniform", "macs"]

AVERAGE_MOMENTUM = 0.98
"""Of the moving average of the computation that drives alpha, a step."""


def block_costs(cost: Cost, kind: CostName) -> Tensor:
    """Return C_i of every gated block, [gates], with mean 1.

    "uniform" is the paper's C_i = 1; "macs" is each block's multiply-adds over their mean, so that
    alpha means the same for both.
    """
    macs = torch.tensor(cost.blocks[1:], dtype=torch.float64)
    return torch.ones_like(macs) if kind == "uniform" else macs / macs.mean()


def skip_rewards(decisions: Tensor, costs: Tensor) -> Tensor:
    """R_i = (1 - g_i) C_i, [batch, gates], for decisions [batch, gates] and costs [gates]."""
    return (1 - decisions) * costs


def reward_to_go(rewards: Tensor) -> Tensor:
    """Sum_{j >= i} R_j with discount 1, [batch, gates]: a decision answers for what follows it."""
    return rewards.flip(1).cumsum(dim=1).flip(1)


def gate_returns(losses: Tensor, rewards: Tensor, alpha: float, beta: float) -> Tensor:
    """r_i = -[beta L - (alpha / N) sum_{j >= i} R_j], [batch, gates], a constant (detached).

    Args:
        losses: Cross-entropy of each image, [batch].
        rewards: R_i, [batch, gates].
        alpha: Weight of skipping.
        beta: Weight of the prediction loss: 1 on CIFAR and SVHN, alpha / N on ImageNet.
    """
    skipping = alpha / rewards.shape[1] * reward_to_go(rewards)
    return (skipping - beta * losses.unsqueeze(1)).detach()


def log_probability(logits: Tensor, decisions: Tensor) -> Tensor:
    """Log p(g_i | x) of Bernoulli decisions, [batch, gates]."""
    return -functional.binary_cross_entropy_with_logits(logits, decisions, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """Entropy of Bernoulli decisions in nats, [batch, gates]."""
    probability = torch.sigmoid(logits)
    return functional.binary_cross_entropy_with_logits(logits, probability, reduction="none")


def others_mean(returns: Tensor) -> Tensor:
    """Mean over the *other* entries of the first dimension; 0 where there is none.

    Leaving its own return out keeps a baseline independent of the decision it judges, and the
    estimator unbiased; including it would shrink the gradient by (n - 1) / n.
    """
    count = len(returns)
    if count == 1:
        return torch.zeros_like(returns)
    return (returns.sum(dim=0, keepdim=True) - returns) / (count - 1)


def policy_loss(logits: Tensor, decisions: Tensor, advantages: Tensor) -> Tensor:
    """-Mean over images of sum_i log p(g_i | x) (r_i - b_i): its gradient is REINFORCE's."""
    return -(log_probability(logits, decisions) * advantages).sum(dim=1).mean()


@dataclass
class Budget:
    """Drives alpha so that the computation meets a target: dual ascent with damping.

    `alpha = max(0, integral + damping * error)`, `integral += rate * error`, the error being the
    computation (share of dense multiply-adds, a moving average over steps) over the target of the
    moment. The target falls linearly from the computation at the start to `target` at `ramp_steps`,
    so that the network can follow. An integral alone swings: by the time the average shows that
    alpha is high enough, it is far too high.

    Attributes:
        target: Share of dense multiply-adds to reach.
        ramp_steps: Steps until the target is in force.
        rate: Integral gain, alpha a step and unit of error.
        damping: Proportional gain, alpha a unit of error.
        momentum: Of the moving average.
        integral: State.
        average: State: the average computation; negative before the first step.
        start: State: the computation at the first step.
    """

    target: float
    ramp_steps: int
    rate: float
    damping: float
    momentum: float = AVERAGE_MOMENTUM
    integral: float = 0.0
    average: float = -1.0
    start: float = -1.0

    def update(self, computation: float, step: int) -> float:
        """Take in the computation of a step, and return alpha for the next."""
        if self.average < 0:
            self.average = self.start = computation
        self.average += (1 - self.momentum) * (computation - self.average)
        ramp = min(1.0, step / max(1, self.ramp_steps))
        goal = self.start + ramp * (self.target - self.start)
        error = self.average - goal
        self.integral = max(0.0, self.integral + self.rate * error)
        return max(0.0, self.integral + self.damping * error)


class Hybrid:
    """The HRL objective: sampled decisions, compacted execution, cross-entropy plus REINFORCE.

    Blocks and their batch norms see only the rows that run, as at inference.

    Args:
        alpha: Weight of skipping; with a budget, its value at the beginning.
        beta: Weight of the prediction loss in the reward; None takes alpha / N (ImageNet).
        policy_weight: Factor on the REINFORCE term; 1 in the equations, 0.01 in the released code.
        baseline: Reduces the variance, and leaves the estimator unbiased as far as rows do not mix
            (batch norms in training let one row's decisions touch another's loss): "none";
            "batch-mean" over the other images of the batch; "greedy", the return of the image's
            argmax decisions (self-critical, one forward more); "leave-one-out" over the image's
            other samples.
        samples: Decision vectors sampled an image; "leave-one-out" needs at least 2.
        entropy_bonus: Weight of the decisions' entropy, in nats.
        costs: C_i, see `block_costs`.
        label_smoothing: Share of the target spread over all classes.
        budget: Drives alpha to a target computation; None keeps alpha fixed.
        seed: Of the decisions: those of a step depend on `(seed, step)` alone.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        beta: float | None = 1.0,
        policy_weight: float = 1.0,
        baseline: BaselineName = "batch-mean",
        samples: int = 1,
        entropy_bonus: float = 0.0,
        costs: CostName = "uniform",
        label_smoothing: float = 0.0,
        budget: Budget | None = None,
        seed: int = 0,
    ) -> None:
        if baseline not in get_args(BaselineName) or costs not in get_args(CostName):
            raise UserError(
                f"baseline is one of {', '.join(get_args(BaselineName))}, costs one of "
                f"{', '.join(get_args(CostName))}, not {baseline!r} and {costs!r}"
            )
        if baseline == "leave-one-out" and samples < 2:
            raise UserError("the leave-one-out baseline needs at least 2 samples an image")
        if samples < 1 or alpha < 0:
            raise UserError(f"samples is at least 1, alpha at least 0, not {samples} and {alpha}")
        self.alpha = alpha
        self.beta = beta
        self.policy_weight = policy_weight
        self.baseline = baseline
        self.samples = samples
        self.entropy_bonus = entropy_bonus
        self.costs = costs
        self.label_smoothing = label_smoothing
        self.budget = budget
        self.seed = seed

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Metrics:
        generator = torch.Generator(images.device)
        generator.manual_seed(sub_seed(self.seed, DECISIONS, step))
        if self.samples > 1:
            images = images.repeat(self.samples, 1, 1, 1)
            labels = labels.repeat(self.samples)
        logits, routing = model(images, decide=Sample(generator), execute="compacted")
        if not routing.decisions.shape[1]:
            raise UserError("HRL trains gates, and this network has none: create it with gate=…")

        losses = self._losses(logits, labels)
        costs = block_costs(routing.cost, self.costs).to(losses)
        alpha = self.alpha
        beta = alpha / len(costs) if self.beta is None else self.beta
        returns = gate_returns(losses, skip_rewards(routing.decisions, costs), alpha, beta)
        advantages = returns - self._baseline(model, images, labels, returns, costs, beta)
        policy = policy_loss(routing.logits, routing.decisions, advantages)
        uncertainty = entropy(routing.logits).sum(dim=1).mean()
        loss = losses.mean() + self.policy_weight * policy - self.entropy_bonus * uncertainty

        computation = routing.macs.double().mean() / routing.cost.dense
        if self.budget is not None:
            self.alpha = self.budget.update(_mean_over_processes(computation), step)
        return {
            "loss": loss,
            "cross_entropy": losses.mean().detach(),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean(),
            "keep_rate": routing.executed.float().mean(),
            "macs_fraction": computation,
            "entropy": (uncertainty / len(costs)).detach(),
            "alpha": torch.tensor(alpha),
        }

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.label_smoothing
        )

    def _baseline(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        returns: Tensor,
        costs: Tensor,
        beta: float,
    ) -> Tensor:
        if self.baseline == "none":
            return torch.zeros_like(returns)
        if self.baseline == "batch-mean":
            return others_mean(returns)
        if self.baseline == "leave-one-out":
            by_sample = returns.view(self.samples, -1, returns.shape[1])
            return others_mean(by_sample).view_as(returns)
        # Running statistics, as at inference, and no trace of this pass in them.
        modes = [(layer, layer.training) for layer in model.modules()]
        model.eval()
        with torch.no_grad():
            logits, routing = model(images, decide="threshold", execute="compacted")
        for layer, training in modes:  # One by one: some may be frozen in evaluation.
            layer.training = training
        rewards = skip_rewards(routing.decisions, costs)
        return gate_returns(self._losses(logits, labels), rewards, self.alpha, beta)

    def state_dict(self) -> dict[str, float]:
        state = {"alpha": self.alpha}
        if self.budget is not None:
            for name in ("integral", "average", "start"):
                state[name] = getattr(self.budget, name)
        return state

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.alpha = state["alpha"]
        if self.budget is not None:
            for name in ("integral", "average", "start"):
                setattr(self.budget, name, state[name])


def _mean_over_processes(value: Tensor) -> float:
    """Every process must drive the same alpha."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value.item()
