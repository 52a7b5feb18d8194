"""The command line: `skipnet COMMAND …`.

Only `main` reads arguments, prints errors as one line and turns them into exit codes. A command's
module is imported when it is called: `predict` must start without torch.
"""

import contextlib
import difflib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any, TextIO

import tyro

import skipnet
from skipnet.errors import Interrupted, UserError, extras_named

EXIT_MISTAKE = 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE

COMMANDS = {
    "train": ("train:main", "Train a recipe's stages in order and leave one run directory."),
    "sweep": (
        "sweep:main",
        "Train the curve of accuracy against computation: one SP a seed, and HRL to every target.",
    ),
    "ablations": (
        "ablations:main",
        "Train a recipe with one thing left out or swapped at a time, and leave one table.",
    ),
    "import": (
        "models:import_",
        "Read a checkpoint of the original SkipNet code, and write a model file.",
    ),
    "evaluate": ("models:evaluate", "Measure accuracy and computation on a test set."),
    "info": (
        "models:info",
        "Show a network's architecture, its multiply-adds by block, and the gates' share.",
    ),
    "list": ("models:list_", "List networks, trained weights, recipes and runs."),
    "export": ("models:export", "Write a trained network as one portable ONNX file."),
    "predict": ("predict:predict", "Classify image files with an exported network."),
    "benchmark": ("benchmark:benchmark", "Time a network in every engine, in turns."),
}
"""Each command's module and function in `skipnet.commands`, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 on a mistake, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # What is not UTF-8 shows a question mark instead.
        with contextlib.suppress(OSError):  # A stream that somebody else has put in its place.
            sys.stdout.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _dispatch(words)
        sys.stdout.flush()
    except UserError as error:
        print(f"skipnet: error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except Interrupted as interruption:
        print(f"skipnet: {interruption}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("skipnet: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # Whoever read our output, head perhaps, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, without the place in our code that says nothing to whoever types commands."""
    print(f"skipnet: warning: {message}", file=sys.stderr)


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return
    if words[0] == "--version":
        print(skipnet.__version__)
        return
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}: {hint}")
    module, function = COMMANDS[name][0].split(":")
    with extras_named():
        command: Callable[..., Any] = getattr(
            importlib.import_module(f"skipnet.commands.{module}"), function
        )
        if function == "main":  # Reads its arguments itself.
            command(rest)
        else:
            tyro.cli(command, prog=f"skipnet {name}", args=rest)


def _usage() -> str:
    lines = [f"  {name:10s} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: skipnet COMMAND …",
            "",
            "Residual networks that decide, image by image, which of their blocks to run.",
            "",
            "commands:",
            *lines,
            "",
            "skipnet COMMAND --help explains each.  Start with: skipnet train digits",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
