"""The CIFAR ResNets of 6n+2 layers (He et al. 2015, section 4.2), in parts that can be skipped.

Three stages of n basic blocks with 16, 32 and 64 channels; the first block of stages 2 and 3 halves
the map and has a 1x1 projection as its shortcut, as in SkipNet.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from skipnet.models.registry import register
from skipnet.routing.gates import GateName, make_gate
from skipnet.routing.network import SkipNet


class BasicBlock(nn.Module):
    """Conv 3x3, BN, ReLU, conv 3x3, BN, plus the shortcut, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Return ReLU(branch(x) + shortcut), [batch, out_channels, height, width]."""
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class _Head(nn.Sequential):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def cifar_resnet(
    depth: int,
    *,
    gate: GateName | None,
    num_classes: int,
    in_channels: int,
    widths: Sequence[int] = (16, 32, 64),
) -> SkipNet:
    """Build the ResNet of `depth` = 6n + 2 layers, with or without gates.

    Args:
        depth: Number of weighted layers, 6n + 2.
        gate: Kind of gate; None for the dense network.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        widths: Channels of the three stages.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (20, 32, 38 …), not {depth}")
    blocks: list[nn.Module] = []
    shortcuts: list[nn.Module] = []
    outputs: list[int] = []
    channels = widths[0]
    for stage, width in enumerate(widths):
        for index in range((depth - 2) // 6):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(BasicBlock(channels, width, stride))
            shortcuts.append(_projection(channels, width, stride))
            outputs.append(width)
            channels = width
    network = SkipNet(
        stem=nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ),
        blocks=blocks,
        shortcuts=shortcuts,
        head=_Head(channels, num_classes),
        gate=None if gate is None else make_gate(gate, outputs[:-1]),
    )
    for module in [network.stem, network.blocks, network.shortcuts]:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


@register
def cifar_resnet20(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-20: 9 blocks, 40.6M multiply-adds at 32x32."""
    return cifar_resnet(20, gate=gate, num_classes=num_classes, in_channels=in_channels)


@register
def cifar_resnet32(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-32: 15 blocks, 68.9M multiply-adds at 32x32."""
    return cifar_resnet(32, gate=gate, num_classes=num_classes, in_channels=in_channels)


@register
def cifar_resnet38(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-38: 18 blocks, 83.0M multiply-adds at 32x32."""
    return cifar_resnet(38, gate=gate, num_classes=num_classes, in_channels=in_channels)


@register
def cifar_resnet44(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-44: 21 blocks, 97.2M multiply-adds at 32x32."""
    return cifar_resnet(44, gate=gate, num_classes=num_classes, in_channels=in_channels)


@register
def cifar_resnet56(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-56: 27 blocks, 125.5M multiply-adds at 32x32."""
    return cifar_resnet(56, gate=gate, num_classes=num_classes, in_channels=in_channels)


@register
def cifar_resnet74(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-74: 36 blocks, 168.0M multiply-adds at 32x32."""
    return cifar_resnet(74, gate=gate, num_classes=num_classes, in_channels=in_channels)


@register
def cifar_resnet110(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-110: 54 blocks, 252.9M multiply-adds at 32x32."""
    return cifar_resnet(110, gate=gate, num_classes=num_classes, in_channels=in_channels)


@register
def cifar_resnet152(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
    """ResNet-152: 75 blocks, 352.0M multiply-adds at 32x32."""
    return cifar_resnet(152, gate=gate, num_classes=num_classes, in_channels=in_channels)
