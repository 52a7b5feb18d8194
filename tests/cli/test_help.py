"""The help of every command, word by word: a flag is made on purpose."""

import importlib
import os
from pathlib import Path

import pytest

from skipnet import cli

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "SKIPNET_UPDATE_GOLDEN"
COMMANDS = {
    "skipnet": ["--help"],
    "train": ["train", "--help"],
    "train-digits": ["train", "digits", "--help"],
    "sweep": ["sweep", "--help"],
    "sweep-digits": ["sweep", "digits", "--help"],
    "ablations": ["ablations", "--help"],
    "ablations-digits": ["ablations", "digits", "--help"],
    "import": ["import", "--help"],
    "evaluate": ["evaluate", "--help"],
    "info": ["info", "--help"],
    "list": ["list", "--help"],
    "export": ["export", "--help"],
    "predict": ["predict", "--help"],
    "benchmark": ["benchmark", "--help"],
}
# From here on the flags are those of `train`.
TRAIN_FLAGS = "  --recipe STR\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(COMMANDS[name])
    except SystemExit as leave:  # of tyro, which prints the help of a command's flags
        code = leave.code
    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    text = "\n".join(line.rstrip() for line in shown.out.strip().splitlines()) + "\n"
    assert str(Path.cwd()) not in text and str(Path.home()) not in text
    if name in ("sweep-digits", "ablations-digits"):
        text, rest = text.split(TRAIN_FLAGS)
        assert "--hrl.target-compute" in rest
    path = GOLDEN / f"{name}.txt"
    if os.environ.get(UPDATE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists() and text == path.read_text(encoding="utf-8"), (
        f"the help of `skipnet {' '.join(COMMANDS[name])}` has changed; if that is meant, run "
        f"{UPDATE}=1 python -m pytest tests/cli/test_help.py, and look at git diff tests/cli/golden"
    )


def test_every_golden_file_is_of_a_command() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(COMMANDS)
    assert set(cli.COMMANDS) <= set(COMMANDS)


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: skipnet COMMAND")
    assert cli.main(["train"]) == 0
    assert capsys.readouterr().out.startswith("usage: skipnet train RECIPE")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_summary_is_the_command_s_own(name: str) -> None:
    """The list of commands is printed without importing them, so it says it once more."""
    place, summary = cli.COMMANDS[name]
    module, function = place.split(":")
    home = importlib.import_module(f"skipnet.commands.{module}")
    command = getattr(home, name if function == "main" else function)
    assert command.__doc__.splitlines()[0].startswith(summary.removesuffix("."))
