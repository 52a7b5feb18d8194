"""`skipnet evaluate`: what it prints is true, however the images are dealt out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_command, write_parquet

import skipnet
from skipnet import cli
from skipnet.commands import models
from skipnet.data.sources import load_split
from skipnet.models.weights import unnamed
from skipnet.training.run import RunDirectory


def evaluate(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """Run the command and return its last line."""
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("stage", ["dense", "sp", "hrl"])
def test_agrees_with_a_plain_loop(
    digits_run: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    shown = evaluate(capsys, digits_run, "--stage", stage)
    network, info = skipnet.load(digits_run / f"{stage}.safetensors")
    images = load_split(RunDirectory.open(digits_run)[1].data, "test", info.classes)
    right, loss, macs, runs = 0, 0.0, 0, torch.zeros(network.num_gates)
    cost = network.cost(1, 8, 8)
    for pixels, label in zip(images.images, images.labels, strict=True):
        image = (pixels[None].float() / 255 - info.mean[0]) / info.std[0]
        with torch.no_grad():
            logits, routing = network(image, execute="masked")
        right += int(logits.argmax() == label)
        loss += -logits.log_softmax(dim=1)[0, label].item()
        executed = routing.decisions[0]
        runs += executed
        blocks = [cost.blocks[0]]
        if stage == "dense":
            blocks += cost.blocks[1:]
        else:
            blocks += [int(g) * block for g, block in zip(executed, cost.blocks[1:], strict=True)]
        macs += cost.stem + sum(blocks) + sum(cost.shortcuts) + sum(cost.gates) + cost.head
    count = len(images)
    assert shown["num_images"] == count == 360
    assert shown["accuracy"] == pytest.approx(100 * right / count)
    assert shown["loss"] == pytest.approx(loss / count, rel=1e-4)
    assert shown["macs"] == pytest.approx(macs / count)
    assert shown["macs_fraction"] == pytest.approx(macs / count / cost.dense)
    assert shown["keep_rates"] == pytest.approx((runs / count).tolist())
    executed_blocks = 1 + sum(shown["keep_rates"])
    assert shown["blocks_fraction"] == pytest.approx(executed_blocks / (network.num_gates + 1))
    assert ("sampled" in shown) == (stage != "dense")


def test_agrees_with_what_training_wrote(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((digits_run / "results.json").read_text())
    for stage in ("dense", "sp", "hrl"):
        shown = evaluate(capsys, digits_run, "--stage", stage)
        sampled = shown.pop("sampled", None)
        expected = results[stage]["evaluation"]
        for name in ("keep_rates", "gate_information", "class_information"):
            assert shown.pop(name) == pytest.approx(expected.pop(name)), name
        assert shown == pytest.approx(expected)
        assert (sampled is None) == (stage == "dense")
    file = evaluate(capsys, digits_run / "sp.safetensors")
    assert file == evaluate(capsys, digits_run, "--stage", "sp")
    assert evaluate(capsys, digits_run) == evaluate(capsys, digits_run, "--stage", "hrl")


def test_same_however_it_is_run(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Executors and batch sizes agree, also on what is sampled in one batch of all."""
    whole = evaluate(capsys, digits_run)
    masked = evaluate(capsys, digits_run, "--execute", "masked")
    assert masked == {**whole, "loss": pytest.approx(whole["loss"]), "sampled": masked["sampled"]}
    assert masked["sampled"]["keep_rates"] == pytest.approx(
        whole["sampled"]["keep_rates"], abs=0.01
    )
    for size in (1, 7, 500):
        other = evaluate(capsys, digits_run, "--batch-size", str(size))
        assert other.pop("sampled")["num_images"] == 360
        assert other == {**other, **{k: pytest.approx(whole[k]) for k in other}}
    assert evaluate(capsys, digits_run, "--seed", "1")["sampled"] != whole["sampled"]
    assert evaluate(capsys, digits_run, "--seed", "0") == whole


def test_other_test_sets(
    cifar_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By another split, other columns and other sizes; with images left out."""
    assert evaluate(capsys, cifar_run)["num_images"] == 20
    labels = [i % 10 for i in range(12)]
    write_parquet(tmp_path / "dev.parquet", labels, image="a", label="b", size=11, bad_rows=(3, 4))
    words = [cifar_run, "--data", tmp_path, "--test-split", "dev", "--label-column", "b"]
    words += ["--image-column", "a", "--on-bad-image", "skip"]
    command = run_command_with_warning(words, tmp_path)
    assert "left out 2 of 12 images" in command.stderr
    shown = json.loads(command.stdout.splitlines()[-1])
    assert shown["num_images"] == 10
    assert len(shown["keep_rates"]) == 5


def run_command_with_warning(words: list[Any], folder: Path) -> Any:
    from harness import Command

    command = Command(["evaluate", *words], folder)
    assert command.wait() == 0
    assert len(command.stderr.splitlines()) == 1
    return command


def test_loss_that_is_not_finite_is_null(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has no word for it."""
    network, info = skipnet.load(digits_run / "dense.safetensors")
    with torch.no_grad():
        network.head[-1].bias.fill_(float("nan"))  # type: ignore[index]
    skipnet.save(network, tmp_path / "model.safetensors", info)
    shown = evaluate(capsys, tmp_path / "model.safetensors", "--data", "digits")
    assert shown["loss"] is None and shown["num_images"] == 360


def test_last_line_is_all_of_stdout_for_a_script(digits_run: Path, tmp_path: Path) -> None:
    command = run_command("evaluate", digits_run, folder=tmp_path)
    (line,) = command.stdout.splitlines()
    assert {"accuracy", "macs", "macs_fraction", "blocks_fraction", "keep_rates", "num_images"} <= (
        set(json.loads(line))
    )


def test_the_function_is_the_command(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = models.evaluate(digits_run, stage="sp")
    assert json.loads(capsys.readouterr().out) == result


def test_classes_without_names(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a checkpoint of the original code leaves them: the test set says what they are called."""
    network, info = skipnet.load(digits_run / "hrl.safetensors")
    file = tmp_path / "unnamed.safetensors"
    skipnet.save(network, file, replace(info, classes=unnamed(10)))
    known = evaluate(capsys, digits_run / "hrl.safetensors", "--data", "digits")
    assert evaluate(capsys, file, "--data", "digits") == known
    write_parquet(tmp_path / "seven" / "test.parquet", [i % 7 for i in range(14)], names="abcdefg")
    assert cli.main(["evaluate", str(file), "--data", str(tmp_path / "seven")]) == 2
    assert "tells 10 apart" in capsys.readouterr().err
