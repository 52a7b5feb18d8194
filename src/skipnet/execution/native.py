"""The native part: a small C program, compiled once a machine with the compiler that is there."""

import atexit
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("route.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fvisibility=hidden", "-shared", "-fPIC")


class DoesNotFit(Exception):
    """This model or machine cannot have an optimised engine: why."""


@functools.cache
def library() -> Path:
    """Return the compiled program, from the user's cache or made now.

    The cache is $SKIPNET_CACHE, or skipnet under $XDG_CACHE_HOME or ~/.cache. Nothing compiled is
    ever loaded from beside a model.

    Raises:
        DoesNotFit: When there is no C compiler or it fails.
    """
    compiler = _compiler()
    key = hashlib.sha256(SOURCE.read_bytes())
    for fact in (*compiler, *FLAGS, *processor()):
        key.update(fact.encode() + b"\0")
    name = f"route-{key.hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _is_whole(folder / name):
            return folder / name
        return _compile(compiler, folder, name)
    except (
        OSError,
        RuntimeError,
    ):  # No home, or a cache that cannot be written: for this process only.
        private = tempfile.TemporaryDirectory(prefix="skipnet-", ignore_cleanup_errors=True)
        atexit.register(private.cleanup)
        return _compile(compiler, Path(private.name), name)


def cache_folder() -> Path:
    """Where compiled programs are kept."""
    if own := os.environ.get("SKIPNET_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).absolute() if base else Path.home() / ".cache") / "skipnet"


@functools.cache
def processor() -> tuple[str, ...]:
    """Return what distinguishes this processor from others that code is compiled for."""
    facts = {platform.machine(), platform.processor()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "flags", "Features", "CPU part"):
            facts.add(value.strip())
    return tuple(sorted(facts))


def _compiler() -> list[str]:
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise DoesNotFit(f"CC is {command!r}: {error}") from None
        if words and shutil.which(words[0]):
            return words
    raise DoesNotFit("there is no C compiler: install gcc or clang, or name one with CC")


def _compile(compiler: list[str], folder: Path, name: str) -> Path:
    """Compile into a folder, and put a digest behind the code.

    Raises:
        DoesNotFit: When the compiler fails.
        OSError: When the folder cannot be written to.
    """
    descriptor, path = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    os.close(descriptor)
    temporary = Path(path)
    try:
        words = [*compiler, *FLAGS, str(SOURCE), "-o", path, "-lm", "-lpthread"]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except OSError as error:
            raise DoesNotFit(f"{compiler[0]} cannot be run: {error}") from None
        code = temporary.read_bytes()
        if done.returncode or not code:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise DoesNotFit(f"{compiler[0]} failed: {said}")
        with temporary.open("ab") as file:
            file.write(hashlib.sha256(code).digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o755)
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / name


def _is_whole(path: Path) -> bool:
    """Whether a compiled program is there and is what was written: to load half of one is fatal."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return len(data) > size and hashlib.sha256(data[:-size]).digest() == data[-size:]
