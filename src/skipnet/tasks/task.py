"""The protocol between the loop and an objective."""

from typing import Protocol

from torch import Tensor, nn

# "loss" is minimised; every other entry is a scalar for the log, detached.
Metrics = dict[str, Tensor]


class Task(Protocol):
    """An objective. The loop calls it once a (micro-)batch and knows nothing of what it does."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Metrics:
        """Return the loss of a batch and what is worth logging.

        Args:
            model: A `SkipNet`, perhaps wrapped for several devices; in training mode.
            images: [batch, channels, height, width].
            labels: int64 [batch].
            step: Number of the (micro-)batch since the beginning of the stage, from 0.
        """
        ...

    def state_dict(self) -> dict[str, float]:
        """Return what must survive a resume."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take back what `state_dict` returned."""
        ...
