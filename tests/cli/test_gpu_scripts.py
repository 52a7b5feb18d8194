"""The scripts under benchmarks/gpu/ run to their end without a GPU, on small networks."""

import importlib.util
import itertools
import json
import math
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from skipnet import UserError

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu" / "execution.py"
CASES = list(itertools.product((1, 4), ("cifar_resnet20", "resnet18")))
TIMED = {"masked", "compacted", "dense-torch", "dense-compile", "masked-compile", "bound"}
GRAPHS = {"dense-graph", "dense-compile-graph", "pruned-graph"}


@pytest.fixture(scope="module")
def execution() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_execution", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow  # torch.compile traces eight networks
def test_execution_runs_to_its_end_and_completes_an_earlier_file(
    execution: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "execution.json"
    execution.measure(out=out, tiny=True, minutes=0)
    results = read(out)
    assert len(results["cases"]) == len(CASES)
    assert {row["note"] for row in results["rows"]} == {"out of time"}
    assert {row["median_ms"] for row in results["rows"]} == {None}

    execution.measure(out=out, tiny=True)
    results = read(out)
    assert [(case["batch_size"], case["network"]) for case in results["cases"]] == CASES
    assert {"cpu", "gpu", "driver", "cuda", "cudnn"} <= set(results["hardware"])
    assert torch.__version__.startswith(results["versions"]["torch"])
    assert results["settings"]["precision"] == "32" and results["settings"]["keep"] == 0.5
    for case in results["cases"]:
        key = (case["network"], case["batch_size"])
        rows = {
            row["engine"]: row
            for row in results["rows"]
            if (row["network"], row["batch_size"]) == key
        }
        graphs = GRAPHS if case["batch_size"] == 1 else GRAPHS - {"pruned-graph"}
        assert set(rows) == TIMED | graphs
        assert {rows[engine]["note"] for engine in graphs} == {"no CUDA"}
        assert {rows[engine]["median_ms"] for engine in graphs} == {None}
        assert {rows[e]["note"] for e in TIMED - {"bound"}} == {""}
        for engine in TIMED:
            row = rows[engine]
            assert 0 < row["min_ms"] <= row["median_ms"] <= row["p95_ms"]
            rate = 1e3 * case["batch_size"] / row["median_ms"]
            assert math.isclose(row["images_per_s"], rate, rel_tol=1e-2)
        for engine in TIMED - {"bound"}:
            assert rows[engine]["error"] <= 1e-4
        best = rows[case["best_dense"]]
        assert best["ratio_to_best_dense"] == 1
        assert best["median_ms"] == min(rows[e]["median_ms"] for e in TIMED if "dense" in e)
        assert 0 < case["macs_fraction"] < 1
        assert math.isclose(
            rows["bound"]["ratio_to_best_dense"], case["macs_fraction"], abs_tol=1e-3
        )

    before = out.read_bytes()
    capsys.readouterr()
    execution.measure(out=out, tiny=True)
    assert out.read_bytes() == before
    printed = capsys.readouterr().out
    assert "Nothing is missing" in printed and "cifar_resnet20, 4" in printed

    with pytest.raises(UserError, match="has other settings"):
        execution.measure(out=out, tiny=True, seed=1)
    assert out.read_bytes() == before


@pytest.fixture
def short(execution: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One case, and a compiler that fails at once."""
    network = execution.TINY.networks[0]
    plan = replace(execution.TINY, networks=(network,), batch_sizes=(4,))
    monkeypatch.setattr(execution, "TINY", plan)

    def fails(function: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fails)


@pytest.mark.usefixtures("short")
def test_engines_that_fail_are_recorded(execution: ModuleType, tmp_path: Path) -> None:
    execution.measure(out=tmp_path / "out.json", tiny=True, precision="bf16")
    rows = {row["engine"]: row for row in read(tmp_path / "out.json")["rows"]}
    assert rows["masked-compile"]["note"] == "RuntimeError: no compiler"
    assert rows["dense-compile-graph"]["note"] == "RuntimeError: no compiler"
    assert rows["compacted"]["median_ms"] > 0 and rows["compacted"]["error"] <= 0.1
    assert rows["bound"]["note"].endswith("of dense-torch")


@pytest.mark.usefixtures("short")
def test_wrong_engines_are_not_timed(
    execution: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in another order; decisions other than the network's; out of memory in the third run."""
    runs = execution.Case._plain

    def spoilt(case: Any, engine: str) -> Any:
        run = runs(case, engine)
        calls = itertools.count(1)

        def spoil() -> Any:
            logits, decisions, gates = run()
            match engine:
                case "compacted":
                    logits = logits.flip(0)
                case "masked":
                    decisions = 1 - decisions
                case _ if next(calls) == 3:
                    raise torch.OutOfMemoryError
            return logits, decisions, gates

        return spoil

    monkeypatch.setattr(execution.Case, "_plain", spoilt)
    with pytest.raises(UserError, match=r"masked of cifar_resnet20, batch 4, is wrong.*a defect"):
        execution.measure(out=tmp_path / "out.json", tiny=True)
    rows = {row["engine"]: row for row in read(tmp_path / "out.json")["rows"]}
    assert rows["masked"]["note"] == "wrong: it decides otherwise than masked execution"
    assert rows["compacted"]["note"].startswith("wrong: its logits are")
    assert rows["dense-torch"]["note"] == "out of memory"
    assert rows["bound"]["note"] == "no dense engine was timed"
    assert {row["median_ms"] for row in rows.values()} == {None}


def test_what_is_more_valuable_later_is_left_time_for(
    execution: ModuleType, tmp_path: Path
) -> None:
    plan = replace(execution.FULL, case_s=10, compile_s={"dense-compile": 20, "masked-compile": 40})
    results = execution.Results(tmp_path / "out.json", {}, plan)
    later = [("resnet101", 1), ("resnet101", 256)]

    def allowed(seconds: float) -> list[str]:
        end = time.monotonic() + seconds
        prospect = execution.Prospect(results, "cifar_resnet110", later, end)
        return [name for name in ("compacted", *plan.compile_s) if prospect.allows(name)]

    assert allowed(29) == []
    assert allowed(31) == ["compacted"]
    assert allowed(51) == ["compacted", "dense-compile"]
    assert allowed(109) == ["compacted", "dense-compile"]
    assert allowed(111) == ["compacted", "dense-compile", "masked-compile"]

    rows = execution.all_rows(1, "")
    for row in rows:
        row |= {"median_ms": 1, "prepare_s": 30}
    rows[-2]["note"] = execution.OUT_OF_TIME
    results.add("cifar_resnet110", 1, {}, rows)
    untimed, incomplete = results.missing()
    assert len(untimed) == 7 and incomplete == [("cifar_resnet110", 1)]
    for seconds, fits in ((69, False), (71, True)):  # 10 + 30 + 30: as long as it took before.
        end = time.monotonic() + seconds
        prospect = execution.Prospect(results, "cifar_resnet110", [], end)
        assert prospect.allows_all() == fits


def test_execution_says_what_is_wrong(execution: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "execution.json"
    with pytest.raises(UserError, match="keep must lie in"):
        execution.measure(out=out, tiny=True, keep=1.5)
    out.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="not a file of this script"):
        execution.measure(out=out, tiny=True)
    assert out.read_text(encoding="utf-8") == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_execution_refuses_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "execution.json"
    monkeypatch.setattr(sys, "argv", [str(PATH), "--out", str(out)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(PATH), run_name="__main__")
    assert exit.value.code == 2
    message = "execution.py: error: this needs a CUDA device; --tiny tries it on the CPU\n"
    assert capsys.readouterr().err == message
    assert not out.exists()


@pytest.mark.gpu
@pytest.mark.slow  # compiles four networks
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_execution_times_graphs_on_a_gpu(
    execution: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(execution.FULL, networks=execution.TINY.networks[:1], batch_sizes=(1, 4))
    monkeypatch.setattr(execution, "FULL", plan)
    precision, tuned = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        execution.measure(out=tmp_path / "out.json")
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = tuned
    rows = read(tmp_path / "out.json")["rows"]
    assert {row["engine"] for row in rows} == TIMED | GRAPHS
    assert [row for row in rows if row["median_ms"] is None] == []
