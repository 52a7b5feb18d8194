"""Networks of other libraries by name: torchvision/NAME, timm/NAME and transformers/ID."""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from skipnet.errors import UserError, extras_named, unknown
from skipnet.models.adapters import skippable
from skipnet.routing.network import SkipNet

Options = dict[str, Any]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

_FILE = ".safetensors"
_TORCHVISION = re.compile(r"(wide_)?resnet\d|resnext|regnet|convnext|vit_|swin_")
_TIMM = ("resnet", "convnext", "vision_transformer", "deit")
_TRANSFORMERS = ("resnet", "vit")
_NAMES = ("id2label", "label2id", "architectures", "transformers_version")


@dataclass(frozen=True)
class Library:
    """Where networks come from.

    Attributes:
        build: `(name, num_classes, in_channels, options) -> model`, with fresh weights.
        trained: `(name, weights) -> model`, as its authors trained it.
        statistics: `(name, weights) -> (mean, std)` that its images are normalised by.
        options: `(name, image_size) -> options` of `build` without which this network cannot be
            built again, or takes no images of this size.
        names: The names that can be made skippable, as far as they can be listed.
    """

    build: Callable[[str, int, int, Options], nn.Module]
    trained: Callable[[str, str], nn.Module]
    statistics: Callable[[str, str], Statistics | None]
    options: Callable[[str, tuple[int, int]], Options]
    names: Callable[[], list[str]]


def is_library_name(name: str) -> bool:
    """Whether a name is that of another library's network."""
    return name.split("/")[0] in LIBRARIES and "/" in name


def build(
    name: str,
    gate: Any,
    num_classes: int,
    in_channels: int,
    blocks: tuple[int, ...] | None,
    options: Options,
) -> SkipNet:
    """Build a network of another library with fresh weights, taken apart.

    Raises:
        UserError: When the library is not installed, does not know the name or an option, or the
            network is of no family that can be taken apart.
    """
    library, own = _split(name)
    with _explained(name):
        model = library.build(own, num_classes, in_channels, options)
    # What can be built by name is held against its parts by the tests, not every time.
    return skippable(model, gate, blocks, verify=False)


def options(name: str, image_size: tuple[int, int]) -> Options:
    """Return what else a model file has to say for the network to be built again.

    Raises:
        UserError: When the library is not installed or does not know the name.
    """
    library, own = _split(name)
    with _explained(name):
        return library.options(own, image_size)


def names(pattern: str) -> list[str]:
    """Return the known names of the libraries that a shell pattern with a slash may match."""
    found = []
    for prefix, library in LIBRARIES.items():
        if pattern.split("/")[0] in (prefix, "*"):
            with _explained(prefix):
                found += [f"{prefix}/{name}" for name in library.names()]
    return found


def statistics(name: str, weights: str) -> Statistics | None:
    """Return mean and standard deviation that trained weights expect, None where nothing says."""
    if weights.endswith(_FILE):
        return None
    library, own = _split(name)
    with _explained(f"{name} with weights {weights}"):
        return library.statistics(own, weights)


def load_trained(network: SkipNet, name: str, weights: str) -> list[str]:
    """Copy trained weights into a network that `build` has made.

    Args:
        network: Changed in place.
        name: Of the network.
        weights: A safetensors file with the library's own names, or what the library calls its
            weights; DEFAULT for its best.

    Returns:
        The names of the tensors that stay as they were initialised: the classifier's, where the
        weights are of other classes.

    Raises:
        UserError: When there are no such weights, or more than the classifier does not fit.
    """
    path = Path(weights)
    if weights.endswith(_FILE):
        try:
            tensors = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as a safetensors file: {error}") from None
    else:
        library, own = _split(name)
        with _explained(f"{name} with weights {weights}"):
            tensors = library.trained(own, weights).state_dict()
    try:
        return network.load_original_state_dict(tensors, new_classes=True)
    except UserError as error:
        raise UserError(f"{name} with weights {weights}: {error}") from None


def _split(name: str) -> tuple[Library, str]:
    prefix, _, own = name.partition("/")
    if prefix not in LIBRARIES:
        raise UserError(unknown("library", prefix, LIBRARIES))
    return LIBRARIES[prefix], own


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say what a library's error means for somebody who named a network."""
    try:
        with extras_named():
            yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name} cannot be had: {why[0]}") from None


def _torchvision(name: str, num_classes: int, in_channels: int, options: Options) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    known = [f"torchvision/{one}" for one in models.list_models(module=models)]
    if f"torchvision/{name}" not in known:
        raise UserError(unknown("model", f"torchvision/{name}", known))
    if in_channels != 3:
        raise UserError(
            f"torchvision/{name} takes images of 3 channels, not {in_channels}: set "
            "--data.channels 3, or take a network of timm"
        )
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def _torchvision_trained(name: str, weights: str) -> nn.Module:
    model: nn.Module = importlib.import_module("torchvision.models").get_model(
        name, weights=weights
    )
    return model


def _torchvision_statistics(name: str, weights: str) -> Statistics:
    models = importlib.import_module("torchvision.models")
    preset = models.get_model_weights(name)[weights].transforms()
    return tuple(preset.mean), tuple(preset.std)


def _torchvision_options(name: str, image_size: tuple[int, int]) -> Options:
    return {"image_size": _square(name, image_size)} if name.startswith("vit_") else {}


def _torchvision_names() -> list[str]:
    models = importlib.import_module("torchvision.models")
    return [name for name in models.list_models(module=models) if _TORCHVISION.match(name)]


def _timm(name: str, num_classes: int, in_channels: int, options: Options) -> nn.Module:
    timm = importlib.import_module("timm")
    # Other prefixes are of files and hubs, which nothing but the user may name.
    if not timm.is_model(name.partition(".")[0]) or ":" in name or "/" in name:
        known = [f"timm/{one}" for one in timm.list_models()]
        raise UserError(unknown("model", f"timm/{name}", known))
    model: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
    )
    return model


def _timm_trained(name: str, weights: str) -> nn.Module:
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(_timm_tagged(name, weights), pretrained=True)
    return model


def _timm_statistics(name: str, weights: str) -> Statistics:
    timm = importlib.import_module("timm")
    config = timm.models.get_pretrained_cfg(_timm_tagged(name, weights))
    return tuple(config.mean), tuple(config.std)


def _timm_tagged(name: str, weights: str) -> str:
    return name if weights == "DEFAULT" else f"{name.partition('.')[0]}.{weights}"


def _timm_options(name: str, image_size: tuple[int, int]) -> Options:
    timm = importlib.import_module("timm")
    base = name.partition(".")[0]
    tokens = base in timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    return {"img_size": list(image_size)} if tokens else {}


def _timm_names() -> list[str]:
    timm = importlib.import_module("timm")
    return [name for module in _TIMM for name in timm.list_models(module=module)]


def _transformers(name: str, num_classes: int, in_channels: int, options: Options) -> nn.Module:
    transformers = importlib.import_module("transformers")
    options = options or _transformers_settings(name)
    kind = options.get("model_type")
    if kind not in _TRANSFORMERS:
        raise UserError(
            f"transformers/{name} is of the kind {kind}: image classifiers of the kinds "
            f"{' and '.join(_TRANSFORMERS)} can be taken apart"
        )
    # Sizes only: other settings of the library name code to fetch, and this may come from a file.
    sizes = vars(transformers.AutoConfig.for_model(kind)).keys()
    sizes -= vars(transformers.PreTrainedConfig()).keys()
    settings = {key: value for key, value in options.items() if key in sizes}
    settings |= {"num_labels": num_classes, "num_channels": in_channels}
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(
        transformers.AutoConfig.for_model(kind, **settings), trust_remote_code=False
    )
    return model


def _transformers_settings(name: str) -> Options:
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    settings: Options = json.loads(config.to_json_string())
    return settings


def _transformers_trained(name: str, weights: str) -> nn.Module:
    transformers = importlib.import_module("transformers")
    model: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
        name, trust_remote_code=False, use_safetensors=True, **_revision(weights)
    )
    return model


def _transformers_statistics(name: str, weights: str) -> Statistics | None:
    transformers = importlib.import_module("transformers")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            name, trust_remote_code=False, **_revision(weights)
        )
    except (OSError, ValueError):  # Not every model comes with one.
        return None
    return tuple(processor.image_mean), tuple(processor.image_std)


def _revision(weights: str) -> dict[str, str]:
    return {} if weights == "DEFAULT" else {"revision": weights}


def _transformers_options(name: str, image_size: tuple[int, int]) -> Options:
    settings = _transformers_settings(name)
    if "image_size" in settings:
        settings["image_size"] = list(image_size)
    return {key: value for key, value in settings.items() if key not in _NAMES}


def _square(name: str, image_size: tuple[int, int]) -> int:
    height, width = image_size
    if height != width:
        raise UserError(f"{name} takes square images, not {height}x{width}: set --data.image-size")
    return height


LIBRARIES = {
    "torchvision": Library(
        build=_torchvision,
        trained=_torchvision_trained,
        statistics=_torchvision_statistics,
        options=_torchvision_options,
        names=_torchvision_names,
    ),
    "timm": Library(
        build=_timm,
        trained=_timm_trained,
        statistics=_timm_statistics,
        options=_timm_options,
        names=_timm_names,
    ),
    "transformers": Library(
        build=_transformers,
        trained=_transformers_trained,
        statistics=_transformers_statistics,
        options=_transformers_options,
        names=list,
    ),
}
