"""Routing: the one record of what a routed network did with a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipnet.routing.cost import Cost


@dataclass
class Routing:
    """Who ran what, and what it cost. Without gates, `logits` and `decisions` are [batch, 0].

    Attributes:
        logits: Logit of executing, [batch, gates].
        decisions: g, the weight of each block's output, [batch, gates]; 0 or 1 unless soft.
        cost: Multiply-adds of the network's parts for one image of this size.
    """

    logits: Tensor
    decisions: Tensor
    cost: Cost

    @property
    def executed(self) -> Tensor:
        """Which gated blocks ran, bool [batch, gates]; a soft g runs its block unless it is 0."""
        return self.decisions > 0

    @property
    def macs(self) -> Tensor:
        """Multiply-adds executed for each image, gates included, int64 [batch]."""
        return self.cost.executed(self.decisions)

    @property
    def keep_rates(self) -> Tensor:
        """Share of the rows that ran each gated block, [gates]."""
        return self.executed.float().mean(dim=0)

    @property
    def blocks_fraction(self) -> float:
        """The paper's computation: share of blocks run, the first counted as always run."""
        rows, gates = self.decisions.shape
        return (self.executed.sum().item() / max(rows, 1) + 1) / (gates + 1)

    @property
    def macs_fraction(self) -> float:
        """Mean executed multiply-adds, gates included, as a share of the dense network's."""
        return self.macs.double().mean().item() / self.cost.dense

    @staticmethod
    def concat(parts: Sequence["Routing"]) -> "Routing":
        """Join the records of several batches of one network and one image size."""
        return Routing(
            logits=torch.cat([part.logits for part in parts]),
            decisions=torch.cat([part.decisions for part in parts]),
            cost=parts[0].cost,
        )
