"""transformers: image classifiers of the kinds ViT and ResNet."""

from typing import Any

from torch import Tensor, nn

from skipnet.models.adapters.parts import Block, FirstToken, Parts, Sum, Whole, adapter


@adapter("transformers.models.resnet.modeling_resnet.ResNetForImageClassification")
def resnet(model: Any) -> Parts:
    """ResNet."""
    return Parts(
        stem=model.resnet.embedder,
        blocks=[
            Block(block=Sum(layer.layer, layer.activation), shortcut=layer.shortcut)
            for stage in model.resnet.encoder.stages
            for layer in stage.layers
        ],
        head=nn.Sequential(model.resnet.pooler, model.classifier),
        input_size=(model.config.num_channels, 224, 224),
    )


@adapter("transformers.models.vit.modeling_vit.ViTForImageClassification")
def vit(model: Any) -> Parts:
    """ViT."""
    size, channels = model.config.image_size, model.config.num_channels
    height, width = (size, size) if isinstance(size, int) else size
    layers = model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer
    return Parts(
        stem=model.vit.embeddings,
        blocks=[Block(block=Whole(_Tensor(layer))) for layer in layers],
        head=nn.Sequential(model.vit.layernorm, FirstToken(), model.classifier),
        layout="tokens",
        input_size=(channels, height, width),
    )


class _Tensor(nn.Module):
    """A layer that returns its output, or, before transformers 5, a tuple that begins with it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return output[0] if isinstance(output, tuple) else output
