"""The loop: it does what a plain loop of a few lines does, and writes down what it did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_same_weights, metrics, tiny_config, weights
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import skipnet
from skipnet import SkipNet, TrainConfig, UserError
from skipnet.data.loaders import TrainLoader
from skipnet.data.sources import load, normalization
from skipnet.models.weights import read_tensors
from skipnet.seeding import WEIGHTS, sub_seed
from skipnet.training.config import OptimizerConfig, ScheduleConfig, StageConfig
from skipnet.training.loop import build_optimizer
from skipnet.training.schedule import learning_rate_factor


def one_stage(name: str, model: str = "tiny_plain", **stage: Any) -> TrainConfig:
    """A run of one stage with nothing but plain gradient descent, logged every step."""
    config = tiny_config(stages=(name,), log_every=1, checkpoint_seconds=1000)
    config.model.name = model
    options = {
        "iterations": 6,
        "batch_size": 16,
        "ema_decay": None,
        "optimizer": OptimizerConfig(lr=0.05, momentum=0, weight_decay=0),
        "schedule": ScheduleConfig(name="constant"),
    }
    return replace(config, **{name: replace(config.stage(name), **options | stage)})


def run(config: TrainConfig, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train and return the metrics and the weights."""
    path = skipnet.train(config, output=folder).path
    return metrics(path), weights(path / f"{config.stages[0]}.safetensors")


def column(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def start(config: TrainConfig) -> tuple[SkipNet, TrainLoader]:
    """The network and the batches of a run with one stage, dense or SP, as it begins."""
    (name,) = config.stages
    index = {"dense": 0, "sp": 1}[name]
    images, _ = load(config.data)
    mean, std = normalization(config.data, images)
    seed = sub_seed(config.seed, WEIGHTS, index)
    torch.manual_seed(seed)
    network = skipnet.create(
        config.model.name, gate=config.model.gate if name == "sp" else None, in_channels=1
    )
    loader = TrainLoader(
        images,
        batch_size=config.stage(name).batch_size,
        seed=seed,
        padding=config.data.padding,
        flip=config.data.flip,
        mean=mean,
        std=std,
    )
    return network, loader


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(lr=0.05, momentum=0.9, weight_decay=1e-2),
        OptimizerConfig(lr=0.05, momentum=0.9, nesterov=True, clip_norm=0.5),
        OptimizerConfig(name="adamw", lr=0.01, momentum=0.8, weight_decay=0.1),
    ],
    ids=["sgd", "nesterov-clipped", "adamw"],
)
@pytest.mark.parametrize("stage", ["dense", "sp"])
def test_same_as_a_plain_loop(tmp_path: Path, optimizer: OptimizerConfig, stage: str) -> None:
    schedule = ScheduleConfig(name="cosine")
    config = one_stage(
        stage, "tiny_resnet", optimizer=optimizer, schedule=schedule, label_smoothing=0.1
    )
    lines, trained = run(config, tmp_path / "run")

    network, loader = start(config)
    network.to(memory_format=torch.channels_last).train()
    if optimizer.name == "sgd":
        plain: torch.optim.Optimizer = torch.optim.SGD(
            network.parameters(),
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            weight_decay=optimizer.weight_decay,
        )
    else:
        plain = torch.optim.AdamW(
            network.parameters(), lr=optimizer.lr, betas=(0.8, 0.999), weight_decay=0.1
        )
    losses, norms = [], []
    for step in range(6):
        plain.param_groups[0]["lr"] = optimizer.lr * learning_rate_factor(schedule, step, 6)
        images, labels = loader.batch(step)
        images = images.to(memory_format=torch.channels_last)
        logits, _ = network(images, decide="straight-through")
        log_p = logits.log_softmax(dim=1)
        right = -log_p[torch.arange(len(labels)), labels].mean()
        loss = 0.9 * right + 0.1 * -log_p.mean()
        plain.zero_grad()
        loss.backward()
        if optimizer.clip_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5).item())
        plain.step()
        losses.append(loss.item())
    assert column(lines, "loss") == pytest.approx(losses, rel=1e-4)
    assert column(lines, "gradient_norm") == pytest.approx(norms, rel=1e-4)
    assert_close(trained, network.state_dict(), 1e-4)


@pytest.mark.parametrize("stage", ["dense", "sp"])
def test_accumulation_equals_the_whole_batch(tmp_path: Path, stage: str) -> None:
    """Without batch norm, which sees only one micro-batch at a time."""
    optimizer = OptimizerConfig(lr=0.05, clip_norm=0.5)
    whole = one_stage(stage, optimizer=optimizer)
    parts = one_stage(stage, optimizer=optimizer, accumulate=4)
    lines, trained = run(whole, tmp_path / "whole")
    part_lines, part_trained = run(parts, tmp_path / "parts")
    for name in ("loss", "accuracy", "gradient_norm", "keep_rate"):
        assert column(part_lines, name) == pytest.approx(column(lines, name), rel=1e-4)
    assert_close(part_trained, trained, 1e-5)


def test_accumulation_in_hybrid_training(tmp_path: Path) -> None:
    lines, _ = run(one_stage("hrl", accumulate=4, target_compute=0.8), tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_gates_have_their_own_learning_rate(tmp_path: Path) -> None:
    def change(gate_lr: float | None) -> dict[str, Tensor]:
        optimizer = OptimizerConfig(lr=0.05, gate_lr=gate_lr, momentum=0, weight_decay=0)
        config = one_stage("sp", iterations=1, optimizer=optimizer)
        first = start(config)[0].state_dict()
        lines, trained = run(config, tmp_path / str(gate_lr))
        assert column(lines, "lr") == [0.05]
        return {name: trained[name] - first[name] for name in first}

    same, slower = change(None), change(0.01)
    for name in same:
        factor = 0.2 if name.startswith("gate.") else 1.0
        torch.testing.assert_close(slower[name], factor * same[name], rtol=1e-2, atol=1e-7)
    assert max(same[name].abs().max() for name in same if name.startswith("gate.")) > 1e-5


def test_schedule_moves_both_learning_rates(tmp_path: Path) -> None:
    network = skipnet.create("tiny_resnet", gate="rnn")
    config = OptimizerConfig(lr=0.1, gate_lr=0.01)
    optimizer = build_optimizer(network, config)
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert network.gate is not None
    gates = sum(p.numel() for p in network.gate.parameters())
    assert sizes == [sum(p.numel() for p in network.parameters()) - gates, gates]

    schedule = ScheduleConfig(name="step", milestones=(0.5,), warmup_iterations=1)
    lines, _ = run(one_stage("sp", iterations=4, schedule=schedule), tmp_path / "run")
    assert column(lines, "lr") == pytest.approx([0.005, 0.05, 0.005, 0.005])


def test_moving_average_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the parameters; buffers are the last ones."""
    states: list[dict[str, Tensor]] = []
    update = AveragedModel.update_parameters

    def record(self: AveragedModel, model: SkipNet) -> None:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        update(self, model)

    monkeypatch.setattr(AveragedModel, "update_parameters", record)
    config = one_stage("sp", "tiny_resnet", ema_decay=0.7)
    _, trained = run(config, tmp_path / "run")
    assert len(states) == 6
    expected = dict(states[0])
    parameters = dict(start(config)[0].named_parameters())
    for state in states[1:]:
        for name, tensor in state.items():
            average = name in parameters
            expected[name] = 0.7 * expected[name] + 0.3 * tensor if average else tensor
    assert_close(trained, expected, 1e-6)


def test_label_smoothing_of_hybrid_training(tmp_path: Path) -> None:
    """The loss that is reported is the one that was asked for."""
    sharp, _ = run(one_stage("hrl", iterations=1), tmp_path / "sharp")
    smooth, _ = run(one_stage("hrl", iterations=1, label_smoothing=0.5), tmp_path / "smooth")
    assert sharp[0]["cross_entropy"] != pytest.approx(smooth[0]["cross_entropy"], rel=1e-4)


@pytest.mark.parametrize("stage", ["dense", "sp"])
def test_memory_layout_does_not_matter(tmp_path: Path, stage: str) -> None:
    config = one_stage(stage, "tiny_resnet")
    lines, _ = run(config, tmp_path / "last")
    first, _ = run(replace(config, channels_last=False), tmp_path / "first")
    assert column(first, "loss") == pytest.approx(column(lines, "loss"), rel=1e-3)


def test_bf16_mixed(tmp_path: Path) -> None:
    config = tiny_config(log_every=1, checkpoint_seconds=1000)
    for stage in config.stages:
        config.stage(stage).ema_decay = None
    exact = metrics(skipnet.train(config, output=tmp_path / "exact").path)
    mixed_run = skipnet.train(replace(config, precision="bf16-mixed"), output=tmp_path / "mixed")
    mixed = metrics(mixed_run.path)
    first = [line for line in zip(exact, mixed, strict=True) if line[0]["step"] == 1]
    for one, other in first[:2]:  # HRL starts from other weights, and samples other decisions
        assert other["loss"] == pytest.approx(one["loss"], rel=0.05)
        assert other["loss"] != one["loss"]
    kept = weights(mixed_run.path / "hrl.safetensors")
    assert {t.dtype for t in kept.values() if t.is_floating_point()} == {torch.float32}


def test_log_lines(tmp_path: Path) -> None:
    config = one_stage("sp", iterations=7)
    config = replace(config, log_every=3, evaluate_every=2 / (1437 // 16))
    path = skipnet.train(config, output=tmp_path / "run").path
    lines = metrics(path, timings=True)
    train_lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train_lines] == [3, 6, 7]
    assert [line["step"] for line in lines if "evaluation" in line] == [2, 4, 6]
    for line in train_lines:
        assert line["stage"] == "sp"
        assert line["epoch"] == pytest.approx(line["step"] * 16 / (1437 // 16 * 16))
        assert 0 <= line["accuracy"] <= 1 and 0 <= line["keep_rate"] <= 1
        assert line["images_per_s"] > 0
    whole, _ = run(replace(config, log_every=1), tmp_path / "each")
    losses = column(whole, "loss")
    expected = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert column(train_lines, "loss") == pytest.approx(expected)


def test_length_in_epochs() -> None:
    assert StageConfig(epochs=2.5).total_steps(10) == 25
    assert StageConfig(epochs=0.01).total_steps(10) == 1
    assert StageConfig(iterations=7).total_steps(10) == 7


def test_seed_decides_everything(tmp_path: Path) -> None:
    paths = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        config = tiny_config(stages=("sp", "hrl"), seed=seed)
        paths[name] = skipnet.train(config, output=tmp_path / name).path
    assert_same_weights(paths["one"] / "hrl.safetensors", paths["same"] / "hrl.safetensors")
    assert metrics(paths["one"]) == metrics(paths["same"])
    assert metrics(paths["one"])[0]["loss"] != metrics(paths["other"])[0]["loss"]


def test_stages_alone_and_together_agree(tmp_path: Path) -> None:
    """What SP does does not depend on whether the dense network was trained before."""
    alone = skipnet.train(tiny_config(stages=("sp",)), output=tmp_path / "alone").path
    both = skipnet.train(tiny_config(stages=("dense", "sp")), output=tmp_path / "both").path
    assert_same_weights(alone / "sp.safetensors", both / "sp.safetensors")
    assert_same_weights(both / "model.safetensors", both / "sp.safetensors")


def test_hybrid_training_starts_from_supervised(tmp_path: Path) -> None:
    config = tiny_config(stages=("sp", "hrl"))
    config.sp.ema_decay = config.hrl.ema_decay = config.hrl.sharpen_to = None
    config.hrl.land = False
    config.hrl.iterations, config.hrl.optimizer = 1, OptimizerConfig(lr=1e-12, momentum=0)
    path = skipnet.train(config, output=tmp_path / "run").path
    sp, hrl = weights(path / "sp.safetensors"), weights(path / "hrl.safetensors")
    for name in sp:
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(hrl[name], sp[name])


def test_sharpening_moves_no_decision(tmp_path: Path) -> None:
    config = tiny_config(stages=("sp", "hrl"))
    config.hrl.iterations, config.hrl.optimizer = 1, OptimizerConfig(lr=1e-12, momentum=0)
    config.hrl.sharpen_to, config.hrl.ema_decay = 50.0, None
    path = skipnet.train(config, output=tmp_path / "run").path
    sp, hrl = weights(path / "sp.safetensors"), weights(path / "hrl.safetensors")
    ratio = hrl["gate.project.bias"] / sp["gate.project.bias"]
    assert ratio > 1
    torch.testing.assert_close(hrl["gate.project.weight"], ratio * sp["gate.project.weight"])


class TestDivergence:
    """A loss or a weight that is not finite stops the run, and nothing of it is kept."""

    def diverging(self, stage: str, **changes: Any) -> TrainConfig:
        optimizer = OptimizerConfig(lr=1e12, momentum=0.9, weight_decay=1e-4)
        config = one_stage(stage, "tiny_resnet", iterations=40, optimizer=optimizer)
        return replace(config, log_every=10, **changes)

    @pytest.mark.parametrize("stage", ["dense", "sp", "hrl"])
    def test_stops_and_keeps_the_last_good_checkpoint(self, tmp_path: Path, stage: str) -> None:
        config = self.diverging(stage, checkpoint_seconds=0)
        with pytest.raises(UserError, match=f"stage {stage} diverged by step") as caught:
            skipnet.train(config, output=tmp_path / "run")
        assert "\n" not in str(caught.value)
        tensors, state = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
        assert f"step {state['step']} is kept" in str(caught.value)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        assert not (tmp_path / "run" / f"{stage}.safetensors").exists()
        assert not (tmp_path / "run" / "results.json").exists()
        log = tmp_path / "run" / "metrics.jsonl"
        assert not log.exists() or "NaN" not in log.read_text()
        with pytest.raises(UserError, match="diverged by step"):
            skipnet.train(config, resume=tmp_path / "run")

    def test_without_a_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"by step 10: .*no checkpoint was written yet"):
            skipnet.train(self.diverging("dense"), output=tmp_path / "run")

    def test_earlier_stages_stay(self, tmp_path: Path) -> None:
        config = tiny_config(stages=("dense", "sp"))
        config.sp = self.diverging("sp").sp
        with pytest.raises(UserError, match="stage sp diverged"):
            skipnet.train(config, output=tmp_path / "run")
        assert all(t.isfinite().all() for t in weights(tmp_path / "run/model.safetensors").values())

    def test_weights_that_are_not_finite_behind_a_finite_loss(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The gradient of the last step of an interval may be the first that is not finite."""
        config = one_stage("dense", iterations=4)
        original = F.cross_entropy

        def explode(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
            # The value is the loss's own, the gradient 0 / 0.
            return original(logits, labels, **options) + 0 * (0 * logits.sum()).sqrt()

        monkeypatch.setattr("skipnet.tasks.criterion.functional.cross_entropy", explode)
        with pytest.raises(UserError, match="by step 1"):
            skipnet.train(config, output=tmp_path / "run")
