"""A network that was trained elsewhere, to a share of its computation."""

from dataclasses import replace

from skipnet.recipes.paper import paper
from skipnet.training.config import (
    HybridConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    SupervisedConfig,
    TrainConfig,
)


def finetune() -> TrainConfig:
    """A trained network of torchvision, timm or transformers, to 70 % of its computation."""
    config = paper("imagenet", 50, "rnn")
    config.recipe = "finetune"
    config.stages = ("sp", "hrl")
    config.data.mean = config.data.std = None  # As the weights expect.
    config.model = ModelConfig(name="torchvision/resnet50", weights="DEFAULT")
    optimizer = OptimizerConfig(lr=0.1, nesterov=True, weight_decay=1e-4, clip_norm=5.0)
    # Before the others, where the weights are of other classes: --stages dense sp hrl.
    config.dense = StageConfig(
        epochs=15, batch_size=128, optimizer=optimizer, schedule=ScheduleConfig(name="one-cycle")
    )
    config.from_dense = True
    # As good as dense training: what it is for is to warm up, at a rate that loses nothing.
    config.sp = SupervisedConfig(
        epochs=0.5,
        batch_size=128,
        optimizer=replace(optimizer, lr=0.01, gate_lr=0.005),
        schedule=ScheduleConfig(name="one-cycle", peak=0.98),
    )
    config.hrl = HybridConfig(
        epochs=4,
        batch_size=128,
        optimizer=replace(optimizer, lr=0.01, gate_lr=0.1),
        schedule=ScheduleConfig(name="one-cycle", peak=0.02),
        alpha=0.0,
        target_compute=0.7,
        target_ramp=0.3,
        alpha_rate=0.01,
        estimator="flip",
        flipped_share=0.5,
        diversity=0.1,
    )
    return config
