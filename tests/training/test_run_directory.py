"""The run directory: what it holds, and that no failure of the disk takes anything from it."""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    Command,
    Failure,
    FileSizeLimit,
    Trap,
    assert_no_pickle,
    assert_same_weights,
    flags,
    metrics,
    run_command,
    tiny_config,
)

import skipnet
from skipnet import UserError
from skipnet.files import write_atomically
from skipnet.models.weights import read_tensors, write_tensors
from skipnet.training import run as run_module
from skipnet.training.run import RunDirectory, environment

BATCH = "skipnet.data.loaders:TrainLoader.batch"


def one_line(command: Command) -> str:
    """The message of a command that has failed as it should."""
    assert command.wait() == 2
    (line,) = command.stderr.splitlines()
    assert line.startswith("skipnet: error: ")
    return line


def test_what_a_run_leaves(digits_run: Path) -> None:
    documented = re.findall(r"[\w.]+\.(?:jsonl?|safetensors)", run_module.__doc__ or "")
    left = {path.name for path in digits_run.iterdir()}
    assert left == set(documented) - {"checkpoint.safetensors"}
    assert skipnet.TrainConfig is type(RunDirectory.open(digits_run)[1])
    about = json.loads((digits_run / "environment.json").read_text())
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert about["hardware"]["threads"] == 1
    for stage in ("dense", "sp", "hrl"):
        model, info = skipnet.load(digits_run / f"{stage}.safetensors")
        assert info.architecture.gate == (None if stage == "dense" else "rnn")
        assert info.classes == tuple("0123456789") and info.image_size == (8, 8)
        results = json.loads((digits_run / "results.json").read_text())[stage]
        assert info.results == results["evaluation"]
        assert results["seconds"] > 0 and results["images_per_s"] > 0
        assert ("sampled" in results) == (model.num_gates > 0)
    assert_same_weights(digits_run / "model.safetensors", digits_run / "hrl.safetensors")


def test_nothing_is_pickled(digits_run: Path) -> None:
    assert_no_pickle(digits_run)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """The second one is told, and the lock goes with the first."""
    path = RunDirectory.create(tiny_config(), tmp_path / "run").path
    told = pytest.raises(UserError, match="another process is training in")
    with RunDirectory(path).locked(), told:
        skipnet.train(tiny_config(), resume=path)
    skipnet.train(tiny_config(), resume=str(path))
    with RunDirectory(path).locked():
        pass


def test_environment_of_a_package_outside_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    about = environment()
    assert about["commit"] is None
    assert about["hardware"]["cores"] == 7
    json.dumps(about)


class TestAtomicWrites:
    """A file is replaced whole or not at all."""

    @pytest.mark.parametrize("function", ["fsync", "replace"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
    def test_failure_keeps_the_previous_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
    ) -> None:
        path = tmp_path / "file"
        write_atomically(path, b"first")

        def fail(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, function, fail)
        message = f"cannot write .*file: {os.strerror(number)}; the previous file is untouched"
        with pytest.raises(UserError, match=message):
            write_atomically(path, b"second")
        monkeypatch.undo()
        assert path.read_bytes() == b"first"
        assert list(tmp_path.iterdir()) == [path]

    def test_failure_of_the_first_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"No such file or directory$"):
            write_atomically(tmp_path / "no" / "file", b"")

    def test_interrupt_leaves_no_temporary_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(descriptor: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "file", b"content")
        assert not list(tmp_path.iterdir())

    def test_tensors_come_back(self, tmp_path: Path) -> None:
        tensors = {
            "strided": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
            "scalar": torch.tensor(7),
            "empty": torch.zeros(0, 3),
            "not a number": torch.tensor([float("nan"), float("inf")]),
        }
        state = {"step": 3, "value": 0.1 + 0.2, "text": "Grüße"}
        write_tensors(tmp_path / "file", tensors, state)
        back, back_state = read_tensors(tmp_path / "file")
        assert back_state == state
        for name, tensor in tensors.items():
            torch.testing.assert_close(back[name], tensor, rtol=0, atol=0, equal_nan=True)


class TestFullDisk:
    """The previous checkpoint survives byte for byte, and the run goes on from it."""

    @pytest.fixture
    def stopped(self, tmp_path: Path) -> Path:
        words = ("train", "digits", *flags(tiny_config()), "--output", tmp_path / "run")
        before = [Trap(BATCH, 9, (signal.SIGINT,))]
        assert Command(words, tmp_path, before=before).wait() == 130
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("failure", "reason"),
        [
            (FileSizeLimit(40_000), "File too large"),  # the kernel refuses to write more
            (Failure("os:fsync", 1), "No space left on device"),
            (Failure("os:fsync", 1, errno.EROFS), "Read-only file system"),
        ],
    )
    def test_while_a_checkpoint_is_written(
        self, stopped: Path, tmp_path: Path, digits_run: Path, failure: Any, reason: str
    ) -> None:
        checkpoint = stopped / "checkpoint.safetensors"
        before = checkpoint.read_bytes()
        if isinstance(failure, FileSizeLimit):
            assert len(before) > failure.limit
        elif failure.number == errno.ENOSPC:  # metrics.jsonl is written anew before
            failure = Failure(failure.function, 2, failure.number)
        command = Command(("train", "--resume", stopped), tmp_path, before=[failure])
        assert f": {reason}; the previous file is untouched" in one_line(command)
        assert checkpoint.read_bytes() == before
        assert not list(stopped.glob(".*"))
        run_command("train", "--resume", stopped, folder=tmp_path)
        assert_same_weights(stopped / "hrl.safetensors", digits_run / "hrl.safetensors")
        assert metrics(stopped) == metrics(digits_run)

    @pytest.mark.parametrize("call", [1, 2, 3, 8, 9, 10])
    def test_at_any_file(self, tmp_path: Path, digits_run: Path, call: int) -> None:
        """Every file in turn, from config.json to the checkpoints of SP."""
        words = ("train", "digits", *flags(tiny_config()), "--output", tmp_path / "run")
        command = Command(words, tmp_path, before=[Failure("os:fsync", call)])
        assert "No space left on device" in one_line(command)
        assert not list((tmp_path / "run").glob(".*"))
        if call <= 1:  # not even the configuration was written
            run_command(*words, folder=tmp_path)
        else:
            run_command("train", "--resume", tmp_path / "run", folder=tmp_path)
        assert_same_weights(tmp_path / "run/hrl.safetensors", digits_run / "hrl.safetensors")
        assert metrics(tmp_path / "run") == metrics(digits_run)

    def test_while_a_line_is_logged(self, tmp_path: Path) -> None:
        run = RunDirectory.create(tiny_config(), tmp_path / "run")
        (run.path / "metrics.jsonl").mkdir()
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
            run.log({"stage": "sp", "step": 1})


class TestCreate:
    """A run directory is made once, where that is possible."""

    def test_default_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        run = RunDirectory.create(tiny_config())
        assert re.fullmatch(r"runs/test-\d{8}-\d{6}", str(run.path))

    def test_existing_run(self, tmp_path: Path) -> None:
        RunDirectory.create(tiny_config(), tmp_path / "run")
        with pytest.raises(UserError, match=f"already holds a run: .*--resume {tmp_path}"):
            RunDirectory.create(tiny_config(), tmp_path / "run")

    def test_existing_folder_without_a_run(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        RunDirectory.create(tiny_config(), tmp_path)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(UserError, match="cannot make the run directory"):
                RunDirectory.create(tiny_config(), path)

    def test_read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The tests may run as root, whom no permission stops: the call itself refuses."""

        def refuse(*arguments: Any, **options: Any) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(os, "mkdir", refuse)
        with pytest.raises(UserError, match=r"cannot make the run directory .*Permission denied"):
            RunDirectory.create(tiny_config(), tmp_path / "run")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_read_only_folder(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        with pytest.raises(UserError, match="Permission denied"):
            RunDirectory.create(tiny_config(), tmp_path / "run")

    def test_files_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: Any, **options: Any) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(UserError, match=r"cannot write .*config\.json: Permission denied"):
            RunDirectory.create(tiny_config(), tmp_path / "run")


class TestOpen:
    """What is not a run, or is broken, is said in one line."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        return RunDirectory.create(tiny_config(), tmp_path / "run").path

    def test_comes_back(self, run: Path) -> None:
        assert RunDirectory.open(run)[1] == tiny_config()

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="there is no run directory"):
            RunDirectory.open(tmp_path / "no")
        with pytest.raises(UserError, match=r"it has no config\.json"):
            RunDirectory.open(tmp_path)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda text: text[: len(text) // 2], r"cannot read .*config\.json"),
            (lambda text: "", r"cannot read .*config\.json"),
            (lambda text: "[1, 2]", "not a TrainConfig of this version"),
            (lambda text: "3", "not a TrainConfig of this version"),
            (lambda text: text.replace('"seed"', '"sead"'), "unknown fields sead$"),
            (lambda text: text.replace('"nesterov"', '"vortex"'), "OptimizerConfig.*vortex$"),
            (lambda text: text.replace('"recipe": "test",', ""), "missing .*'recipe'"),
            (lambda text: text.replace('"seed": 0', '"seed": "x"'), "not a TrainConfig"),
            (lambda text: text.replace('"seed": 0', '"seed": -1'), "seed must be at least 0"),
            (lambda text: text.replace('"name": "cosine"', '"name": null, "x": {}'), "fields x$"),
        ],
    )
    def test_broken_configuration(
        self, run: Path, spoil: Callable[[str], str], message: str
    ) -> None:
        path = run / "config.json"
        path.write_text(spoil(path.read_text()))
        with pytest.raises(UserError, match=message) as caught:
            RunDirectory.open(run)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["{", "[1]", '"dense"', "\udcff"])
    def test_broken_results(self, run: Path, text: str) -> None:
        (run / "results.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=r"results\.json") as caught:
            RunDirectory.open(run)
        assert "\n" not in str(caught.value)

    def test_another_configuration(self, run: Path) -> None:
        config = tiny_config(seed=3)
        config.hrl.optimizer.lr = 0.123
        with pytest.raises(UserError, match=r"started with another hrl\.optimizer\.lr, seed:"):
            RunDirectory(run).demand_same(config)


class TestMetrics:
    """A resumed run writes no line twice."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> RunDirectory:
        run = RunDirectory.create(tiny_config(), tmp_path / "run")
        for stage, step in [("dense", 4), ("dense", 8), ("sp", 4), ("sp", 8)]:
            run.log({"stage": stage, "step": step})
        return run

    def steps(self, run: RunDirectory) -> list[tuple[str, int]]:
        return [(line["stage"], line["step"]) for line in metrics(run.path)]

    def test_drops_what_comes_after(self, run: RunDirectory) -> None:
        run.forget_after("sp", 4)
        assert self.steps(run) == [("dense", 4), ("dense", 8), ("sp", 4)]
        run.forget_after("sp", 0)
        assert self.steps(run) == [("dense", 4), ("dense", 8)]

    def test_drops_a_line_that_was_cut_short(self, run: RunDirectory) -> None:
        path = run.path / "metrics.jsonl"
        path.write_text(path.read_text()[:-9])
        run.forget_after("sp", 8)
        assert self.steps(run) == [("dense", 4), ("dense", 8), ("sp", 4)]
        run.log({"stage": "sp", "step": 8})
        assert self.steps(run)[-1] == ("sp", 8)

    def test_without_a_file(self, tmp_path: Path) -> None:
        RunDirectory.create(tiny_config(), tmp_path / "run").forget_after("sp", 0)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unfinished_files_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    run = RunDirectory.create(tiny_config(), tmp_path / "run")
    (run.path / ".checkpoint.safetensors.123.tmp").write_bytes(b"half")
    (run.path / ".mine").touch()
    run.sweep()
    assert [path.name for path in run.path.glob(".*")] == [".mine"]


@pytest.mark.slow  # importing tensorboard
def test_tensorboard_has_all_numbers(tmp_path: Path) -> None:
    """When the process ends, and after a resume, each once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(stages=("sp",), tensorboard=True, evaluate_every=3 / (1437 // 16))
    words = ("train", "digits", *flags(config), "--output", tmp_path / "run")
    killed = Command(words, tmp_path, before=[Trap(BATCH, 6, (signal.SIGINT,))])
    assert killed.wait() in (0, 130)
    run_command("train", "--resume", tmp_path / "run", folder=tmp_path)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = metrics(tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    scalars = events.Scalars("sp/train/loss")
    assert {event.step: event.value for event in scalars} == pytest.approx(losses)
    assert [event.step for event in events.Scalars("sp/test/accuracy")] == [3]
