"""Networks of other libraries by name: torchvision/NAME, timm/NAME and transformers/ID."""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

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
        trained: `(name, weights) -> state dict`, as its authors trained it.
        statistics: `(name, weights) -> (mean, std)` that its images are normalised by.
        options: `(name, image_size) -> options` of `build` without which this network cannot be
            built again, or takes no images of this size; None is the network's own.
        image_size: `name -> (height, width)` that the network is known for.
        names: The names that can be made skippable, as far as they can be listed.
    """

    build: Callable[[str, int, int, Options], nn.Module]
    trained: Callable[[str, str], Mapping[str, Tensor]]
    statistics: Callable[[str, str], Statistics | None]
    options: Callable[[str, tuple[int, int] | None], Options]
    image_size: Callable[[str], tuple[int, int]]
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


def options(name: str, image_size: tuple[int, int] | None = None) -> Options:
    """Return what else a model file has to say for the network to be built again.

    Args:
        name: Of the network.
        image_size: (height, width) that it is to take; what it is known for if not given.

    Raises:
        UserError: When the library is not installed or does not know the name.
    """
    library, own = _split(name)
    with _explained(name):
        return library.options(own, image_size)


def image_size(name: str) -> tuple[int, int]:
    """Return height and width of the images that a network is known for."""
    library, own = _split(name)
    with _explained(name):
        return library.image_size(own)


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
    if path.exists() and not weights.endswith(_FILE):
        raise UserError(
            f"--weights takes {_FILE} files with the library's names, and {weights} is none: a run "
            "of skipnet's is named with --start, and a .pth file's state dict is written anew by "
            "safetensors.torch.save_file"
        )
    if weights.endswith(_FILE):
        try:
            tensors = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as a safetensors file: {error}") from None
    else:
        library, own = _split(name)
        with _explained(f"{name} with weights {weights}"):
            tensors = dict(library.trained(own, weights))
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
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        AssertionError,
    ) as error:
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
    _demand_known(f"torchvision/{name}", options, {"image_size"})
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def _demand_known(name: str, options: Options, known: set[str]) -> None:
    """Refuse what a file says of a constructor, but for what is known to be a size.

    Others name files to open and code to fetch.
    """
    if strange := sorted(set(options) - known):
        raise UserError(f"{name} has options that are not read: {', '.join(strange)}")


def _torchvision_trained(name: str, weights: str) -> Mapping[str, Tensor]:
    # Not by get_model, which would unpickle whatever the file says.
    tensors: Mapping[str, Tensor] = _torchvision_weights(name, weights).get_state_dict(
        check_hash=True, weights_only=True
    )
    return tensors


def _torchvision_weights(name: str, weights: str) -> Any:
    known = importlib.import_module("torchvision.models").get_model_weights(name)
    if weights not in known.__members__:
        raise UserError(
            f"torchvision/{name} has no weights {weights}: use {', '.join(known.__members__)}, or "
            f"a {_FILE} file"
        )
    return known[weights]


def _torchvision_statistics(name: str, weights: str) -> Statistics:
    preset = _torchvision_weights(name, weights).transforms()
    return tuple(preset.mean), tuple(preset.std)


def _torchvision_options(name: str, image_size: tuple[int, int] | None) -> Options:
    if image_size is None:
        return {}
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
    _demand_known(f"timm/{name}", options, {"img_size"})
    model: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
    )
    return model


def _timm_trained(name: str, weights: str) -> Mapping[str, Tensor]:
    timm = importlib.import_module("timm")
    tensors: dict[str, Tensor] = timm.create_model(
        _timm_tagged(name, weights), pretrained=True
    ).state_dict()
    return tensors


def _timm_statistics(name: str, weights: str) -> Statistics:
    timm = importlib.import_module("timm")
    config = timm.models.get_pretrained_cfg(_timm_tagged(name, weights))
    return tuple(config.mean), tuple(config.std)


def _timm_tagged(name: str, weights: str) -> str:
    return name if weights == "DEFAULT" else f"{name.partition('.')[0]}.{weights}"


def _timm_options(name: str, image_size: tuple[int, int] | None) -> Options:
    if image_size is None:
        return {}
    timm = importlib.import_module("timm")
    base = name.partition(".")[0]
    tokens = base in timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    return {"img_size": list(image_size)} if tokens else {}


def _timm_names() -> list[str]:
    timm = importlib.import_module("timm")
    return [name for module in _TIMM for name in timm.list_models(module=module)]


def _transformers(name: str, num_classes: int, in_channels: int, options: Options) -> nn.Module:
    transformers = importlib.import_module("transformers")
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


def _transformers_trained(name: str, weights: str) -> Mapping[str, Tensor]:
    transformers = importlib.import_module("transformers")
    model: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
        name, trust_remote_code=False, use_safetensors=True, **_revision(weights)
    )
    return model.state_dict()


def _transformers_statistics(name: str, weights: str) -> Statistics | None:
    transformers = importlib.import_module("transformers")
    folder = Path(name)
    if folder.is_dir() and not (folder / "preprocessor_config.json").exists():
        return None
    processor = transformers.AutoImageProcessor.from_pretrained(
        name, trust_remote_code=False, **_revision(weights)
    )
    return tuple(processor.image_mean), tuple(processor.image_std)


def _revision(weights: str) -> dict[str, str]:
    return {} if weights == "DEFAULT" else {"revision": weights}


def _transformers_options(name: str, image_size: tuple[int, int] | None) -> Options:
    settings = _transformers_settings(name)
    if "image_size" in settings and image_size is not None:
        settings["image_size"] = list(image_size)
    return {key: value for key, value in settings.items() if key not in _NAMES}


def _torchvision_size(name: str) -> tuple[int, int]:
    return 224, 224


def _timm_size(name: str) -> tuple[int, int]:
    timm = importlib.import_module("timm")
    config = timm.models.get_pretrained_cfg(name)
    _, height, width = (3, 224, 224) if config is None else config.input_size
    return height, width


def _transformers_size(name: str) -> tuple[int, int]:
    size = _transformers_settings(name).get("image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


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
        image_size=_torchvision_size,
        names=_torchvision_names,
    ),
    "timm": Library(
        build=_timm,
        trained=_timm_trained,
        statistics=_timm_statistics,
        options=_timm_options,
        image_size=_timm_size,
        names=_timm_names,
    ),
    "transformers": Library(
        build=_transformers,
        trained=_transformers_trained,
        statistics=_transformers_statistics,
        options=_transformers_options,
        image_size=_transformers_size,
        names=list,
    ),
}
