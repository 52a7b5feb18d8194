"""Supervised training: cross-entropy alone, of a dense network or through decisions (SP)."""

from torch import Tensor, nn
from torch.nn import functional

from skipnet.routing.decisions import Decision
from skipnet.routing.network import ExecutorName
from skipnet.tasks.task import Metrics


class Supervised:
    """Cross-entropy. With straight-through decisions it is the paper's SP (section 3.2).

    There is no cost term, and yet gates learn to skip. A dense network has no decisions to make.

    Args:
        decide: How gates decide in training.
        execute: Which executor runs the blocks.
        label_smoothing: Share of the target spread over all classes.
    """

    def __init__(
        self,
        *,
        decide: str | Decision = "straight-through",
        execute: ExecutorName = "masked",
        label_smoothing: float = 0.0,
    ) -> None:
        self.decide = decide
        self.execute = execute
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Metrics:
        logits, routing = model(images, decide=self.decide, execute=self.execute)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        metrics = {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}
        if routing.decisions.shape[1]:
            metrics["keep_rate"] = routing.executed.float().mean()
        return metrics

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        assert not state
