"""Models of other libraries, taken apart: with all gates open they compute what they computed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

import skipnet
from skipnet import Fixed, SkipNet, skippable

CLASSES = 7


def timm_model(name: str, **settings: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **settings)
    return model


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def hf_resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=CLASSES
    )
    model: nn.Module = transformers.ResNetForImageClassification(config)
    return model


def tv(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=CLASSES)


SWIN = ([2, 2], 12, [2, 2], [2, 2], [4, 4])
# Model, side of its images, blocks that can be skipped.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (tv("resnet18"), 48, 7),
    "resnext50": (tv("resnext50_32x4d"), 48, 15),
    "wide_resnet50": (tv("wide_resnet50_2"), 48, 15),
    "regnet_x": (tv("regnet_x_400mf"), 48, 21),
    "regnet_y": (tv("regnet_y_400mf"), 48, 15),
    "convnext": (
        lambda: ConvNeXt(
            [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 3)],
            num_classes=CLASSES,
            layer_scale=0.5,
        ),
        32,
        4,
    ),
    "vit": (lambda: VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=CLASSES), 32, 2),
    "swin": (lambda: SwinTransformer(*SWIN, num_classes=CLASSES), 32, 3),
    "swin_v2": (
        lambda: SwinTransformer(
            *SWIN,
            num_classes=CLASSES,
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
        32,
        3,
    ),
    "timm-resnet18": (lambda: timm_model("resnet18"), 48, 7),
    "timm-resnet50d": (lambda: timm_model("resnet50d"), 48, 15),
    "timm-seresnet50": (lambda: timm_model("seresnet50"), 48, 15),
    "timm-convnext": (lambda: timm_model("convnext_atto"), 32, 11),
    "timm-vit": (lambda: timm_model("vit_tiny_patch16_224", img_size=32), 32, 11),
    "timm-deit": (lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32), 32, 11),
    "transformers-vit": (hf_vit, 32, 2),
    "transformers-resnet": (hf_resnet, 48, 3),
}


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, SkipNet, Tensor, int]:
    """A model, the same skippable, three images, and how many blocks can be skipped."""
    build, side, gates = FAMILIES[request.param]
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():  # Heads that start at zero would hide everything.
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model, skippable(model), torch.randn(3, 3, side, side), gates


@torch.no_grad()
def test_all_gates_open_is_the_model(family: tuple[nn.Module, SkipNet, Tensor, int]) -> None:
    model, network, images, gates = family
    expected = logits_of(model, images)
    for execute in ("masked", "compacted"):
        logits, routing = network(images, execute=execute)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert routing.executed.all() and network.num_gates == gates
    assert set(network.original_state_dict()) == set(model.state_dict())
    for name, value in network.original_state_dict().items():
        assert value.data_ptr() == model.state_dict()[name].data_ptr(), "another tensor"


@torch.no_grad()
def test_a_skipped_block_leaves_its_shortcut(
    family: tuple[nn.Module, SkipNet, Tensor, int],
) -> None:
    """Whatever rows skip what, both executors agree, and a row is what it is alone."""
    _, network, images, gates = family
    mask = torch.rand(3, gates, generator=torch.Generator().manual_seed(0)) < 0.5
    logits, routing = network(images, decide=Fixed(mask), execute="compacted")
    assert torch.equal(routing.executed, mask)
    masked, _ = network(images, decide=Fixed(mask))
    torch.testing.assert_close(masked, logits, rtol=1e-4, atol=1e-5)
    for row in range(3):
        alone, _ = network(images[row : row + 1], decide=Fixed(mask[row : row + 1]))
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_multiply_adds_are_those_that_are_run(
    family: tuple[nn.Module, SkipNet, Tensor, int],
) -> None:
    model, network, images, gates = family
    torch.backends.mha.set_fastpath_enabled(False)  # An operation that nobody counts.
    try:
        with FlopCounterMode(display=False) as counter:
            model(images[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    cost = network.cost(*images.shape[1:])
    assert cost.dense == counter.get_total_flops() // 2
    assert len(cost.gates) == gates and all(macs > 0 for macs in cost.blocks)


def test_gradients_reach_blocks_and_gates(family: tuple[nn.Module, SkipNet, Tensor, int]) -> None:
    _, network, images, _ = family
    logits, _ = network.train()(images, decide="straight-through")
    nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.gate.project.parameters())  # type: ignore[union-attr]
    for block in network.blocks:
        assert any(p.grad is not None and p.grad.any() for p in block.parameters())


@torch.no_grad()
def test_half_precision_and_channels_last(
    family: tuple[nn.Module, SkipNet, Tensor, int],
) -> None:
    model, network, images, _ = family
    expected = logits_of(model, images)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    logits, _ = last(images.to(memory_format=torch.channels_last), execute="compacted")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(network).bfloat16()
    logits, routing = half(images.bfloat16(), execute="compacted")
    assert logits.dtype == torch.bfloat16 and routing.executed.all()
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max() + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnet_y", "convnext", "vit", "swin", "timm-convnext"])
def test_exported_file_decides_alike(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    build, side, _ = FAMILIES[name]
    torch.manual_seed(0)
    network = skippable(build().eval())
    images = torch.randn(16, 3, side, side)
    assert network.gate is not None
    with torch.no_grad():
        nn.init.normal_(network.gate.project.weight)  # type: ignore[union-attr, arg-type]
        network.gate.shift_logits_(-network(images)[1].logits.median().item())
    info = skipnet.ModelInfo(
        architecture=skipnet.models.Architecture(name="resnet18", gate="rnn", num_classes=CLASSES),
        classes=tuple(map(str, range(CLASSES))),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        image_size=(side, side),
    )
    skipnet.export(network, tmp_path / "x.onnx", info)
    session = skipnet.InferenceSession(tmp_path / "x.onnx", optimize=False)
    logits, routing = session.run(images.numpy())
    with torch.no_grad():
        expected, decided = network(images, execute="compacted")
    sure = (decided.logits.abs() > 1e-4).all(dim=1).numpy()
    assert sure.any() and not decided.executed.all() and decided.executed.any()
    assert (routing.executed == decided.executed.numpy())[sure].all()
    assert abs(logits - expected.numpy())[sure].max() < 1e-4
