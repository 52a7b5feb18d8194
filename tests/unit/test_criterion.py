"""The loss of each image, against the formulas written out in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from skipnet import UserError
from skipnet.tasks.criterion import Criterion


class Teacher(nn.Module):
    """Answers with what the images hold."""

    def forward(self, images: Tensor, **options: object) -> tuple[Tensor, None]:
        return images.flatten(1), None


def case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    answers = 3 * torch.randn(5, 4, 1, 1, dtype=torch.float64, generator=generator)
    return logits, answers, torch.tensor([0, 1, 2, 3, 1])


def softmax(row: list[float], temperature: float) -> list[float]:
    exponents = [math.exp(x / temperature) for x in row]
    return [x / sum(exponents) for x in exponents]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mixes_labels_and_teacher(weight: float, temperature: float) -> None:
    logits, answers, labels = case()
    criterion = Criterion(teacher=Teacher(), weight=weight, temperature=temperature)
    losses = criterion(logits, answers, labels)
    for row in range(5):
        own = softmax(logits[row].tolist(), temperature)
        teacher = softmax(answers[row].flatten().tolist(), temperature)
        kl = sum(t * math.log(t / p) for t, p in zip(teacher, own, strict=True))
        labels_part = -math.log(softmax(logits[row].tolist(), 1.0)[labels[row]])
        expected = (1 - weight) * labels_part + weight * temperature**2 * kl
        assert losses[row].item() == pytest.approx(expected, rel=1e-9)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn_from_it() -> None:
    _, answers, labels = case()
    student = answers.flatten(1).clone().requires_grad_()
    Criterion(teacher=Teacher(), weight=1.0)(student, answers, labels).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-12)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    logits, answers, labels = case()
    losses = Criterion(label_smoothing=0.1)(logits, answers, labels)
    expected = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("options", [{"weight": 1.1}, {"weight": -0.1}, {"temperature": 0.0}])
def test_impossible_mixtures(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="weight lies in"):
        Criterion(**options)
