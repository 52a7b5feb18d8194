"""What a file or a network could do to get wrong numbers, or another's memory."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import demand_compiler, info_of
from onnx import helper, numpy_helper
from torch import Tensor, nn

import skipnet
from skipnet import InferenceSession, RNNGate, SkipNet, UserError
from skipnet.execution import export as export_module
from skipnet.execution.optimized import _describe_attribute
from skipnet.models.registry import Architecture

SIZE = (16, 16)
INFO = info_of(Architecture(name="own", gate="rnn", num_classes=4), SIZE)


class Scaled(nn.Module):
    """Blocks that differ in what is no weight."""

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self._scale = scale
        self.register_buffer("offset", torch.tensor(offset), persistent=False)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.relu(self.conv(x) * self._scale + self.offset + shortcut)


class Twice(nn.Module):
    """One convolution, two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        for norm, mean in ((self.bn1, 0.5), (self.bn2, -0.5)):
            nn.init.constant_(norm.running_mean, mean)  # type: ignore[arg-type]
            nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv(x)))
        return torch.relu(self.bn2(self.conv(x)) + shortcut)


def network_of(*blocks: nn.Module) -> SkipNet:
    torch.manual_seed(0)
    return SkipNet(
        stem=nn.Conv2d(3, 16, 3, padding=1),
        blocks=blocks,
        shortcuts=[nn.Identity() for _ in blocks],
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
        gate=RNNGate([16] * (len(blocks) - 1)),
    ).eval()


def images_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_a_convolution_called_twice_is_not_folded() -> None:
    network = network_of(Twice(), Twice(), Twice())
    with torch.inference_mode():
        expected, _ = network(images_of(2))
        actual, _ = network.fuse()(images_of(2))
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("default:.*not optimised")
def test_blocks_that_differ_in_private_values_are_exported_each(tmp_path: Path) -> None:
    network = network_of(Scaled(1.0, 0.0), Scaled(0.3, 0.0), Scaled(1.0, 2.0))
    error = skipnet.export(network, tmp_path / "model.onnx", INFO)
    assert error < 1e-4
    with torch.inference_mode():
        expected, routing = network(images_of(3))
    assert routing.executed.all()
    logits, _ = InferenceSession(tmp_path / "model.onnx").run(images_of(3).numpy())
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


def test_a_wrong_export_is_refused_and_the_earlier_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    right = export_module.to_onnx

    def wrong(model: SkipNet, info: skipnet.ModelInfo) -> onnx.ModelProto:
        proto = right(model, info)
        for tensor in proto.graph.initializer:
            if tensor.name == "stem/bias":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1))
                tensor.name = "stem/bias"
        return proto

    monkeypatch.setattr(export_module, "to_onnx", wrong)
    with pytest.raises(UserError, match="would not compute what the network does"):
        skipnet.export(network_of(Scaled(1, 0), Scaled(1, 0)), path, INFO)
    assert path.read_bytes() == b"earlier"


def test_an_operator_whose_output_an_image_sizes_is_not_optimised(tmp_path: Path) -> None:
    """The engine's memory is laid out before it sees an image."""
    demand_compiler()
    path = tmp_path / "model.onnx"
    skipnet.export(network_of(Scaled(1, 0), Scaled(1, 0)), path, INFO)
    proto = onnx.load(path)
    at = next(i for i, node in enumerate(proto.graph.node) if "x0" in node.output)
    proto.graph.node[at].output[0] = "x0/before"
    # As many numbers as the largest feature says, summed up: none on zeros, too many on an image.
    values = {"test/zero": 0.0, "test/one": 1.0, "test/many": [1e6]}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in values.items()
    )
    added = [
        helper.make_node("ReduceMax", ["x0/before"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "test/many"], ["wide"]),
        helper.make_node("Squeeze", ["wide"], ["end"]),
        helper.make_node("Range", ["test/zero", "end", "test/one"], ["range"]),
        helper.make_node("ReduceSum", ["range"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "test/zero"], ["nothing"]),
        helper.make_node("Add", ["x0/before", "nothing"], ["x0"]),
    ]
    for node in reversed(added):
        node.name = f"stem/{node.output[0]}"
        proto.graph.node.insert(at + 1, node)
    onnx.save(proto, path)
    with pytest.warns(UserWarning, match="Range is not among the operators"):
        session = InferenceSession(path)
    assert session.engine == "portable"


def test_numbers_reach_the_engine_whatever_the_locale() -> None:
    """As integers of their bits: C reads 0.4 as 0 where the comma is decimal."""
    text = _describe_attribute(helper.make_attribute("alpha", 0.4))
    assert text == f"alpha f {np.float32(0.4).view(np.int32)}"
    many = _describe_attribute(helper.make_attribute("params", [0.5, -2.0]))
    assert many.split()[:2] == ["params", "F"]
    bits = np.array(many.split()[2:], np.int32)
    assert bits.view(np.float32).tolist() == [0.5, -2.0]
    assert _describe_attribute(helper.make_attribute("pads", [1, 2])) == "pads I 1 2"


def test_an_earlier_export_s_kept_graph_goes(tmp_path: Path) -> None:
    demand_compiler()
    path = tmp_path / "model.onnx"
    (tmp_path / "other.optimized.onnx").write_bytes(b"not ours")
    for scale in (1.0, 0.5):
        skipnet.export(network_of(Scaled(scale, 0), Scaled(1, 0)), path, INFO)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            InferenceSession(path)
    assert len(list(tmp_path.glob("*.optimized.onnx"))) == 2
