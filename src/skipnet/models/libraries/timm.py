"""timm: networks by their names there, with the tag of their weights or without."""

from collections.abc import Mapping

import timm
from torch import Tensor, nn

from skipnet.errors import UserError, unknown
from skipnet.models.libraries.library import DEFAULT, Options, Statistics, demand_known

_MODULES = ("resnet", "convnext", "vision_transformer", "deit")


def build(name: str, num_classes: int, in_channels: int, options: Options) -> nn.Module:
    # Other prefixes are of files and hubs, which nothing but the user may name.
    if not timm.is_model(name.partition(".")[0]) or ":" in name or "/" in name:
        known = [f"timm/{one}" for one in timm.list_models()]
        raise UserError(unknown("model", f"timm/{name}", known))
    demand_known(f"timm/{name}", options, {"img_size"})
    model: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
    )
    return model


def trained(name: str, weights: str) -> Mapping[str, Tensor]:
    tensors: dict[str, Tensor] = timm.create_model(
        _tagged(name, weights), pretrained=True
    ).state_dict()
    return tensors


def statistics(name: str, weights: str) -> Statistics:
    config = timm.models.get_pretrained_cfg(_tagged(name, weights))
    if config is None:
        raise UserError(f"timm/{name} has no trained weights")
    return tuple(config.mean), tuple(config.std)


def options(name: str, image_size: tuple[int, int] | None) -> Options:
    if image_size is None:
        return {}
    base = name.partition(".")[0]
    tokens = base in timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    return {"img_size": list(image_size)} if tokens else {}


def image_size(name: str) -> tuple[int, int]:
    config = timm.models.get_pretrained_cfg(name)
    _, height, width = (3, 224, 224) if config is None else config.input_size
    return height, width


def names() -> list[str]:
    return [name for module in _MODULES for name in timm.list_models(module=module)]


def _tagged(name: str, weights: str) -> str:
    return name if weights == DEFAULT else f"{name.partition('.')[0]}.{weights}"
