"""The checkpoints of the original code (github.com/ucbdrive/skipnet), read as model files are.

`.pth.tar` files: pickles of `{"state_dict", "arch", "iter", "best_prec1"}`, read without running
anything that they name. What is in them is told from names and shapes:

    conv1, bn1, fc                                    stem and head
    group{g}_layer{i}.{conv,bn}{1,2[,3]}              block i of stage g, which counts from 1
    group{g}_layer{i}.downsample.{0,1}                its projection, once more as group{g}_ds{i}
    group{g}_gate{i}.1, control.{rnn,proj}            recurrent gates
    group{g}_gate{i}.{conv,bn}{1[,2]}, .linear_layer  feed-forward gates

The gate after the last block decides nothing, and is left out.
"""

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipnet.errors import UserError
from skipnet.models.registry import Architecture, list_models
from skipnet.models.weights import ModelInfo, unnamed
from skipnet.routing.gates import GateName
from skipnet.routing.network import SkipNet

DataName = Literal["cifar10", "cifar100", "svhn", "imagenet"]
_SAID = ["arch", "iter", "best_prec1"]


@dataclass(frozen=True)
class _DataSet:
    """What a checkpoint does not say of the images it was trained on.

    Attributes:
        num_classes: Number of classes.
        mean: Of each channel, for pixels in 0 to 1, as the original code has it.
        std: The same.
        image_size: Height and width.
        classes: Names, if they are known here.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 32
    classes: tuple[str, ...] = ()


_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_CIFAR10_CLASSES = tuple(
    "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
)
_DATA_SETS: dict[DataName, _DataSet] = {
    "cifar10": _DataSet(10, _CIFAR_MEAN, _CIFAR_STD, classes=_CIFAR10_CLASSES),
    "cifar100": _DataSet(100, _CIFAR_MEAN, _CIFAR_STD),
    "svhn": _DataSet(
        10, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), classes=tuple("0123456789")
    ),
    "imagenet": _DataSet(1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
}
# Blocks of each stage, and whether they are bottlenecks.
_IMAGENET = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


class Imported(NamedTuple):
    """A checkpoint, read.

    Attributes:
        network: In evaluation mode.
        info: As for a model file; nothing of it was measured here.
        said: What the checkpoint says of itself: arch, iter, best_prec1, where they are there.
    """

    network: SkipNet
    info: ModelInfo
    said: dict[str, Any]


def read_checkpoint(path: str | os.PathLike[str], trained_on: DataName | None = None) -> Imported:
    """Read a checkpoint of the original code.

    Args:
        path: The `.pth.tar` file.
        trained_on: Its data set, which says how images are normalised and what classes are called;
            told from its arch and its number of classes if not given.

    Raises:
        UserError: When it cannot be read, holds code, or is not such a checkpoint: names that are
            missing or left over are listed.
    """
    path = Path(path)
    saved = _unpickle(path)
    tensors = saved.get("state_dict", saved)
    said = {key: _plain(saved[key]) for key in _SAID if key in saved}
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path} holds no state_dict of tensors: it is no checkpoint of a network")
    own = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    try:
        stages, architecture = _architecture(own)
        network = architecture.build()
        network.load_state_dict(_renamed(own, stages, architecture.gate, network))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    name = trained_on or _data_name(architecture, str(said.get("arch", "")))
    return Imported(network.eval(), _info(architecture, name), said)


def _unpickle(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    # Numbers of NumPy's, which a training script may have left beside the tensors.
    multiarray = getattr(np, "_core", None) or np.core
    numbers = [multiarray.multiarray.scalar, np.dtype]
    numbers += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)]
    try:
        # Other protocols than PyTorch's own warn, and are then read or refused like any other.
        with torch.serialization.safe_globals(numbers), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named[1]}" if named else "it is damaged, or holds more than tensors"
        raise UserError(f"{path} is refused: {what}, and nothing in a file is run here") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        why = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path} is truncated, or no checkpoint of PyTorch's ({why[0]})") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds a {type(saved).__name__}, and no checkpoint of a network")
    return saved


def _architecture(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], Architecture]:
    """Which network this is, and the number of blocks in each of its stages."""
    found = {tuple(map(int, m.groups())) for m in map(_LAYER.match, tensors) if m}
    numbers = sorted({stage for stage, _ in found})
    dimensions = {"conv1.weight": 4, "fc.weight": 2}
    missing = [
        name
        for name, number in dimensions.items()
        if name not in tensors or tensors[name].ndim != number
    ]
    if missing or not numbers:
        raise UserError(
            "it has no "
            + (missing or ["group1_layer0"])[0]
            + " and is no network of the original code; its first names are "
            + ", ".join(list(tensors)[:3])
        )
    if len(numbers) > 4 or numbers != list(range(1, len(numbers) + 1)):
        raise UserError(f"its stages are {numbers[:5]}, and not the first three or four")
    stages = tuple(sum(stage == number for stage, _ in found) for number in numbers)
    bottleneck = "group1_layer0.conv3.weight" in tensors
    depth = 6 * stages[0] + 2
    name = f"cifar_resnet{depth}"
    if len(stages) == 4:
        name = f"resnet{_IMAGENET.get((stages, bottleneck), 0)}"
    if name not in list_models() or (len(stages) == 3 and len(set(stages)) > 1):
        raise UserError(
            f"its stages have {', '.join(map(str, stages))} blocks, which no network of the "
            "original code has"
        )
    return stages, Architecture(
        name=name,
        gate=_gate(tensors),
        num_classes=len(tensors["fc.weight"]),
        in_channels=tensors["conv1.weight"].shape[1],
    )


def _gate(tensors: Mapping[str, Tensor]) -> GateName | None:
    if "control.proj.weight" in tensors:
        return "rnn"
    if "group1_gate0.conv2.weight" in tensors:
        return "ff1"
    return "ff2" if "group1_gate0.conv1.weight" in tensors else None


_LAYER = re.compile(r"group(\d+)_layer(\d+)\.")


def _renamed(
    theirs: Mapping[str, Tensor], stages: tuple[int, ...], gate: GateName | None, network: SkipNet
) -> dict[str, Tensor]:
    """The tensors under our names.

    Raises:
        UserError: With the names that are missing, left over or of another shape.
    """
    left = dict(theirs)
    wrong: list[str] = []
    renamed: dict[str, Tensor] = {}
    own = network.state_dict()
    head = next(name.removesuffix(".weight") for name in own if name.startswith("head"))
    for ours, name in _names(stages, gate, head):
        for key in (key for key in own if key.startswith(f"{ours}.") or key == ours):
            source = name + key.removeprefix(ours)
            tensor = left.pop(source, None)
            if tensor is None and source.endswith("num_batches_tracked"):  # Older than these.
                tensor = own[key]
            if tensor is None:
                wrong.append(f"{source} is missing")
            elif tensor.numel() != own[key].numel():
                wrong.append(f"{source} is {list(tensor.shape)}, not {list(own[key].shape)}")
            else:  # A linear of theirs may be a convolution of one pixel.
                renamed[key] = tensor.reshape(own[key].shape)
    last = f"group{len(stages)}_gate{stages[-1] - 1}."
    for name, tensor in left.items():
        twin = re.sub(r"_ds(\d+)\.", r"_layer\1.downsample.", name)
        if twin == name or twin not in theirs:
            if not name.startswith(last):
                wrong.append(f"{name} is left over")
        elif not torch.equal(theirs[twin], tensor):
            wrong.append(f"{name} is not {twin}, which it is to share its weights with")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"not a {len(stages)}-stage network: {'; '.join(wrong[:5])}{more}")
    return renamed


def _names(stages: tuple[int, ...], gate: GateName | None, head: str) -> Iterator[tuple[str, str]]:
    """Our name of every layer, or group of layers, and theirs."""
    yield "stem.0", "conv1"
    yield "stem.1", "bn1"
    yield head, "fc"
    if gate == "rnn":
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            yield f"gate.lstm.{kind}", f"control.rnn.{kind}_l0"
        yield "gate.project", "control.proj"
    places = [(g + 1, i) for g, count in enumerate(stages) for i in range(count)]
    for index, (g, i) in enumerate(places):
        yield f"blocks.{index}", f"group{g}_layer{i}"
        yield f"shortcuts.{index}", f"group{g}_layer{i}.downsample"
        if index == len(places) - 1:
            break
        theirs = f"group{g}_gate{i}"
        if gate == "rnn":
            yield f"gate.embed.{index}", f"{theirs}.1"
        elif gate is not None:
            layers = ("conv1", "bn1", "", "conv2", "bn2")[: 5 if gate == "ff1" else 2]
            for number, layer in enumerate(layers):
                if layer:
                    yield f"gate.units.{index}.layers.{number}", f"{theirs}.{layer}"
            yield f"gate.units.{index}.linear", f"{theirs}.linear_layer"


def _data_name(architecture: Architecture, arch: str) -> DataName:
    for name in _DATA_SETS:
        if re.match(rf"{name}(?!\d)", arch):
            return name
    for name, data in _DATA_SETS.items():
        if data.num_classes == architecture.num_classes:
            return name
    raise UserError(
        f"a network of {architecture.num_classes} classes is none of the original code's: say with "
        f"--trained-on which of {', '.join(_DATA_SETS)} it is nearest to"
    )


def _info(architecture: Architecture, name: DataName) -> ModelInfo:
    data = _DATA_SETS[name]
    count = architecture.num_classes
    classes = data.classes if len(data.classes) == count else unnamed(count)
    return ModelInfo(
        architecture=architecture,
        classes=classes,
        mean=data.mean,
        std=data.std,
        image_size=(data.image_size, data.image_size),
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor | np.generic) and value.ndim == 0 else value
