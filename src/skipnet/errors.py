"""What ends a command in other ways than success or a defect of ours."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A user's mistake: the message says what is wrong and what to do instead.

    The commands print it as one line and exit with a non-zero status; any other exception is a
    defect of ours and keeps its traceback.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not known, with the nearest ones that are."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    return f"unknown {kind} {name!r}: did you mean {', '.join(near)}?"


# Which extra brings an optional package.
_EXTRAS = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "matplotlib": "report",
    "timm": "timm",
    "transformers": "transformers",
}


@contextmanager
def extras_named() -> Iterator[None]:
    """Turn the lack of an optional package into a `UserError` that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name]
        raise UserError(f"{error.name} is not installed: pip install 'skipnet[{extra}]'") from None


class Interrupted(Exception):
    """The run was asked to stop, and has left a checkpoint to go on from."""
