"""Checkpoints of the original code, against a network written down here as that code has it.

Names, layers and their order are the published description's: every block computes, with a
projection of its own, and what it is masked with decides; the shared projection of a stage's first
block exists twice; the last gate exists and is not used; softmax index 1 is execution.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import skipnet
from skipnet import UserError
from skipnet.cli import main
from skipnet.models.original import read_checkpoint

STAGES = {"cifar_resnet20": (3, 3, 3), "resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Layer(nn.Module):
    """BasicBlock or Bottleneck."""

    def __init__(self, inputs: int, planes: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * planes if bottleneck else planes
        if bottleneck:
            self.conv1, self.conv2 = conv(inputs, planes, 1), conv(planes, planes, 3, stride)
            self.conv3, self.bn3 = conv(planes, outputs, 1), nn.BatchNorm2d(outputs)
        else:
            self.conv1, self.conv2 = conv(inputs, planes, 3, stride), conv(planes, planes, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if hasattr(self, "conv3"):
            x = self.bn3(self.conv3(functional.relu(x)))
        return functional.relu(x + residual)


class FeedForward(nn.Module):
    def __init__(self, kind: str, pool: int, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.conv1 = conv(channels, channels, 3, 1 if kind == "ff1" else 2)
        self.bn1 = nn.BatchNorm2d(channels)
        if kind == "ff1":
            self.conv2, self.bn2 = conv(channels, channels, 3, 2), nn.BatchNorm2d(channels)
            pool = pool // 2
        self.average = nn.AvgPool2d((pool + 1) // 2)
        self.linear_layer = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "ff1":
            x = functional.max_pool2d(x, 2)
        x = functional.relu(self.bn1(self.conv1(x)))
        if self.kind == "ff1":
            x = functional.relu(self.bn2(self.conv2(x)))
        return torch.softmax(self.linear_layer(self.average(x)).flatten(1), dim=1)[:, 1]


class Control(nn.Module):
    def __init__(self, imagenet: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(10, 10)
        self.proj = nn.Conv2d(10, 1, 1) if imagenet else nn.Linear(10, 1)


class Original(nn.Module):
    def __init__(self, name: str, gate: str, num_classes: int) -> None:
        super().__init__()
        self.stages, self.kind = STAGES[name], gate
        imagenet = len(self.stages) == 4
        width, size = (64, 16) if imagenet else (16, 32)
        self.conv1 = nn.Conv2d(
            3, width, 7 if imagenet else 3, 2 if imagenet else 1, 3 if imagenet else 1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.imagenet, bottleneck = imagenet, name == "resnet50"
        inputs = width
        for g, count in enumerate(self.stages, start=1):
            planes = width * 2 ** (g - 1)
            for i in range(count):
                stride = 2 if i == 0 and g > 1 else 1
                size //= stride
                layer = Layer(inputs, planes, stride, bottleneck)
                inputs = 4 * planes if bottleneck else planes
                setattr(self, f"group{g}_layer{i}", layer)
                setattr(self, f"group{g}_ds{i}", layer.downsample)
                setattr(self, f"group{g}_gate{i}", self.gate(inputs, size))
        if gate == "rnn":
            self.control = Control(imagenet)
        self.fc = nn.Linear(inputs, num_classes)

    def gate(self, channels: int, size: int) -> nn.Module:
        if self.kind == "rnn":
            return nn.Sequential(nn.AvgPool2d(size), nn.Conv2d(channels, 10, 1))
        return FeedForward(self.kind, size, channels)

    def decide(self, g: int, i: int, x: Tensor) -> Tensor:
        out = getattr(self, f"group{g}_gate{i}")(x)
        if self.kind != "rnn":
            return out
        hidden, self.state = self.control.rnn(out.view(1, len(x), -1), self.state)
        last = hidden.squeeze(0)
        last = last[:, :, None, None] if self.imagenet else last
        return torch.sigmoid(self.control.proj(last)).flatten()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.state: Any = None
        x = functional.relu(self.bn1(self.conv1(x)))
        if self.imagenet:
            x = functional.max_pool2d(x, 3, 2, 1)
        x = self.group1_layer0(x)
        probability = self.decide(1, 0, x)
        probabilities, masks = [], []
        for g, count in enumerate(self.stages, start=1):
            for i in range(int(g == 1), count):
                mask = (probability > 0.5).float()
                probabilities.append(probability)
                masks.append(mask)
                downsample = getattr(self, f"group{g}_ds{i}")
                previous = x if downsample is None else downsample(x)
                g_i = mask[:, None, None, None]
                x = g_i * getattr(self, f"group{g}_layer{i}")(x) + (1 - g_i) * previous
                if not (g == len(self.stages) and i == count - 1):
                    probability = self.decide(g, i, x)
        x = self.fc(x.mean(dim=(2, 3)))
        return x, torch.stack(probabilities, 1), torch.stack(masks, 1)


def original(name: str, gate: str, num_classes: int, seed: int = 0) -> Original:
    """With random weights, under which gates decide either way."""
    torch.manual_seed(seed)
    network = Original(name, gate, num_classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    network.eval()
    if gate == "rnn":
        with torch.no_grad():
            network.control.proj.weight.mul_(10)
            for _ in range(3):
                probabilities = network(images_for(network))[1]
                network.control.proj.bias -= torch.logit(probabilities).median()
    return network


def images_for(network: Original) -> Tensor:
    size = (64, 64) if network.imagenet else (32, 32)
    return torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(1))


def checkpoint(network: nn.Module, path: Path, **changes: Any) -> Path:
    """As the original code saves it: of DataParallel, and of a PyTorch that counted no batches."""
    tensors = {
        f"module.{name}": tensor
        for name, tensor in network.state_dict().items()
        if "num_batches" not in name
    }
    torch.save({"iter": 64000, "state_dict": tensors, "best_prec1": 92.5} | changes, path)
    return path


CASES = [
    ("cifar_resnet20", "rnn", "cifar10_rnn_gate_20", 10),
    ("cifar_resnet20", "ff1", "cifar100_feedforward_20", 100),
    ("cifar_resnet20", "ff2", "svhn_feedforward_20", 10),
    ("resnet18", "rnn", "resnet18_rnn", 1000),
    ("resnet50", "rnn", "resnet50_rnn", 1000),
]


@pytest.mark.parametrize(("name", "gate", "arch", "num_classes"), CASES)
def test_logits_probabilities_and_decisions(
    name: str, gate: str, arch: str, num_classes: int, tmp_path: Path
) -> None:
    theirs = original(name, gate, num_classes)
    network, info, said = read_checkpoint(checkpoint(theirs, tmp_path / "c.pth.tar", arch=arch))
    assert (info.architecture.name, info.architecture.gate) == (name, gate)
    assert said == {"arch": arch, "iter": 64000, "best_prec1": 92.5}
    assert len(info.classes) == num_classes
    images = images_for(theirs)
    with torch.no_grad():
        expected, probabilities, masks = theirs(images)
        logits, routing = network(images)
    torch.testing.assert_close(torch.sigmoid(routing.logits), probabilities, atol=1e-5, rtol=1e-5)
    assert torch.equal(routing.decisions, masks)
    assert 0 < masks.mean() < 1, "gates decide either way"
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arch", "num_classes", "mean"),
    [
        ("cifar10_rnn_gate_38", 10, 0.4914),
        ("cifar100_rnn_gate_38", 100, 0.4914),
        ("svhn_rnn_gate_38", 10, 0.4377),
        ("", 100, 0.4914),
        ("resnet34_rnn", 1000, 0.485),
    ],
)
def test_what_it_was_trained_on(tmp_path: Path, arch: str, num_classes: int, mean: float) -> None:
    name = "resnet18" if num_classes == 1000 else "cifar_resnet20"
    file = checkpoint(original(name, "rnn", num_classes), tmp_path / "c.pth.tar", arch=arch)
    assert read_checkpoint(file).info.mean[0] == mean
    assert read_checkpoint(file, "svhn").info.mean[0] == 0.4377


def test_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = original("cifar_resnet20", "rnn", 10)
    file = checkpoint(
        theirs, tmp_path / "c.pth.tar", arch="cifar10_rnn", best_prec1=torch.tensor(92.5)
    )
    out = tmp_path / "out.safetensors"
    assert main(["import", str(file), str(out)]) == 0
    said = capsys.readouterr().out
    assert "cifar_resnet20, gate rnn, 10 classes" in said
    assert "arch cifar10_rnn, iter 64000, best_prec1 92.5" in said
    _, info = skipnet.load(out)
    assert info.classes[3] == "cat" and info.results == {}
    assert main(["info", str(out)]) == 0
    assert main(["import", str(file), str(tmp_path / "out.onnx")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_numbers_of_numpy(tmp_path: Path) -> None:
    file = checkpoint(
        original("cifar_resnet20", "rnn", 10), tmp_path / "c.pth.tar", best_prec1=np.float64(92.5)
    )
    assert read_checkpoint(file).said["best_prec1"] == 92.5


def test_a_bare_state_dict(tmp_path: Path) -> None:
    torch.save(original("cifar_resnet20", "ff1", 10).state_dict(), tmp_path / "c.pth")
    assert read_checkpoint(tmp_path / "c.pth").said == {}


class Opens:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


class TestRefused:
    def test_code(self, tmp_path: Path) -> None:
        trap = tmp_path / "trap"
        file = tmp_path / "c.pth.tar"
        network = original("cifar_resnet20", "rnn", 10)
        checkpoint(network, file, optimizer=Opens(trap))
        with pytest.raises(UserError, match=r"is refused: it names .*open"):
            read_checkpoint(file)
        for protocol in (2, 4):
            file.write_bytes(pickle.dumps({"state_dict": Opens(trap)}, protocol=protocol))
            with pytest.raises(UserError, match=r"is refused|no checkpoint"):
                read_checkpoint(file)
        assert not trap.exists()

    def test_names(self, tmp_path: Path) -> None:
        network = original("cifar_resnet20", "rnn", 10)
        tensors = network.state_dict()
        file = tmp_path / "c.pth.tar"
        for change, message in [
            ({"group2_layer1.conv1.weight": None}, "group2_layer1.conv1.weight is missing"),
            ({"group9": torch.zeros(1)}, "group9 is left over"),
            ({"group2_layer1.bn1.bias": torch.zeros(3)}, r"group2_layer1.bn1.bias is \[3\], not"),
            ({"group2_ds0.0.weight": torch.zeros(1)}, "group2_ds0.0.weight is not group2_layer0"),
            ({"conv1.weight": None}, "it has no conv1.weight and is no network of the original"),
            ({"conv1.weight": torch.zeros(3)}, "it has no conv1.weight and is no network of the"),
            ({"fc.weight": torch.tensor(0.0)}, "it has no fc.weight and is no network of the"),
            ({name: None for name in tensors if name.startswith("group")}, "no group1_layer0"),
            ({"group3_layer2.conv1.weight": None, "group3_layer2.conv2.weight": None}, "missing"),
            ({"group900000000_layer0.conv1.weight": torch.zeros(1)}, "not the first three or four"),
            ({3: torch.zeros(1)}, "no state_dict of tensors"),
            ({"group1_layer3.conv1.weight": torch.zeros(1)}, "its stages have 4, 3, 3 blocks"),
        ]:
            changed: dict[Any, Any] = {**tensors, **change}
            torch.save({k: v for k, v in changed.items() if v is not None}, file)
            with pytest.raises(UserError, match=message):
                read_checkpoint(file)

    def test_classes_of_none(self, tmp_path: Path) -> None:
        file = checkpoint(original("cifar_resnet20", "rnn", 7), tmp_path / "c.pth.tar")
        with pytest.raises(
            UserError, match="7 classes is none of the original code's: say with --trained"
        ):
            read_checkpoint(file)
        assert read_checkpoint(file, "cifar10").info.classes[:2] == ("class 0", "class 1")

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        file = tmp_path / "c.pth.tar"
        with pytest.raises(UserError, match="there is no checkpoint"):
            read_checkpoint(file)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data.pkl", b"")
        for content in (b"", b"PK", b"hello", file.read_bytes(), self.half(tmp_path)):
            file.write_bytes(content)
            with pytest.raises(UserError, match=r"refused|truncated"):
                read_checkpoint(file)
        for value, message in [([1], "holds a list"), ({"state_dict": 3}, "no state_dict")]:
            torch.save(value, file)
            with pytest.raises(UserError, match=message):
                read_checkpoint(file)
        torch.save({}, file)
        with pytest.raises(UserError, match=r"it has no conv1.weight"):
            read_checkpoint(file)

    @staticmethod
    def half(folder: Path) -> bytes:
        whole = io.BytesIO()
        torch.save(original("cifar_resnet20", "rnn", 10).state_dict(), whole)
        return whole.getvalue()[: len(whole.getvalue()) // 2]
