"""Configurations: what cannot work is refused when it is written, and nothing else."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from harness import tiny_config

from skipnet import DataConfig, TrainConfig, UserError
from skipnet.training.config import (
    HybridConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    differences,
    from_dict,
    to_dict,
)


def stage(**options: Any) -> StageConfig:
    return StageConfig(**{"iterations": 1} | options)


def hybrid(**options: Any) -> HybridConfig:
    return HybridConfig(**{"iterations": 1} | options)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (OptimizerConfig, {"lr": 0}, "lr must be above 0, not 0"),
        (OptimizerConfig, {"lr": float("nan")}, "lr must be above 0, not nan"),
        (OptimizerConfig, {"gate_lr": -1}, "gate_lr must be above 0"),
        (OptimizerConfig, {"clip_norm": 0}, "clip_norm must be above 0"),
        (OptimizerConfig, {"momentum": 1}, r"momentum must lie in \[0, 1\)"),
        (OptimizerConfig, {"momentum": 0, "nesterov": True}, "nesterov needs momentum"),
        (OptimizerConfig, {"weight_decay": -1}, "weight_decay must be at least 0"),
        (ScheduleConfig, {"milestones": (0.5, 1.5)}, "milestones are shares"),
        (ScheduleConfig, {"peak": 1}, "peak is a share"),
        (ScheduleConfig, {"warmup_iterations": -1}, "warmup_iterations must be at least 0"),
        (StageConfig, {}, "in epochs or in iterations"),
        (stage, {"epochs": 2}, "in epochs or in iterations"),
        (stage, {"iterations": 0}, "iterations must be above 0"),
        (stage, {"iterations": None, "epochs": -1}, "epochs must be above 0"),
        (stage, {"batch_size": 0}, "batch_size must be above 0"),
        (stage, {"accumulate": 0}, "accumulate must be above 0"),
        (stage, {"batch_size": 10, "accumulate": 3}, "not a multiple of accumulate 3"),
        (stage, {"label_smoothing": 1}, r"label_smoothing must lie in \[0, 1\)"),
        (stage, {"ema_decay": 1}, "ema_decay must lie between 0 and 1"),
        (hybrid, {"alpha": -0.1}, "alpha must be at least 0"),
        (hybrid, {"target_compute": 0}, r"target_compute must lie in \(0, 1\]"),
        (hybrid, {"target_compute": 60}, r"target_compute must lie in \(0, 1\]"),
        (hybrid, {"target_ramp": 2}, r"target_ramp must lie in \[0, 1\]"),
        (hybrid, {"samples": 0}, "samples must be above 0"),
        (hybrid, {"baseline": "leave-one-out"}, "needs samples of at least 2"),
        (hybrid, {"sharpen_to": 0}, "sharpen_to must be above 0"),
        (tiny_config, {"stages": ()}, "at least one of dense, sp, hrl"),
        (tiny_config, {"stages": ("hrl", "sp")}, "in the order dense, sp, hrl"),
        (tiny_config, {"stages": ("sp", "sp")}, "each once"),
        (tiny_config, {"log_every": 0}, "log_every must be above 0"),
        (tiny_config, {"evaluate_every": 0}, "evaluate_every must be above 0"),
        (tiny_config, {"checkpoint_seconds": -1}, "checkpoint_seconds must be at least 0"),
        (tiny_config, {"seed": -1}, "seed must be at least 0"),
    ],
)
def test_refused(build: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_comes_back_from_json() -> None:
    config = tiny_config()
    config.data = DataConfig(name="x", mean=(0.1, 0.2, 0.3), std=(1, 1, 1), channels=3)
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(TrainConfig, values) == config
    assert differences(from_dict(TrainConfig, values), config) == []


def test_differences_name_the_fields() -> None:
    one, other = tiny_config(), tiny_config(seed=4, stages=("sp",))
    other.dense.schedule.name = "constant"
    other.data.padding = 3
    assert differences(one, other) == ["stages", "data.padding", "dense.schedule.name", "seed"]


def test_stages_by_name() -> None:
    config = tiny_config()
    assert config.stage("dense") is config.dense
    assert config.stage("sp") is config.sp
    assert config.stage("hrl") is config.hrl
