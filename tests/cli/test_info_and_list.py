"""`skipnet info` and `skipnet list`: the numbers add up, and everything is named."""

import re
import shutil
from pathlib import Path

import pytest

import skipnet
from skipnet import cli


def show(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def rows(text: str) -> list[list[str]]:
    """The cells of the table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("gate", [None, "rnn", "ff1", "ff2"])
def test_multiply_adds_by_block_add_up(
    capsys: pytest.CaptureFixture[str], gate: str | None
) -> None:
    words = ["info", "cifar_resnet38", *(["--gate", gate] if gate else [])]
    text = show(capsys, *words)
    table = rows(text)
    cost = skipnet.create("cifar_resnet38", gate=gate).cost(3, 32, 32)  # type: ignore[arg-type]
    assert sum(number(row[1]) for row in table) == cost.dense
    assert f"dense: {cost.dense:,} MACs an image (82," in text or f"{cost.dense:,} MACs" in text
    shares = [float(row[2].removesuffix(" %")) for row in table]
    assert sum(shares) == pytest.approx(100, abs=0.01 * len(table))
    blocks = [row for row in table if row[0].startswith("block")]
    assert [row[0] for row in blocks] == [f"block {index}" for index in range(18)]
    gates = [row[3] for row in blocks]
    assert gates[0] == "always runs"
    if gate is None:
        assert set(gates) == {"always runs"} and "gates:" not in text
    else:
        assert sum(number(g) for g in gates[1:]) == sum(cost.gates)
        assert f"gates: {sum(cost.gates):,} MACs in all" in text
        assert f"least possible computation {100 * cost.always / cost.dense:.1f} %" in text


def test_of_a_run(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = show(capsys, "info", digits_run)
    assert text.startswith("tiny_resnet, gate rnn, 10 classes, 1x8x8 images, ")
    network, about = skipnet.load(digits_run / "model.safetensors")
    keep = [row[4] for row in rows(text) if row[0].startswith("block")]
    assert keep[1:] == [f"{100 * rate:.1f} %" for rate in about.results["keep_rates"]]
    measured = re.search(r"as measured when saved: accuracy (\S+) %", text)
    assert measured and float(measured[1]) == pytest.approx(about.results["accuracy"], abs=0.01)
    parameters = sum(p.numel() for p in network.parameters())
    assert f"{parameters:,} parameters" in text
    dense = show(capsys, "info", digits_run, "--stage", "dense")
    assert "gate none (dense)" in dense
    assert show(capsys, "info", digits_run / "dense.safetensors") == dense


def test_of_other_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--num-classes", "7", "--in-channels", "1", "--image-size", "20")
    text = show(capsys, "info", "cifar_resnet20", *words)
    assert "7 classes, 1x20x20 images" in text
    cost = skipnet.create("cifar_resnet20", num_classes=7, in_channels=1).cost(1, 20, 20)
    assert f"dense: {cost.dense:,} MACs an image" in text


def test_list_names_everything(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits_run, tmp_path / "runs" / "mine")
    text = show(capsys, "list")
    for name in [*skipnet.list_models(), *skipnet.list_recipes(), "runs/mine"]:
        lines = [line for line in text.splitlines() if line.split()[:1] == [name]]
        # Weights may be called as the recipe is that they were trained by.
        assert len(lines) == 1 + (name in skipnet.list_weights())
        assert all(len(line.split()) > 2 for line in lines)  # and says something of each
    assert re.search(r"runs/mine +dense \d+\.\d\d % at 100\.0 %, sp .* %, hrl .* %$", text, re.M)


def test_list_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    models = show(capsys, "list", "models", "--pattern", "cifar*resnet3?")
    names = [line.split()[0] for line in models.splitlines()[1:]]
    assert names == ["cifar_resnet32", "cifar_resnet38"]
    assert show(capsys, "list", "models", "--pattern", "vgg*") == "models:\n  (none)\n"
    recipes = show(capsys, "list", "recipes")
    assert [line.split()[0] for line in recipes.splitlines()[1:]] == skipnet.list_recipes()
    assert show(capsys, "list", "runs") == "runs in runs:\n  (none)\n"
    assert show(capsys, "list", "runs", "--runs", tmp_path / "no").endswith("(none)\n")


def test_list_unfinished_run(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    text = show(capsys, "list", "runs", "--runs", tmp_path)
    assert "dense unfinished, sp unfinished, hrl unfinished" in text
