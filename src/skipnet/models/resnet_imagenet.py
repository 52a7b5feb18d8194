"""ResNets for ImageNet (He et al. 2015), taken apart from torchvision's."""

from functools import partial

import torchvision
from torch import nn
from torchvision.models.resnet import ResNet

from skipnet.models.adapters.torchvision import resnet as take_apart
from skipnet.models.registry import IMAGENET, register
from skipnet.routing.gates import GateName, make_gate
from skipnet.routing.network import SkipNet


def _resnet(depth: int, gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=num_classes)
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return _routed(model, gate)


def _routed(model: ResNet, gate: GateName | None) -> SkipNet:
    """On the same weights; fresh gates, for training from the beginning."""
    parts = take_apart(model)
    layers = [block for number in (1, 2, 3, 4) for block in getattr(model, f"layer{number}")]
    channels = [getattr(layer, "conv3", layer.conv2).out_channels for layer in layers]
    return SkipNet(
        stem=parts.stem,
        blocks=[block.block for block in parts.blocks],
        shortcuts=[block.shortcut for block in parts.blocks],
        head=parts.head,
        gate=None if gate is None else make_gate(gate, channels[:-1]),
    )


_register = partial(register, defaults=IMAGENET)


@_register
def resnet18(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-18 for ImageNet: 8 blocks, 1.81G multiply-adds at 224x224."""
    return _resnet(18, gate, num_classes, in_channels)


@_register
def resnet34(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-34 for ImageNet: 16 blocks, 3.66G multiply-adds at 224x224."""
    return _resnet(34, gate, num_classes, in_channels)


@_register
def resnet50(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-50 for ImageNet: 16 blocks, 4.09G multiply-adds at 224x224."""
    return _resnet(50, gate, num_classes, in_channels)


@_register
def resnet101(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-101 for ImageNet: 33 blocks, 7.80G multiply-adds at 224x224."""
    return _resnet(101, gate, num_classes, in_channels)


@_register
def resnet152(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-152 for ImageNet: 50 blocks, 11.51G multiply-adds at 224x224."""
    return _resnet(152, gate, num_classes, in_channels)
