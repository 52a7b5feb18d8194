"""Sweeps and ablations: their runs as processes, what is kept, and what they leave.

Training itself is stood in for, see stand_in.py; test_trained.py trains.
"""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import STAND_IN, Command, StandIn, Trap

import skipnet
from skipnet import cli
from skipnet.studies import children as children_module
from skipnet.studies.results import collect
from skipnet.studies.study import Study

SMALL = ["--model.name", "cifar_resnet20", "--accelerator", "cpu"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Gives orders to the stand-ins; the working directory is private."""
    monkeypatch.setattr(children_module, "TRAIN", STAND_IN)
    monkeypatch.setattr(children_module, "POLL_SECONDS", 0.02)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)

    def give(**orders: str) -> None:
        monkeypatch.setenv("STAND_IN", json.dumps(orders))

    give()
    return give


def sweep(*words: str, code: int = 0) -> Path:
    assert cli.main(["sweep", "digits", *SMALL, *words, "--output", "s"]) == code
    return Path("s")


def begun(folder: Path) -> list[str]:
    """Names of the runs in the order they began."""
    return [line.split()[0] for line in (folder / "begun").read_text().splitlines()]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.usefixtures("stand_in")
class TestSweep:
    def test_runs_and_order(self) -> None:
        """Seed by seed, SP first, the points from low to high."""
        folder = sweep("--targets", "0.7,0.5", "--seeds", "1,0")
        expected = ["sp", "dense", "target-0.5", "target-0.7"]
        assert begun(folder) == [f"seed{seed}/{name}" for seed in (1, 0) for name in expected]

    def test_each_run_s_configuration(self) -> None:
        folder = sweep("--targets", "0.5", "--seeds", "3", "--sp.epochs", "7")
        configs = {
            name: json.loads((folder / "seed3" / name / "config.json").read_text())
            for name in ("sp", "dense", "target-0.5")
        }
        base = skipnet.recipe("digits")
        assert all(config["seed"] == 3 for config in configs.values())
        assert [configs[name]["stages"] for name in configs] == [["sp"], ["dense"], ["hrl"]]
        assert configs["sp"]["sp"]["epochs"] == 7
        assert configs["sp"]["start"] is None and configs["dense"]["start"] is None
        assert configs["target-0.5"]["start"] == "s/seed3/sp"
        assert configs["target-0.5"]["hrl"]["target_compute"] == 0.5
        assert configs["target-0.5"]["hrl"]["epochs"] == base.hrl.epochs

    def test_alphas(self) -> None:
        folder = sweep("--alphas", "0.5,0", "--no-dense")
        assert begun(folder) == ["seed0/sp", "seed0/alpha-0.0", "seed0/alpha-0.5"]
        config = json.loads((folder / "seed0" / "alpha-0.5" / "config.json").read_text())
        assert config["hrl"]["target_compute"] is None and config["hrl"]["alpha"] == 0.5

    def test_stages_say_what_is_trained(self, tmp_path: Path) -> None:
        folder = sweep("--targets", "0.5", "--stages", "hrl")
        assert begun(folder) == ["seed0/target-0.5"]
        config = json.loads((folder / "seed0" / "target-0.5" / "config.json").read_text())
        assert config["start"] is None

    def test_results(self, capsys: pytest.CaptureFixture[str]) -> None:
        folder = sweep("--targets", "0.5,0.7", "--seeds", "0,1")
        found = results(folder)
        assert found["kind"] == "sweep" and found["recipe"] == "digits" and found["missing"] == []
        assert found["config"]["model"]["name"] == "cifar_resnet20"
        assert len(found["runs"]) == 8
        (run,) = (run for run in found["runs"] if run["name"] == "seed1/target-0.7")
        assert (run["label"], run["stage"], run["seed"]) == ("target-0.7", "hrl", 1)
        assert (run["target"], run["alpha"], run["seconds"]) == (0.7, None, 12.5)
        assert run["evaluation"]["accuracy"] == pytest.approx(94.5)
        assert run["sampled"]["accuracy"] == 80
        assert run["environment"]["commit"] == "abc"
        assert run["path"] == {
            "step": [10, 20, 30],
            "alpha": [0.25] * 3,
            "macs_fraction": [0.7] * 3,
            "macs_thresholded": [0.7] * 3,
        }
        shown = capsys.readouterr().out
        (row,) = (line for line in shown.splitlines() if line.strip().startswith("target-0.7"))
        # Seeds 0 and 1: 93.5 and 94.5, whose standard deviation is 1 / sqrt 2.
        assert re.split(r"\s{2,}", row.strip()) == [
            "target-0.7",
            "94.00 ± 0.71",
            "70.0 ± 0.0",
            "80.00 ± 0.00",
            "70.0 ± 0.0",
            "0.7M",
            "2 of 5",
            "12 s",
        ]
        assert "Results: s/results.json" in shown

    def test_a_data_folder_is_named_without_its_place(self, tmp_path: Path) -> None:
        study = Study(
            path=tmp_path / "s",
            kind="sweep",
            config=skipnet.recipe("digits"),
            settings={"seeds": [0]},
        )
        (tmp_path / "somewhere" / "images").mkdir(parents=True)
        study.config.data.name = str(tmp_path / "somewhere" / "images")
        study.path.mkdir()
        assert collect(study, [])["config"]["data"]["name"] == "images"

    def test_plots(self) -> None:
        pytest.importorskip("matplotlib")
        folder = sweep("--targets", "0.5,0.7")
        for name in ("curve", "path"):
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert b"</svg>" in (folder / f"{name}.svg").read_bytes()

    def test_without_matplotlib(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        folder = sweep("--targets", "0.5")
        assert "No plot: matplotlib is not installed: pip install 'skipnet[report]'" in (
            capsys.readouterr().out
        )
        assert results(folder)["missing"] == [] and not list(folder.glob("*.png"))

    def test_default_directory(self) -> None:
        assert cli.main(["sweep", "digits", *SMALL, "--targets", "0.5"]) == 0
        assert results(Path("runs") / "digits-sweep")["missing"] == []


class TestGoingOn:
    def test_a_failed_run_is_tried_again_and_nothing_else(
        self, stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        stand_in(**{"seed0/target-0.5": "fail"})
        words = ("--targets", "0.5,0.7", "--seeds", "0,1")
        folder = sweep(*words, code=2)
        shown = capsys.readouterr()
        assert "seed0/target-0.5 ended with exit code 2:" in shown.err
        assert "  line 19\n  skipnet: error: no luck\n  (log: s/seed0/target-0.5.log)" in shown.err
        assert "line 12" not in shown.err, "only the last lines"
        assert shown.err.splitlines()[-1] == (
            "skipnet: error: 1 of 8 runs failed, the others are kept: mend the cause, and continue "
            "with: skipnet sweep --resume s"
        )
        assert results(folder)["missing"] == ["seed0/target-0.5"]
        assert len(results(folder)["runs"]) == 7
        (folder / "begun").unlink()
        stand_in()
        sweep(*words)
        assert begun(folder) == ["seed0/target-0.5"]
        assert results(folder)["missing"] == []
        log = (folder / "seed0" / "target-0.5.log").read_text()
        assert log.count(" $ ") == 2 and "line 0" in log, "the first try is still there"

    def test_what_starts_from_a_failed_run_is_left_out(
        self, stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        stand_in(**{"seed0/sp": "fail"})
        folder = sweep("--targets", "0.5,0.7", "--seeds", "0,1", code=2)
        assert begun(folder)[:2] == ["seed0/sp", "seed0/dense"]
        assert "seed0/target-0.5" not in begun(folder) and "seed1/target-0.5" in begun(folder)
        shown = capsys.readouterr().err
        assert "seed0/target-0.7 did not begin:\n  it starts from seed0/sp, which failed" in shown
        assert "3 of 8 runs failed" in shown

    @pytest.mark.usefixtures("stand_in")
    def test_new_targets_and_seeds_join(self) -> None:
        folder = sweep("--targets", "0.5", "--no-dense")
        (folder / "begun").unlink()
        sweep("--targets", "0.7", "--seeds", "1", "--no-dense")
        assert set(begun(folder)) == {
            "seed0/target-0.7",
            "seed1/sp",
            "seed1/target-0.5",
            "seed1/target-0.7",
        }
        assert Study.read(folder).settings == {
            "targets": [0.5, 0.7],
            "alphas": [],
            "seeds": [0, 1],
            "dense": False,
        }

    @pytest.mark.usefixtures("stand_in")
    def test_resume_alone(self) -> None:
        """The configuration and what was asked for are those of the directory."""
        folder = sweep("--targets", "0.5", "--seeds", "4", "--no-dense", "--sp.epochs", "3")
        (folder / "seed4" / "target-0.5" / "results.json").unlink()
        (folder / "begun").unlink()
        assert cli.main(["sweep", "--resume", "s"]) == 0
        assert begun(folder) == ["seed4/target-0.5"]

    @pytest.mark.usefixtures("stand_in")
    def test_a_directory_that_was_moved(self) -> None:
        folder = sweep("--targets", "0.5,0.7")
        (folder / "seed0" / "target-0.5" / "results.json").unlink()
        folder.rename("moved")
        assert cli.main(["sweep", "--resume", "moved"]) == 0
        assert results(Path("moved"))["missing"] == []
        config = json.loads(Path("moved/seed0/target-0.5/config.json").read_text())
        assert Path(config["start"]) == Path("moved/seed0/sp").absolute() or config["start"] == str(
            Path("moved/seed0/sp")
        )

    @pytest.mark.usefixtures("stand_in")
    def test_the_dense_run_of_a_sweep_is_not_left_out_later(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sweep("--targets", "0.5")
        assert cli.main(["sweep", "--resume", "s", "--no-dense"]) == 2
        assert "s was started with dense: leave out --no-dense" in capsys.readouterr().err

    @pytest.mark.usefixtures("stand_in")
    def test_new_targets_of_a_resume_are_of_the_seeds_that_are_there(self) -> None:
        folder = sweep("--targets", "0.5", "--seeds", "1,2", "--no-dense")
        assert cli.main(["sweep", "--resume", "s", "--targets", "0.7"]) == 0
        assert sorted(path.name for path in folder.glob("seed*")) == ["seed1", "seed2"]
        assert (folder / "seed2" / "target-0.7").is_dir()

    @pytest.mark.usefixtures("stand_in")
    @pytest.mark.parametrize("half", ["nothing", "description", "empty run", "made run"])
    def test_a_directory_half_written(self, half: str) -> None:
        """As a command that was killed early leaves it."""
        folder = Path("s")
        if half == "nothing":
            folder.mkdir()
            (folder / ".study.json.1-2.tmp").write_text("{")
        else:
            sweep("--targets", "0.5")
            (folder / "results.json").unlink()
            for name in ("sp", "target-0.5"):
                for file in (folder / "seed0" / name).iterdir():
                    if half != "made run" or file.name != "config.json":
                        file.unlink()
                if half == "description":
                    (folder / "seed0" / name).rmdir()
        sweep("--targets", "0.5")
        assert results(folder)["missing"] == [] and not list(folder.glob(".*"))


class TestPlaces:
    @pytest.mark.usefixtures("stand_in")
    def test_threads_of_a_cpu_are_shared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
        places = children_module.places
        config = skipnet.recipe("digits")
        config.accelerator = "cpu"
        assert places(config, None) == [{"OMP_NUM_THREADS": "7"}]
        assert places(config, 3) == [{"OMP_NUM_THREADS": "2"}] * 3
        assert places(config, 20) == [{"OMP_NUM_THREADS": "1"}] * 20
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert places(config, 3) == [{"OMP_NUM_THREADS": "4"}] * 3

    @pytest.mark.usefixtures("stand_in")
    def test_one_gpu_each(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

        def devices(jobs: int | None, accelerator: str = "auto") -> list[str | None]:
            config = skipnet.recipe("digits")
            config.accelerator = accelerator
            return [p.get("CUDA_VISIBLE_DEVICES") for p in children_module.places(config, jobs)]

        assert devices(None) == ["0", "1"]
        assert devices(1) == ["0"]
        assert devices(5) == ["0", "1", "0", "1", "0"]
        assert devices(None, "cpu") == [None]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
        assert devices(None) == ["5", "GPU-ab"]

    @pytest.mark.slow
    def test_several_at_once(self, stand_in: Callable[..., None]) -> None:
        """Both runs that start from nothing run side by side; a third waits for a place."""
        orders = {f"seed{seed}/{name}": "wait" for seed in (0, 1) for name in ("sp", "dense")}
        words = ["sweep", "digits", *SMALL, "--targets", "0.5", "--seeds", "0,1", "--jobs", "2"]
        command = Command(
            [*words, "--output", "s"], Path.cwd(), before=[StandIn(json.dumps(orders))]
        )
        wait_for(lambda: Path("s/begun").exists() and len(begun(Path("s"))) == 2)
        time.sleep(0.2)
        assert set(begun(Path("s"))) == {"seed0/sp", "seed0/dense"}
        Path("s/go").touch()
        assert command.wait() == 0, command.stderr
        assert len(begun(Path("s"))) == 6
        # As many threads as its share of the cores, unless the environment says.
        threads = os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // 2)
        lines = Path("s/begun").read_text().splitlines()
        assert {line.split()[1] for line in lines} <= {str(threads), "1"}


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


@pytest.mark.slow
class TestStopping:
    """Ctrl-C in every phase, and worse."""

    WORDS = ("sweep", "digits", *SMALL, "--targets", "0.5,0.7", "--jobs", "2", "--output", "s")

    def start(self, folder: Path, orders: dict[str, str]) -> Command:
        return Command(self.WORDS, folder, before=[StandIn(json.dumps(orders))])

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_runs_are_asked_once_and_write_checkpoints(self, tmp_path: Path, number: int) -> None:
        folder = tmp_path / "s"
        waiting = ("seed0/target-0.5", "seed0/target-0.7")
        command = self.start(tmp_path, dict.fromkeys(waiting, "wait"))
        wait_for(lambda: (folder / "begun").exists() and set(waiting) <= set(begun(folder)))
        os.kill(command.process.pid, number)
        assert command.wait() == 130
        assert command.stderr == (
            "skipnet: stopped with 2 of 4 runs finished; continue with: skipnet sweep --resume s\n"
        )
        for name in waiting:
            assert (folder / name / "signals").read_text() == f"{signal.SIGTERM}\n", "once"
            assert (folder / name / "checkpoint.safetensors").exists()
        assert len(results(folder)["runs"]) == 2
        (folder / "begun").unlink()
        again = Command(["sweep", "--resume", "s"], tmp_path, before=[StandIn()])
        assert again.wait() == 0, again.stderr
        assert set(begun(folder)) == set(waiting)

    def test_before_the_last_runs_have_begun(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        command = self.start(tmp_path, {"seed0/sp": "wait"})
        wait_for(lambda: (folder / "begun").exists() and "seed0/sp" in begun(folder))
        os.kill(command.process.pid, signal.SIGINT)
        assert command.wait() == 130
        assert not {"seed0/target-0.5", "seed0/target-0.7"} & set(begun(folder))

    def test_twice_ends_those_that_do_not_listen(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        command = self.start(tmp_path, {"seed0/sp": "deaf, wait"})
        wait_for(lambda: (folder / "begun").exists() and "seed0/sp" in begun(folder))
        os.kill(command.process.pid, signal.SIGINT)
        wait_for(lambda: (folder / "seed0" / "sp" / "signals").exists())
        os.kill(command.process.pid, signal.SIGINT)
        assert command.wait() == 130
        assert "continue with: skipnet sweep --resume s" in command.stderr

    def test_before_anything_is_made(self, tmp_path: Path) -> None:
        """While the data is read."""
        trap = Trap("skipnet.commands.study:load", 1, (signal.SIGINT,))
        command = Command(self.WORDS, tmp_path, before=[StandIn(), trap])
        assert command.wait() == 130
        assert command.stderr == "skipnet: interrupted\n" and not (tmp_path / "s").exists()

    def test_a_killed_sweep_goes_on(self, tmp_path: Path) -> None:
        """Its runs end by themselves; the same command takes them up."""
        folder = tmp_path / "s"
        command = self.start(tmp_path, {"seed0/target-0.5": "wait"})
        wait_for(lambda: (folder / "begun").exists() and "seed0/target-0.5" in begun(folder))
        os.kill(command.process.pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        (folder / "go").touch()
        wait_for(lambda: (folder / "seed0" / "target-0.5" / "results.json").exists())
        again = Command(self.WORDS, tmp_path, before=[StandIn()])
        assert again.wait() == 0, again.stderr
        assert results(folder)["missing"] == []


def test_one_command_at_a_time(tmp_path: Path, stand_in: Callable[..., None]) -> None:
    folder = sweep("--targets", "0.5")
    study = Study.read(folder)
    again = pytest.raises(skipnet.UserError, match="another command is at work in s")
    with study.locked(), again, study.locked():
        pytest.fail("two at once")


@pytest.fixture
def mistake(
    stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that fails before anything is trained, and returns the message."""

    def run(*words: str) -> str:
        before = sorted(Path().rglob("*"))
        capsys.readouterr()
        assert cli.main(list(words)) == 2
        shown = capsys.readouterr()
        assert sorted(Path().rglob("*")) == before, "nothing is made"
        (line,) = shown.err.splitlines()
        return line.removeprefix("skipnet: error: ")

    return run


class TestMistakes:
    """Each in one line, before anything is made."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "give --targets 0.3,0.5,… (shares of dense computation) or --alphas"),
            (("--targets", "0.5", "--alphas", "1"), "of skipping), not both"),
            (("--targets", "0.5,1.2"), "targets must lie in (0, 1], and 1.2 does not"),
            (("--targets", "0"), "targets must lie in (0, 1], and 0.0 does not"),
            (("--targets", "nan"), "targets must lie in (0, 1], and nan does not"),
            (("--targets", "0.5,0.50"), "targets has 0.5 twice"),
            (("--targets", "0.5,half"), "targets are numbers with commas between, and 'half'"),
            (("--targets", "0.5,"), "and '' is none"),
            (("--alphas", "-1"), "alphas must be at least 0, and -1.0 is not"),
            (("--alphas", "inf"), "alphas must be at least 0, and inf is not"),
            (("--targets", "0.5", "--seeds", "0,0"), "seeds has 0 twice"),
            (("--targets", "0.5", "--seeds", "-1"), "seeds must be at least 0"),
            (("--targets", "0.5", "--seeds", "0.5"), "seeds are whole numbers"),
            (("--targets", "0.5", "--jobs", "0"), "jobs is 0: give 1 or more"),
            (("--targets", "0.5", "--stages", "dense", "sp"), "a sweep needs the stage hrl"),
            (("--targets", "0.05,0.5"), "target-0.05: target_compute 0.05 is out of reach"),
            (("--targets", "0.5", "--data.name", "nowhere/x"), "nowhere/x"),
            (("--targets", "0.5", "--start", "nowhere"), "sp: there is no run directory or model"),
            (("--targets", "0.5", "--resume", "s", "--output", "t"), "no directory of a sweep"),
        ],
    )
    def test_sweep(self, mistake: Callable[..., str], words: tuple[str, ...], message: str) -> None:
        assert message in mistake("sweep", "digits", *SMALL, *words)

    def test_unknown_network(self, mistake: Callable[..., str]) -> None:
        words = ("--model.name", "cifar_resnet21", "--targets", "0.5")
        assert "did you mean cifar_resnet" in mistake("sweep", "digits", *words)

    def test_no_recipe(self, mistake: Callable[..., str]) -> None:
        assert "sweep needs a recipe (digits, " in mistake("sweep", "--targets", "0.5")
        assert "ablations needs a recipe (digits, " in mistake("ablations", "--resume")
        assert "did you mean digits?" in mistake("sweep", "digit")

    def test_no_directory_to_resume(self, mistake: Callable[..., str]) -> None:
        assert "none is no directory of a sweep" in mistake("sweep", "--resume", "none")

    def test_directory_of_a_run(self, mistake: Callable[..., str]) -> None:
        Path("run").mkdir()
        Path("run/config.json").write_text("{}")
        words = ("sweep", "digits", *SMALL, "--targets", "0.5", "--output", "run")
        assert "run holds a single run" in mistake(*words)

    @pytest.mark.parametrize("text", ["{", "[]", '{"kind": "sweep"}', '{"config": 1}'])
    def test_description_that_is_broken(self, mistake: Callable[..., str], text: str) -> None:
        Path("s").mkdir()
        Path("s/study.json").write_text(text)
        assert "cannot read s/study.json" in mistake("sweep", "--resume", "s")

    def test_another_configuration(self, mistake: Callable[..., str]) -> None:
        sweep("--targets", "0.5")
        words = ("sweep", "digits", *SMALL, "--targets", "0.5", "--output", "s")
        message = mistake(*words, "--hrl.epochs", "3", "--sp.optimizer.lr", "0.2")
        assert (
            "s was started with another sp.optimizer.lr (0.1, now 0.2), hrl.epochs (40, now 3.0)"
            in (message)
        )
        assert "skipnet sweep --resume s alone" in message
        other = mistake("sweep", "cifar10-resnet38-rnn", "--targets", "0.5", "--output", "s")
        assert "recipe (digits, now cifar10-resnet38-rnn)" in other
        kind = mistake("ablations", "digits", *SMALL, "--output", "s")
        assert "s holds a sweep, not ablations" in kind
        alphas = mistake("sweep", "digits", *SMALL, "--alphas", "0.5", "--output", "s")
        assert "s was started with targets, not alphas" in alphas

    def test_output_that_cannot_be(self, mistake: Callable[..., str]) -> None:
        Path("file").touch()
        words = ("sweep", "digits", *SMALL, "--targets", "0.5", "--output")
        assert "cannot make the directory file" in mistake(*words, "file")
        assert "cannot make the directory file/s" in mistake(*words, "file/s")

    def test_a_run_of_another_configuration(
        self, stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Somebody put it there: it is not taken for ours."""
        stand_in(**{"seed0/sp": "fail"})
        folder = sweep("--targets", "0.5", code=2)
        config = json.loads((folder / "seed0" / "sp" / "config.json").read_text())
        config["sp"]["epochs"] = 1
        (folder / "seed0" / "sp" / "config.json").write_text(json.dumps(config))
        stand_in()
        sweep("--targets", "0.5", code=2)
        assert "seed0/sp was started with another sp.epochs" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--only", "hrl,softy"), "unknown variant 'softy': did you mean soft"),
            (("--only", "hrl,hrl"), "only has hrl twice"),
            (("--only", "flip"), "flip is what this recipe does anyway"),
            (
                ("--only", "sdv", "--hrl.target-compute", "None"),
                "sdv skips at the rate of a target",
            ),
            (("--stages", "hrl"), "ablations need the stages sp and hrl"),
            (("--only", "hrl", "--hrl.target-compute", "0.01"), "hrl: target_compute 0.01 is out"),
        ],
    )
    def test_ablations(
        self, mistake: Callable[..., str], words: tuple[str, ...], message: str
    ) -> None:
        assert message in mistake("ablations", "digits", *SMALL, *words)


@pytest.mark.slow
def test_the_terminal_shows_bars(stand_in: Callable[..., None]) -> None:
    """On a terminal a bar a run; here a pseudo-terminal."""
    orders = json.dumps({"seed0/target-0.5": "wait"})
    program = (
        "import sys; from skipnet import cli; from skipnet.studies import children; "
        f"children.TRAIN = {STAND_IN!r}; sys.exit(cli.main(sys.argv[1:]))"
    )
    parent, child = pty.openpty()
    words = ["sweep", "digits", *SMALL, "--targets", "0.5", "--output", "s"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=child,
        stderr=subprocess.STDOUT,
        env=os.environ | {"STAND_IN": orders, "TERM": "xterm", "COLUMNS": "140"},
    )
    os.close(child)
    shown = b""
    run = Path("s/seed0/target-0.5")
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # The other end is closed.
            break
        if run.exists() and not (run / "metrics.jsonl").exists():
            line = {"stage": "hrl", "step": 5, "epoch": 10.0, "loss": 1.5, "alpha": 0.25}
            (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if b"loss 1.500" in shown:
            Path("s/go").touch()
    os.close(parent)
    assert process.wait() == 0, shown.decode()
    assert b"25%" in shown and b"alpha 0.25" in shown, "10 of 40 epochs"


@pytest.mark.usefixtures("stand_in")
class TestAblations:
    def test_all_variants(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["ablations", "digits", *SMALL, "--output", "a"]) == 0
        found = results(Path("a"))
        assert found["missing"] == []
        labels = [run["label"] for run in found["runs"]]
        # What changes nothing in this recipe is not there, and the same SP is trained once.
        assert "frozen" in labels and "sp" in labels and len(labels) == len(set(labels))
        starts = {
            run["label"]: json.loads((Path("a") / run["name"] / "config.json").read_text())["start"]
            for run in found["runs"]
        }
        assert starts["hrl"] == starts["all-rows"] == starts["no-baseline"] == "a/seed0/sp"
        assert starts["ff"] == "a/seed0/ff-sp" and starts["static"] == "a/seed0/static-sp"
        assert starts["no-sp"] is None and starts["pure-rl"] is None and starts["sdv"] is None
        assert "\n  pure-rl" in capsys.readouterr().out

    def test_resume_adds_variants(self) -> None:
        assert cli.main(["ablations", "digits", *SMALL, "--only", "sp", "--output", "a"]) == 0
        assert begun(Path("a")) == ["seed0/sp"]
        assert cli.main(["ablations", "--resume", "a", "--only", "soft,hrl"]) == 0
        assert begun(Path("a")) == ["seed0/sp", "seed0/soft", "seed0/hrl"]
        assert cli.main(["ablations", "--resume", "a"]) == 0
        assert len(begun(Path("a"))) == 3
