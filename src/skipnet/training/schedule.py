"""Learning-rate schedules, as pure functions of the step: nothing to save, nothing to restore."""

import math

from skipnet.training.config import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """Return what the learning rate is multiplied by at a step.

    Args:
        schedule: Which schedule.
        step: From 0.
        total: Steps of the stage.
    """
    if step < schedule.warmup_iterations:
        return schedule.warmup_factor
    done = step / total
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        passed = sum(step >= round(share * total) for share in schedule.milestones)
        return schedule.gamma**passed
    if schedule.name == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    # One-cycle: the step itself counts, so that neither the first nor the last one is at 0.
    done = (step + 1) / (total + 1)
    return done / schedule.peak if done < schedule.peak else (1 - done) / (1 - schedule.peak)
