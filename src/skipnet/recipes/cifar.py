"""CIFAR-10 recipes: the paper's, and a short one for a CPU."""

from collections.abc import Callable

from skipnet.data.sources import DataConfig
from skipnet.routing.gates import GateName
from skipnet.training.config import (
    HybridConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    SupervisedConfig,
    TrainConfig,
)

CIFAR10 = "uoft-cs/cifar10"


def _paper(depth: int, gate: GateName, recipe: str) -> TrainConfig:
    """SkipNet, section 4 and its released code: 64k iterations dense and SP, 10k HRL."""
    # ResNet-110 starts at a tenth of the learning rate (He et al. 2015, section 4.2).
    warmup = 400 if depth >= 110 else 0
    optimizer = OptimizerConfig(lr=0.1, weight_decay=1e-4)
    schedule = ScheduleConfig(
        name="step", milestones=(0.5, 0.75), gamma=0.1, warmup_iterations=warmup
    )
    return TrainConfig(
        recipe=recipe,
        model=ModelConfig(name=f"cifar_resnet{depth}", gate=gate),
        data=DataConfig(name=CIFAR10, padding=4, flip=True),
        dense=StageConfig(iterations=64_000, optimizer=optimizer, schedule=schedule),
        sp=SupervisedConfig(iterations=64_000, optimizer=optimizer, schedule=schedule),
        hrl=HybridConfig(
            iterations=10_000,
            optimizer=OptimizerConfig(lr=1e-4, weight_decay=1e-4),
            schedule=ScheduleConfig(name="constant"),
            alpha=0.1,
            beta=1.0,
            policy_weight=0.01,
            baseline="none",
        ),
        evaluate_every=5,
    )


def cifar10_resnet38_rnn() -> TrainConfig:
    """The paper's ResNet-38 with recurrent gates on CIFAR-10."""
    return _paper(38, "rnn", "cifar10-resnet38-rnn")


def cifar10_resnet38_ff() -> TrainConfig:
    """The paper's ResNet-38 with feed-forward gates I on CIFAR-10."""
    return _paper(38, "ff1", "cifar10-resnet38-ff")


def cifar10_resnet74_rnn() -> TrainConfig:
    """The paper's ResNet-74 with recurrent gates on CIFAR-10."""
    return _paper(74, "rnn", "cifar10-resnet74-rnn")


def cifar10_resnet74_ff() -> TrainConfig:
    """The paper's ResNet-74 with feed-forward gates I on CIFAR-10."""
    return _paper(74, "ff1", "cifar10-resnet74-ff")


def cifar10_resnet110_rnn() -> TrainConfig:
    """The paper's ResNet-110 with recurrent gates on CIFAR-10."""
    return _paper(110, "rnn", "cifar10-resnet110-rnn")


def cifar10_resnet110_ff() -> TrainConfig:
    """The paper's ResNet-110 with feed-forward gates II on CIFAR-10."""
    return _paper(110, "ff2", "cifar10-resnet110-ff")


def cifar10_resnet38_rnn_short() -> TrainConfig:
    """ResNet-38 with recurrent gates on CIFAR-10 in about 75 minutes of two CPU cores."""
    config = cifar10_resnet38_rnn()
    config.recipe = "cifar10-resnet38-rnn-short"
    optimizer = OptimizerConfig(lr=0.3, nesterov=True, weight_decay=5e-4, clip_norm=5.0)
    config.dense = StageConfig(
        epochs=9, optimizer=optimizer, schedule=ScheduleConfig(name="one-cycle")
    )
    # Together the two stages follow the dense network's one cycle: up in SP, down in HRL.
    config.sp = SupervisedConfig(
        epochs=3, optimizer=optimizer, schedule=ScheduleConfig(name="one-cycle", peak=0.98)
    )
    config.hrl = HybridConfig(
        epochs=6,
        optimizer=OptimizerConfig(
            lr=0.3, gate_lr=0.1, nesterov=True, weight_decay=5e-4, clip_norm=5.0
        ),
        schedule=ScheduleConfig(name="one-cycle", peak=0.02),
        alpha=0.6,
        target_compute=0.73,
        target_ramp=0.2,
        policy_weight=0.2,
        sharpen_to=2.0,
    )
    config.evaluate_every = 1
    return config


CIFAR_RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "cifar10-resnet38-rnn": cifar10_resnet38_rnn,
    "cifar10-resnet38-ff": cifar10_resnet38_ff,
    "cifar10-resnet74-rnn": cifar10_resnet74_rnn,
    "cifar10-resnet74-ff": cifar10_resnet74_ff,
    "cifar10-resnet110-rnn": cifar10_resnet110_rnn,
    "cifar10-resnet110-ff": cifar10_resnet110_ff,
    "cifar10-resnet38-rnn-short": cifar10_resnet38_rnn_short,
}
