"""README's commands and programs do what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Command, StandIn, write_cifar10
from PIL import Image

import skipnet
from skipnet.models import Architecture

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SHOWN_ONLY = {"bibtex", "text"}  # languages of blocks that nobody runs

# Added to a training command, so that it takes seconds; the rest of it stays as README has it.
STEPS = [
    f"--{stage}.{flag}"
    for stage in ("dense", "sp", "hrl")
    for flag in ("epochs=None", "iterations=2", "batch-size=16")
]
SMALL = ["--model.name=cifar_resnet20", "--no-tensorboard", *STEPS]
OVERRIDES = {
    "digits": SMALL,
    "cifar10-resnet38-rnn": [*SMALL, "--data.image-size=8"],
    "cifar10-resnet38-rnn-short": [*SMALL, "--data.image-size=8"],
}
DATA_PLACES = ["path/to/parquet-or-image-folder"]  # where README says that images are
IMAGES = "path/to/images"
BENCHMARK = ["--repeats=2", "--engines", "compacted", "optimized"]


def blocks() -> list[tuple[str, str]]:
    """Language and content of every fenced block; README must be there."""
    text = README.read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_programs_of_the_page_on_adapters_run(tmp_path: Path) -> None:
    """One after the other, as the page is read."""
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(programs) == 4
    (tmp_path / "page.py").write_text("\n".join(programs))
    command = [sys.executable, "-W", "error", "page.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)


def test_every_block_is_of_a_known_kind() -> None:
    languages = [language for language, _ in blocks()]
    assert set(languages) <= {"bash", "python"} | SHOWN_ONLY
    assert {"bash", "python"} <= set(languages)


def commands() -> list[list[str]]:
    """The words of every line of every bash block, in order."""
    content = "".join(text for language, text in blocks() if language == "bash")
    lines = content.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line]


def test_every_command_is_of_a_known_kind() -> None:
    assert commands()
    unknown = [line for line in commands() if line[0] not in ("make", "skipnet")]
    assert not unknown, "teach this test to run them, or write them without ```bash"


def test_make_targets_exist() -> None:
    for line in commands():
        if line[0] == "make":
            done = subprocess.run(
                ["make", "-n", *line[1:]], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{shlex.join(line)}: {done.stderr}"


@pytest.mark.slow  # trains a little
def test_skipnet_commands_run_in_order(tmp_path: Path) -> None:
    """In one folder, as a reader does: what one command leaves, the next one uses."""
    for place in DATA_PLACES:
        write_cifar10(tmp_path / place)
    (tmp_path / IMAGES).mkdir(parents=True)
    Image.new("RGB", (20, 30)).save(tmp_path / IMAGES / "black.png")
    ran = 0
    for line in commands():
        if line[0] != "skipnet":
            continue
        words = line[1:]
        if words[0] in ("train", "sweep", "ablations"):
            assert words[1] in OVERRIDES, f"say in OVERRIDES how {words[1]} is made short"
            words = words + OVERRIDES[words[1]]
        if words[0] == "benchmark":
            words = words + BENCHMARK
        command = Command(words, tmp_path, before=[StandIn()])  # tests/studies trains for real.
        assert command.wait() == 0, command.stderr
        # Where there is no C compiler, the engine says so.
        assert not command.stderr or words[0] in ("predict", "benchmark"), command.stderr
        ran += 1
    assert ran


@pytest.mark.filterwarnings("default:.*run as it is, not optimised")
def test_python_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    architecture = Architecture(name="cifar_resnet20", gate="rnn", in_channels=1)
    info = skipnet.ModelInfo(
        architecture=architecture,
        classes=tuple("0123456789"),
        mean=(0.3,),
        std=(0.4,),
        image_size=(8, 8),
    )
    skipnet.export(architecture.build(), "mine.onnx", info)  # As `skipnet export` would.
    programs = [text for language, text in blocks() if language == "python"]
    for program in programs:
        exec(compile(program, str(README), "exec"), {"__name__": "__main__"})
