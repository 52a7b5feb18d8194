"""The trained networks that come with the package."""

import re
from pathlib import Path

import pytest
import torch

import skipnet
from skipnet import UserError, cli
from skipnet.models import weights
from skipnet.training.start import locate_start

NAMES = skipnet.list_weights()


def test_there_are_some() -> None:
    assert "cifar10-resnet38-rnn" in NAMES


@pytest.mark.parametrize("name", NAMES)
class TestEach:
    """Every file, with its card."""

    def test_skips(self, name: str) -> None:
        network, info = skipnet.load(name)
        assert not network.training and len(info.classes) == info.architecture.num_classes
        images = torch.randn(3, info.architecture.in_channels, *info.image_size)
        logits, routing = network(images, execute="compacted")
        assert logits.shape == (3, len(info.classes))
        assert 0 < routing.macs_fraction < 1

    def test_is_small(self, name: str) -> None:
        assert weights.find_weights(name).stat().st_size < 10e6

    def test_card_says_what_was_measured(self, name: str) -> None:
        """The figures of the card are those that the file carries."""
        path = weights.find_weights(name)
        card = path.with_suffix(".md").read_text(encoding="utf-8")
        _, info = skipnet.load(name)
        assert f"{info.results['accuracy']:.2f} %" in card
        assert f"{100 * info.results['macs_fraction']:.1f} %" in card
        assert f"{info.results['gates_by_input']} of {len(info.results['keep_rates'])}" in card
        for title in ("## Data", "## Training", "## Limits"):
            assert title in card
        assert not re.search(r"/(tmp|home|work)/", card)


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAMES[0]).write_bytes(b"mine")
    with pytest.raises(UserError, match="not a safetensors file"):
        skipnet.load(NAMES[0])


def test_an_unknown_name_says_where_to_look() -> None:
    with pytest.raises(UserError, match=r"no model file nobody .*skipnet list weights"):
        skipnet.load("nobody")


def test_commands_take_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", NAMES[0]]) == 0
    assert "as measured when saved: accuracy" in capsys.readouterr().out
    assert cli.main(["list", "weights"]) == 0
    assert NAMES[0] in capsys.readouterr().out
    assert cli.main(["evaluate", NAMES[0], "--stage", "hrl"]) == 2
    assert "--stage chooses within a run directory" in capsys.readouterr().err
    assert cli.main(["evaluate", NAMES[0]]) == 2
    assert "name a test set with --data" in capsys.readouterr().err


def test_training_starts_from_a_name() -> None:
    assert locate_start(Path(NAMES[0]), "hrl") == weights.find_weights(NAMES[0])
