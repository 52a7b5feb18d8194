"""The first command anybody types, with fewer steps."""

import json
import re
from pathlib import Path

import pytest
import safetensors
from harness import run_command

TINY = [
    f"--{stage}.{flag}"
    for stage in ("dense", "sp", "hrl")
    for flag in ("epochs=0.1", "batch-size=16")
]


@pytest.mark.slow  # ResNet-38 and tensorboard
def test_quickstart(tmp_path: Path) -> None:
    """It ends with the table and with what to type next, which works."""
    done = run_command("train", "digits", *TINY, folder=tmp_path)
    lines = done.stdout.splitlines()
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-\d{8}-\d{6}", run.name)
    assert lines[-2] == f"Run directory: runs/{run.name}"
    following = re.fullmatch(r"Next: skipnet (.*)   or   skipnet (.*)", lines[-1])
    assert following is not None

    title = next(index for index, line in enumerate(lines) if "digits: cifar_resnet38" in line)
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines[title:]
        if line.startswith("│")
    ]
    assert [row[0] for row in cells] == ["dense", "SP", "HRL"]
    for row in cells:
        pattern = r"\d+\.\d\d %;\d+\.\d\dM;\d+\.\d %;\d+\.\d %;(\d+ of 17)?;[\d,]+"
        assert re.fullmatch(pattern, ";".join(row[1:])), row
    assert cells[0][3:5] == ["100.0 %", "100.0 %"]
    for head in ("accuracy", "MACs", "of dense", "blocks run", "by input", "images/s"):
        assert head in lines[title + 2]

    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    files = {file for file in files if not file.startswith("tensorboard/")}
    stages = {f"{stage}.safetensors" for stage in ("dense", "sp", "hrl", "model")}
    logs = {"config.json", "environment.json", "metrics.jsonl", "results.json"}
    assert files == stages | logs
    for name in stages:  # No pickle has the name of another format.
        with safetensors.safe_open(run / name, framework="pt") as file:
            assert "skipnet" in file.metadata()

    for index, words in enumerate(following.groups()):
        shown = run_command(*words.split(), folder=tmp_path, name=f"next{index}-").stdout
        assert "cifar_resnet38" in shown or json.loads(shown.splitlines()[-1])["accuracy"] > 0
