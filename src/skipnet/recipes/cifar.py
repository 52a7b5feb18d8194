"""CIFAR-10 in an hour on a CPU."""

from dataclasses import replace

from skipnet.recipes.paper import paper
from skipnet.training.config import (
    HybridConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    SupervisedConfig,
    TrainConfig,
)


def cifar10_resnet20_rnn_short() -> TrainConfig:
    """ResNet-20 with recurrent gates on CIFAR-10, in half the time of ResNet-38."""
    config = cifar10_resnet38_rnn_short()
    config.recipe, config.model.name = "cifar10-resnet20-rnn-short", "cifar_resnet20"
    return config


def cifar10_resnet38_rnn_short() -> TrainConfig:
    """ResNet-38 with recurrent gates on CIFAR-10 in about 75 minutes of two CPU cores."""
    config = paper("cifar10", 38, "rnn")
    config.recipe = "cifar10-resnet38-rnn-short"
    optimizer = OptimizerConfig(lr=0.3, nesterov=True, weight_decay=5e-4, clip_norm=5.0)
    config.dense = StageConfig(
        epochs=9, optimizer=optimizer, schedule=ScheduleConfig(name="one-cycle")
    )
    # Together the two stages follow the dense network's one cycle: up in SP, down in HRL. Gates are
    # slow in SP: left to themselves they sink towards the threshold and blocks get less training.
    config.sp = SupervisedConfig(
        epochs=3,
        optimizer=replace(optimizer, gate_lr=0.005),
        schedule=ScheduleConfig(name="one-cycle", peak=0.98),
    )
    config.hrl = HybridConfig(
        epochs=6,
        optimizer=OptimizerConfig(
            lr=0.3, gate_lr=0.2, nesterov=True, weight_decay=5e-4, clip_norm=5.0
        ),
        schedule=ScheduleConfig(name="one-cycle", peak=0.02),
        alpha=0.0,
        target_compute=0.58,
        target_ramp=0.3,
        alpha_rate=0.01,
        estimator="flip",
        flipped_share=0.5,
        diversity=0.1,
    )
    config.evaluate_every = 1
    return config
