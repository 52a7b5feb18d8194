"""Every recipe trains, and those of the paper are the paper's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import metrics, write_cifar10, write_parquet

import skipnet
from skipnet import TrainConfig, UserError
from skipnet.recipes import RECIPES, describe_recipe, list_families, recipe
from skipnet.training.config import StageConfig, from_dict, to_dict
from skipnet.training.schedule import learning_rate_factor
from skipnet.training.train import network_info

# SkipNet, sections 4.1 and 4.2: networks and gates; feed-forward gates II are for deep networks.
SHORT = {
    "cifar10-resnet20-rnn-short": "cifar_resnet20",
    "cifar10-resnet38-rnn-short": "cifar_resnet38",
}
PAPER = [
    (f"{data}-resnet{depth}-{kind}", data, depth, gate)
    for data, depths in (
        ("cifar10", (38, 74, 110)),
        ("cifar100", (38, 74, 110)),
        ("svhn", (38, 74, 110, 152)),
    )
    for depth in depths
    for kind, gate in (("rnn", "rnn"), ("ff", "ff1" if depth < 100 else "ff2"))
] + [(f"imagenet-resnet{depth}-rnn", "imagenet", depth, "rnn") for depth in (34, 50, 101)]
HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "imagenet": "ILSVRC/imagenet-1k",
}


def is_large(name: str) -> bool:
    return any(depth in name for depth in ("110", "152", "imagenet"))


RECIPES_BY_SIZE = [
    pytest.param(name, marks=[pytest.mark.slow] if is_large(name) else []) for name in RECIPES
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a data set, with the columns and splits it has on the hub."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar10(folder / "cifar10", num_train=20, num_test=8)
    splits = {
        "cifar100": ("train", "test"),
        "svhn": ("train", "extra", "test"),
        "imagenet": ("train", "validation"),
    }
    for name, names in splits.items():
        label = "fine_label" if name == "cifar100" else "label"
        for seed, split in enumerate(names):
            labels = [i % 10 for i in range(12)]
            size = 40 if name == "imagenet" else 8
            file = folder / name / f"{split}.parquet"
            write_parquet(file, labels, size=size, label=label, seed=seed)
    return folder


@pytest.mark.parametrize("name", RECIPES_BY_SIZE)
def test_two_steps_of_each_stage(name: str, data: Path, tmp_path: Path) -> None:
    config = recipe(name)
    if name != "digits":
        data_set = "imagenet" if name == "finetune" else name.split("-")[0]
        assert config.data.name == HUB[data_set]
        config.data.name = str(data / data_set)
    if name == "finetune":  # Weights that need no download, and classes that are not 1000.
        config.model = replace(config.model, name="torchvision/resnet18", weights=None)
    if config.data.image_size is not None:
        config.data.image_size, config.data.resize, config.data.workers = 32, 36, 0
    for stage in config.stages:
        short = {"epochs": None, "iterations": 2, "batch_size": 8}
        setattr(config, stage, replace(config.stage(stage), **short))
    config = replace(config, tensorboard=False, accelerator="cpu", log_every=1)
    run = skipnet.train(config, output=tmp_path / "run")
    assert list(run.results) == list(config.stages)
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
        logits, routing = model(torch.zeros(3, channels, *info.image_size), execute="compacted")
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
    assert names[0] == "digits" and len(set(names)) == len(names)
    assert set(names) == {"digits", "finetune", *SHORT} | {name for name, *_ in PAPER}


def test_families_are_the_names_put_together() -> None:
    """As a shell expands braces."""

    def expand(family: str) -> list[str]:
        head, brace, rest = family.partition("{")
        if not brace:
            return [family]
        choices, _, tail = rest.partition("}")
        return [name for choice in choices.split(",") for name in expand(head + choice + tail)]

    families = list_families()
    assert [name for family in families for name in expand(family)] == skipnet.list_recipes()
    assert len(families) <= 8 and all(text.endswith(".") for text in families.values())


def rate(stage: StageConfig, step: int, steps_per_epoch: int) -> float:
    total = stage.total_steps(steps_per_epoch)
    return stage.optimizer.lr * learning_rate_factor(stage.schedule, step, total)


@pytest.mark.parametrize(("name", "data_set", "depth", "gate"), PAPER)
def test_what_all_of_the_papers_recipes_have(
    name: str, data_set: str, depth: int, gate: str
) -> None:
    config = recipe(name)
    family = "resnet" if data_set == "imagenet" else "cifar_resnet"
    assert (config.model.name, config.model.gate) == (f"{family}{depth}", gate)
    assert config.stages == ("dense", "sp", "hrl") and config.data.name == HUB[data_set]
    assert (config.teacher, config.recalibrate) == (None, 0)
    for stage in (config.dense, config.sp, config.hrl):
        optimizer = stage.optimizer
        assert (optimizer.name, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.9, False)
        assert (optimizer.weight_decay, optimizer.clip_norm) == (1e-4, None)
        assert stage.batch_size == (256 if data_set == "imagenet" else 128)
        assert (stage.accumulate, stage.label_smoothing) == (1, 0)
        assert (stage.ema_decay, optimizer.gate_lr) == (None, None)
    sp, hrl = config.sp, config.hrl
    assert (sp.alpha, sp.target_compute, sp.decide) == (0, None, "straight-through")
    total = hrl.total_steps(390)
    assert rate(hrl, 0, 390) == rate(hrl, total - 1, 390) == 1e-4
    # The equations as they are; the weight of the REINFORCE term is the released code's.
    assert (hrl.alpha, hrl.target_compute, hrl.sharpen_to) == (0.1, None, None)
    assert hrl.beta == (None if data_set == "imagenet" else 1)
    assert (hrl.costs, hrl.baseline, hrl.samples, hrl.entropy_bonus) == ("uniform", "none", 1, 0)
    assert (hrl.policy_weight, hrl.supervised_weight, hrl.diversity) == (0.01, 1, 0)


@pytest.mark.parametrize(
    ("name", "depth"), [(name, depth) for name, data, depth, _ in PAPER if "cifar" in data]
)
def test_the_papers_schedule_of_cifar(name: str, depth: int) -> None:
    """SkipNet, section 4 and appendix; He et al. 2015, section 4.2, for the warm-up."""
    config = recipe(name)
    data = config.data
    assert (data.padding, data.flip, data.crop) == (4, True, "pad")
    assert (data.image_size, data.mean, data.train_split) == (None, None, "train")
    assert data.label_column == ("fine_label" if "cifar100" in name else None)
    for stage in (config.dense, config.sp):
        assert stage.total_steps(390) == 64_000
        assert rate(stage, 0, 390) == rate(stage, 399, 390)
        assert rate(stage, 0, 390) == pytest.approx(0.01 if depth == 110 else 0.1)
        for first, last, expected in [
            (400, 31_999, 0.1),
            (32_000, 47_999, 0.01),
            (48_000, 63_999, 0.001),
        ]:
            assert rate(stage, first, 390) == rate(stage, last, 390) == pytest.approx(expected)
    assert config.hrl.total_steps(390) == 10_000


@pytest.mark.parametrize("name", [name for name, data, *_ in PAPER if data == "svhn"])
def test_the_papers_schedule_of_svhn(name: str) -> None:
    """Training and extra images, 604,388 in all, as they are; 50 epochs of SP, and of HRL."""
    config = recipe(name)
    data = config.data
    assert (data.train_split, data.test_split, data.subset) == (
        "train+extra",
        "test",
        "cropped_digits",
    )
    assert (data.padding, data.flip, data.crop, data.mean) == (0, False, "pad", None)
    assert data.stream == "auto"
    steps_per_epoch = 604_388 // 128
    for stage in (config.dense, config.sp, config.hrl):
        assert stage.total_steps(steps_per_epoch) == 50 * steps_per_epoch


@pytest.mark.parametrize("name", [name for name, data, *_ in PAPER if data == "imagenet"])
def test_the_papers_schedule_of_imagenet(name: str) -> None:
    """He et al. 2015, section 3.4, with torchvision's crop; HRL for 40 epochs."""
    config = recipe(name)
    data = config.data
    assert (data.image_size, data.resize, data.crop) == (224, 256, "random-resized")
    assert (data.flip, data.channels, data.test_split) == (True, 3, "validation")
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)
    per_epoch = 1_281_167 // 256
    for stage in (config.dense, config.sp):
        assert stage.total_steps(per_epoch) == 90 * per_epoch
        for epoch, expected in [(0, 0.1), (29, 0.1), (30, 0.01), (59, 0.01), (60, 0.001)]:
            middle = epoch * per_epoch + per_epoch // 2
            assert rate(stage, middle, per_epoch) == pytest.approx(expected)
        assert rate(stage, 0, per_epoch) == 0.1
    assert config.hrl.total_steps(per_epoch) == 40 * per_epoch


@pytest.mark.parametrize(("name", "network"), SHORT.items())
def test_short_recipes_differ_in_the_schedule_alone(name: str, network: str) -> None:
    short, paper = recipe(name), recipe("cifar10-resnet38-rnn")
    assert short.recipe == name
    assert short.model == replace(paper.model, name=network)
    assert short.data == paper.data
    assert short.hrl.target_compute is not None
    epochs = [short.stage(stage).epochs for stage in short.stages]
    assert None not in epochs and sum(epochs) < 30


def test_finetune_normalises_as_the_weights_expect(data: Path) -> None:
    config = recipe("finetune")
    assert config.data.mean is None and config.model.weights == "DEFAULT"
    images = skipnet.ImageSet(
        images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        labels=torch.arange(4),
        classes=tuple("abcd"),
    )
    info = network_info(config, images)
    assert (info.mean, info.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
