"""benchmarks/gpu/cifar10.py runs to its end without a GPU, goes on where it stopped, and moves."""

import importlib.util
import json
import shutil
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from skipnet import UserError
from skipnet.studies.study import Study
from skipnet.training.loop import StopRequest

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu" / "cifar10.py"
WAYS = 6  # Eager dense, SP and HRL, in two precisions.


@pytest.fixture(scope="module")
def cifar10() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_cifar10", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow  # three training processes
def test_runs_to_its_end_and_goes_on(
    cifar10: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    cifar10.main(state=state, tiny=True, minutes=0, precision="32-true")
    assert "Left: sp-20, dense-20, hrl-20-0.6" in capfd.readouterr().out
    assert not list((state / "runs").glob("*/*"))

    cifar10.main(state=state, tiny=True, minutes=60, only=("hrl-20-0.6",))
    assert "Nothing is left" in capfd.readouterr().out
    assert {path.name for path in (state / "results").iterdir()} == {
        "sp-20.json",
        "hrl-20-0.6.json",
    }
    hrl = read(state / "results" / "hrl-20-0.6.json")
    assert hrl["config"]["hrl"]["target_compute"] == 0.6 and hrl["seed"] == 0
    assert hrl["config"]["data"]["name"] == "data"
    assert {"versions", "hardware", "commit"} <= set(hrl["environment"])
    assert set(hrl["results"]["hrl"]) >= {"evaluation", "sampled", "seconds"}
    assert hrl["train_images_per_s"] > 0
    assert [line["step"] for line in hrl["curve"] if "loss" in line] == [2, 4, 6]

    # Elsewhere, images and all; what is left finds them.
    moved = tmp_path / "elsewhere"
    shutil.move(state, moved)
    cifar10.main(state=moved, tiny=True, plan=True)
    rows = capfd.readouterr().out.splitlines()
    assert [row.split()[3] for row in rows if "-20" in row] == ["done", "step", "done"]
    cifar10.main(state=moved, tiny=True, minutes=60)
    assert "Nothing is left" in capfd.readouterr().out
    assert read(moved / "results" / "dense-20.json")["results"]["dense"]["seconds"] > 0
    assert not list(moved.rglob("model.safetensors"))


def test_timing_is_gone_on_with(cifar10: ModuleType, tmp_path: Path) -> None:
    cifar10.main(state=tmp_path, tiny=True, timing=True, minutes=0)
    assert not (tmp_path / "timing.json").exists()
    cifar10.main(state=tmp_path, tiny=True, timing=True)
    rows = read(tmp_path / "timing.json")["rows"]
    assert len(rows) == WAYS and all(row["images_per_s"] > 0 for row in rows)
    cifar10.main(state=tmp_path, tiny=True, timing=True)
    assert read(tmp_path / "timing.json")["rows"] == rows


def test_what_is_faster_is_chosen(cifar10: ModuleType, tmp_path: Path) -> None:
    def chosen(**speeds: float) -> dict[str, str]:
        timing = cifar10.Timing(tmp_path / "none.json")
        timing.content = {"rows": [], "chosen": {}}
        for compiled in (False, True):
            for precision in ("32-true", "bf16-mixed"):
                speed = speeds["compile" if compiled else "eager"]
                speed *= speeds["bf16"] if precision == "bf16-mixed" else 1
                row = {"depth": 38, "stage": "sp", "compiled": compiled, "precision": precision}
                timing.content["rows"].append(row | {"images_per_s": speed, "step_ms": 1})
        timing.choose("auto", "auto")
        return timing.chosen

    assert chosen(eager=1, compile=2, bf16=1.05) == {"way": "compile", "precision": "32-true"}
    assert chosen(eager=1, compile=0.9, bf16=1.3) == {"way": "eager", "precision": "bf16-mixed"}


def test_the_papers_pieces(cifar10: ModuleType, tmp_path: Path) -> None:
    timing = cifar10.Timing(tmp_path / "none.json")
    timing.content["chosen"] = {"way": "compile", "precision": "bf16-mixed"}

    def pieces(depth: int, schedule: str) -> list[Any]:
        return cifar10.pieces(depth, cifar10.FULL, timing, schedule, tmp_path, 3, False)

    sp, dense, *hrl = pieces(110, "paper")
    assert (sp.label, dense.label, hrl[0].label) == ("sp-110", "dense-110", "hrl-110-0.4")
    assert sorted(child.config.hrl.target_compute for child in hrl) == [
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
    ]
    assert {child.after for child in hrl} == {sp.name} and sp.after is dense.after is None
    lengths = [sp.config.sp.iterations, dense.config.dense.iterations]
    assert [*lengths, hrl[0].config.hrl.iterations] == [64_000, 64_000, 10_000]
    assert dense.config.dense.schedule.warmup_iterations == 400
    assert [child.config.compile for child in (sp, dense, hrl[0])] == [True, True, False]
    assert {child.config.precision for child in (sp, dense, *hrl)} == {"bf16-mixed"}
    assert {child.config.model.name for child in pieces(74, "short")} == {"cifar_resnet74"}
    assert pieces(38, "short")[0].config.sp.iterations == 16_000


def test_runs_that_were_moved_find_their_data(cifar10: ModuleType, tmp_path: Path) -> None:
    timing = cifar10.Timing(tmp_path / "none.json")

    def study_of(place: str) -> tuple[Study, list[Any]]:
        children = cifar10.pieces(
            20, cifar10.TINY, timing, "paper", tmp_path / place / "data", 0, True
        )
        path = tmp_path / place / "runs"
        return Study(path=path, kind="sweep", config=children[0].config, settings={}), children

    study, children = study_of("here")
    for child in children:
        study.prepare(child)
    shutil.move(tmp_path / "here", tmp_path / "there")
    study, children = study_of("there")
    with pytest.raises(UserError, match=r"another data\.name"):
        study.prepare(children[0])
    cifar10.find_data(study, children)
    for child in children:
        config = read(study.prepare(child) / "config.json")
        assert config["data"]["name"] == str(tmp_path / "there" / "data")
    assert config["start"] == str(tmp_path / "there" / "runs" / "seed0" / "sp-20")


def test_stops_in_time_and_then_at_once(
    cifar10: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "GRACE_S", 0.2)
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        cifar10.stop_myself(time.monotonic(), threading.Event())
        assert stop.requested
        time.sleep(5)
    over = threading.Event()
    over.set()
    with StopRequest() as stop:
        cifar10.stop_myself(time.monotonic(), over)
        assert not stop.requested


def test_says_what_is_wrong(cifar10: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no piece is called dense-38: they are sp-20, dense-20"):
        cifar10.main(state=tmp_path / "a", tiny=True, only=("dense-38",))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA device; --tiny tries it"):
            cifar10.main(state=tmp_path / "b", data=tmp_path)
    with pytest.raises(UserError, match="--data names the folder"):
        cifar10.main(state=tmp_path / "c", plan=True)
