"""torchvision: ResNet, ResNeXt, Wide ResNet, RegNet, ConvNeXt, ViT, Swin."""

from typing import Any

import torch
from torch import Tensor, nn

from skipnet.models.adapters.parts import (
    Block,
    FirstToken,
    Parts,
    Sum,
    Whole,
    adapter,
    in_sequence,
)


class Residual(nn.Module):
    """A torchvision ResNet block given its shortcut's output: convolutions, sum, ReLU.

    Args:
        block: A `BasicBlock` or `Bottleneck`; its projection, if any, is not used.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = block.conv1, block.bn1
        self.conv2, self.bn2 = block.conv2, block.bn2
        self.bottleneck = hasattr(block, "conv3")
        if self.bottleneck:
            self.conv3, self.bn3 = block.conv3, block.bn3
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(self.relu(x)))
        x = self.relu(x + shortcut)
        return x


@adapter("torchvision.models.resnet.ResNet")
def resnet(model: Any) -> Parts:
    """ResNet, ResNeXt and Wide ResNet."""
    blocks = [block for layer in (1, 2, 3, 4) for block in getattr(model, f"layer{layer}")]
    return Parts(
        stem=nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool),
        blocks=[
            Block(block=Residual(block), shortcut=block.downsample or nn.Identity())
            for block in blocks
        ],
        head=nn.Sequential(model.avgpool, nn.Flatten(1), model.fc),
    )


@adapter("torchvision.models.regnet.RegNet")
def regnet(model: Any) -> Parts:
    """RegNet X and Y."""
    return Parts(
        stem=model.stem,
        blocks=[
            Block(block=Sum(block.f, block.activation), shortcut=block.proj or nn.Identity())
            for stage in model.trunk_output
            for block in stage
        ],
        head=nn.Sequential(model.avgpool, nn.Flatten(1), model.fc),
    )


@adapter("torchvision.models.convnext.ConvNeXt")
def convnext(model: Any) -> Parts:
    """ConvNeXt: a downsampling always runs, and is the shortcut of the block after it."""
    stem, *stages = model.features
    return Parts(
        stem=stem,
        blocks=_blocks_after_downsampling(stages, lambda part: hasattr(part[0], "layer_scale")),
        head=nn.Sequential(model.avgpool, model.classifier),
    )


@adapter("torchvision.models.swin_transformer.SwinTransformer")
def swin(model: Any) -> Parts:
    """Swin and Swin V2, whose patches are merged in shortcuts."""
    stem, *stages = model.features
    return Parts(
        stem=stem,
        blocks=_blocks_after_downsampling(stages, lambda part: isinstance(part, nn.Sequential)),
        head=nn.Sequential(model.norm, model.permute, model.avgpool, model.flatten, model.head),
        layout="tokens",
    )


def _blocks_after_downsampling(stages: list[Any], is_stage: Any) -> list[Block]:
    blocks: list[Block] = []
    before: list[nn.Module] = []
    for part in stages:
        if not is_stage(part):
            before.append(part)
            continue
        for block in part:
            blocks.append(Block(block=Whole(block), shortcut=in_sequence(before)))
            before = []
    return blocks


class _ViTStem(nn.Module):
    """Patches, the class token, and where they are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.conv_proj, self.dropout = model.conv_proj, model.encoder.dropout
        self.class_token, self.pos_embedding = model.class_token, model.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.dropout(tokens + self.pos_embedding)


@adapter("torchvision.models.vision_transformer.VisionTransformer")
def vit(model: Any) -> Parts:
    """ViT."""
    return Parts(
        stem=_ViTStem(model),
        blocks=[Block(block=Whole(layer)) for layer in model.encoder.layers],
        head=nn.Sequential(model.encoder.ln, FirstToken(), model.heads),
        layout="tokens",
        input_size=(3, model.image_size, model.image_size),
    )
