"""benchmarks/training.py times a small case, completes its file, and refuses another's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "training.py"
SMALL = ("--models", "cifar_resnet20", "--batch-size", "8", "--image-size", "8", "--turns", "3")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PATH), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow  # four processes
def test_measures_every_stage_once(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    cores = len(os.sched_getaffinity(0))
    done = run("measure", "--out", str(out), *SMALL, "--threads", "1", str(cores + 1))
    assert done.returncode == 0, done.stderr
    assert f"{cores + 1} threads need as many cores" in done.stdout
    results = json.loads(out.read_text())
    (case,) = results["cases"]
    assert (case["model"], case["threads"]) == ("cifar_resnet20", 1)
    assert {"commit", "versions", "hardware"} <= set(results["environment"])
    assert 0.3 < case["keep_rate"] < 0.7 and 0.3 < case["macs_fraction"] < 0.8
    rows = {row["stage"]: row for row in case["stages"]}
    assert list(rows) == ["dense", "sp", "hrl"]
    assert rows["dense"]["ratio_to_dense"] == rows["dense"]["cpu_ratio_to_dense"] == 1
    assert [row["target"] for row in rows.values()] == [None, 1.15, 0.80]
    for row in rows.values():
        assert 0 < row["min_s"] <= row["quartiles_s"][0] <= row["median_s"] <= row["quartiles_s"][1]

    before = out.read_bytes()
    assert run("measure", "--out", str(out), *SMALL, "--threads", "1").returncode == 0
    assert out.read_bytes() == before
    other = run("measure", "--out", str(out), *SMALL, "--threads", "1", "--seed", "1")
    assert other.returncode == 1 and "other settings: name another file" in other.stderr
    assert out.read_bytes() == before
