"""torchvision: networks by their names in `torchvision.models`."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision import models

from skipnet.errors import UserError, unknown
from skipnet.models.libraries.library import FILE, Options, Statistics, demand_known

_FAMILIES = re.compile(r"(wide_)?resnet\d|resnext|regnet|convnext|vit_|swin_")


def build(name: str, num_classes: int, in_channels: int, options: Options) -> nn.Module:
    known = [f"torchvision/{one}" for one in models.list_models(module=models)]
    if f"torchvision/{name}" not in known:
        raise UserError(unknown("model", f"torchvision/{name}", known))
    if in_channels != 3:
        raise UserError(
            f"torchvision/{name} takes images of 3 channels, not {in_channels}: set "
            "--data.channels 3, or take a network of timm"
        )
    demand_known(f"torchvision/{name}", options, {"image_size"})
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def trained(name: str, weights: str) -> Mapping[str, Tensor]:
    # Not by get_model, which would unpickle whatever the file says.
    tensors: Mapping[str, Tensor] = _weights(name, weights).get_state_dict(
        check_hash=True, weights_only=True
    )
    return tensors


def _weights(name: str, weights: str) -> Any:
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise UserError(
            f"torchvision/{name} has no weights {weights}: use {', '.join(known.__members__)}, or "
            f"a {FILE} file"
        )
    return known[weights]


def statistics(name: str, weights: str) -> Statistics:
    preset = _weights(name, weights).transforms()
    return tuple(preset.mean), tuple(preset.std)


def options(name: str, image_size: tuple[int, int] | None) -> Options:
    if image_size is None:
        return {}
    return {"image_size": _square(name, image_size)} if name.startswith("vit_") else {}


def image_size(name: str) -> tuple[int, int]:
    return 224, 224


def names() -> list[str]:
    return [name for name in models.list_models(module=models) if _FAMILIES.match(name)]


def _square(name: str, image_size: tuple[int, int]) -> int:
    height, width = image_size
    if height != width:
        raise UserError(f"{name} takes square images, not {height}x{width}: set --data.image-size")
    return height
