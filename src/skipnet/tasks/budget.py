"""A budget: what drives the price of computation so that a network meets a target."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from skipnet.routing.network import SkipNet

SMOOTHING = 0.9
"""Momentum of the moving average of the computation, a step."""


@dataclass
class Budget:
    """Drives alpha, the price of computation, so that the computation meets a target.

    Dual ascent with damping: `alpha = integral + damping * error`, `integral += rate * error`, the
    error being the computation (share of dense multiply-adds, a moving average over steps) over the
    target of the moment, less 1: relative, since the fewer blocks are left, the more each is worth,
    and the higher the price has to rise to close another. The target falls linearly from the
    computation at the start to `target` at `ramp_steps`, so that the network can follow. An
    integral alone swings: by the time the average shows that alpha is high enough, it is far too
    high. Alpha becomes negative where the computation is below the target: then blocks are paid to
    run, for closed gates do not open by themselves.

    Attributes:
        target: Share of dense multiply-adds to reach.
        ramp_steps: Steps until the target is in force.
        rate: Integral gain, alpha a step and unit of relative error.
        damping: Proportional gain, alpha a unit of relative error.
        momentum: Of the moving average.
        integral: State.
        average: State: the average computation; negative before the first step.
        start: State: the computation at the first step.
    """

    target: float
    ramp_steps: int
    rate: float
    damping: float
    momentum: float = SMOOTHING
    integral: float = 0.0
    average: float = -1.0
    start: float = -1.0

    def goal(self, step: int) -> float:
        """Return the target of the moment."""
        ramp = min(1.0, step / max(1, self.ramp_steps))
        return self.start + ramp * (self.target - self.start)

    def update(self, computation: float, step: int) -> float:
        """Take in the computation of a step, and return alpha for the next."""
        if self.average < 0:
            self.average = self.start = computation
        self.average += (1 - self.momentum) * (computation - self.average)
        error = self.average / self.goal(step) - 1
        self.integral += self.rate * error
        return self.integral + self.damping * error

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("integral", "average", "start")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in ("integral", "average", "start"):
            setattr(self, name, state[name])


@dataclass
class Landing:
    """Where the drive ends: gates are moved once so that the target is met, and then stay.

    For the rest of the stage a network is trained as it will be used, so that its blocks get used
    to the decisions, whatever the move has cost.

    Attributes:
        gate: What stays.
        step: The first step after the move.
        land: Moves the gates.
        landed: State: whether it has.
    """

    gate: nn.Module
    step: int
    land: Callable[[], object]
    landed: bool = False

    def advance(self, step: int) -> bool:
        """Return whether gates stay as they are in a step, having moved them before the first."""
        if step >= self.step and not self.landed:
            self.land()
            self.landed = True
        if self.landed:
            # Not a gradient of 0, by which weight decay and momentum would move them; and what has
            # none is not waited for by other processes. Their batch norms are as at inference.
            self.gate.requires_grad_(False).eval()
        return self.landed

    def state_dict(self) -> dict[str, float]:
        return {"landed": float(self.landed)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.landed = bool(state.get("landed", False))


@dataclass
class HeadStart:
    """Where a stage begins: blocks of a trained network stay as they are, and gates alone learn.

    Which blocks matter for the network as it is, is learned before blocks get used to being left
    out. Batch norms are as at inference.

    Attributes:
        network: Of which all but the gates stays.
        step: The first step in which blocks learn too.
    """

    network: SkipNet
    step: int

    def advance(self, step: int) -> None:
        """Freeze or release the blocks for a step."""
        if step > self.step:
            return
        for name, part in self.network.named_children():
            if name != "gate":
                part.requires_grad_(step == self.step).train(step == self.step)


def mean_over_processes(value: Tensor) -> float:
    """Return the mean over all processes: every one must drive the same alpha."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value.item()
