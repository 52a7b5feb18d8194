"""The portable ONNX file: the names in it, and what it says about itself."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipnet.errors import UserError
from skipnet.routing.cost import Cost

IMAGES, LOGITS, DECISIONS, BATCH = "images", "logits", "decisions", "batch"
FORMAT_VERSION = 1
_KEY = "skipnet"


def set_metadata(proto: Any, values: dict[str, Any]) -> None:
    """Write JSON metadata into an ONNX model."""
    entry = proto.metadata_props.add()
    entry.key, entry.value = _KEY, json.dumps(values)


@dataclass(kw_only=True)
class PortableInfo:
    """What a portable file says about itself.

    Attributes:
        architecture: Name of the network and its gate, classes and channels.
        classes: Names of the classes.
        mean: Mean of each channel, for pixels in 0 to 1.
        std: Standard deviation of each channel, for pixels in 0 to 1.
        image_size: (height, width) of the images.
        results: Accuracy and computation as measured when the model was saved.
        cost: Multiply-adds of the network's parts.
    """

    architecture: dict[str, Any]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    results: dict[str, Any]
    cost: Cost


def metadata_of(properties: dict[str, str], path: Path) -> PortableInfo:
    """Read the metadata of an ONNX model.

    Raises:
        UserError: When they are not ours.
    """
    try:
        values = json.loads(properties[_KEY])
        version = values["format_version"]
    except (KeyError, ValueError, TypeError):
        raise UserError(
            f"{path} was not written by skipnet export: it lacks the metadata"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this skipnet reads {FORMAT_VERSION}")
    try:
        cost = values["cost"]
        height, width = values["image_size"]
        return PortableInfo(
            architecture=dict(values["architecture"]),
            classes=tuple(values["classes"]),
            mean=tuple(map(float, values["mean"])),
            std=tuple(map(float, values["std"])),
            image_size=(int(height), int(width)),
            results=dict(values["results"]),
            cost=Cost(
                int(cost["stem"]),
                tuple(map(int, cost["blocks"])),
                tuple(map(int, cost["shortcuts"])),
                tuple(map(int, cost["gates"])),
                int(cost["head"]),
            ),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: its metadata is damaged ({error!r})") from None


def onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        UserError: When it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("ONNX Runtime is not installed: pip install 'skipnet[onnx]'") from None
    return onnxruntime


@contextmanager
def errors_as(make: Callable[[str], Exception]) -> Iterator[None]:
    """Turn what ONNX Runtime raises into another error, made of its first line."""
    try:
        yield
    except Exception as error:  # Its errors have no common class of their own.
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise make(first_line(error)) from None


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def open_session(
    model: str | bytes,
    *,
    threads: int | None,
    providers: list[str],
    spin: bool = True,
    custom_ops: Path | None = None,
    **settings: Any,
) -> Any:
    """Open an ONNX Runtime session over a file or a model in memory.

    Args:
        model: Path, or the model itself.
        threads: Threads of one call; all cores if None.
        providers: Execution providers.
        spin: Let its threads wait for the next call by spinning.
        custom_ops: Library of further operators.
        **settings: Further fields of its `SessionOptions`.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if custom_ops is not None:
        options.register_custom_ops_library(str(custom_ops))
    for name, value in settings.items():
        setattr(options, name, value)
    return ort.InferenceSession(model, options, providers=providers)


def load_onnx(path: Path) -> tuple[bytes, PortableInfo]:
    """Read a portable file: the model's bytes, and what it says about itself.

    Raises:
        UserError: When there is no such file, or it was not written by `skipnet export`.
    """
    onnxruntime()  # The extra brings both.
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise UserError(f"there is no ONNX file {path}: make one with skipnet export")
    data = path.read_bytes()
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise UserError(f"{path} is truncated or not an ONNX file: export it again") from None
    info = metadata_of({entry.key: entry.value for entry in proto.metadata_props}, path)
    wrong = _contradiction(info, proto.graph)
    if wrong:
        raise UserError(f"{path}: its metadata and its graph contradict each other: {wrong}")
    return data, info


def _contradiction(info: PortableInfo, graph: Any) -> str | None:
    """What in the metadata cannot be true of the graph."""
    channels, gate = info.architecture.get("in_channels"), info.architecture.get("gate", "")
    num_gates = len(info.cost.gates)
    names = {tensor.name for tensor in graph.initializer}
    gates = {"rnn": "gate1/W", "ff1": "gate1/threshold", "ff2": "gate1/threshold"}
    if gate not in (None, *gates) or (gate is None) != (num_gates == 0):
        return f"gate {gate!r} with {num_gates} gates"
    if gate is not None and (gates[gate] not in names or (gate != "rnn" and "gate1/W" in names)):
        return f"it has no gates of kind {gate}"
    if num_gates != sum(name.endswith("/threshold") for name in names):
        return f"the cost of {num_gates} gates"
    if len(info.cost.shortcuts) != len(info.cost.blocks):
        return "shortcuts and blocks differ in number"
    if num_gates not in (0, len(info.cost.blocks) - 1):
        return f"{num_gates} gates for {len(info.cost.blocks)} blocks"
    inputs = {value.name: _shape(value) for value in graph.input}
    outputs = {value.name: _shape(value) for value in graph.output}
    if inputs != {IMAGES: [BATCH, channels, *info.image_size]}:
        return f"its input is {inputs}"
    expected = {LOGITS: [BATCH, len(info.classes)]}
    if num_gates:
        expected[DECISIONS] = [BATCH, num_gates]
    if outputs != expected:
        return f"its outputs are {outputs}"
    produced = {name for node in graph.node for name in node.output}
    if not produced.issuperset(outputs):
        return f"nothing computes {', '.join(sorted(set(outputs) - produced))}"
    if not len(info.mean) == len(info.std) == channels:
        return f"mean and std of {len(info.mean)} and {len(info.std)} channels, not {channels}"
    if not all(math.isfinite(value) for value in info.mean + info.std) or min(info.std) <= 0:
        return "mean or std is no possible value"
    return None


def _shape(value: Any) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
