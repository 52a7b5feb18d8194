"""scikit-learn's handwritten digits: the whole system in minutes, nothing to download."""

from skipnet.data.sources import DataConfig
from skipnet.training.config import (
    HybridConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    SupervisedConfig,
    TrainConfig,
)


def digits() -> TrainConfig:
    """ResNet-38 on 8x8 digits, dense, SP and HRL to 60 % of the computation: two minutes."""
    one_cycle = ScheduleConfig(name="one-cycle")
    optimizer = OptimizerConfig(lr=0.1, nesterov=True, weight_decay=5e-4, clip_norm=5.0)
    return TrainConfig(
        recipe="digits",
        model=ModelConfig(name="cifar_resnet38", gate="rnn"),
        data=DataConfig(name="digits", padding=1, flip=False),
        dense=StageConfig(epochs=40, batch_size=64, optimizer=optimizer, schedule=one_cycle),
        sp=SupervisedConfig(epochs=30, batch_size=64, optimizer=optimizer, schedule=one_cycle),
        hrl=HybridConfig(
            epochs=40,
            batch_size=64,
            optimizer=OptimizerConfig(
                lr=0.02, gate_lr=0.1, nesterov=True, weight_decay=5e-4, clip_norm=5.0
            ),
            schedule=ScheduleConfig(name="cosine"),
            alpha=0.0,
            target_compute=0.6,
            target_ramp=0.4,
            alpha_rate=0.01,
            estimator="flip",
            flipped_share=0.5,
            diversity=0.1,
        ),
        evaluate_every=10,
        log_every=20,
    )
