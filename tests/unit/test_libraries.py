"""Networks of other libraries by name: built again from a file, and trained from their weights."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision

import skipnet
from skipnet import ModelInfo, SkipNet, UserError
from skipnet.models import libraries
from skipnet.models.registry import Architecture

SIZE = (64, 64)


def info_of(architecture: Architecture) -> ModelInfo:
    return ModelInfo(
        architecture=architecture,
        classes=tuple(map(str, range(architecture.num_classes))),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        image_size=SIZE,
    )


def architecture(name: str, **fields: Any) -> Architecture:
    fields = {"gate": "rnn", "num_classes": 5, "options": libraries.options(name, SIZE)} | fields
    return Architecture(name=name, **fields)


def hf_folder(folder: Path, kind: str) -> str:
    transformers = pytest.importorskip("transformers")
    if kind == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=5
        )
    else:
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=64,
            patch_size=16,
            num_labels=5,
        )
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return f"transformers/{folder}"


@pytest.fixture(
    params=[
        "torchvision/resnet18",
        "torchvision/swin_t",
        "timm/resnet10t",
        "timm/vit_tiny_patch16_224",
        "transformers/resnet",
        "transformers/vit",
    ]
)
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    library, own = request.param.split("/")
    if library == "transformers":
        return hf_folder(tmp_path / own, own)
    pytest.importorskip(library)
    return str(request.param)


def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    info = info_of(architecture(name))
    network = info.architecture.build().eval()
    skipnet.save(network, tmp_path / "model.safetensors", info)
    if name.startswith("transformers/"):  # The file says all there is to know.
        Path(name.removeprefix("transformers/"), "config.json").unlink()
    again, said = skipnet.load(tmp_path / "model.safetensors")
    assert said == info
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, (logits, routing) = network(images)[0], again(images)
    assert torch.equal(logits, expected)
    assert routing.logits.shape == (2, network.num_gates)
    assert again.original_state_dict().keys() == network.original_state_dict().keys()


def test_blocks_that_may_be_skipped_are_in_the_file(tmp_path: Path) -> None:
    info = info_of(architecture("torchvision/resnet18", blocks=(2, 5)))
    network = info.architecture.build()
    assert (network.num_gates, network.fixed_blocks) == (2, (1, 3, 4, 6, 7))
    skipnet.save(network, tmp_path / "model.safetensors", info)
    again, said = skipnet.load(tmp_path / "model.safetensors")
    assert (said, again.fixed_blocks) == (info, network.fixed_blocks)


def test_held_against_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a network is first made: a release of the library may have changed it."""
    own = torchvision.models.ResNet.forward
    monkeypatch.setattr(torchvision.models.ResNet, "forward", lambda self, x: 2 * own(self, x))
    with pytest.raises(UserError, match="parts of ResNet compute something else than it does"):
        skipnet.create("torchvision/resnet18")
    architecture("torchvision/resnet18").build()  # Again, from what a file says.


def test_nothing_is_said_of_our_own() -> None:
    assert set(Architecture(name="cifar_resnet20").to_dict()) == {
        "name",
        "gate",
        "num_classes",
        "in_channels",
    }


class TestOriginalWeights:
    def test_there_and_back(self) -> None:
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=5)
        network = architecture("torchvision/resnet18").build()
        assert network.load_original_state_dict(model.state_dict()) == []
        images = torch.randn(2, 3, *SIZE)
        with torch.no_grad():
            assert torch.equal(network.eval()(images)[0], model.eval()(images))
        back = network.original_state_dict()
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())

    def test_a_file_of_other_classes(self, tmp_path: Path) -> None:
        model = torchvision.models.resnet18(num_classes=7)
        safetensors.torch.save_file(model.state_dict(), tmp_path / "seven.safetensors")
        network = architecture("torchvision/resnet18").build()
        before = network.head[-1].bias.clone()  # type: ignore[index]
        left = libraries.load_trained(
            network, "torchvision/resnet18", str(tmp_path / "seven.safetensors")
        )
        assert left == ["fc.weight", "fc.bias"]
        assert torch.equal(network.head[-1].bias, before)  # type: ignore[index]
        assert torch.equal(network.original_state_dict()["conv1.weight"], model.conv1.weight)

    def test_new_classes_are_said(self) -> None:
        network = architecture("torchvision/resnet18").build()
        tensors = torchvision.models.resnet18(num_classes=7).state_dict()
        with pytest.raises(UserError, match=r"fc.weight is \[7, 512\] instead of \[5, 512\]"):
            network.load_original_state_dict(tensors)

    def test_other_architecture(self) -> None:
        network = architecture("torchvision/resnet18").build()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        tensors = torchvision.models.resnet34(num_classes=5).state_dict()
        with pytest.raises(UserError, match=r"layer1.2.conv1.weight is left over; .* more"):
            network.load_original_state_dict(tensors, new_classes=True)
        wide = torchvision.models.resnet18(num_classes=5).state_dict()
        wide["conv1.weight"] = wide["conv1.weight"][:32]
        with pytest.raises(UserError, match=r"conv1.weight is "):
            network.load_original_state_dict(wide, new_classes=True)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def test_a_transformers_folder(self, tmp_path: Path) -> None:
        name = hf_folder(tmp_path / "hf", "vit")
        network = architecture(name).build()
        assert libraries.load_trained(network, name, "DEFAULT") == []
        assert libraries.statistics(name, "DEFAULT") is None
        processor = {"image_processor_type": "ViTImageProcessor"}
        processor |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}  # type: ignore[dict-item]
        (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
        assert libraries.statistics(name, "DEFAULT") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

    def test_statistics_of_the_libraries(self) -> None:
        usual = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        assert libraries.statistics("torchvision/resnet50", "DEFAULT") == usual
        pytest.importorskip("timm")
        assert libraries.statistics("timm/resnet50", "a1_in1k") == usual
        assert libraries.statistics("torchvision/resnet50", "mine.safetensors") is None
        with pytest.raises(UserError, match=r"with weights nope cannot be had: Invalid pretr"):
            libraries.statistics("timm/resnet50", "nope")


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("torchvision/resnet51", "did you mean torchvision/resnet50"),
            ("torchvision/vgg11", "VGG is of no known family"),
            ("torchvison/resnet50", "unknown model 'torchvison/resnet50'"),
            ("torchvision/", "unknown model 'torchvision/'"),
        ],
    )
    def test_names(self, name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            Architecture(name=name, num_classes=5).build()

    @pytest.mark.parametrize("name", ["timm/hf-hub:somebody/something", "timm/nothing"])
    def test_names_of_timm(self, name: str) -> None:
        pytest.importorskip("timm")
        with pytest.raises(UserError, match="unknown model 'timm/"):
            Architecture(name=name, num_classes=5).build()

    def test_no_model_in_a_folder(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(UserError, match="cannot be had: "):
            architecture(f"transformers/{tmp_path}")

    def test_another_kind_of_model(self) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(UserError, match="is of the kind bert: image classifiers of"):
            Architecture(name="transformers/x", options={"model_type": "bert"}).build()

    def test_code_named_by_a_file_is_not_fetched(self) -> None:
        transformers = pytest.importorskip("transformers")
        options = {
            "model_type": "resnet",
            "depths": [2, 2],
            "hidden_sizes": [8, 8],
            "attn_implementation": "somebody/kernels",
            "auto_map": {"AutoModelForImageClassification": "somebody/code--module.Class"},
        }
        network = Architecture(name="transformers/x", num_classes=5, options=options).build()
        assert isinstance(network, SkipNet) and transformers is not None
        with pytest.raises(UserError, match="of the kind None"):  # Nor its settings.
            Architecture(name="transformers/somebody/model", num_classes=5).build()

    def test_files_named_by_a_file_are_not_opened(self) -> None:
        pytest.importorskip("timm")
        options = {"img_size": [64, 64], "checkpoint_path": "evil.pth"}
        with pytest.raises(UserError, match="options that are not read: checkpoint_path"):
            Architecture(name="timm/vit_tiny_patch16_224", num_classes=5, options=options).build()

    def test_weights_of_another_kind(self, tmp_path: Path) -> None:
        network = architecture("torchvision/resnet18").build()
        (tmp_path / "mine.pth").write_bytes(b"")
        for place in (tmp_path / "mine.pth", tmp_path):
            with pytest.raises(UserError, match=r"takes .safetensors files .* with --start"):
                libraries.load_trained(network, "torchvision/resnet18", str(place))

    def test_an_image_size_that_does_not_fit(self) -> None:
        name = "torchvision/vit_b_16"
        with pytest.raises(UserError, match="indivisible by patch size"):
            Architecture(name=name, options=libraries.options(name, (30, 30))).build()

    def test_weights_that_are_not_there(self, tmp_path: Path) -> None:
        network = architecture("torchvision/resnet18").build()
        with pytest.raises(UserError, match="has no weights NOPE: use IMAGENET1K_V1, DEFAULT, or"):
            libraries.load_trained(network, "torchvision/resnet18", "NOPE")
        with pytest.raises(UserError, match="cannot be read as a safetensors file"):
            libraries.load_trained(network, "torchvision/resnet18", str(tmp_path / "n.safetensors"))

    def test_options_that_do_not_fit(self) -> None:
        with pytest.raises(UserError, match="resnet18 has options that are not read: colour"):
            Architecture(name="torchvision/resnet18", options={"colour": 3}).build()
        with pytest.raises(UserError, match="are for other libraries' networks"):
            Architecture(name="cifar_resnet20", blocks=(2,)).build()
        with pytest.raises(UserError, match="takes square images, not 64x32"):
            libraries.options("torchvision/vit_b_16", (64, 32))

    def test_grey_images(self) -> None:
        with pytest.raises(UserError, match="takes images of 3 channels, not 1"):
            Architecture(name="torchvision/resnet18", in_channels=1).build()

    def test_a_library_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "skipnet.models.libraries.timm", raising=False)
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(
            UserError, match=r"timm is not installed: pip install 'skipnet\[timm\]'"
        ):
            Architecture(name="timm/resnet18").build()

    def test_weights_and_blocks_are_for_libraries(self) -> None:
        config = skipnet.recipe("digits")
        with pytest.raises(UserError, match="are for other libraries' networks"):
            dataclasses.replace(config.model, weights="DEFAULT")


def test_sizes_that_networks_are_known_for() -> None:
    assert libraries.image_size("torchvision/vit_b_16") == (224, 224)
    pytest.importorskip("timm")
    assert libraries.image_size("timm/vit_base_patch16_384") == (384, 384)
    assert skipnet.create("timm/vit_tiny_patch16_384", num_classes=5).num_gates == 0


@pytest.mark.parametrize("pattern", ["torchvision/*", "*/resnet18*"])
def test_listed(pattern: str) -> None:
    names = skipnet.list_models(pattern)
    assert "torchvision/resnet18" in names
    assert "torchvision/vgg11" not in names
    assert not [name for name in skipnet.list_models() if "/" in name]
