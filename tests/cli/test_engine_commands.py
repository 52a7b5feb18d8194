"""`skipnet export`, `predict` and `benchmark`, as typed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_command
from PIL import Image

import skipnet
from skipnet import cli
from skipnet.commands.predict import Prediction, predict
from skipnet.data.sources import DataConfig, load_split
from skipnet.execution.native import DoesNotFit, library

# Where there is no C compiler a warning says so.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def exported(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    run_command("export", digits_run, folder / "model.onnx", folder=folder)
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def images(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test images as files, named by their number."""
    folder = tmp_path_factory.mktemp("images")
    for number, pixels in enumerate(test_images(digits_run).images[:6]):
        Image.fromarray(pixels[0].numpy()).save(folder / f"{number}.png")
    return folder


def test_images(run: Path) -> skipnet.ImageSet:
    source = json.loads((run / "config.json").read_text())["data"]
    return load_split(DataConfig(**source), "test")


test_images.__test__ = False  # type: ignore[attr-defined]


def test_predict_says_what_the_network_says(digits_run: Path, exported: Path, images: Path) -> None:
    network, about = skipnet.load(digits_run / "model.safetensors")
    batch = test_images(digits_run).images[:6] / 255.0
    batch = (batch - about.mean[0]) / about.std[0]
    with torch.inference_mode():
        logits, routing = network(batch)
    found = predict(exported, (images,))
    assert [p.image for p in found] == [str(images / f"{i}.png") for i in range(6)]
    assert [p.label for p in found] == [about.classes[i] for i in logits.argmax(1)]
    probabilities = logits.softmax(1).amax(1).numpy()
    np.testing.assert_allclose([p.probability for p in found], probabilities, atol=1e-4)
    assert [p.macs for p in found] == routing.macs.tolist()
    assert [p.blocks_run for p in found] == (routing.executed.sum(1) + 1).tolist()
    assert all(p.ms > 0 and p.num_blocks == len(network.blocks) for p in found)


def test_predict_prints_a_line_an_image(
    exported: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", str(exported), str(images), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["image", "class", "probability"]
    assert len(lines) == 8 and lines[7].startswith("6 images, ")
    one = str(images / "0.png")
    assert cli.main(["predict", str(exported), one, "--json", "--no-optimize"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert set(json.loads(line)) == set(Prediction.__dataclass_fields__)


def test_predict_leaves_torch_alone(exported: Path, images: Path) -> None:
    words = ["predict", str(exported), str(images)]
    code = (
        f"import sys; from skipnet import cli; cli.main({words}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "no.onnx", "{images}"], "there is no ONNX file no.onnx"),
        (["predict", "{model}", "no.png"], "there is no image file or folder no.png"),
        (["predict", "{model}", "{empty}"], "has no images"),
        (["predict", "{model}", "{text}", "--no-optimize"], "cannot be read"),
        (["predict", "{text}", "{text}"], "not an ONNX file"),
        (["predict", "{model}", "{images}", "--threads", "0"], "threads must be at least 1"),
        (["export", "{run}", "model.pt"], "must end in .onnx"),
        (["export", "no", "model.onnx"], "no run directory or model file no"),
        (["export", "{run}", "no/folder/model.onnx"], "no/folder/model.onnx"),
        (["benchmark", "cifar_resnet21"], "did you mean cifar_resnet"),
        (["benchmark", "cifar_resnet20", "--keep", "1.5"], "keep must lie in"),
        (["benchmark", "cifar_resnet20", "--batch-size", "0"], "batch_size must be at least 1"),
        (["benchmark", "cifar_resnet20", "--repeats", "0"], "repeats must be at least 1"),
        (["benchmark", "cifar_resnet20", "--threads", "0"], "threads must be at least 1"),
        (["benchmark", "cifar_resnet20", "--image-size", "0"], "image_size is 0"),
        (["benchmark", "{run}", "--stage", "dense"], "a dense network has no blocks to skip"),
        (["benchmark", "{run}", "--image-size", "16"], "--image-size needs --keep"),
        (["benchmark", "{run}", "--batch-size", "100000"], "fewer than a batch"),
    ],
)
def test_mistakes(
    words: list[str],
    said: str,
    digits_run: Path,
    exported: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    places = {
        "run": digits_run,
        "model": exported,
        "images": images,
        "empty": tmp_path / "empty",
        "text": tmp_path / "text.png",
    }
    assert cli.main([word.format(**places) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("skipnet: error: ") and said in shown.err
    assert shown.err.count("\n") == 1


def test_predict_skips_what_cannot_be_read(
    exported: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_text("no image")
    words = ["predict", exported, tmp_path / "bad.png", images / "0.png", "--on-bad-image", "skip"]
    assert cli.main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2 and "bad.png" in shown.err


def test_benchmark_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        library()
    except DoesNotFit as reason:
        pytest.skip(str(reason))
    engines = ["dense-torch", "masked", "compacted", "portable", "optimized", "bound"]
    words = ["benchmark", "cifar_resnet20", "--image-size", "16", "--repeats", "3", "--seed", "1"]
    assert cli.main([*words, "--engines", *engines]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["engine"] for row in result["rows"]] == ["dense-torch", "dense-onnx", *engines[1:]]
    assert (result["model"], result["keep"], result["batch_size"]) == ("cifar_resnet20", 0.5, 1)
    assert 0 < result["macs_fraction"] < 1 and result["threads"] == 1
    base = result["rows"][1]
    assert base["ratio_to_dense_onnx"] == 1
    for row in result["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p95_ms"]
        expected = row["median_ms"] / base["median_ms"]
        assert row["ratio_to_dense_onnx"] == pytest.approx(expected, rel=1e-2)


def test_benchmark_of_another_library_s_network(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", "torchvision/resnet18", "--image-size", "32", "--repeats", "1"]
    assert cli.main([*words, "--engines", "compacted", "portable"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["model"], result["gate"]) == ("torchvision/resnet18", "rnn")
    assert [row["engine"] for row in result["rows"]] == ["dense-onnx", "compacted", "portable"]


def test_benchmark_of_a_run_lets_its_gates_decide(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["benchmark", str(digits_run), "--batch-size", "4", "--repeats", "2"]
    assert cli.main([*words, "--engines", "compacted", "portable", "bound"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["keep"] is None and result["batch_size"] == 4
    assert [row["engine"] for row in result["rows"]] == [
        "dense-onnx",
        "compacted",
        "portable",
        "bound",
    ]


def test_benchmark_refuses_an_engine_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from skipnet.routing import network

    def wrong(block: object, features: object, bypass: torch.Tensor, g: object) -> torch.Tensor:
        return bypass

    monkeypatch.setitem(network.EXECUTORS, "compacted", wrong)
    words = ["benchmark", "cifar_resnet20", "--image-size", "8", "--engines", "compacted"]
    assert cli.main([*words, "--repeats", "1"]) == 2
    assert "compacted gives logits" in capsys.readouterr().err
