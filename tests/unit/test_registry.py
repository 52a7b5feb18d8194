"""The registry: networks by name, and every one of them at work."""

from pathlib import Path

import pytest
import torch

import skipnet
from skipnet import ModelInfo, UserError
from skipnet.models import Architecture, defaults_of, describe
from skipnet.models.resnet_cifar import cifar_resnet

CIFAR = [f"cifar_resnet{depth}" for depth in (20, 32, 38, 44, 56, 74, 110, 152)]
IMAGENET = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]


def test_list_models_in_order_of_registration() -> None:
    assert [name for name in skipnet.list_models() if name in CIFAR + IMAGENET] == CIFAR + IMAGENET


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("cifar_resnet1*", ["cifar_resnet110", "cifar_resnet152"]),
        ("cifar_resnet?8", ["cifar_resnet38"]),
        ("cifar_resnet[34]?", ["cifar_resnet32", "cifar_resnet38", "cifar_resnet44"]),
        ("CIFAR*", []),
        ("resnet38", []),
    ],
)
def test_list_models_by_pattern(pattern: str, expected: list[str]) -> None:
    assert skipnet.list_models(pattern) == expected


@pytest.mark.parametrize("name", skipnet.list_models())
def test_every_model_describes_itself_in_a_line(name: str) -> None:
    assert describe(name).endswith(".")


def info(architecture: Architecture) -> ModelInfo:
    classes = tuple(f"class {i}" for i in range(architecture.num_classes))
    channels = architecture.in_channels
    return ModelInfo(
        architecture=architecture,
        classes=classes,
        mean=(0.25,) * channels,
        std=(0.5,) * channels,
        image_size=(8, 8),
        results={"accuracy": 0.5},
    )


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        *((name, gate) for name in CIFAR for gate in (None, "rnn")),
        *(pytest.param(name, "rnn", marks=pytest.mark.slow) for name in IMAGENET),
        ("cifar_resnet20", "ff1"),
        ("cifar_resnet38", "ff1"),
        ("cifar_resnet110", "ff2"),
    ],
)
def test_forward_backward_save_load(name: str, gate: str | None, tmp_path: Path) -> None:
    architecture = Architecture(name=name, gate=gate, num_classes=7, in_channels=1)
    torch.manual_seed(0)
    network = architecture.build().train()
    assert network.num_gates == (0 if gate is None else len(network.blocks) - 1)
    size = defaults_of(name).image_size // 4  # Two by two pixels in the last stage.
    logits, _ = network(torch.randn(2, 1, size, size), decide="straight-through")
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key

    skipnet.save(network, tmp_path / "model.safetensors", info(architecture))
    loaded, read = skipnet.load(tmp_path / "model.safetensors")
    assert read == info(architecture)
    assert not loaded.training
    images = torch.randn(2, 1, size, size)
    network.eval()
    with torch.no_grad():
        (expected, before), (actual, after) = network(images), loaded(images)
    assert torch.equal(actual, expected)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.decisions, before.decisions)


@pytest.mark.parametrize("num_classes", [1, 2, 100])
@pytest.mark.parametrize("in_channels", [1, 2, 3])
def test_any_number_of_classes_and_channels(num_classes: int, in_channels: int) -> None:
    network = skipnet.create(
        "cifar_resnet20", gate="rnn", num_classes=num_classes, in_channels=in_channels
    )
    logits, _ = network(torch.randn(2, in_channels, 8, 8))
    assert logits.shape == (2, num_classes)


@pytest.mark.parametrize("option", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_that_are_not_positive(option: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{value}"):
        skipnet.create("cifar_resnet20", **{option: value})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cifar_resnet39", "cifar_resnet38"),
        ("resnet51", "resnet50"),
        ("cifar_resnet1100", "cifar_resnet110"),
        ("?!", "152"),
    ],
)
def test_unknown_model_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown model .*did you mean .*{nearest}"):
        skipnet.create(name)


@pytest.mark.parametrize("gate", ["RNN", "ff3", "", "none"])
def test_unknown_gate_names_the_nearest(gate: str) -> None:
    with pytest.raises(UserError, match=r"unknown gate .*did you mean .*(rnn|ff1)"):
        skipnet.create("cifar_resnet20", gate=gate)


@pytest.mark.parametrize("depth", [2, 7, 21, 48, -4])
def test_depth_is_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match="6n"):
        cifar_resnet(depth, gate=None, num_classes=10, in_channels=3)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(skipnet.create("cifar_resnet20", gate="ff2").state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["stem.0.weight"], states[2]["stem.0.weight"])


def test_a_registered_builder_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from skipnet.models import registry

    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @skipnet.register
    def narrow_resnet(gate: str | None, num_classes: int, in_channels: int) -> skipnet.SkipNet:
        """ResNet-20 of a quarter of the width."""
        return cifar_resnet(
            20, gate=gate, num_classes=num_classes, in_channels=in_channels, widths=(4, 8, 16)
        )

    assert skipnet.list_models("narrow*") == ["narrow_resnet"]
    assert describe("narrow_resnet") == "ResNet-20 of a quarter of the width."
    _, routing = skipnet.create("narrow_resnet", gate="rnn")(torch.zeros(2, 3, 8, 8))
    assert routing.logits.shape == (2, 8)

    def cifar_resnet20(gate: str | None, num_classes: int, in_channels: int) -> skipnet.SkipNet:
        raise AssertionError("the name is taken")

    with pytest.raises(UserError, match="cifar_resnet20 is already"):
        skipnet.register(cifar_resnet20)
    assert len(skipnet.create("cifar_resnet20").blocks) == 9
