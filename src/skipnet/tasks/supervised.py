"""Supervised training: cross-entropy, of a dense network or through decisions (SP)."""

from typing import Literal

import torch
from torch import Tensor, nn

from skipnet.routing.decisions import Decision, Gumbel, Sample, Threshold, named_decision
from skipnet.routing.network import ExecutorName
from skipnet.seeding import DECISIONS, sub_seed
from skipnet.tasks.budget import Budget, HeadStart, Landing, mean_over_processes
from skipnet.tasks.criterion import Criterion
from skipnet.tasks.rewards import CostName, block_costs, information
from skipnet.tasks.task import Metrics

DecideName = Literal["straight-through", "gumbel", "soft", "sample", "threshold"]


class Supervised:
    """Cross-entropy. With straight-through decisions it is the paper's SP (section 3.2).

    SP has no cost term, and yet gates learn to skip. With alpha, or a budget that drives it, each
    block run has a price: `L + alpha / N * sum_i g_i C_i`, whose gradient reaches the gates through
    the decisions, as that of L does. A dense network has no decisions to make.

    Args:
        decide: How gates decide in training. "straight-through" is the paper's SP, "gumbel" the
            same with noise, "soft" its soft-gating ablation. Those without gradient leave the gates
            as they are: "sample" (stochastic depth) and "threshold" (a fixed subset of blocks). Or
            a `Decision`.
        criterion: The loss of each image.
        alpha: Price of computation; with a budget, its value at the beginning.
        budget: Drives alpha to a target computation; None keeps alpha fixed.
        costs: C_i, see `block_costs`.
        diversity: Weight of what the decisions tell about the image, see `rewards.information`.
        landing: When gates stop learning, and decide as at inference; None lets them learn.
        head_start: When blocks begin to learn; None lets them from the first step.
        seed: Of the decisions: those of a step depend on `(seed, step)` alone.
    """

    def __init__(
        self,
        *,
        decide: DecideName | Decision = "straight-through",
        criterion: Criterion | None = None,
        alpha: float = 0.0,
        budget: Budget | None = None,
        costs: CostName = "uniform",
        diversity: float = 0.0,
        landing: Landing | None = None,
        head_start: HeadStart | None = None,
        seed: int = 0,
    ) -> None:
        self.decide = decide
        self.criterion = criterion or Criterion()
        self.alpha = alpha
        self.budget = budget
        self.costs = costs
        self.diversity = diversity
        self.landing = landing
        self.head_start = head_start
        self.seed = seed

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Metrics:
        if self.head_start is not None:
            self.head_start.advance(step)
        landed = self.landing is not None and self.landing.advance(step)
        decision = Threshold() if landed else self._decision(images.device, step)
        # Rows can be left out only where no gradient flows through g.
        execute: ExecutorName = "compacted" if decision.binary(True) else "masked"
        logits, routing = model(images, decide=decision, execute=execute)
        loss = self.criterion(logits, images, labels).mean()
        metrics = {
            "cross_entropy": loss.detach(),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean(),
        }
        if routing.decisions.shape[1]:
            costs = block_costs(routing.cost, self.costs).to(loss, non_blocking=True)
            told = information(routing.logits).mean()
            # Not added where they are nothing: a gradient of 0 would let weight decay at the gates.
            if self.alpha and routing.decisions.requires_grad:
                loss = loss + self.alpha * (routing.decisions * costs).mean()
            if self.diversity and not landed:
                loss = loss - self.diversity * told
            # Soft gates run every block; what the budget is meant for is what they decide at test.
            ran = routing.logits if self.decide == "soft" else routing.decisions
            computation = routing.cost.executed(ran).double().mean() / routing.cost.dense
            metrics |= {
                "keep_rate": routing.executed.float().mean(),
                "macs_fraction": computation,
                "information": told.detach(),
                "alpha": torch.tensor(0.0 if landed else self.alpha),
            }
            if self.budget is not None and not landed:
                self.alpha = self.budget.update(mean_over_processes(computation), step)
        return {"loss": loss, **metrics}

    def _decision(self, device: torch.device, step: int) -> Decision:
        if not isinstance(self.decide, str):
            return self.decide
        if self.decide not in ("gumbel", "sample"):
            return named_decision(self.decide)
        generator = torch.Generator(device)
        generator.manual_seed(sub_seed(self.seed, DECISIONS, step))
        return Gumbel(generator) if self.decide == "gumbel" else Sample(generator)

    def state_dict(self) -> dict[str, float]:
        state = {"alpha": self.alpha}
        for part in (self.budget, self.landing):
            if part is not None:
                state |= part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.alpha = state.get("alpha", self.alpha)  # Checkpoints of 0.1 have none.
        for part in (self.budget, self.landing):
            if part is not None:
                part.load_state_dict(state)
