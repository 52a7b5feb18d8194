"""What the tests of training, commands and recipes share: tiny networks, data, and processes."""

import errno
import functools
import importlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from skipnet import SkipNet, TrainConfig, register
from skipnet.data.sources import DataConfig
from skipnet.models import registry
from skipnet.models.resnet_cifar import cifar_resnet
from skipnet.routing.gates import GATES, GateName
from skipnet.training import train as train_module
from skipnet.training.config import (
    HybridConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    SupervisedConfig,
)

STAGES = ("dense", "sp", "hrl")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
CIFAR10_CLASSES += ("truck",)


# Networks


class Plain(nn.Module):
    """A residual block without batch norm, so that rows of a batch do not see each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.relu(0.5 * self.conv(x) + shortcut)


def register_tiny_networks() -> None:
    """Register tiny_plain (4 blocks, no batch norm) and tiny_resnet (6 blocks, batch norm)."""

    def tiny_plain(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
        """A test's."""
        return SkipNet(
            stem=nn.Conv2d(in_channels, 6, 3, padding=1),
            blocks=[Plain(6) for _ in range(4)],
            shortcuts=[nn.Identity() for _ in range(4)],
            head=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes)),
            gate=None if gate is None else GATES[gate]([6] * 3),
        )

    def tiny_resnet(gate: GateName | None, num_classes: int, in_channels: int) -> SkipNet:
        """A test's."""
        options = {"gate": gate, "num_classes": num_classes, "in_channels": in_channels}
        return cifar_resnet(14, widths=(4, 8, 8), **options)

    register(tiny_plain)
    register(tiny_resnet)


@pytest.fixture(autouse=True)
def quick_and_private(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Tiny networks are registered, timing takes no time, caches are private, one thread."""
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    monkeypatch.setattr(registry, "_DEFAULTS", dict(registry._DEFAULTS))
    register_tiny_networks()
    quick = functools.partial(train_module.throughput, seconds=0)
    monkeypatch.setattr(train_module, "throughput", quick)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of tiny_resnet on the digits, not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    words = flags(tiny_config())
    run_command("train", "digits", *words, "--output", folder / "run", folder=folder)
    return folder / "run"


@pytest.fixture(scope="session")
def cifar_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of tiny_resnet on images in the form of CIFAR-10, not to be changed."""
    folder = tmp_path_factory.mktemp("cifar")
    config = tiny_config(stages=("sp",))
    config.data.name = str(write_cifar10(folder / "data"))
    words = flags(config)
    run_command("train", "digits", *words, "--output", folder / "run", folder=folder)
    return folder / "run"


# Configurations


def tiny_config(**changes: Any) -> TrainConfig:
    """Six steps of each stage of tiny_resnet on the digits; everything that has state is on."""
    optimizer = OptimizerConfig(lr=0.05, gate_lr=0.02, clip_norm=1.0)
    schedule = ScheduleConfig(name="cosine")
    length: dict[str, Any] = {"iterations": 6, "batch_size": 16, "ema_decay": 0.8}
    config = TrainConfig(
        recipe="test",
        model=ModelConfig(name="tiny_resnet", gate="rnn"),
        data=DataConfig(name="digits", padding=1, flip=True),
        dense=StageConfig(**length, optimizer=optimizer, schedule=schedule),
        sp=SupervisedConfig(**length, optimizer=optimizer, schedule=schedule),
        hrl=HybridConfig(
            **length,
            optimizer=optimizer,
            schedule=schedule,
            target_compute=0.6,
            settle=0.5,
            sharpen_to=1.0,
        ),
        log_every=4,
        evaluate_every=None,
        checkpoint_seconds=0,
        accelerator="cpu",
        tensorboard=False,
    )
    return replace(config, **changes)


def flags(config: TrainConfig) -> list[str]:
    """The command line that turns the recipe digits into a configuration, but for its name."""
    recipe = importlib.import_module("skipnet").recipe("digits")
    words: list[str] = []

    def compare(one: Any, other: Any, prefix: str) -> None:
        for name in vars(one):
            a, b = getattr(one, name), getattr(other, name)
            option = f"--{prefix}{name.replace('_', '-')}"
            if hasattr(a, "__dataclass_fields__"):
                compare(a, b, f"{prefix}{name.replace('_', '-')}.")
            elif a != b and isinstance(b, bool):
                words.append(option if b else f"--{prefix}no-{name.replace('_', '-')}")
            elif a != b and isinstance(b, tuple):
                words.extend([option, *map(str, b)])
            elif a != b:
                words.extend([option, str(b)])

    compare(recipe, replace(config, recipe="digits"), "")
    return words


# Files


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(
    file: Path,
    labels: Sequence[Any],
    *,
    size: int = 8,
    image: str = "img",
    label: str = "label",
    names: Sequence[str] | None = CIFAR10_CLASSES,
    bad_rows: Sequence[int] = (),
    seed: int = 0,
) -> None:
    """Write random RGB images with the columns and the schema of CIFAR-10 on the hub."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), size, size, 3), np.uint8)
    encoded = [
        {"bytes": b"no image" if row in bad_rows else png(one), "path": None}
        for row, one in enumerate(pixels)
    ]
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    table = datasets.Dataset.from_dict(
        {image: encoded, label: list(labels)},
        features=datasets.Features({image: datasets.Image(), label: kind}),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.data.table, file)  # Dataset.to_parquet shows a progress bar


def write_cifar10(folder: Path, *, num_train: int = 64, num_test: int = 20, size: int = 8) -> Path:
    """Write a small data set in the form of CIFAR-10 and return its folder."""
    write_parquet(folder / "train.parquet", [i % 10 for i in range(num_train)], size=size)
    write_parquet(folder / "test.parquet", [i % 10 for i in range(num_test)], size=size, seed=1)
    return folder


def metrics(run: Path, *, timings: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not timings:
        for line in lines:
            line.pop("images_per_s", None)
    return lines


def assert_no_pickle(run: Path) -> None:
    """Every file of a run is read by something that cannot run code."""
    for path in run.rglob("*"):
        if path.suffix == ".safetensors":
            assert weights(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert [json.loads(line) for line in path.read_text().splitlines()]
        elif path.is_file():
            assert path.parent.name == "tensorboard" and path.name.startswith("events."), path


def weights(file: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(file)


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare two model files bit for bit."""
    a, b = weights(one), weights(other)
    assert list(a) == list(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[:3]} …"


def assert_same_run(one: Path, other: Path) -> None:
    """Compare weights and numbers of two runs: all that does not depend on the clock."""
    for stage in STAGES:
        assert_same_weights(one / f"{stage}.safetensors", other / f"{stage}.safetensors")
    assert metrics(one) == metrics(other)
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    for stage in STAGES:
        assert results[0][stage]["evaluation"] == results[1][stage]["evaluation"]
    left_over = [path.name for run in (one, other) for path in run.glob(".*")]
    assert not left_over


# Processes


def _owner(function: str) -> tuple[Any, str]:
    """What holds a function given as `module:name` or `module:Class.name`, and its last name."""
    module, path = function.split(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


class Preparation(Protocol):
    """Something done in a new process before its command starts."""

    def set(self) -> None: ...


@dataclass(frozen=True)
class Trap:
    """Sends its own process signals just before the n-th call (from 1) of a function.

    Attributes:
        function: `module:name` or `module:Class.name`, looked up where it is called from.
        call: Which call.
        signals: What to send.
    """

    function: str
    call: int
    signals: tuple[int, ...] = (signal.SIGKILL,)

    def set(self) -> None:
        owner, name = _owner(self.function)
        original, calls = getattr(owner, name), 0

        @functools.wraps(original)
        def trapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                for number in self.signals:
                    os.kill(os.getpid(), number)
            return original(*arguments, **options)

        setattr(owner, name, trapped)


@dataclass(frozen=True)
class Failure:
    """Makes calls of a function fail as the system does, from the n-th one (from 1)."""

    function: str
    call: int
    number: int = errno.ENOSPC

    def set(self) -> None:
        owner, name = _owner(self.function)
        original, calls = getattr(owner, name), 0

        @functools.wraps(original)
        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= self.call:
                raise OSError(self.number, os.strerror(self.number))
            return original(*arguments, **options)

        setattr(owner, name, failing)


@dataclass(frozen=True)
class Terminal:
    """Connects stdout to a terminal, which is drawn on after every step."""

    name: str

    def set(self) -> None:
        os.dup2(os.open(self.name, os.O_RDWR | os.O_NOCTTY), sys.stdout.fileno())
        os.environ |= {"TERM": "xterm", "COLUMNS": "120"}
        importlib.import_module("skipnet.training.progress").REFRESH_SECONDS = 0


STAND_IN = (sys.executable, str(Path(__file__).parents[1] / "studies" / "stand_in.py"))


@dataclass(frozen=True)
class StandIn:
    """Puts tests/studies/stand_in.py in the place of the runs that a study trains.

    Attributes:
        orders: What else a run does, by its name, as JSON.
    """

    orders: str = "{}"

    def set(self) -> None:
        importlib.import_module("skipnet.studies.children").TRAIN = STAND_IN
        os.environ["STAND_IN"] = self.orders


@dataclass(frozen=True)
class FileSizeLimit:
    """A disk that is full for files above a size."""

    limit: int

    def set(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


@dataclass(frozen=True)
class Rank:
    """The environment torchrun gives to one of its processes."""

    rank: int
    world_size: int
    port: int

    def set(self) -> None:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "test",
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }


# The server does not see pytest's import path, and so not this module itself.
PRELOAD = [
    "skipnet.commands.train",
    "skipnet.commands.models",
    "lightning_fabric",
    "datasets",
    "sklearn.model_selection",
    "pytest",
]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclass
class Command:
    """A `skipnet` command in a process of its own, which can be killed.

    The process is forked from a server that has imported the package once, as an import takes
    seconds.

    Attributes:
        arguments: What stands after `skipnet`.
        folder: Working directory, where its output goes to `stdout` and `stderr`.
        before: Done in the process before the command starts.
        name: What the names of its output files begin with.
        daemon: Whether it dies with the tests' own process; if so, it can have no workers.
    """

    arguments: Sequence[str | Path]
    folder: Path
    before: Sequence[Preparation] = ()
    name: str = ""
    daemon: bool = True
    process: Any = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [str(word) for word in self.arguments]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        arguments = (words, self.folder, self.name, tuple(self.before))
        self.process = context.Process(target=_command, args=arguments, daemon=self.daemon)
        self.process.start()

    def wait(self, seconds: float = 240) -> int:
        """Wait for the end and return the exit code; minus the number if a signal killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            pytest.fail(f"skipnet {self.arguments} hangs:\n{self.stdout}\n{self.stderr}")
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return (self.folder / f"{self.name}stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / f"{self.name}stderr").read_text()


def _command(words: list[str], folder: Path, name: str, before: Sequence[Preparation]) -> None:
    from skipnet import cli

    for stream in ("stdout", "stderr"):
        file = os.open(folder / f"{name}{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, getattr(sys, stream).fileno())
    os.chdir(folder)
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    register_tiny_networks()
    train_module.throughput = functools.partial(train_module.throughput, seconds=0)
    for step in before:
        step.set()
    sys.exit(cli.main(words))


def run_command(*arguments: str | Path, folder: Path, **options: Any) -> Command:
    """Run a command to its end and expect that it succeeds, silently on stderr."""
    command = Command(arguments, folder, **options)
    code = command.wait()
    assert (code, command.stderr) == (0, ""), f"{command.stdout}\n{command.stderr}"
    return command
