"""Every recipe trains, and those of the paper are the paper's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import metrics, write_cifar10

import skipnet
from skipnet import TrainConfig, UserError
from skipnet.recipes import RECIPES, describe_recipe, recipe
from skipnet.training.config import from_dict, to_dict
from skipnet.training.schedule import learning_rate_factor

PAPER = [
    (f"cifar10-resnet{depth}-{kind}", depth, gate)
    for depth, ff in ((38, "ff1"), (74, "ff1"), (110, "ff2"))
    for kind, gate in (("rnn", "rnn"), ("ff", ff))
]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("cifar10"), num_train=20, num_test=8)


@pytest.mark.parametrize("name", list(RECIPES))
def test_two_steps_of_each_stage(name: str, cifar10: Path, tmp_path: Path) -> None:
    config = recipe(name)
    if config.data.name != "digits":
        assert config.data.name == "uoft-cs/cifar10"
        config.data.name = str(cifar10)
    for stage in config.stages:
        short = {"epochs": None, "iterations": 2, "batch_size": 8}
        setattr(config, stage, replace(config.stage(stage), **short))
    config = replace(config, tensorboard=False, accelerator="cpu", log_every=1)
    run = skipnet.train(config, output=tmp_path / "run")
    assert list(run.results) == ["dense", "sp", "hrl"]
    lines = [line for line in metrics(run.path) if "loss" in line]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in config.stages for step in (1, 2)
    ]
    model, info = skipnet.load(run.path / "model.safetensors")
    assert (info.architecture.name, info.architecture.gate) == (
        config.model.name,
        config.model.gate,
    )
    channels = info.architecture.in_channels
    with torch.inference_mode():
        logits, routing = model(torch.zeros(3, channels, 8, 8), execute="compacted")
    assert logits.shape == (3, 10)
    assert routing.decisions.shape == (3, model.num_gates)


@pytest.mark.parametrize("name", list(RECIPES))
def test_comes_back_from_json(name: str) -> None:
    config = recipe(name)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert recipe(name) == config and recipe(name) is not config


@pytest.mark.parametrize("name", list(RECIPES))
def test_unknown_fields_are_refused(name: str) -> None:
    for path in ((), ("model",), ("data",), ("hrl",), ("sp", "optimizer"), ("dense", "schedule")):
        values = inner = to_dict(recipe(name))
        for key in path:
            inner = inner[key]
        inner["colour"] = "blue"
        with pytest.raises(UserError, match="unknown fields colour"):
            from_dict(TrainConfig, values)


@pytest.mark.parametrize("name", list(RECIPES))
def test_name_and_description(name: str) -> None:
    assert recipe(name).recipe == name
    description = describe_recipe(name)
    assert description.endswith(".") and len(description) < 90


@pytest.mark.parametrize("name", list(RECIPES))
def test_stages_share_nothing(name: str) -> None:
    """A field that is changed in one stage stays as it is in the others."""
    config = recipe(name)
    config.dense.optimizer.lr, config.sp.schedule.name = 123.0, "constant"
    assert config.sp.optimizer.lr == recipe(name).sp.optimizer.lr
    assert config.dense.schedule.name == recipe(name).dense.schedule.name


def test_all_are_listed() -> None:
    names = skipnet.list_recipes()
    assert names[0] == "digits"
    assert "cifar10-resnet38-rnn-short" in names
    assert {name for name, _, _ in PAPER} <= set(names)


@pytest.mark.parametrize(("name", "depth", "gate"), PAPER)
def test_the_papers_schedule(name: str, depth: int, gate: str) -> None:
    """SkipNet, section 4 and appendix; He et al. 2015, section 4.2, for the warm-up."""
    config = recipe(name)
    assert (config.model.name, config.model.gate) == (f"cifar_resnet{depth}", gate)
    assert config.stages == ("dense", "sp", "hrl")
    data = config.data
    assert (data.padding, data.flip, data.image_size, data.mean) == (4, True, None, None)
    for stage in (config.dense, config.sp, config.hrl):
        optimizer = stage.optimizer
        assert (optimizer.name, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.9, False)
        assert (optimizer.weight_decay, optimizer.clip_norm) == (1e-4, None)
        assert (stage.batch_size, stage.accumulate, stage.label_smoothing) == (128, 1, 0)
        assert (stage.ema_decay, optimizer.gate_lr) == (None, None)

    def rate(stage: skipnet.training.config.StageConfig, step: int) -> float:
        total = stage.total_steps(steps_per_epoch=390)
        return stage.optimizer.lr * learning_rate_factor(stage.schedule, step, total)

    for stage in (config.dense, config.sp):
        assert stage.total_steps(steps_per_epoch=390) == 64_000
        assert rate(stage, 0) == rate(stage, 399) == pytest.approx(0.01 if depth == 110 else 0.1)
        for first, last, expected in [
            (400, 31_999, 0.1),
            (32_000, 47_999, 0.01),
            (48_000, 63_999, 0.001),
        ]:
            assert rate(stage, first) == rate(stage, last) == pytest.approx(expected)
    hrl = config.hrl
    assert hrl.total_steps(steps_per_epoch=390) == 10_000
    assert rate(hrl, 0) == rate(hrl, 9_999) == 1e-4
    # The equations as they are; the weight of the REINFORCE term is the released code's.
    assert (hrl.alpha, hrl.beta, hrl.target_compute, hrl.sharpen_to) == (0.1, 1.0, None, None)
    assert (hrl.costs, hrl.baseline, hrl.samples, hrl.entropy_bonus) == ("uniform", "none", 1, 0)
    assert hrl.policy_weight == 0.01


def test_short_recipe_differs_in_the_schedule_alone() -> None:
    short, paper = recipe("cifar10-resnet38-rnn-short"), recipe("cifar10-resnet38-rnn")
    assert short.model == paper.model and short.data == paper.data
    assert short.hrl.target_compute is not None
    epochs = [short.stage(stage).epochs for stage in short.stages]
    assert None not in epochs and sum(epochs) < 30
