"""Every mistake of a user ends in one line that says what to do, and a non-zero exit code."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from harness import (
    Command,
    Failure,
    flags,
    run_command,
    tiny_config,
    weights,
    write_cifar10,
    write_parquet,
)

import skipnet
from skipnet import cli
from skipnet.commands import models
from skipnet.models.weights import write_tensors

Mistake = Callable[..., str]


@pytest.fixture
def mistake(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Mistake:
    """Runs a command in an empty folder and returns the message of its failure."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        (line,) = shown.err.splitlines()
        assert line.startswith("skipnet: error: ")
        return line.removeprefix("skipnet: error: ")

    return run


@pytest.fixture
def box(capsys: pytest.CaptureFixture[str]) -> Mistake:
    """Runs a command whose flags are wrong and returns what tyro says of them, in one line."""

    def run(*words: str | Path) -> str:
        with pytest.raises(SystemExit) as leave:
            cli.main([str(word) for word in words])
        assert leave.value.code == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return " ".join(re.sub("[│╭╮╰╯─]", " ", shown.out + shown.err).split())

    return run


def train(*more: str | Path) -> list[str | Path]:
    return ["train", "digits", *flags(tiny_config()), *more]


class TestNames:
    """An unknown name is answered with the nearest ones."""

    def test_command(self, mistake: Mistake) -> None:
        assert mistake("trian", "digits") == "unknown command 'trian': did you mean train?"
        said = mistake("xyz")
        assert said == f"unknown command 'xyz': use one of {', '.join(cli.COMMANDS)}"

    def test_recipe(self, mistake: Mistake) -> None:
        assert "did you mean digits?" in mistake("train", "digit")
        message = mistake("train", "cifar10-resnet38")
        assert message.startswith("unknown recipe 'cifar10-resnet38': did you mean ")
        assert "cifar10-resnet38-rnn" in message and "digits" not in message

    def test_no_recipe(self, mistake: Mistake) -> None:
        assert "train needs a recipe (digits, for instance)" in mistake("train", "--seed", "1")
        assert "train needs a recipe (digits, for instance)" in mistake("train", "--resume")

    def test_model_to_train(self, mistake: Mistake, tmp_path: Path) -> None:
        """No directory is left behind, in whose way the next try would be."""
        message = mistake(*train("--model.name", "cifar_resnet39", "--output", "run"))
        assert message.startswith("unknown model 'cifar_resnet39': did you mean cifar_resnet3")
        assert not (tmp_path / "run").exists()

    def test_model_to_show(self, mistake: Mistake) -> None:
        assert "did you mean cifar_resnet38" in mistake("info", "cifar_resnet83")

    def test_run_to_show(self, mistake: Mistake) -> None:
        expected = (
            "there is no run directory or model file runs/x; see skipnet list runs, and skipnet "
            "list weights"
        )
        assert mistake("info", "runs/x") == expected
        assert mistake("evaluate", "runs/x") == expected
        assert "model file x.safetensors" in mistake("info", "x.safetensors")

    def test_stage(self, box: Mistake, mistake: Mistake, digits_run: Path, cifar_run: Path) -> None:
        assert "invalid choice 'hrl2'" in box("evaluate", digits_run, "--stage", "hrl2")
        message = mistake("evaluate", cifar_run, "--stage", "dense")
        assert "has no finished stage dense" in message
        file = digits_run / "sp.safetensors"
        assert "--stage chooses within a run directory" in mistake("info", file, "--stage", "sp")

    def test_what_to_list(self, box: Mistake) -> None:
        assert "invalid choice 'model'" in box("list", "model")


class TestFlags:
    """A flag that does not exist, or a value that cannot work."""

    def test_unknown(self, box: Mistake) -> None:
        shown = box("train", "digits", "--hrl.target", "0.5")
        assert "--hrl.target" in shown and "skipnet train digits --help" in shown

    def test_missing_value(self, box: Mistake) -> None:
        assert "--seed" in box("train", "digits", "--seed")
        assert "MODEL" in box("evaluate")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--dense.batch-size", "0"), "batch_size must be above 0"),
            (("--dense.batch-size", "many"), "many"),
            (("--dense.iterations", "5"), "set the other to None"),
            (
                ("--hrl.estimator", "reinforce", "--hrl.baseline", "leave-one-out"),
                "needs samples of at least 2",
            ),
            (("--sp.optimizer.lr", "-1"), "lr must be above 0"),
            (("--sp.optimizer.momentum", "0"), "nesterov needs momentum"),
            (("--sp.schedule.name", "cosin"), "cosin"),
            (("--accelerator", "gpu"), "gpu"),
            (("--precision", "16"), "16"),
            (("--data.padding", "-1"), "padding is -1"),
        ],
    )
    def test_value(self, box: Mistake, words: Sequence[str], message: str) -> None:
        assert message in box("train", "digits", *words)

    def test_stages(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A field of the run itself is said in one line."""
        assert cli.main(["train", "digits", "--stages", "sp", "dense"]) == 2
        assert "stages run in the order dense, sp, hrl" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_such_device(self, mistake: Mistake) -> None:
        message = mistake(*train("--accelerator", "cuda"))
        assert message == "cuda is not available on this machine: use --accelerator auto"

    def test_batch_larger_than_the_data(self, mistake: Mistake, tmp_path: Path) -> None:
        message = mistake(*train("--hrl.batch-size", "2000", "--output", "run"))
        assert "1437 images, less than one batch of 2000" in message
        assert not (tmp_path / "run").exists()

    def test_batch_size_of_an_evaluation(self, mistake: Mistake, digits_run: Path) -> None:
        assert "batch_size is 0" in mistake("evaluate", digits_run, "--batch-size", "0")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--image-size", "0"), "image_size is 0; set it to 1 or more"),
            (("--num-classes", "0"), "must be positive"),
            (("--in-channels", "-1"), "must be positive"),
        ],
    )
    def test_shapes_to_show(self, mistake: Mistake, words: Sequence[str], message: str) -> None:
        assert message in mistake("info", "cifar_resnet20", *words)


class TestData:
    """Images or labels that are missing or wrong."""

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        return write_cifar10(tmp_path / "data", num_train=32)

    @pytest.fixture
    def fail(self, mistake: Mistake) -> Mistake:
        def run(data: Path | str, *more: str) -> str:
            message = mistake(*train("--data.name", data, *more, "--output", "run"))
            assert not Path("run").exists()
            return message

        return run

    def test_missing_folder(self, fail: Mistake, tmp_path: Path) -> None:
        assert f"there is no folder {tmp_path}/no" in fail(tmp_path / "no")

    def test_empty_folder(self, fail: Mistake, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "has no train split" in fail(tmp_path / "empty")

    def test_file(self, fail: Mistake, data: Path) -> None:
        assert "is a file; give the folder" in fail(data / "train.parquet")

    def test_no_test_split(self, fail: Mistake, data: Path) -> None:
        (data / "test.parquet").unlink()
        assert "has no test or validation or valid or val split" in fail(data)

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ("img", "no image_column found; set image_column to one of label"),
            ("label", "no label_column found; set label_column to one of img"),
        ],
    )
    def test_no_column(self, fail: Mistake, data: Path, column: str, message: str) -> None:
        file = data / "train.parquet"
        table = pq.read_table(file).drop_columns([column])
        pq.write_table(table.replace_schema_metadata(None), file)
        assert message in fail(data)

    def test_unknown_column(self, fail: Mistake, data: Path) -> None:
        assert "there is no column x" in fail(data, "--data.image-column", "x")

    def test_label_outside_the_classes(self, fail: Mistake, data: Path) -> None:
        write_parquet(data / "test.parquet", [0, 1, 7], names=None)
        write_parquet(data / "train.parquet", [0, 1, 2] * 12, names=None)
        assert "row 2 of " in (message := fail(data))
        assert "label 7, outside the 3 classes (0 to 2)" in message

    def test_unreadable_image(self, fail: Mistake, data: Path) -> None:
        write_parquet(data / "train.parquet", [0, 1] * 16, bad_rows=(5, 9))
        message = fail(data)
        assert f"row 5 of {data / 'train.parquet'}: the image cannot be read" in message

    def test_unreadable_image_is_left_out_if_asked(self, data: Path, tmp_path: Path) -> None:
        write_parquet(data / "train.parquet", [0, 1] * 16, bad_rows=(5, 9))
        words = train("--data.name", data, "--data.on-bad-image", "skip", "--output", "run")
        command = Command([*words, "--stages", "sp"], tmp_path)
        assert command.wait() == 0
        (line,) = command.stderr.splitlines()
        assert line.startswith(
            f"skipnet: warning: left out 2 of 32 images that cannot be read: row 5 of {data}"
        )

    def test_truncated_parquet(self, fail: Mistake, data: Path) -> None:
        file = data / "train.parquet"
        file.write_bytes(file.read_bytes()[:-100])
        assert "is not a readable parquet file" in fail(data)

    def test_sizes_that_differ(self, fail: Mistake, data: Path) -> None:
        write_parquet(data / "test.parquet", [0, 1], size=9)
        assert "set image_size" in fail(data)

    def test_hub_without_network(self, fail: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*arguments: Any, **options: Any) -> None:
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
        assert "cannot reach the Hugging Face hub for train of who/what" in fail("who/what")

    def test_evaluation_on_other_classes(
        self, mistake: Mistake, digits_run: Path, cifar_run: Path, data: Path
    ) -> None:
        message = mistake("evaluate", digits_run, "--data", data)
        assert "classes that are not the 10 wanted" in message
        assert "classes that are not the" in mistake("evaluate", cifar_run, "--data", "digits")

    def test_evaluation_on_bad_images(self, mistake: Mistake, cifar_run: Path, data: Path) -> None:
        write_parquet(data / "test.parquet", list(range(10)), bad_rows=(3,))
        assert "row 3 of" in mistake("evaluate", cifar_run, "--data", data)
        message = mistake("evaluate", cifar_run, "--data", data, "--test-split", "dev")
        assert "has no dev split" in message


class Trojan:
    """An object whose unpickling touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


class TestModelFiles:
    """A model file is read if it is one of ours, and never unpickled."""

    @pytest.fixture
    def file(self, digits_run: Path, tmp_path: Path) -> Path:
        return Path(shutil.copy(digits_run / "model.safetensors", tmp_path / "model.safetensors"))

    @pytest.fixture(params=["evaluate", "info"])
    def fail(self, request: pytest.FixtureRequest, mistake: Mistake) -> Mistake:
        return lambda *words: mistake(request.param, *words)

    @pytest.mark.parametrize("size", [0, 5, 8, 100, 1000, -1, -1000])
    def test_truncated(self, fail: Mistake, file: Path, size: int) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) + size if size < 0 else size])
        assert f"{file} is truncated or not a safetensors file" in fail(file)

    def test_too_long(self, fail: Mistake, file: Path) -> None:
        file.write_bytes(file.read_bytes() + b"more")
        assert "is truncated or not a safetensors file" in fail(file)

    @pytest.mark.parametrize("how", ["pickle", "torch", "legacy"])
    def test_pickle_is_never_loaded(
        self, fail: Mistake, mistake: Mistake, tmp_path: Path, digits_run: Path, how: str
    ) -> None:
        marker, trap = tmp_path / "marker", {"weight": Trojan(tmp_path / "marker")}
        for name in ("model.pt", "model.safetensors"):
            file = tmp_path / name
            if how == "pickle":
                file.write_bytes(pickle.dumps(trap))
            else:
                torch.save(trap, file, _use_new_zipfile_serialization=how == "torch")
            assert "not a safetensors file" in fail(file)
        run = Path(shutil.copytree(digits_run, tmp_path / "run"))
        for name in ("model.safetensors", "checkpoint.safetensors", "results.json"):
            shutil.copy(file, run / name)
        fail(run)
        mistake("train", "--resume", run)
        (run / "results.json").unlink()
        assert "not a safetensors file" in mistake("train", "--resume", run)
        assert not marker.exists()
        pickle.loads(pickle.dumps(trap))
        assert marker.exists()  # the trap works

    def test_without_metadata(self, fail: Mistake, file: Path) -> None:
        tensors = weights(file)
        safetensors.torch.save_file(tensors, file)
        assert "was not written by skipnet: it lacks the metadata" in fail(file)
        for metadata in ({"format": "pt"}, {"skipnet": "no json"}, {"skipnet": "[1]"}):
            safetensors.torch.save_file(tensors, file, metadata)
            assert "was not written by skipnet: it lacks the metadata" in fail(file)

    def rewrite(self, file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        with safetensors.safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["skipnet"])
        change(about)
        write_tensors(file, weights(file), about)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda about: about.pop("classes"), "its metadata is not a model's"),
            (lambda about: about.update(format_version=9), "has format version 9; this skipnet"),
            (lambda about: about.update(architecture=None), "its metadata is not a model's"),
            (lambda about: about["architecture"].update(name="resnext"), "unknown model 'resnext'"),
            (lambda about: about["architecture"].update(gate="ff3"), "unknown gate 'ff3'"),
            (lambda about: about["architecture"].update(gate="ff1"), "is of another architecture"),
            (lambda about: about["architecture"].update(gate=None), "is of another architecture"),
            (lambda about: about["architecture"].update(num_classes=3), "of another architecture"),
            (lambda about: about["architecture"].update(num_classes="x"), "is not a model's"),
            (
                lambda about: about["architecture"].update(name="cifar_resnet20"),
                "is of another architecture",
            ),
            (lambda about: about.update(image_size=[8]), "its metadata is not a model's"),
        ],
    )
    def test_of_another_architecture(
        self, fail: Mistake, file: Path, change: Callable[[dict[str, Any]], Any], message: str
    ) -> None:
        self.rewrite(file, change)
        line = fail(file)
        assert message in line
        assert str(file) in line

    def test_checkpoint_is_no_model(self, fail: Mistake, tmp_path: Path) -> None:
        write_tensors(tmp_path / "checkpoint.safetensors", {}, {"stage": "sp", "step": 3})
        assert "has format version None" in fail(tmp_path / "checkpoint.safetensors")

    def test_folder_instead_of_a_file(self, digits_run: Path) -> None:
        with pytest.raises(skipnet.UserError, match=r"is a folder: .*run/model\.safetensors$"):
            skipnet.load(digits_run)

    def test_missing(self, fail: Mistake, tmp_path: Path) -> None:
        assert "there is no run directory or model file" in fail(tmp_path / "no.safetensors")

    def test_outside_a_run_without_data(self, mistake: Mistake, file: Path) -> None:
        assert "name a test set with --data" in mistake("evaluate", file)

    def test_beside_the_configuration_of_something_else(
        self, mistake: Mistake, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As in a folder of the Hugging Face hub."""
        (file.parent / "config.json").write_text('{"architectures": ["Other"]}')
        assert "unknown fields architectures" in mistake("evaluate", file)
        assert cli.main(["evaluate", str(file), "--data", "digits"]) == 0
        assert cli.main(["info", str(file)]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[0])["num_images"] == 360


class TestRuns:
    """Run directories that are missing, broken, unfinished or of something else."""

    @pytest.fixture
    def copy(self, digits_run: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(digits_run, tmp_path / "copy"))

    def test_no_such_run(self, mistake: Mistake, tmp_path: Path) -> None:
        assert mistake("train", "--resume", "x") == "there is no run directory x"
        assert mistake("train", "--resume=x") == "there is no run directory x"
        assert "is no run directory: it has no config.json" in mistake("evaluate", tmp_path)
        assert "is no run directory: it has no config.json" in mistake("info", tmp_path)

    def test_run_without_weights(self, mistake: Mistake, copy: Path) -> None:
        for path in copy.glob("*.safetensors"):
            path.unlink()
        for command in ("evaluate", "info"):
            message = mistake(command, copy)
            assert f"has no finished stage yet: continue it with skipnet train --resume {copy}" in (
                message
            )
        assert "no finished stage sp" in mistake("evaluate", copy, "--stage", "sp")

    def test_resume_of_something_else(self, mistake: Mistake, copy: Path) -> None:
        message = mistake("train", "--resume", copy, "--seed", "5", "--sp.optimizer.lr", "0.01")
        assert "was started with another sp.optimizer.lr, seed: resume it unchanged" in message
        message = mistake("train", "digits", "--resume", copy)
        assert "was started with another stages" not in message
        for field in ("model.name", "dense.epochs", "hrl.iterations", "log_every"):
            assert field in message

    def test_resume_with_the_same_flags_in_full(self, copy: Path, tmp_path: Path) -> None:
        run_command(*train("--resume", copy), folder=tmp_path)

    def test_resume_and_output(self, mistake: Mistake, copy: Path, tmp_path: Path) -> None:
        message = mistake("train", "--resume", copy, "--output", "other")
        assert "not both" in message
        assert not (tmp_path / "other").exists()

    def test_output_that_holds_a_run(self, mistake: Mistake, copy: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
        message = mistake(*train("--output", copy))
        assert f"already holds a run: continue it with --resume {copy}" in message
        assert before == {path: path.stat().st_mtime_ns for path in copy.iterdir()}

    def test_output_that_cannot_be_made(self, mistake: Mistake, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "cannot make the run directory" in mistake(*train("--output", "file/run"))

    def test_output_that_cannot_be_written(self, tmp_path: Path) -> None:
        """Root, as who tests may run, can write anywhere: the call itself fails."""
        failure = Failure("os:mkdir", 1, errno.EROFS)
        command = Command(train("--output", tmp_path / "new" / "run"), tmp_path, before=[failure])
        assert command.wait() == 2
        assert command.stderr == (
            f"skipnet: error: cannot make the run directory {tmp_path / 'new' / 'run'}: "
            "Read-only file system\n"
        )

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": "x", "speed": 3}'])
    def test_broken_configuration(self, mistake: Mistake, copy: Path, text: str) -> None:
        (copy / "config.json").write_text(text)
        for words in (["evaluate", copy], ["info", copy], ["train", "--resume", copy]):
            message = mistake(*words)
            assert "config.json" in message or "of this version of skipnet" in message

    @pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
    def test_broken_results(self, mistake: Mistake, copy: Path, text: str) -> None:
        (copy / "results.json").write_text(text)
        for words in (["evaluate", copy], ["info", copy], ["train", "--resume", copy]):
            assert "results.json" in mistake(*words)

    def test_broken_checkpoint(self, mistake: Mistake, copy: Path) -> None:
        (copy / "results.json").unlink()
        (copy / "checkpoint.safetensors").write_bytes(b"\x10" + bytes(20))
        assert "checkpoint.safetensors is truncated" in mistake("train", "--resume", copy)

    def test_broken_run_among_others(
        self, copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for name, file, text in [
            ("cut", "config.json", "{"),
            ("newer", "config.json", '{"speed": 1}'),
            ("results", "results.json", "{"),
            ("strange", "results.json", '{"dense": 3, "sp": {}, "hrl": {"evaluation": {}}}'),
        ]:
            shutil.copytree(copy, tmp_path / name)
            (tmp_path / name / file).write_text(text)
        (tmp_path / "no run").mkdir()
        assert cli.main(["list", "runs", "--runs", str(tmp_path)]) == 0
        shown = capsys.readouterr()
        lines = shown.out.splitlines()
        assert shown.err == "" and len(lines) == 6
        assert any("copy" in line and "hrl" in line and "% at" in line for line in lines)
        assert any("cut" in line and "cannot read" in line for line in lines)
        assert any("newer" in line and "unknown fields speed" in line for line in lines)
        assert any("strange" in line and "results.json" in line for line in lines)


def test_reader_that_leaves(tmp_path: Path) -> None:
    """`skipnet … | head` is no mistake: nothing is said."""
    failure = Failure("builtins:print", 1, errno.EPIPE)
    command = Command(["list"], tmp_path, before=[failure])
    assert command.wait() == 141
    assert command.stderr == ""


def test_terminal_without_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main([]) == 0
    assert stdout.buffer.getvalue().startswith(b"usage: skipnet COMMAND ?")  # type: ignore[attr-defined]


def test_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a UserError is said in one line: another ValueError is for us to see."""

    def broken() -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(models, "list_recipes", broken)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["list"])
