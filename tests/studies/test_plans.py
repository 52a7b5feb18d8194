"""What a study lays out: which runs, of which configuration; and what its plots show."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import skipnet
from skipnet import TrainConfig
from skipnet.studies.ablations import (
    VARIANTS,
    ablation_children,
    ablation_settings,
    describe_variant,
)
from skipnet.studies.paper import DENSE, POINTS, data_set
from skipnet.studies.study import Child, plan
from skipnet.studies.sweep import sweep_children, sweep_settings
from skipnet.studies.view import last_line, share_done
from skipnet.training.config import differences, to_dict

RNN, FF = "cifar10-resnet38-rnn", "cifar10-resnet38-ff"
SAMPLING = ("hrl.estimator", "hrl.policy_weight", "hrl.sharpen_to", "hrl.flipped_share")
"""In what the digits' recipe, which flips, differs from one that samples."""


def changed(name: str, recipe: str = "digits", **fields: Any) -> tuple[TrainConfig, list[str]]:
    """A variant and the names of the fields in which it differs from the recipe."""
    config = skipnet.recipe(recipe)
    for field, value in fields.items():
        setattr(config.hrl, field, value)
    return VARIANTS[name](config), differences(config, VARIANTS[name](config))


class TestVariants:
    """Each changes what it says, and nothing else."""

    @pytest.mark.parametrize(
        ("name", "fields"),
        [
            ("hrl", ["stages"]),
            ("dense", ["stages"]),
            ("sp", ["stages"]),
            ("pure-rl", ["stages", "hrl"]),
            ("reinforce", ["stages", *SAMPLING]),
            ("static", ["stages", "model.gate"]),
            ("ff", ["stages", "model.gate"]),
            ("gumbel", ["stages", "sp.decide"]),
            ("fixed-alpha", ["stages", "hrl.target_compute", "hrl.alpha"]),
            ("no-baseline", ["stages", "hrl.baseline", *SAMPLING]),
            ("no-sharpen", ["stages", "hrl.estimator", "hrl.policy_weight", "hrl.flipped_share"]),
            ("no-flipped", ["stages", "hrl.flipped_share"]),
            ("no-landing", ["stages", "hrl.land"]),
            ("no-settling", ["stages", "hrl.settle"]),
            ("all-rows", ["stages", "hrl.statistics"]),
            ("frozen", ["stages", "hrl.statistics"]),
            ("no-clip", ["stages", "hrl.optimizer.clip_norm"]),
            ("macs-costs", ["stages", "hrl.costs"]),
            ("recalibrated", ["stages", "recalibrate"]),
        ],
    )
    def test_fields(self, name: str, fields: list[str]) -> None:
        found = changed(name)[1]
        assert {field if field in fields else field.split(".")[0] for field in found} == set(fields)

    def test_the_recipe_is_left_as_it_is(self) -> None:
        config = skipnet.recipe("digits")
        for variant in VARIANTS.values():
            variant(config)
        assert not differences(config, skipnet.recipe("digits"))

    def test_each_is_described(self) -> None:
        for name in VARIANTS:
            assert describe_variant(name).endswith("."), name

    def test_pure_rl_and_no_sp_begin_at_random_and_train_as_long_as_dense(self) -> None:
        for name, weight in (("no-sp", 1.0), ("pure-rl", 0.0)):
            config, _ = changed(name, "cifar10-resnet38-rnn-short")
            assert config.stages == ("hrl",) and config.start is None
            assert config.hrl.supervised_weight == weight
            assert config.hrl.epochs == config.dense.epochs == 9
            assert config.hrl.optimizer.lr == config.dense.optimizer.lr
            assert config.hrl.optimizer.gate_lr == 0.2, "the recipe's HRL"
            assert config.hrl.schedule == config.dense.schedule

    def test_soft_pays_the_same_price(self) -> None:
        config, _ = changed("soft", target_compute=0.4)
        assert config.stages == ("sp",) and config.sp.decide == "soft"
        assert config.sp.target_compute == 0.4 and config.sp.epochs == config.dense.epochs
        config, _ = changed("soft", RNN)
        assert config.sp.target_compute is None and config.sp.alpha == 0.1

    def test_sdv_skips_at_the_rate_that_costs_the_target(self) -> None:
        config, _ = changed("sdv", target_compute=0.5)
        assert config.sp.decide == "sample" and config.model.gate == "static"
        cost = skipnet.create("cifar_resnet38", gate="static").cost(3, 32, 32)
        spent = cost.always + config.model.initial_keep * sum(cost.blocks[1:])
        assert spent / cost.dense == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("recipe", "gate"), [(RNN, "ff1"), ("cifar10-resnet110-rnn", "ff2"), (FF, "rnn")]
    )
    def test_ff_by_depth(self, recipe: str, gate: str) -> None:
        assert changed("ff", recipe)[0].model.gate == gate

    def test_all_but_those_that_change_nothing(self) -> None:
        config = skipnet.recipe("digits")
        names = ablation_settings(config)["variants"]
        assert set(VARIANTS) - set(names) == {"flip"}, "the recipe flips"
        config.hrl.estimator, config.stages = "reinforce", ("sp", "hrl")
        names = ablation_settings(config)["variants"]
        assert set(VARIANTS) - set(names) == {"reinforce", "no-sharpen", "dense"}

    def test_of_a_recipe_that_samples(self) -> None:
        assert set(changed("flip", RNN)[1]) == {"stages", "hrl.estimator", "hrl.flipped_share"}
        assert changed("flip")[1] == ["stages"], "the recipe flips"
        assert changed("no-baseline", RNN)[0].hrl.policy_weight == 0.01, "the recipe's own"


def names(children: list[Child]) -> list[str]:
    return [child.name for child in children]


class TestPlan:
    def test_variants_of_the_same_sp_share_it(self) -> None:
        config = skipnet.recipe("digits")
        settings = ablation_settings(config, only=["frozen", "static", "sp", "gumbel"], seeds=[2])
        children = ablation_children(config, settings)
        assert names(children) == [
            "seed2/sp",
            "seed2/frozen",
            "seed2/static-sp",
            "seed2/static",
            "seed2/gumbel-sp",
            "seed2/gumbel",
        ]
        after = {child.label: child.after for child in children}
        assert after["frozen"] == "seed2/sp" and after["static"] == "seed2/static-sp"
        assert all(child.config.seed == 2 for child in children)

    def test_start_is_for_the_first_stage_with_gates(self) -> None:
        config = dataclasses.replace(skipnet.recipe("digits"), start=Path("there"))
        settings = sweep_settings(config, targets=[0.5])
        starts = {c.label: c.config.start for c in sweep_children(config, settings)}
        assert starts == {"sp": Path("there"), "dense": None, "target-0.5": None}
        config.stages = ("hrl",)
        starts = {c.label: c.config.start for c in sweep_children(config, settings | {"dense": 0})}
        assert starts == {"target-0.5": Path("there")}

    def test_what_others_start_from_comes_first(self) -> None:
        config = skipnet.recipe("digits")
        for children in (
            sweep_children(config, sweep_settings(config, alphas=[0, 1], seeds=[1, 0])),
            ablation_children(config, ablation_settings(config, seeds=[0, 1])),
        ):
            for index, child in enumerate(children):
                assert child.after is None or child.after in names(children[:index])
            assert len(set(names(children))) == len(children)

    def test_one_stage_a_run(self) -> None:
        config = skipnet.recipe("digits")
        variants = {"a": dataclasses.replace(config, stages=("sp", "hrl"))}
        assert [child.config.stages for child in plan(config, variants, [0])] == [("sp",), ("hrl",)]


class TestView:
    def test_share_done(self) -> None:
        config = skipnet.recipe("digits")
        child = Child(name="c", label="c", config=dataclasses.replace(config, stages=("hrl",)))
        assert share_done(child, {"stage": "hrl", "step": 7, "epoch": 10.0}) == 0.25
        child.config.hrl.epochs, child.config.hrl.iterations = None, 28
        assert share_done(child, {"stage": "hrl", "step": 7, "epoch": 10.0}) == 0.25

    def test_last_line(self, tmp_path: Path) -> None:
        """An evaluation has no loss of its own; a line being written is not read."""
        path = tmp_path / "metrics.jsonl"
        assert last_line(path) is None
        path.write_text('{"step": 1, "loss": 2}\n')
        assert last_line(path) == {"step": 1, "loss": 2}
        path.write_text('{"step": 1}\n' * 5000 + '{"step": 2, "loss": 2}\n{"evaluation": {}}\n{"l')
        assert last_line(path) == {"step": 2, "loss": 2}


def evaluation(accuracy: float, share: float) -> dict[str, float]:
    return {"accuracy": accuracy, "macs_fraction": share}


def made_up(*, model: str = "cifar_resnet38", accuracy: float = 92.0, alphas: bool = False) -> Any:
    """Results of two seeds and three points on CIFAR-10."""
    config = skipnet.recipe(RNN)
    config.model.name = model
    runs = []
    for seed in (0, 1):
        for label, stage, share in (
            ("sp", "sp", 0.97),
            ("dense", "dense", 1.0),
            ("p-0.3", "hrl", 0.3),
            ("p-0.5", "hrl", 0.5),
            ("p-0.7", "hrl", 0.7),
        ):
            routed = stage == "hrl"
            steps = [50, 100, 150] if routed else []
            runs.append(
                {
                    "label": label,
                    "stage": stage,
                    "seed": seed,
                    "target": share if routed and not alphas else None,
                    "alpha": 1 - share if routed and alphas else None,
                    "evaluation": evaluation(accuracy + share + 0.1 * seed, share),
                    "path": {
                        "step": steps,
                        "alpha": [0.1 for _ in steps],
                        "macs_fraction": [share for _ in steps],
                        "macs_thresholded": [share for _ in steps],
                    },
                }
            )
    return {"config": to_dict(config), "settings": {"seeds": [0, 1]}, "runs": runs}


class TestPlots:
    """The text of the SVG files is text, so it can be read."""

    @pytest.fixture
    def drawn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        pytest.importorskip("matplotlib")
        from skipnet.studies import plot

        monkeypatch.setitem(plot._STYLE, "svg.fonttype", "none")

        def draw(results: Any) -> dict[str, str]:
            files = plot.draw(results, tmp_path)
            assert {file.suffix for file in files} == {".png", ".svg"}
            return {f.stem: f.read_text() for f in files if f.suffix == ".svg"}

        return draw

    def test_paper_beside_ours(self, drawn: Any) -> None:
        curve = drawn(made_up())["curve"]
        assert ">paper, dense<" in curve and ">paper, hard gating<" in curve
        assert ">paper, HRL<" in curve and ">(% of blocks)<" in curve
        assert "dense, trained alike  93.05" in curve
        assert "Off the scale" not in curve

    def test_paper_too_far_for_the_scale(self, drawn: Any) -> None:
        curve = drawn(made_up(accuracy=70.0))["curve"]
        assert ">paper, dense<" not in curve
        assert "Off the scale: paper, HRL: 92.75 % at 70 % of blocks; paper, hard gating:" in curve

    def test_no_paper_for_other_networks(self, drawn: Any) -> None:
        assert "paper" not in drawn(made_up(model="cifar_resnet20"))["curve"]

    def test_path_names_targets_or_alphas(self, drawn: Any) -> None:
        path = drawn(made_up())["path"]
        assert all(f">{share} %<" in path for share in (30, 50, 70)) and "its target" in path
        path = drawn(made_up(alphas=True))["path"]
        assert all(f">alpha {alpha}<" in path for alpha in (0.3, 0.5, 0.7))
        assert "its target" not in path

    def test_few_runs(self, drawn: Any) -> None:
        """What a sweep that was stopped early has."""
        for keep in ({"sp"}, {"dense"}, {"p-0.5"}, {"sp", "dense"}):
            results = made_up()
            results["runs"] = [run for run in results["runs"] if run["label"] in keep][:1]
            assert drawn(results)["curve"]


def test_paper_s_points_belong_to_networks_it_has() -> None:
    assert set(POINTS) <= set(DENSE)
    for (model, _), points in POINTS.items():
        assert model in skipnet.list_models()
        for point in points:
            assert 0 < point.share < 1 and 60 < point.accuracy < 100
    # The paper's table: 38 layers at 0.58e8 of 83.0e6 multiply-adds.
    hard = [p for p in POINTS["cifar_resnet38", "cifar10"] if p.counted == "MACs"]
    assert [(p.accuracy, round(p.share, 3)) for p in hard] == [(90.83, 0.699)]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("uoft-cs/cifar10", "cifar10"),
        ("data/CIFAR-10/", "cifar10"),
        ("uoft-cs/cifar100", "cifar100"),
        ("ufldl-stanford/svhn", "svhn"),
        ("ILSVRC/imagenet-1k", "imagenet"),
        ("tiny-imagenet-50", "tinyimagenet50"),
    ],
)
def test_data_set(name: str, plain: str) -> None:
    assert data_set(name) == plain
