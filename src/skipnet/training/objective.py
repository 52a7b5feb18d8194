"""What a stage minimises: its task, built from its configuration."""

from collections.abc import Callable

from skipnet.routing.network import SkipNet
from skipnet.seeding import RANK, sub_seed
from skipnet.tasks.budget import SMOOTHING, Budget, HeadStart, Landing
from skipnet.tasks.criterion import Criterion
from skipnet.tasks.hybrid import Hybrid
from skipnet.tasks.supervised import Supervised
from skipnet.tasks.task import Task
from skipnet.training.config import (
    HybridConfig,
    RoutedConfig,
    StageConfig,
    SupervisedConfig,
    TrainConfig,
)


def stage_task(
    config: TrainConfig,
    stage: StageConfig,
    network: SkipNet,
    *,
    total: int,
    rank: int,
    teacher: SkipNet | None,
    land: Callable[[], object],
) -> Task:
    """Return the objective of a stage.

    Args:
        config: Of the run.
        stage: Of the stage.
        network: To be trained.
        total: Its steps.
        rank: Number of this process, which draws decisions of its own.
        teacher: The network that it learns from beside the labels, if any.
        land: Moves the gates so that the stage's target is met.
    """
    if not isinstance(stage, RoutedConfig):
        return Supervised(criterion=Criterion(label_smoothing=stage.label_smoothing))
    criterion = Criterion(
        label_smoothing=stage.label_smoothing,
        teacher=teacher,
        weight=config.teacher_weight,
        temperature=config.teacher_temperature,
    )
    budget = None
    if stage.target_compute is not None:
        budget = Budget(
            target=stage.target_compute,
            ramp_steps=round(stage.target_ramp * total * stage.accumulate),
            # The budget is told of every micro-batch; its gain and average are meant a step.
            rate=stage.alpha_rate / stage.accumulate,
            damping=stage.alpha_damping,
            momentum=SMOOTHING ** (1 / stage.accumulate),
            integral=stage.alpha,
        )
    landing = None
    if stage.settles:
        assert network.gate is not None
        step = round((1 - stage.settle) * total) * stage.accumulate
        landing = Landing(gate=network.gate, step=step, land=land)
    head_start = None
    if stage.gates_first:
        head_start = HeadStart(network, round(stage.gates_first * total) * stage.accumulate)
    seed = sub_seed(config.seed, RANK, rank)
    if isinstance(stage, SupervisedConfig):
        if stage.decide in ("sample", "threshold") and not stage.diversity:
            # Nothing moves the gates, and other processes are not to wait for their gradients.
            assert network.gate is not None
            network.gate.requires_grad_(False)
        return Supervised(
            decide=stage.decide,
            criterion=criterion,
            alpha=stage.alpha,
            budget=budget,
            costs=stage.costs,
            diversity=stage.diversity,
            landing=landing,
            head_start=head_start,
            seed=seed,
        )
    assert isinstance(stage, HybridConfig)
    return Hybrid(
        alpha=stage.alpha,
        beta=stage.beta,
        policy_weight=stage.policy_weight,
        baseline=stage.baseline,
        samples=stage.samples,
        entropy_bonus=stage.entropy_bonus,
        diversity=stage.diversity,
        costs=stage.costs,
        estimator=stage.estimator,
        flipped_share=stage.flipped_share,
        supervised_weight=stage.supervised_weight,
        statistics=stage.statistics,
        criterion=criterion,
        budget=budget,
        landing=landing,
        head_start=head_start,
        seed=seed,
    )
