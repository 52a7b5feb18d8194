"""Routing: the one record of what a routed network did with a batch."""

from dataclasses import dataclass
from typing import Any

from skipnet.routing.cost import Cost


@dataclass
class Routing:
    """Who ran what, and what it cost. Without gates, `logits` and `decisions` are [batch, 0].

    A network records tensors, the inference session arrays; what is derived from them is alike.

    Attributes:
        logits: Logit of executing, [batch, gates].
        decisions: g, the weight of each block's output, [batch, gates]; 0 or 1 unless soft.
        cost: Multiply-adds of the network's parts for one image of this size.
    """

    logits: Any
    decisions: Any
    cost: Cost

    @property
    def executed(self) -> Any:
        """Which gated blocks ran, bool [batch, gates]; a soft g runs its block unless it is 0."""
        return self.decisions > 0

    @property
    def macs(self) -> Any:
        """Multiply-adds executed for each image, gates included, int64 [batch]."""
        return self.cost.executed(self.decisions)

    @property
    def keep_rates(self) -> Any:
        """Share of the rows that ran each gated block, [gates]."""
        return (self.executed * 1.0).mean(0)

    @property
    def blocks_fraction(self) -> float:
        """The paper's computation: share of blocks run, the first counted as always run."""
        rows, gates = self.decisions.shape
        return (int(self.executed.sum()) / max(rows, 1) + 1) / (gates + 1)

    @property
    def macs_fraction(self) -> float:
        """Mean executed multiply-adds, gates included, as a share of the dense network's."""
        return int(self.macs.sum()) / len(self.macs) / self.cost.dense
