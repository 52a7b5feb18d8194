"""ResNets for ImageNet (He et al. 2015), taken apart from torchvision's."""

from functools import partial
from typing import cast

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from skipnet.models.registry import IMAGENET, register
from skipnet.routing.gates import GATES, GateName
from skipnet.routing.network import SkipNet


class Residual(nn.Module):
    """A torchvision block given its shortcut's output: convolutions, sum, ReLU.

    Args:
        block: The block; its projection, if any, is not used.
    """

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.conv1, self.bn1 = block.conv1, block.bn1
        self.conv2, self.bn2 = block.conv2, block.bn2
        if isinstance(block, Bottleneck):
            self.conv3, self.bn3 = block.conv3, block.bn3
        self.bottleneck = isinstance(block, Bottleneck)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(self.relu(x)))
        x = self.relu(x + shortcut)
        return x


def take_apart(model: ResNet, gate: GateName | None = None) -> SkipNet:
    """Return a torchvision ResNet as a routed network, on the same weights.

    With all gates open it computes what the model computes.

    Args:
        model: The ResNet, ResNeXt or Wide ResNet.
        gate: Kind of gate to add, or None.
    """
    layers = [block for layer in (1, 2, 3, 4) for block in getattr(model, f"layer{layer}")]
    blocks = [cast(BasicBlock | Bottleneck, block) for block in layers]
    last = [b.conv3 if isinstance(b, Bottleneck) else b.conv2 for b in blocks]
    return SkipNet(
        stem=nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool),
        blocks=[Residual(block) for block in blocks],
        shortcuts=[block.downsample or nn.Identity() for block in blocks],
        head=nn.Sequential(model.avgpool, nn.Flatten(1), model.fc),
        gate=None if gate is None else GATES[gate]([conv.out_channels for conv in last[:-1]]),
    )


def _resnet(depth: int, gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=num_classes)
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return take_apart(model, gate)


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
