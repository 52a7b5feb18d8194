"""Learning-rate schedules: against values by hand, and torch's own where it has them."""

import pytest
import torch

from skipnet.training.config import ScheduleConfig
from skipnet.training.schedule import learning_rate_factor

TOTAL = 40


def factors(schedule: ScheduleConfig, total: int = TOTAL) -> list[float]:
    return [learning_rate_factor(schedule, step, total) for step in range(total)]


def torch_factors(build: object, total: int = TOTAL) -> list[float]:
    """The learning rates of one of torch's schedulers that starts from 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_constant() -> None:
    assert factors(ScheduleConfig(name="constant")) == [1.0] * TOTAL


def test_cosine_is_torchs() -> None:
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL))
    assert factors(ScheduleConfig(name="cosine")) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shares", [(0.5, 0.75), (0.1, 0.4, 0.9), ()])
def test_step_is_torchs(shares: tuple[float, ...]) -> None:
    milestones = [round(share * TOTAL) for share in shares]
    expected = torch_factors(
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones, gamma=0.2)
    )
    schedule = ScheduleConfig(name="step", milestones=shares, gamma=0.2)
    assert factors(schedule) == pytest.approx(expected)


def test_one_cycle_by_hand() -> None:
    """Lines through 0 before the first step, 1 at the peak and 0 after the last step."""
    schedule = ScheduleConfig(name="one-cycle", peak=0.4)
    assert factors(schedule, 4) == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3])
    schedule = ScheduleConfig(name="one-cycle", peak=0.3)
    assert factors(schedule, 4) == pytest.approx([2 / 3, 6 / 7, 4 / 7, 2 / 7])


@pytest.mark.parametrize("total", [1, 2, 3, 100])
def test_one_cycle_never_stands_still(total: int) -> None:
    for peak in (0.01, 0.3, 0.99):
        rates = factors(ScheduleConfig(name="one-cycle", peak=peak), total)
        assert all(0 < rate <= 1 for rate in rates)
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "one-cycle"])
def test_warmup_holds_a_lower_rate_and_changes_nothing_after(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup_iterations=5, warmup_factor=0.05)
    without = factors(ScheduleConfig(name=name))
    assert factors(schedule) == [0.05] * 5 + without[5:]
