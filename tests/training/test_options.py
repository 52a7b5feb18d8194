"""What a stage can be asked for beyond the paper: each does what it says, or is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import metrics, run_command, tiny_config, weights, write_cifar10
from torch import Tensor

import skipnet
from skipnet import SkipNet, UserError
from skipnet.data.augment import normalize
from skipnet.data.sources import load
from skipnet.training.config import HybridConfig, ModelConfig, SupervisedConfig
from skipnet.training.processes import leaves_unused


def results(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "results.json").read_text())
    return values


def test_open_blocks_train_a_fixed_subset(tmp_path: Path) -> None:
    config = tiny_config(stages=("sp",))
    config.model = ModelConfig(name="tiny_resnet", gate="static", open_blocks=(1, 4))
    config.sp = replace(config.sp, decide="threshold", ema_decay=None)
    skipnet.train(config, output=tmp_path / "run")
    final = results(tmp_path / "run")["sp"]
    for way in ("evaluation", "sampled"):
        assert final[way]["keep_rates"] == pytest.approx([0, 1, 0, 0, 1], abs=0.01)
    assert final["evaluation"]["num_paths"] == 1
    network, _ = skipnet.load(tmp_path / "run" / "sp.safetensors")
    state = network.state_dict()
    assert state["gate.logits"].tolist() == [-8, 8, -8, -8, 8]
    assert state["blocks.2.bn1.num_batches_tracked"] == 6
    assert state["blocks.3.bn1.num_batches_tracked"] == 0, "a skipped block was run"


def test_open_blocks_go_before_the_gates_of_a_start(tmp_path: Path) -> None:
    config = tiny_config(stages=("sp",))
    config.model = ModelConfig(name="tiny_resnet", gate="static", open_blocks=(1, 4))
    config.sp = replace(config.sp, decide="threshold", ema_decay=None)
    skipnet.train(config, output=tmp_path / "one")
    again = replace(config, start=tmp_path / "one")
    again.model = replace(config.model, open_blocks=(0,))
    skipnet.train(again, output=tmp_path / "two")
    rates = results(tmp_path / "two")["sp"]["evaluation"]["keep_rates"]
    assert rates == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("blocks", [(5,), (-1,), (0, 9)])
def test_open_blocks_that_are_not_there(tmp_path: Path, blocks: tuple[int, ...]) -> None:
    config = tiny_config(stages=("sp",))
    config.model = ModelConfig(name="tiny_resnet", gate="static", open_blocks=blocks)
    with pytest.raises(UserError, match="from 0 to 4"):
        skipnet.train(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_random_skipping_leaves_its_rate_alone(tmp_path: Path) -> None:
    """The paper's SDV: the sampled evaluation is its test."""
    config = tiny_config(stages=("sp",))
    config.model = ModelConfig(name="tiny_resnet", gate="static", initial_keep=0.4)
    config.sp = replace(config.sp, decide="sample", iterations=12)
    skipnet.train(config, output=tmp_path / "run")
    logits = weights(tmp_path / "run" / "sp.safetensors")["gate.logits"]
    torch.testing.assert_close(torch.sigmoid(logits), torch.full_like(logits, 0.4))
    assert results(tmp_path / "run")["sp"]["sampled"]["keep_rates"] == pytest.approx(
        [0.4] * 5, abs=0.1
    )


@pytest.mark.parametrize("decide", ["straight-through", "gumbel", "soft"])
def test_a_price_moves_the_gates(tmp_path: Path, decide: Any) -> None:
    def logit(alpha: float) -> float:
        config = tiny_config(stages=("sp",), seed=1)
        config.model = ModelConfig(name="tiny_resnet", gate="static")
        config.sp = replace(config.sp, decide=decide, alpha=alpha, ema_decay=None)
        config.sp.optimizer = replace(config.sp.optimizer, gate_lr=0.1, clip_norm=None)
        skipnet.train(config, output=tmp_path / str(alpha))
        saved = weights(tmp_path / str(alpha) / "sp.safetensors")["gate.logits"]
        return float(saved.mean())

    assert logit(5.0) < logit(0.0) - 0.05


@pytest.mark.parametrize("statistics", ["executed", "all", "frozen"])
def test_statistics_of_batch_norms(tmp_path: Path, statistics: Any) -> None:
    config = tiny_config(stages=("hrl",))
    config.hrl = replace(config.hrl, statistics=statistics, ema_decay=None, target_compute=None)
    config.model.initial_keep = 0.5
    skipnet.train(config, output=tmp_path / "run")
    saved = weights(tmp_path / "run" / "hrl.safetensors")
    tracked = saved["blocks.1.bn1.num_batches_tracked"]
    assert tracked == (0 if statistics == "frozen" else 6)
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_statistics_over_all_rows_see_rows_that_skip() -> None:
    """Against the network itself run dense."""
    from skipnet.tasks.hybrid import Hybrid

    def statistics(name: Any) -> torch.Tensor:
        torch.manual_seed(0)
        network = skipnet.create("tiny_resnet", gate="rnn").train()
        assert network.gate is not None
        network.gate.set_keep_(0.01)
        images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        Hybrid(statistics=name)(network, images, torch.zeros(64, dtype=torch.int64), 0)
        counted = [block.bn1.num_batches_tracked for block in network.blocks]  # type: ignore[union-attr]
        return torch.stack(counted)  # type: ignore[arg-type]

    assert statistics("all").tolist() == [1] * 6
    assert statistics("executed").tolist()[0] == 1
    assert statistics("frozen").tolist() == [0] * 6


def test_pure_reinforcement_moves_nothing_by_the_labels(tmp_path: Path) -> None:
    """Without supervision the head, which no gate reads, stays as it was."""
    config = tiny_config(stages=("hrl",), seed=3)
    config.hrl = replace(config.hrl, supervised_weight=0.0, ema_decay=None)
    config.hrl.optimizer = replace(config.hrl.optimizer, weight_decay=0.0)
    skipnet.train(config, output=tmp_path / "run")
    supervised = replace(config, hrl=replace(config.hrl, supervised_weight=1.0))
    skipnet.train(supervised, output=tmp_path / "other")
    pure, normal = (weights(tmp_path / name / "hrl.safetensors") for name in ("run", "other"))
    head = [name for name in pure if name.startswith("head") and name.endswith("bias")]
    assert all((pure[name] != normal[name]).any() for name in head)
    from skipnet.tasks.hybrid import Hybrid

    torch.manual_seed(0)
    network = skipnet.create("tiny_resnet", gate="rnn").train()
    images = torch.randn(16, 3, 8, 8)
    labels = torch.zeros(16, dtype=torch.int64)
    Hybrid(supervised_weight=0.0)(network, images, labels, 0)["loss"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in network.head.parameters())
    assert any(p.grad is not None and p.grad.any() for p in network.gate.parameters())  # type: ignore[union-attr]


def test_recalibration_changes_statistics_alone(tmp_path: Path) -> None:
    config = tiny_config(stages=("sp",))
    skipnet.train(config, output=tmp_path / "plain")
    skipnet.train(replace(config, recalibrate=3), output=tmp_path / "again")
    plain, again = (weights(tmp_path / name / "sp.safetensors") for name in ("plain", "again"))
    changed = {name for name in plain if not torch.equal(plain[name], again[name])}
    assert changed and all(
        name.rsplit(".", 1)[1] in ("running_mean", "running_var", "num_batches_tracked")
        for name in changed
    )


def test_lands_on_training_images_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An augmented image costs otherwise than the one that is tested on."""
    landed: list[tuple[list[Tensor], float, float]] = []

    def land(network: SkipNet, batches: list[Tensor], target: float, *, reach: float) -> float:
        landed.append((batches, target, reach))
        return target

    monkeypatch.setattr("skipnet.training.train.land", land)
    config = tiny_config(stages=("hrl",))
    skipnet.train(config, output=tmp_path / "run")
    assert [(target, reach) for _, target, reach in landed] == [(0.6, math.inf), (0.6, 0.05)]
    batches, images = landed[1][0], load(config.data)[0]
    _, info = skipnet.load(tmp_path / "run" / "hrl.safetensors")
    expected = normalize(images.images, info.mean, info.std)
    assert torch.equal(torch.cat(batches), expected)


@pytest.mark.parametrize("gate", ["rnn", "ff1"])
@pytest.mark.parametrize("stage", ["sp", "hrl"])
def test_gates_stay_while_a_stage_settles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any, gate: Any
) -> None:
    """The last half of the steps changes blocks, and nothing of the gates."""
    config = tiny_config(stages=(stage,))
    config.model = replace(config.model, gate=gate)
    change = {"target_compute": 0.6, "settle": 0.5, "ema_decay": None, "iterations": 6}
    setattr(config, stage, replace(config.stage(stage), **change))
    seen: list[dict[str, Tensor]] = []

    def keep(network: SkipNet, *_: Any, **__: Any) -> float:
        seen.append({name: x.clone() for name, x in network.state_dict().items()})
        return 0.6

    monkeypatch.setattr("skipnet.training.train.land", keep)
    skipnet.train(config, output=tmp_path / "run")
    before, after = seen  # Landed before settling, and at the end.
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("blocks") for name in changed)
    assert not any(name.startswith("gate") for name in changed)


def test_an_average_of_the_weights_lands_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates are moved once: an average would hold them back for as long as it remembers."""
    config = tiny_config(stages=("hrl",))
    config.hrl = replace(config.hrl, settle=0.5, ema_decay=0.999)
    shifts = iter([-3.0, 0.0])
    biases: list[float] = []

    def land(network: SkipNet, *_: Any, **__: Any) -> float:
        assert network.gate is not None
        network.gate.shift_logits_(next(shifts))
        biases.append(network.gate.project.bias.item())  # type: ignore[union-attr, operator]
        return 0.6

    monkeypatch.setattr("skipnet.training.train.land", land)
    skipnet.train(config, output=tmp_path / "run")
    assert biases[0] == biases[1]


def test_rewards_alone_never_settle() -> None:
    config = tiny_config().hrl
    assert config.settles and not replace(config, supervised_weight=0.0).settles


def test_a_stage_holds_its_ramp_and_its_settling() -> None:
    with pytest.raises(
        UserError, match=r"target_ramp 0\.9 and settle 0\.2 are more than the whole"
    ):
        replace(tiny_config().hrl, target_ramp=0.9, settle=0.2)


@pytest.mark.parametrize(
    ("stages", "decide", "unused"),
    [
        (("dense",), "straight-through", False),
        (("sp",), "straight-through", False),
        (("sp",), "threshold", True),
        (("sp",), "sample", True),
        (("dense",), "sample", False),
        (("hrl",), "straight-through", True),
    ],
)
def test_which_runs_leave_parameters_without_gradient(
    stages: Any, decide: Any, unused: bool
) -> None:
    config = tiny_config(stages=stages)
    config.sp = replace(config.sp, decide=decide)
    assert leaves_unused(config) == unused
    if stages == ("sp",) and decide == "straight-through":
        config.sp = replace(config.sp, target_compute=0.5)
        assert leaves_unused(config), "SP that settles leaves out rows, and gates"


@pytest.mark.parametrize(
    ("stages", "changes", "warning"),
    [
        (("dense",), {"recalibrate": 2}, "recalibrate has no effect: the stage dense has no gates"),
        (("hrl",), {"hrl": {"estimator": "flip", "baseline": "greedy"}}, "hrl.baseline has no eff"),
        (("hrl",), {"hrl": {"flipped_share": 0.5}}, "hrl.flipped_share has no effect"),
    ],
)
def test_what_has_no_effect_is_said(
    tmp_path: Path, stages: Any, changes: dict[str, Any], warning: str
) -> None:
    config = tiny_config(stages=stages)
    if "hrl" in changes:
        changes = {"hrl": replace(config.hrl, **changes["hrl"])}
    with pytest.warns(UserWarning, match=warning):
        skipnet.train(replace(config, **changes), output=tmp_path / "run")


class TestTeacher:
    """Runs learn from another run's dense network."""

    def test_changes_what_is_learned(self, tmp_path: Path) -> None:
        skipnet.train(tiny_config(stages=("dense",)), output=tmp_path / "dense")
        config = tiny_config(stages=("sp", "hrl"))
        skipnet.train(config, output=tmp_path / "alone")
        teacher = tmp_path / "dense"
        skipnet.train(replace(config, teacher=teacher), output=tmp_path / "taught")
        unheard = replace(config, teacher=teacher / "dense.safetensors", teacher_weight=0.0)
        skipnet.train(unheard, output=tmp_path / "unheard")
        losses = {
            name: [line["cross_entropy"] for line in metrics(tmp_path / name)]
            for name in ("alone", "taught", "unheard")
        }
        assert losses["unheard"] == losses["alone"] != losses["taught"]

    def test_survives_a_resume(self, tmp_path: Path) -> None:
        skipnet.train(tiny_config(stages=("dense",)), output=tmp_path / "dense")
        config = tiny_config(stages=("sp",), teacher=tmp_path / "dense")
        run = skipnet.train(config, output=tmp_path / "run")
        skipnet.train(config, resume=run.path)
        run_command("train", "--resume", run.path, folder=tmp_path)

    def test_other_classes(self, tmp_path: Path) -> None:
        config = tiny_config(stages=("dense",))
        config.data = replace(config.data, name=str(write_cifar10(tmp_path / "data")))
        skipnet.train(config, output=tmp_path / "dense")
        with pytest.raises(UserError, match=r"trained on other data: .*its classes are"):
            skipnet.train(tiny_config(teacher=tmp_path / "dense"), output=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nowhere"):
            skipnet.train(tiny_config(teacher=tmp_path / "nowhere"), output=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_run_without_a_dense_network(self, tmp_path: Path) -> None:
        skipnet.train(tiny_config(stages=("sp",)), output=tmp_path / "sp")
        with pytest.raises(UserError, match="dense"):
            skipnet.train(tiny_config(teacher=tmp_path / "sp"), output=tmp_path / "run")


@pytest.mark.parametrize("stage", ["sp", "hrl"])
@pytest.mark.parametrize("target", [0.05, 1.0])
def test_a_target_out_of_reach_says_what_is_possible(
    tmp_path: Path, stage: Any, target: float
) -> None:
    config = tiny_config(stages=(stage,))
    config.sp = replace(config.sp, target_compute=target if stage == "sp" else None)
    config.hrl = replace(config.hrl, target_compute=target if stage == "hrl" else None)
    if target == 1.0:  # The gates cost something: all of it is possible, a little more, too.
        skipnet.train(config, output=tmp_path / "run")
        return
    with pytest.raises(UserError, match=r"takes from 0\.\d+ \(every gate closed\) to 1\.\d+"):
        skipnet.train(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SupervisedConfig(iterations=1, decide="sample", target_compute=0.5), "leaves the"),
        (lambda: SupervisedConfig(iterations=1, decide="hard"), "decide is 'hard'"),
        (lambda: SupervisedConfig(iterations=1, diversity=-1.0), "diversity"),
        (lambda: SupervisedConfig(iterations=1, target_compute=1.5), r"\(0, 1\]"),
        (lambda: HybridConfig(iterations=1, statistics="none"), "statistics is 'none'"),
        (lambda: HybridConfig(iterations=1, supervised_weight=-1.0), "supervised_weight"),
        (lambda: ModelConfig(initial_keep=1.0), "initial_keep"),
        (lambda: ModelConfig(open_blocks=(1,)), "static"),
        (lambda: tiny_config(model=ModelConfig(gate="static", open_blocks=(1,))), "open_blocks"),
        (lambda: SupervisedConfig(iterations=1, alpha_rate=-1.0), "alpha_rate"),
        (lambda: HybridConfig(iterations=1, flipped_share=1.5), "flipped_share"),
        (lambda: HybridConfig(iterations=1, alpha_damping=float("nan")), "alpha_damping"),
        (lambda: HybridConfig(iterations=1, policy_weight=float("nan")), "policy_weight"),
        (lambda: HybridConfig(iterations=1, beta=-1.0), "beta"),
        (lambda: HybridConfig(iterations=1, entropy_bonus=float("inf")), "entropy_bonus"),
        (lambda: tiny_config(recalibrate=-1), "recalibrate"),
        (lambda: tiny_config(teacher_weight=2.0), "teacher_weight"),
        (lambda: tiny_config(teacher_temperature=0.0), "teacher_temperature"),
    ],
)
def test_impossible_settings(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_gates_first_leaves_something_to_learn() -> None:
    config = tiny_config()
    with pytest.raises(UserError, match=r"gates_first 0\.8 and settle 0\.2 leave no step"):
        replace(config.hrl, gates_first=0.8, settle=0.2, target_compute=0.5)
    with pytest.raises(UserError, match=r"gates_first must lie in \[0, 1\), not 1"):
        replace(config.hrl, gates_first=1.0)
    with pytest.raises(UserError, match="nothing would learn"):
        replace(config.sp, gates_first=0.5, decide="threshold", target_compute=None)
