"""Hybrid reinforcement learning, HRL (SkipNet, section 3.3): cross-entropy plus REINFORCE.

Minimises J = E_x E_g [ L - (alpha / N) sum_i R_i ] over N gates, R_i = (1 - g_i) C_i, by

    grad J = E[ grad L ] - E[ sum_i grad log p(g_i | x) r_i ],
    r_i = -[ beta L - (alpha / N) sum_{j >= i} R_j ].

The terms are in `rewards`; `Hybrid` puts them together for the loop.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipnet.errors import UserError
from skipnet.routing.decisions import Decision, Flip, Sample, Threshold
from skipnet.routing.network import ExecutorName, SkipNet
from skipnet.routing.trace import Routing
from skipnet.seeding import DECISIONS, sub_seed
from skipnet.tasks.budget import Budget, HeadStart, Landing, mean_over_processes
from skipnet.tasks.criterion import Criterion
from skipnet.tasks.rewards import (
    CostName,
    block_costs,
    entropy,
    flip_loss,
    gate_returns,
    information,
    others_mean,
    policy_loss,
    skip_rewards,
)
from skipnet.tasks.task import Metrics

BaselineName = Literal["none", "batch-mean", "greedy", "leave-one-out"]
StatisticsName = Literal["executed", "all", "frozen"]
EstimatorName = Literal["reinforce", "flip"]

_NO_GATES = "HRL trains gates, and this network has none: create it with gate=…"


class Hybrid:
    """The HRL objective: sampled decisions, cross-entropy plus REINFORCE.

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
        diversity: Weight of what the decisions tell about the image, see `rewards.information`.
        costs: C_i, see `block_costs`.
        estimator: "reinforce" samples all decisions, as the paper does. "flip" takes those of
            inference, then runs each image once more with one gate, drawn at random, the other way:
            which of the two would have been better is what that gate learns (see `flip_loss`). A
            decision answers for itself alone.
        flipped_share: With "flip", the share of the images whose blocks learn from the flipped
            decision, and not from that of inference. Without any, no noise reaches the blocks, but
            those that are closed learn nothing, and nothing gets used to the lack of those that are
            open: each decision then looks better than any other because it was taken.
        supervised_weight: Factor on the gradient of L itself; 0 is the paper's pure RL.
        statistics: What batch norms see: "executed", only the rows that run a block, as at
            inference (and the others are left out of it); "all", every row whether it runs the
            block or not, as in the released code; "frozen", the running statistics.
        criterion: The loss of each image.
        budget: Drives alpha to a target computation; None keeps alpha fixed.
        landing: When gates stop learning, and decide as at inference: from then on L alone is
            minimised. None lets them learn to the end.
        head_start: When blocks begin to learn; None lets them from the first step.
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
        diversity: float = 0.0,
        costs: CostName = "uniform",
        estimator: EstimatorName = "reinforce",
        flipped_share: float = 0.0,
        supervised_weight: float = 1.0,
        statistics: StatisticsName = "executed",
        criterion: Criterion | None = None,
        budget: Budget | None = None,
        landing: Landing | None = None,
        head_start: HeadStart | None = None,
        seed: int = 0,
    ) -> None:
        for value, kind in (
            (baseline, BaselineName),
            (costs, CostName),
            (statistics, StatisticsName),
            (estimator, EstimatorName),
        ):
            if value not in get_args(kind):
                raise UserError(f"{value!r} is not one of {', '.join(get_args(kind))}")
        if baseline == "leave-one-out" and samples < 2 and estimator == "reinforce":
            raise UserError("the leave-one-out baseline needs at least 2 samples an image")
        if samples < 1 or alpha < 0:
            raise UserError(f"samples is at least 1, alpha at least 0, not {samples} and {alpha}")
        if not 0 <= flipped_share <= 1:
            raise UserError(f"flipped_share must lie in [0, 1], not {flipped_share}")
        self.alpha = alpha
        self.beta = beta
        self.policy_weight = policy_weight
        self.baseline = baseline
        self.samples = samples
        self.entropy_bonus = entropy_bonus
        self.diversity = diversity
        self.costs = costs
        self.estimator = estimator
        self.flipped_share = flipped_share
        self.supervised_weight = supervised_weight
        self.statistics = statistics
        self.criterion = criterion or Criterion()
        self.budget = budget
        self.landing = landing
        self.head_start = head_start
        self.seed = seed

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Metrics:
        generator = torch.Generator(images.device)
        generator.manual_seed(sub_seed(self.seed, DECISIONS, step))
        if self.head_start is not None:
            self.head_start.advance(step)
        landed = self.landing is not None and self.landing.advance(step)
        if self.samples > 1 and not landed:
            images = images.repeat(self.samples, 1, 1, 1)
            labels = labels.repeat(self.samples)
        if self.statistics == "frozen":
            for layer in model.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        execute: ExecutorName = "masked" if self.statistics == "all" else "compacted"
        flips: _Flips | None = None
        decision: Decision = Threshold()
        if self.estimator == "flip" and not landed:
            flips = self._draw_flips(model, images, generator)
            decision = flips.learned
        elif not landed:
            decision = Sample(generator)
        logits, routing = model(images, decide=decision, execute=execute)
        if not routing.decisions.shape[1]:
            raise UserError(_NO_GATES)

        losses = self.criterion(logits, images, labels)
        costs = block_costs(routing.cost, self.costs).to(losses, non_blocking=True)
        alpha = self.alpha
        uncertainty = entropy(routing.logits).sum(dim=1).mean()
        told = information(routing.logits).mean()
        decided = routing.logits  # At inference, by their signs.
        loss = self.supervised_weight * losses.mean()
        if not landed:
            # A budget may drive alpha below zero; a loss is never to be wished for.
            beta = max(0.0, alpha) / len(costs) if self.beta is None else self.beta
            if flips is not None:
                policy, decided = self._flip(
                    model, images, labels, routing, losses, costs, beta, flips, execute
                )
            else:
                returns = gate_returns(losses, skip_rewards(routing.decisions, costs), alpha, beta)
                advantages = returns - self._baseline(model, images, labels, returns, costs, beta)
                policy = policy_loss(routing.logits, routing.decisions, advantages)
            loss = loss + self.policy_weight * policy
            loss = loss - self.entropy_bonus * uncertainty - self.diversity * told

        # What inference would cost; the budget is meant for that.
        inference = routing.cost.executed(decided).double().mean() / routing.cost.dense
        if self.budget is not None and not landed:
            self.alpha = self.budget.update(mean_over_processes(inference), step)
        return {
            "loss": loss,
            "cross_entropy": losses.mean().detach(),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean(),
            "keep_rate": routing.executed.float().mean(),
            "macs_fraction": routing.macs.double().mean() / routing.cost.dense,
            "macs_thresholded": inference,
            "entropy": (uncertainty / len(costs)).detach(),
            "information": told.detach(),
            "alpha": torch.tensor(0.0 if landed else alpha),
        }

    def _draw_flips(self, model: nn.Module, images: Tensor, generator: torch.Generator) -> "_Flips":
        rows = len(images)
        # Fabric's wrapper passes attributes on.
        num_gates = cast(SkipNet, model).num_gates
        if not num_gates:
            raise UserError(_NO_GATES)
        device = generator.device
        gates = torch.randint(num_gates, (rows,), generator=generator, device=device)
        flipped = torch.zeros(rows, dtype=torch.bool, device=device)
        if self.flipped_share:
            flipped = torch.rand(rows, generator=generator, device=device) < self.flipped_share
        return _Flips(gates.to(images.device), flipped.to(images.device))

    def _flip(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        routing: Routing,
        losses: Tensor,
        costs: Tensor,
        beta: float,
        flips: "_Flips",
        execute: ExecutorName,
    ) -> tuple[Tensor, Tensor]:
        """What one gate an image would have changed: the loss it learns by, and all decisions."""
        num_gates = routing.decisions.shape[1]
        with torch.no_grad(), _untracked(model):
            logits, other = model(images, decide=flips.other, execute=execute)
            other_losses = self.criterion(logits, images, labels)
            price = self.alpha / num_gates
            spent = ((other.decisions - routing.decisions) * costs).sum(dim=1)
            change = beta * (other_losses - losses) + price * spent
            change = torch.where(flips.flipped, -change, change)
            decided = torch.where(flips.flipped.unsqueeze(1), other.decisions, routing.decisions)
        # A gate before its own flip is what it is without: its logit is that of both passes.
        chosen = flips.gates.unsqueeze(1)
        logit = routing.logits.gather(1, chosen).squeeze(1)
        decision = decided.gather(1, chosen).squeeze(1)
        # The estimate of the sum over all gates from one of them.
        return num_gates * flip_loss(logit, decision, change), decided

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
        return gate_returns(self.criterion(logits, images, labels), rewards, self.alpha, beta)

    def state_dict(self) -> dict[str, float]:
        state = {"alpha": self.alpha}
        for part in (self.budget, self.landing):
            if part is not None:
                state |= part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.alpha = state["alpha"]
        for part in (self.budget, self.landing):
            if part is not None:
                part.load_state_dict(state)


@dataclass(frozen=True)
class _Flips:
    """Which gate of each image is tried the other way, and in which of two passes.

    Attributes:
        gates: One an image, int64 [batch].
        flipped: Whether it is in the pass that blocks learn from, bool [batch].
    """

    gates: Tensor
    flipped: Tensor

    @property
    def learned(self) -> Flip:
        """The decisions of the pass that blocks learn from."""
        return Flip(self.gates.where(self.flipped, -1))

    @property
    def other(self) -> Flip:
        """The decisions of the other pass."""
        return Flip(self.gates.where(~self.flipped, -1))


@contextmanager
def _untracked(model: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are, though batch norms use those of the batch."""
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
