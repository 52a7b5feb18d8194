"""timm: the ResNet family, ConvNeXt, ViT and DeiT."""

from typing import Any

from torch import Tensor, nn

from skipnet.models.adapters.parts import Block, Parts, Whole, adapter, in_sequence, shell


class _ResNetBlock(nn.Module):
    """A timm `BasicBlock` or `Bottleneck` given its shortcut's output."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.bottleneck = hasattr(block, "conv3")
        self.block = shell(block, without=["downsample"])

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        block: Any = self.block
        if self.bottleneck:
            x = block.act1(block.bn1(block.conv1(x)))
            x = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(x)))))
            x = block.bn3(block.conv3(x))
        else:
            x = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
            x = block.bn2(block.conv2(x))
        if block.se is not None:
            x = block.se(x)
        if block.drop_path is not None:
            x = block.drop_path(x)
        return (block.act3 if self.bottleneck else block.act2)(x + shortcut)


class _Head(nn.Module):
    """Whatever comes before a timm model's `forward_head`, and that."""

    def __init__(self, model: nn.Module, without: list[str], before: list[nn.Module]) -> None:
        super().__init__()
        self.before = in_sequence(before)
        self.model = shell(model, without)

    def forward(self, features: Tensor) -> Tensor:
        head: Any = self.model
        return head.forward_head(self.before(features))


def _size(model: Any) -> tuple[int, int, int]:
    """What the weights were trained on; a ViT's own size is that of its patches."""
    channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
    embed = getattr(model, "patch_embed", None)
    if embed is not None and embed.img_size is not None:
        height, width = embed.img_size
    return channels, height, width


@adapter("timm.models.resnet.ResNet")
def resnet(model: Any) -> Parts:
    """ResNet, ResNeXt, SE- and ECA-ResNet, with any stem, of basic blocks or bottlenecks."""
    layers = ["layer1", "layer2", "layer3", "layer4"]
    stem = ["conv1", "bn1", "act1", "maxpool"]
    return Parts(
        stem=nn.Sequential(*(getattr(model, name) for name in stem)),
        blocks=[
            Block(block=_ResNetBlock(block), shortcut=block.downsample or nn.Identity())
            for layer in layers
            for block in getattr(model, layer)
        ],
        head=_Head(model, without=[*stem, *layers], before=[]),
        input_size=_size(model),
    )


@adapter("timm.models.convnext.ConvNeXt")
def convnext(model: Any) -> Parts:
    """ConvNeXt: a stage's downsampling is the shortcut of its first block."""
    blocks = []
    for stage in model.stages:
        for index, block in enumerate(stage.blocks):
            before = stage.downsample if index == 0 else nn.Identity()
            blocks.append(Block(block=Whole(block), shortcut=before))
    return Parts(
        stem=model.stem,
        blocks=blocks,
        head=_Head(model, without=["stem", "stages", "norm_pre"], before=[model.norm_pre]),
        input_size=_size(model),
    )


class _ViTStem(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = shell(
            model, without=["blocks", "norm", "attn_pool", "fc_norm", "head", "head_dist"]
        )

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


@adapter("timm.models.vision_transformer.VisionTransformer")
def vit(model: Any) -> Parts:
    """ViT and DeiT, distilled too."""
    stem = ["patch_embed", "patch_drop", "norm_pre", "cls_token", "reg_token", "dist_token"]
    return Parts(
        stem=_ViTStem(model),
        blocks=[Block(block=Whole(block)) for block in model.blocks],
        head=_Head(model, without=[*stem, "pos_embed", "blocks", "norm"], before=[model.norm]),
        layout="tokens",
        input_size=_size(model),
    )
