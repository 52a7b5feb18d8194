"""A run that is stopped, however and whenever, ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import (
    Command,
    Trap,
    assert_same_run,
    assert_same_weights,
    flags,
    metrics,
    run_command,
    tiny_config,
)

import skipnet
from skipnet.models.weights import read_tensors
from skipnet.training.loop import StopRequest

# Steps are counted through all stages: 1 to 6 are dense, 7 to 12 SP, and 13 to 18 HRL. The HRL
# stage draws batch 0 once more before its first step, to sharpen the gates.
BATCH = "skipnet.data.loaders:TrainLoader.batch"
RUN = "run"


def train(folder: Path, *more: str) -> tuple[str, ...]:
    return ("train", "digits", *flags(tiny_config()), "--output", str(folder / RUN), *more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_command(*train(folder), folder=folder)
    return folder / RUN


def resume(folder: Path) -> Path:
    """Continue a run in a new process, as its message says."""
    run_command("train", "--resume", folder / RUN, folder=folder, name="resumed-")
    return folder / RUN


@pytest.mark.parametrize("call", [1, 5, 9, 14, 18])
def test_killed_at_a_step(uninterrupted: Path, tmp_path: Path, call: int) -> None:
    killed = Command(train(tmp_path), tmp_path, before=[Trap(BATCH, call)])
    assert killed.wait() == -signal.SIGKILL
    assert_same_run(resume(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        # Files are replaced in this order: config, environment; 6 checkpoints, dense.safetensors,
        # model.safetensors, results.json; metrics.jsonl as SP begins, and so on.
        ("os:replace", 3),  # the first checkpoint is written, not yet in its place
        ("os:replace", 9),  # dense.safetensors
        ("os:replace", 10),  # model.safetensors
        ("os:replace", 11),  # results.json
        ("pathlib:Path.unlink", 12),  # the checkpoint of a finished stage
        ("os:replace", 23),  # HRL's first checkpoint
        ("skipnet.training.train:land", 1),  # before the last step of HRL, which settles
        ("skipnet.training.train:land", 2),  # all steps of a stage are done
        ("os:replace", 29),  # hrl.safetensors
        ("skipnet.training.run:RunDirectory.log", 5),
        ("skipnet.training.train:_measure_throughput", 1),  # all stages are finished
    ],
)
def test_killed_between_two_files(
    uninterrupted: Path, tmp_path: Path, function: str, call: int
) -> None:
    killed = Command(train(tmp_path), tmp_path, before=[Trap(function, call)])
    assert killed.wait() == -signal.SIGKILL
    assert_same_run(resume(tmp_path), uninterrupted)


def test_the_steps_of_a_stage_are_not_repeated_for_what_follows_them(tmp_path: Path) -> None:
    trap = Trap("skipnet.training.train:land", 2)
    killed = Command(train(tmp_path), tmp_path, before=[trap])
    assert killed.wait() == -signal.SIGKILL
    _, state = read_tensors(tmp_path / RUN / "checkpoint.safetensors")
    assert (state["stage"], state["step"]) == ("hrl", 6)


def test_killed_again_and_again(uninterrupted: Path, tmp_path: Path) -> None:
    killed = Command(train(tmp_path), tmp_path, before=[Trap(BATCH, 4)])
    assert killed.wait() == -signal.SIGKILL
    again = ("train", "--resume", tmp_path / RUN)
    for calls in (1, 2, 5):
        killed = Command(again, tmp_path, before=[Trap(BATCH, calls)])
        assert killed.wait() == -signal.SIGKILL
    assert_same_run(resume(tmp_path), uninterrupted)


def test_killed_with_rare_checkpoints(uninterrupted: Path, tmp_path: Path) -> None:
    """Nothing was saved in the stage: it starts again, and logs nothing twice."""
    command = train(tmp_path, "--checkpoint-seconds", "1000")
    killed = Command(command, tmp_path, before=[Trap(BATCH, 12)])
    assert killed.wait() == -signal.SIGKILL
    assert [line["step"] for line in metrics(tmp_path / RUN)] == [4, 6, 4]
    assert_same_run(resume(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("number", "call", "stage", "step"),
    [
        (signal.SIGINT, 3, "dense", 3),
        (signal.SIGTERM, 8, "sp", 2),
        (signal.SIGINT, 16, "hrl", 3),
    ],
)
def test_asked_to_stop(
    uninterrupted: Path, tmp_path: Path, number: int, call: int, stage: str, step: int
) -> None:
    command = train(tmp_path, "--checkpoint-seconds", "1000")
    stopped = Command(command, tmp_path, before=[Trap(BATCH, call, (number,))])
    assert stopped.wait() == 130
    assert stopped.stderr == (
        f"skipnet: stopped in stage {stage} at step {step} of 6; continue with: "
        f"skipnet train --resume {tmp_path / RUN}\n"
    )
    assert_same_run(resume(tmp_path), uninterrupted)


def test_asked_to_stop_in_the_last_step_of_a_stage(uninterrupted: Path, tmp_path: Path) -> None:
    """The stage is finished, and the next one stops at its first step."""
    stopped = Command(train(tmp_path), tmp_path, before=[Trap(BATCH, 6, (signal.SIGINT,))])
    assert stopped.wait() == 130
    assert "stopped in stage sp at step 1 of 6" in stopped.stderr
    assert list(json.loads((tmp_path / RUN / "results.json").read_text())) == ["dense"]
    assert_same_run(resume(tmp_path), uninterrupted)


def test_asked_to_stop_in_the_last_step_of_all(uninterrupted: Path, tmp_path: Path) -> None:
    """Nothing is left to continue: the run ends as any other."""
    before = [Trap(BATCH, 19, (signal.SIGINT,))]
    done = run_command(*train(tmp_path), folder=tmp_path, before=before)
    assert "Next: skipnet evaluate" in done.stdout
    assert_same_run(tmp_path / RUN, uninterrupted)


def test_second_interrupt_stops_at_once(uninterrupted: Path, tmp_path: Path) -> None:
    twice = (signal.SIGINT, signal.SIGINT)
    stopped = Command(train(tmp_path), tmp_path, before=[Trap(BATCH, 10, twice)])
    assert stopped.wait() == 130
    assert stopped.stderr == (
        "skipnet: stopped at once; continue from the last checkpoint with: "
        f"skipnet train --resume {tmp_path / RUN}\n"
    )
    assert_same_run(resume(tmp_path), uninterrupted)


def test_second_interrupt_while_a_checkpoint_is_written(
    uninterrupted: Path, tmp_path: Path
) -> None:
    twice = (signal.SIGINT, signal.SIGINT)
    stopped = Command(train(tmp_path), tmp_path, before=[Trap("os:fsync", 5, twice)])
    assert stopped.wait() == 130
    assert not list((tmp_path / RUN).glob(".*"))
    assert_same_run(resume(tmp_path), uninterrupted)


def test_asked_to_stop_before_there_is_a_run(tmp_path: Path) -> None:
    trap = Trap("skipnet.training.train:load", 1, (signal.SIGINT,))
    stopped = Command(train(tmp_path), tmp_path, before=[trap])
    assert stopped.wait() == 130
    assert stopped.stderr == "skipnet: interrupted\n"
    assert not (tmp_path / RUN).exists()


def test_message_quotes_the_directory(tmp_path: Path) -> None:
    folder = tmp_path / "with a blank"
    stopped = Command(train(folder), folder, before=[Trap(BATCH, 1, (signal.SIGINT,))])
    assert stopped.wait() == 130
    assert stopped.stderr.endswith(f"--resume '{folder / RUN}'\n")


def test_resume_of_a_finished_run_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in uninterrupted.glob("*.safetensors")}
    done = run_command("train", "--resume", uninterrupted, folder=tmp_path)
    assert "accuracy" in done.stdout and "finished" not in done.stdout
    for name, content in before.items():
        assert (uninterrupted / name).read_bytes() == content


def test_resume_by_function_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evaluations and an adamw optimizer, which has state that is not a tensor's shape."""
    config = tiny_config(stages=("sp",), evaluate_every=0.03)
    config.sp.optimizer.name = "adamw"
    whole = skipnet.train(config, output=tmp_path / "whole").path

    batch = skipnet.data.loaders.TrainLoader.batch

    def stop_at_4(self: object, step: int) -> object:
        if step == 4 and not (tmp_path / "parts" / "checkpoint.safetensors").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)  # type: ignore[arg-type]

    config.checkpoint_seconds = 1000
    monkeypatch.setattr(skipnet.data.loaders.TrainLoader, "batch", stop_at_4)
    with pytest.raises(skipnet.Interrupted, match="stage sp at step 5 of 6"):
        skipnet.train(config, output=tmp_path / "parts")
    parts = skipnet.train(config, resume=tmp_path / "parts").path
    assert_same_weights(parts / "sp.safetensors", whole / "sp.safetensors")
    assert metrics(parts) == metrics(whole)
    assert [line["step"] for line in metrics(whole) if "evaluation" in line] == [3]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow  # two starts of a real process
def test_real_process_killed_at_any_moment(tmp_path: Path) -> None:
    """As `kill -9` does, whenever: the delay differs from run to run."""
    config = tiny_config(recipe="digits", stages=("sp", "hrl"))
    config.model.name = "cifar_resnet20"  # the process knows no tiny network
    config.sp.iterations = config.hrl.iterations = 12
    whole = skipnet.train(config, output=tmp_path / "whole").path

    command = [sys.executable, "-m", "skipnet.cli"]
    words = ["train", "digits", *flags(config), "--output", str(tmp_path / RUN)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *words], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / RUN / "checkpoint.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(time.time_ns() % 1000 / 1000)
    finally:
        process.kill()
        process.wait()
    if not (tmp_path / RUN / "results.json").exists() or len(metrics(tmp_path / RUN)) < 6:
        parts = skipnet.train(config, resume=tmp_path / RUN).path
        assert_same_weights(parts / "hrl.safetensors", whole / "hrl.safetensors")
        assert metrics(parts) == metrics(whole)
