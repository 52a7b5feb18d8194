"""Model files: weights and metadata in one safetensors file, without pickle."""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from skipnet.errors import UserError
from skipnet.files import write_atomically
from skipnet.models.registry import Architecture
from skipnet.routing.network import SkipNet, demand_fitting
from skipnet.sharing import FILE, download, is_hub_id

FORMAT_VERSION = 1
_KEY = "skipnet"
_PUBLISHED = Path(__file__).parents[1] / "published"
_SUFFIX = ".safetensors"


@dataclass(kw_only=True)
class ModelInfo:
    """What a model file says about its weights.

    Attributes:
        architecture: How to build the network.
        classes: Names of the classes.
        mean: Mean of each channel, for pixels in 0 to 1.
        std: Standard deviation of each channel, for pixels in 0 to 1.
        image_size: (height, width) of the images trained on.
        results: Accuracy and computation as measured when the file was written.
    """

    architecture: Architecture
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> bool:
        """Whether the classes' names are known; those of `unnamed` stand in for them if not."""
        return self.classes != unnamed(len(self.classes))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "format_version": FORMAT_VERSION,
            "architecture": self.architecture.to_dict(),
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "image_size": list(self.image_size),
            "results": self.results,
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelInfo":
        """Read back what `to_dict` returned."""
        height, width = values["image_size"]
        return ModelInfo(
            architecture=Architecture(**values["architecture"]),
            classes=tuple(values["classes"]),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            image_size=(height, width),
            results=values["results"],
        )


def unnamed(count: int) -> tuple[str, ...]:
    """Return what classes are called whose names are not known."""
    return tuple(f"class {number}" for number in range(count))


def save(model: SkipNet, path: str | os.PathLike[str], info: ModelInfo) -> None:
    """Write a model file atomically: an earlier file at `path` survives any failure.

    Raises:
        UserError: When the file cannot be written (no space, no permission), or could not be read:
            the network is not of the architecture that `info` says.
    """
    _demand_loadable(model, info)
    write_tensors(Path(path), model.state_dict(), info.to_dict())


def _demand_loadable(model: SkipNet, info: ModelInfo) -> None:
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                built = info.architecture.build()
        except RuntimeError:  # Some constructors read what they have made.
            built = info.architecture.build()
    demand_fitting(built.state_dict(), model.state_dict(), "the network to save")


def fingerprint(tensors: Mapping[str, Tensor]) -> int:
    """Return a number that changes when a tensor does."""
    found = 0
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found = zlib.crc32(data.data, zlib.crc32(name.encode(), found))
    return found


def load(path: str | os.PathLike[str]) -> tuple[SkipNet, ModelInfo]:
    """Read a model file: the network in evaluation mode, and what the file says about it.

    Args:
        path: Of the file, or a name of `list_weights`, or of a model on the Hugging Face hub
            ("owner/name"), unless a file is called so.

    Raises:
        UserError: When there is no such file, it is truncated or not a safetensors file, was not
            written by `save`, or its weights do not fit its architecture.
    """
    path = find_weights(path)
    tensors, values = read_tensors(path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this skipnet reads {FORMAT_VERSION}")
    try:
        info = ModelInfo.from_dict(values)
        model = info.architecture.build()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is not a model's ({error!r})") from None
    load_weights(model, tensors, path)
    model.info, model._measured = info, fingerprint(tensors)
    return model.eval(), info


def list_weights() -> list[str]:
    """Return the names of the trained networks that come with the package, each with its card."""
    return sorted(path.stem for path in _PUBLISHED.glob(f"*{_SUFFIX}"))


def find_weights(name: str | os.PathLike[str]) -> Path:
    """Return the file that a name of `list_weights`, or of the hub, stands for; a path as it is.

    Raises:
        UserError: When it is a name of the hub's, and cannot be had.
    """
    path = Path(name)
    if (path / "README.md").exists() and (path / FILE).exists():  # As `save_pretrained` leaves it.
        return path / FILE
    if path.exists():
        return path
    if str(path) in list_weights():
        return _PUBLISHED / f"{path}{_SUFFIX}"
    return download(str(path)) if is_hub_id(str(path)) else path


def load_weights(model: SkipNet, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy weights into a network.

    Raises:
        UserError: When names or shapes differ, with the first of them.
    """
    demand_fitting(model.state_dict(), tensors, str(path))
    model.load_state_dict(tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON metadata to a safetensors file atomically.

    The file is complete on the disk before it takes the place of an earlier one.

    Raises:
        UserError: When the file cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, {_KEY: json.dumps(metadata)})
    write_atomically(path, data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        UserError: When there is no such file, or it is not one of ours, or truncated.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the model file, {path / 'model.safetensors'}")
    if not path.is_file():
        raise UserError(
            f"there is no model file {path} (skipnet list runs and skipnet list weights show what "
            "there is)"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}): copy or train it again"
        ) from None
    try:
        values = json.loads(metadata[_KEY])
    except (KeyError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} was not written by skipnet: it lacks the metadata")
    return tensors, values
