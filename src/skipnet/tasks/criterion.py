"""The loss of each image: cross-entropy, and what a teacher network adds to it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipnet.errors import UserError


class Criterion:
    """Cross-entropy with the labels, mixed with a teacher's answers (knowledge distillation).

    `(1 - weight) * CE(labels) + weight * T^2 * KL(teacher || student)`, both at temperature T in
    the second term (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        label_smoothing: Share of the target spread over all classes.
        teacher: A trained network `images -> (logits, …)` in evaluation mode, on the device of the
            images; None for labels alone. It is not trained.
        weight: Share of the teacher's term, 0 to 1.
        temperature: T, above 0: higher shows more of what the teacher thinks of wrong classes.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        weight: float = 0.5,
        temperature: float = 2.0,
    ) -> None:
        if not 0 <= weight <= 1 or not temperature > 0:
            raise UserError(
                f"a teacher's weight lies in [0, 1] and its temperature above 0, not {weight} and "
                f"{temperature}"
            )
        self.label_smoothing = label_smoothing
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature

    def __call__(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image, [batch], for logits [batch, classes]."""
        losses = functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.label_smoothing
        )
        if self.teacher is None:
            return losses
        with torch.no_grad():
            answers, _ = self.teacher(images, execute="compacted")
        difference = functional.kl_div(
            functional.log_softmax(logits / self.temperature, dim=1),
            functional.log_softmax(answers.to(logits) / self.temperature, dim=1),
            reduction="none",
            log_target=True,
        ).sum(dim=1)
        return (1 - self.weight) * losses + self.weight * self.temperature**2 * difference
