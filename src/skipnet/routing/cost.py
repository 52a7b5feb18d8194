"""Cost: the multiply-adds (MACs) of a network's parts, and what decisions make of them."""

from typing import Any, NamedTuple

import numpy as np


class Cost(NamedTuple):
    """Multiply-adds of one image, by part.

    Attributes:
        stem: The layers before the first block.
        blocks: Each block without its shortcut.
        shortcuts: Each shortcut: 0 for an identity, else its projection, which always runs.
        gates: Each gate; one fewer than blocks, or none.
        head: The layers after the last block.
    """

    stem: int
    blocks: tuple[int, ...]
    shortcuts: tuple[int, ...]
    gates: tuple[int, ...]
    head: int

    @property
    def always(self) -> int:
        """What every image pays in a routed network: all but the gated blocks."""
        return (
            self.stem + self.blocks[0] + sum(self.shortcuts) + sum(self.gates) + self.head
            if self.gates
            else self.dense
        )

    @property
    def dense(self) -> int:
        """The network without gates, every block run."""
        return self.stem + sum(self.blocks) + sum(self.shortcuts) + self.head

    @property
    def dense_without_projections(self) -> int:
        """The paper's figure: convolutions, neither shortcut projections nor the classifier."""
        return self.stem + sum(self.blocks)

    def executed(self, decisions: Any) -> Any:
        """Return the multiply-adds of each row, int64 [batch], for decisions [batch, gates].

        Args:
            decisions: Tensor or array; so is what returns.
        """
        gated: Any = np.array(self.blocks[1:] if self.gates else (), dtype=np.int64)
        if not isinstance(decisions, np.ndarray):
            import torch  # Not at the top: the engine does without.

            gated = torch.from_numpy(gated).to(decisions.device, non_blocking=True)
        return ((decisions > 0) * gated).sum(1) + self.always
