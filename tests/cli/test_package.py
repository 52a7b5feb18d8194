"""The built wheel: what it holds, and that it works where the source is out of reach."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "skipnet"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that sees no import path but its own; fail with its output."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name not in hidden},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the working tree without network."""
    out = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    run(*build, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def install_with_dependencies(venv: Path, wheel: Path) -> bool:
    """Install the wheel and its core dependencies from uv's cache; False if they are not there."""
    uv = shutil.which("uv", path=sysconfig.get_path("scripts"))
    if uv is None:
        return False
    # Links into the cache instead of copies: torch alone is larger than some /tmp.
    install = [uv, "pip", "install", "--offline", "--link-mode", "symlink", "--python", venv]
    constraints = ["--constraints", ROOT / "requirements" / "core.txt"]
    done = subprocess.run(
        [str(part) for part in [*install, *constraints, wheel]],
        cwd=venv,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0


def create_venv(venv: Path) -> Path:
    """Create an empty virtual environment, and return its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    return Path(sysconfig.get_path("scripts", "venv", vars={"base": str(venv)})) / "python"


def install_beside_dependencies(venv: Path, wheel: Path) -> None:
    """Unpack the wheel in the environment, and borrow this one's dependencies."""
    here = sysconfig.get_path("purelib")
    there = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(venv)}))
    # A path in a .pth file comes last in sys.path, and the .pth files that lie in
    # it are not read, so this environment's editable install stays out of reach.
    (there / "borrowed.pth").write_text(here + "\n")
    installer = [sys.executable, "-m", "uv", "pip", "install", "--offline", "--python", venv]
    if shutil.which("uv", path=sysconfig.get_path("scripts")) is None:
        pip = [sys.executable, "-m", "pip", "--python", venv]
        installer = [*pip, "install", "--no-index", "--disable-pip-version-check"]
    run(*installer, "--no-deps", wheel, cwd=venv)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory):
    """The Python of a clean environment that holds the installed wheel."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    python = create_venv(venv)
    if not install_with_dependencies(venv, wheel):
        shutil.rmtree(venv)
        python = create_venv(venv)
        install_beside_dependencies(venv, wheel)
    yield python
    shutil.rmtree(venv)


def test_wheel_holds_the_whole_package(wheel: Path):
    """Every file of src/skipnet is in it, and nothing else but the metadata."""
    expected = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"skipnet-{VERSION}.dist-info"
        assert {name for name in names if not name.startswith(f"{info}/")} == expected
        assert "skipnet/py.typed" in names
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert licence == (ROOT / "LICENSE").read_text()
    assert f"Version: {VERSION}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata


def test_installed_package_imports_from_the_environment(python: Path, tmp_path: Path):
    """The import finds the installed files, under the version that was built."""
    code = (
        "import importlib.metadata, skipnet;"
        "print(skipnet.__file__, importlib.metadata.version('skipnet'), sep='\\n')"
    )
    place, version = run(python, "-c", code, cwd=tmp_path).stdout.splitlines()[-2:]
    assert Path(place).is_relative_to(python.parents[1])
    assert version == VERSION


def test_installed_command_prints_its_help(python: Path, tmp_path: Path):
    """The skipnet command starts with the core dependencies alone."""
    shown = run(python.with_name("skipnet"), "--help", cwd=tmp_path).stdout
    assert "usage: skipnet" in shown
