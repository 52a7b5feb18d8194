"""transformers: image classifiers by their names on the hub, or of a folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import transformers
from torch import Tensor, nn

from skipnet.errors import UserError
from skipnet.models.libraries.library import DEFAULT, Options, Statistics

_KINDS = ("resnet", "vit")
_NAMES = ("id2label", "label2id", "architectures", "transformers_version")


def build(name: str, num_classes: int, in_channels: int, options: Options) -> nn.Module:
    kind = options.get("model_type")
    if kind not in _KINDS:
        raise UserError(
            f"transformers/{name} is of the kind {kind}: image classifiers of the kinds "
            f"{' and '.join(_KINDS)} can be taken apart"
        )
    # Sizes only: other settings of the library name code to fetch, and this may come from a file.
    sizes = set(vars(transformers.AutoConfig.for_model(kind)))
    sizes -= set(vars(transformers.PreTrainedConfig()))
    settings = {key: value for key, value in options.items() if key in sizes}
    settings |= {"num_labels": num_classes, "num_channels": in_channels}
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(
        transformers.AutoConfig.for_model(kind, **settings), trust_remote_code=False
    )
    return model


def trained(name: str, weights: str) -> Mapping[str, Tensor]:
    model: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
        name, trust_remote_code=False, use_safetensors=True, **_revision(weights)
    )
    return model.state_dict()


def statistics(name: str, weights: str) -> Statistics | None:
    folder = Path(name)
    if folder.is_dir() and not (folder / "preprocessor_config.json").exists():
        return None
    processor = transformers.AutoImageProcessor.from_pretrained(
        name, trust_remote_code=False, **_revision(weights)
    )
    return tuple(processor.image_mean), tuple(processor.image_std)


def options(name: str, image_size: tuple[int, int] | None) -> Options:
    settings = _settings(name)
    if "image_size" in settings and image_size is not None:
        settings["image_size"] = list(image_size)
    return {key: value for key, value in settings.items() if key not in _NAMES}


def image_size(name: str) -> tuple[int, int]:
    size = _settings(name).get("image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _settings(name: str) -> Options:
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    settings: Options = json.loads(config.to_json_string())
    return settings


def _revision(weights: str) -> dict[str, str]:
    return {} if weights == DEFAULT else {"revision": weights}


def names() -> list[str]:
    return []  # What is on the hub.
