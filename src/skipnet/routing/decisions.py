"""Decisions: a logit of executing becomes g, the weight of the block's output.

A decision is a callable `(logit, index, training) -> g`, both [batch], made anew or reused for each
forward. Which gate gave the logit and who executes the block are other choices.
"""

from typing import Protocol

import torch
from torch import Tensor

from skipnet.errors import UserError


class Decision(Protocol):
    """What `SkipNet.forward` asks of a decision."""

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        """Return g for gate `index`, [batch], of the logit's dtype, in [0, 1]."""
        ...

    def binary(self, training: bool) -> bool:
        """Whether g is 0 or 1 and carries no gradient, so that rows can truly be left out."""
        ...


class Threshold:
    """Execute iff p(execute) > 0.5: the decision at inference."""

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        return (logit > 0).to(logit.dtype)

    def binary(self, training: bool) -> bool:
        return True


class StraightThrough:
    """Forward 1[S(x) >= 0.5], backward the gradient of S(x) (SkipNet, section 3.2).

    Outside of training it is the hard threshold.
    """

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        if not training:
            return (logit > 0).to(logit.dtype)
        soft = torch.sigmoid(logit)
        # soft - soft.detach() is exactly 0, so g is exactly 0 or 1.
        return (logit >= 0).to(logit.dtype) + (soft - soft.detach())

    def binary(self, training: bool) -> bool:
        return not (training and torch.is_grad_enabled())


class Gumbel:
    """Sample forward, pathwise gradient backward: a straight-through binary Gumbel-softmax.

    Logistic noise is added to the logit; forward 1[logit + noise > 0], which is Bernoulli of
    sigmoid(logit), backward the gradient of sigmoid(logit + noise) (Jang et al. 2017, arXiv
    1611.01144, at temperature 1). Outside of training it is the hard threshold.

    Args:
        generator: Source of randomness, on the CPU or the logits' device; None takes torch's own.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        if not training:
            return (logit > 0).to(logit.dtype)
        uniform = _uniform(logit, self.generator).clamp(1e-6, 1 - 1e-6)
        noisy = logit + torch.logit(uniform).to(logit.dtype)
        soft = torch.sigmoid(noisy)
        return (noisy > 0).to(logit.dtype) + (soft - soft.detach())

    def binary(self, training: bool) -> bool:
        return not (training and torch.is_grad_enabled())


class Sample:
    """Execute with probability p(execute): g ~ Bernoulli(sigmoid(logit)), no gradient.

    Args:
        generator: Source of randomness, on the CPU or the logits' device; None takes torch's own.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        uniform = _uniform(logit, self.generator)
        return (uniform < torch.sigmoid(logit.detach())).to(logit.dtype)

    def binary(self, training: bool) -> bool:
        return True


class Soft:
    """g = S(x) in training, the hard threshold at test: the paper's soft-gating ablation."""

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        return torch.sigmoid(logit) if training else (logit > 0).to(logit.dtype)

    def binary(self, training: bool) -> bool:
        return not training


class Fixed:
    """Decisions given beforehand, whatever the logits say.

    Args:
        mask: True or 1 where the block runs; [gates] for all rows alike, or [batch, gates].
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.ndim not in (1, 2):
            raise UserError(f"a fixed mask is [gates] or [batch, gates], not {list(mask.shape)}")
        if not ((mask == 0) | (mask == 1)).all():
            raise UserError("a fixed mask holds only 0 and 1")
        self.mask = mask

    def demand_gates(self, num_gates: int) -> None:
        """Check that the mask is of a network with as many gates."""
        if self.mask.shape[-1] != num_gates:
            raise UserError(
                f"the fixed mask has {self.mask.shape[-1]} gates, the network has {num_gates}"
            )

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        if self.mask.ndim == 2 and self.mask.shape[0] != logit.shape[0]:
            raise UserError(
                f"the fixed mask has {self.mask.shape[0]} rows, the batch has {logit.shape[0]}"
            )
        return self.mask[..., index].to(logit).expand(logit.shape)

    def binary(self, training: bool) -> bool:
        return True


class Flip:
    """The hard threshold, but for one gate a row at most, which decides the other way.

    Args:
        gates: Which gate, int64 [batch]; -1 for none.
    """

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        return ((logit > 0) ^ (self.gates == index)).to(logit.dtype)

    def binary(self, training: bool) -> bool:
        return True


class Random:
    """Execute with a given probability, whatever the logits say.

    The paper's SDV: stochastic depth with the same skipping ratio in training and at test.

    Args:
        keep: Probability of execution, one for all gates or one a gate.
        generator: Source of randomness, on the CPU or the logits' device; None takes torch's own.
    """

    def __init__(
        self, keep: float | tuple[float, ...], generator: torch.Generator | None = None
    ) -> None:
        rates = keep if isinstance(keep, tuple) else (keep,)
        if not all(0 <= rate <= 1 for rate in rates):
            raise UserError(f"keep rates must lie in [0, 1], not {keep}")
        self.keep = keep
        self.generator = generator

    def demand_gates(self, num_gates: int) -> None:
        """Check that the rates are of a network with as many gates."""
        if isinstance(self.keep, tuple) and len(self.keep) != num_gates:
            raise UserError(f"{len(self.keep)} keep rates for a network of {num_gates} gates")

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        rate = self.keep[index] if isinstance(self.keep, tuple) else self.keep
        return (_uniform(logit, self.generator) < rate).to(logit.dtype)

    def binary(self, training: bool) -> bool:
        return True


def named_decision(name: str) -> Decision:
    """Return a decision by its name: threshold, straight-through, gumbel, sample or soft."""
    known: dict[str, type] = {
        "threshold": Threshold,
        "straight-through": StraightThrough,
        "gumbel": Gumbel,
        "sample": Sample,
        "soft": Soft,
    }
    if name not in known:
        raise UserError(f"unknown decision {name!r}: use one of {', '.join(known)}, or an object")
    return known[name]()


def _uniform(logit: Tensor, generator: torch.Generator | None) -> Tensor:
    device = logit.device if generator is None else generator.device
    # float32 whatever the precision: bfloat16 has too few values between 0 and 1 to draw from.
    return torch.rand(logit.shape, generator=generator, device=device).to(logit.device)
