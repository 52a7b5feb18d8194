"""What the tests of the engines share: networks whose gates disagree, exported, and ways to run."""

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import skipnet
from skipnet import Fixed, InferenceSession, ModelInfo, Random, SkipNet
from skipnet.execution import native, optimized
from skipnet.execution.portable import DECISIONS, IMAGES, LOGITS, load_onnx
from skipnet.models.registry import Architecture

GATES = ("rnn", "ff1", "ff2")
SIZES = {"32 px": (32, 32), "odd": (17, 23)}
ENGINES = ("compacted", "fused", "portable", "optimized")
TORCH = ("masked", "compacted", "fused")
LARGEST = np.finfo(np.float32).max

Answers = tuple[np.ndarray, np.ndarray]


def images_of(batch: int, channels: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Noise, of a different contrast and brightness an image."""
    random = np.random.default_rng(seed)
    contrast, brightness = random.normal(size=(2, batch, 1, 1, 1))
    noise = random.normal(size=(batch, channels, *size))
    return (np.exp(contrast / 2) * noise + brightness).astype(np.float32)


def made_lively(network: SkipNet, channels: int, size: tuple[int, int]) -> SkipNet:
    """Settle the batch norms, and let the gates disagree about images."""
    images = [torch.from_numpy(images_of(8, channels, size, seed)) for seed in range(10, 14)]
    decide = Random(0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for batch in images[:3]:
            network.train()(batch, decide=decide)
        network.eval()
        if hasattr(network.gate, "embed"):
            for embed in network.gate.embed:
                embed.weight *= 4
        _, routing = network(images[3], decide=decide)
        if hasattr(network.gate, "embed"):
            network.gate.project.bias -= routing.logits.mean()
        elif network.gate is not None:
            for unit, logits in zip(network.gate.units, routing.logits.T, strict=True):
                unit.linear.bias[1] -= logits.mean()
    return network


@dataclasses.dataclass
class Exported:
    """A network and its portable file."""

    network: SkipNet
    info: ModelInfo
    path: Path

    def images(self, batch: int, seed: int = 0) -> np.ndarray:
        return images_of(batch, self.info.architecture.in_channels, self.info.image_size, seed)

    @functools.cached_property
    def fused(self) -> SkipNet:
        return self.network.fuse()

    @functools.cached_property
    def sessions(self) -> dict[str, InferenceSession]:
        return {}

    def session(self, engine: str) -> InferenceSession:
        if engine == "optimized":
            demand_compiler()
        if engine not in self.sessions:
            session = InferenceSession(self.path, threads=1, optimize=engine == "optimized")
            assert session.engine == engine
            self.sessions[engine] = session
        return self.sessions[engine]

    @functools.cached_property
    def portable_under_force(self) -> Any:
        """The portable file, with the thresholds as further inputs."""
        proto = onnx.load(self.path)
        names = [f"gate{i}/threshold" for i in range(1, self.network.num_gates + 1)]
        kept = [tensor for tensor in proto.graph.initializer if tensor.name not in names]
        assert len(kept) == len(proto.graph.initializer) - len(names)
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        for name in names:
            proto.graph.input.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 1])
            )
        return onnxruntime.InferenceSession(
            proto.SerializeToString(), single_thread(), providers=["CPUExecutionProvider"]
        )

    @functools.cached_property
    def optimized_under_force(self) -> Any:
        demand_compiler()
        return optimized.build(self.path, *load_onnx(self.path)).open(threads=1)

    def run(self, engine: str, images: np.ndarray, mask: np.ndarray | None = None) -> Answers:
        """Class logits and decisions: the gates' own, or those of a mask [batch, gates]."""
        if engine in TORCH:
            network = self.fused if engine == "fused" else self.network
            with torch.inference_mode():
                logits, routing = network(
                    torch.from_numpy(images),
                    decide="threshold" if mask is None else Fixed(torch.from_numpy(mask)),
                    execute="masked" if engine == "masked" else "compacted",
                )
            return logits.numpy(), routing.executed.numpy()
        if mask is None:
            logits, routing = self.session(engine).run(images)
            return logits, routing.decisions
        thresholds = np.where(mask, -LARGEST, LARGEST).astype(np.float32)
        if engine == "portable":
            feed = {IMAGES: images}
            for i in range(mask.shape[1]):
                feed[f"gate{i + 1}/threshold"] = thresholds[:, i : i + 1]
            return tuple(self.portable_under_force.run([LOGITS, DECISIONS], feed))
        rows = [
            self.optimized_under_force.run(
                [LOGITS, DECISIONS],
                {
                    IMAGES: images[row : row + 1],
                    optimized.THRESHOLDS: thresholds[row : row + 1],
                },
            )
            for row in range(len(images))
        ]
        logits, decisions = zip(*rows, strict=True)
        return np.concatenate(logits), np.concatenate(decisions)

    def gate_logits(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.network(torch.from_numpy(images))[1].logits.numpy()

    def certain(self, images: np.ndarray) -> np.ndarray:
        """The rows of which no gate is within 1e-5 of its threshold; nearly all, or it fails."""
        rows = (np.abs(self.gate_logits(images)) > 1e-5).all(axis=1)
        assert rows.sum() >= 0.9 * len(rows)
        return rows


def assert_same(actual: Answers, expected: Answers, rows: Any = ...) -> None:
    """Decisions equal, logits to 1e-4."""
    np.testing.assert_array_equal(actual[1][rows], expected[1][rows])
    assert actual[0].dtype == np.float32 and actual[1].dtype == bool
    np.testing.assert_allclose(actual[0][rows], expected[0][rows], rtol=1e-4, atol=1e-4)


def export_to(folder: Path, network: SkipNet, info: ModelInfo) -> Exported:
    path = folder / "model.onnx"
    skipnet.export(network, path, info)
    return Exported(network, info, path)


def info_of(architecture: Architecture, size: tuple[int, int]) -> ModelInfo:
    return ModelInfo(
        architecture=architecture,
        classes=tuple(f"class {i}" for i in range(architecture.num_classes)),
        mean=tuple(np.linspace(0.4, 0.6, architecture.in_channels).tolist()),
        std=tuple(np.linspace(0.2, 0.3, architecture.in_channels).tolist()),
        image_size=size,
    )


def lively(architecture: Architecture, size: tuple[int, int]) -> SkipNet:
    torch.manual_seed(0)
    return made_lively(architecture.build(), architecture.in_channels, size)


def demand_compiler() -> None:
    try:
        native.library()
    except native.DoesNotFit as reason:
        pytest.skip(str(reason))


def single_thread() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def edited(data: bytes, edit: Callable[[onnx.ModelProto], object]) -> bytes:
    """A portable file with something changed."""
    proto = onnx.ModelProto.FromString(data)
    edit(proto)
    return proto.SerializeToString()


def edit_metadata(proto: onnx.ModelProto, edit: Callable[[dict[str, Any]], object]) -> None:
    (entry,) = (entry for entry in proto.metadata_props if entry.key == "skipnet")
    values = json.loads(entry.value)
    edit(values)
    entry.value = json.dumps(values)


def set_weight(proto: onnx.ModelProto, name: str, change: Callable[[np.ndarray], Any]) -> None:
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    value = np.asarray(change(numpy_helper.to_array(tensor)), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def resized(exported: Exported, size: tuple[int, int], path: Path) -> Exported:
    """The same network and weights for images of another size; nothing in the file depends on it.

    But where maps become too small for FFGate-I to pool: that is decided when it is exported.
    """
    network = copy.deepcopy(exported.network)
    cost = network.cost(exported.info.architecture.in_channels, *size)

    def edit(proto: onnx.ModelProto) -> None:
        for dim, length in zip(
            proto.graph.input[0].type.tensor_type.shape.dim[2:], size, strict=True
        ):
            dim.dim_value = length
        change = {"image_size": size, "cost": cost._asdict()}
        edit_metadata(proto, lambda values: values.update(change))

    path.write_bytes(edited(exported.path.read_bytes(), edit))
    info = dataclasses.replace(exported.info, image_size=size)
    return Exported(network, info, path)


def opened_with_warning(path: Path, match: str) -> InferenceSession:
    """A session that says why it is not optimised."""
    with pytest.warns(UserWarning, match=match) as caught:
        session = InferenceSession(path, threads=1)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    assert session.engine == "portable"
    return session


def opened_either_way(path: Path, *, threads: int = 1, **options: Any) -> InferenceSession:
    """A session, optimised or not; that it says so is of no interest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*is run as it is, not optimised")
        return InferenceSession(path, threads=threads, **options)
