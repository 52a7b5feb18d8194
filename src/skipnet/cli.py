"""The command line: `skipnet train | evaluate | info | list`, each an importable function.

Only `main` reads arguments, prints errors as one line and turns them into exit codes.
"""

import contextlib
import difflib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import torch
import tyro
from rich.console import Console
from rich.table import Table

import skipnet
from skipnet.analysis.evaluate import evaluate as evaluate_model
from skipnet.data.sources import DataConfig, load_split
from skipnet.errors import UserError
from skipnet.models.registry import Architecture, describe, list_models
from skipnet.models.weights import ModelInfo, load
from skipnet.recipes import describe_recipe, list_recipes, recipe
from skipnet.routing.decisions import Sample
from skipnet.routing.gates import GateName
from skipnet.routing.network import ExecutorName, SkipNet
from skipnet.seeding import EVALUATION, sub_seed
from skipnet.training.config import StageName, TrainConfig
from skipnet.training.loop import Interrupted
from skipnet.training.run import RunDirectory
from skipnet.training.train import train as train_run

EXIT_MISTAKE = 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE


def train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    *,
    output: Path | None = None,
    resume: Path | None = None,
) -> RunDirectory:
    """Train a recipe's stages in order and leave one run directory.

    Args:
        config: What to do.
        output: The run directory to make; runs/RECIPE-TIME if not given.
        resume: A run directory to continue to the same numbers as if it had not stopped.
    """
    return train_run(config, output=output, resume=resume)


def evaluate(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")],
    *,
    data: str | None = None,
    stage: StageName | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    on_bad_image: Literal["stop", "skip"] | None = None,
    execute: ExecutorName = "compacted",
    batch_size: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure accuracy and computation on a test set; the last line of stdout is one JSON object.

    Its fields: accuracy (percent), loss, macs (mean an image, gates included), macs_fraction (of
    the dense network), blocks_fraction (the paper's count: the first block always counts as run),
    keep_rates (one a gate), num_images, and, for a network with gates, the same for sampled
    instead of thresholded decisions under "sampled".

    Args:
        model: A run directory or a model file.
        data: digits, a Hugging Face hub name, or a folder of parquet files or images; what the run
            was trained on if not given.
        stage: Which stage of a run; its last finished one if not given.
        test_split: Name of the split.
        image_column: Column of the images; found by its type or name if not given.
        label_column: Column of the labels; label, labels or fine_label if not given.
        on_bad_image: Stop at an image that cannot be read, or leave it out with a warning.
        execute: masked runs every block on every image, compacted only where it is needed.
        batch_size: Images a batch.
        seed: Of the sampled decisions.
    """
    path = _locate(model, stage)
    network, info = load(path)
    if data is not None:
        source = DataConfig(name=data)
    elif (path.parent / "config.json").exists():
        source = RunDirectory.open(path.parent)[1].data
    else:
        raise UserError(f"{path} does not say what it was trained on: name a test set with --data")
    source = replace(
        source,
        channels=1 if info.architecture.in_channels == 1 else 3,
        image_size=_image_size(source, info),
        test_split=test_split or source.test_split,
        image_column=image_column or source.image_column,
        label_column=label_column or source.label_column,
        on_bad_image=on_bad_image or source.on_bad_image,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = load_split(source, "test", info.classes).to(device)
    network.to(device)

    def measure(**decide: Any) -> dict[str, Any]:
        return evaluate_model(
            network,
            images,
            mean=info.mean,
            std=info.std,
            execute=execute,
            batch_size=batch_size,
            **decide,
        ).to_dict()

    result = measure()
    if network.num_gates:
        generator = torch.Generator(device).manual_seed(sub_seed(seed, EVALUATION, 0))
        result["sampled"] = measure(decide=Sample(generator))
    print(json.dumps(result))
    return result


def info(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    *,
    stage: StageName | None = None,
    gate: GateName | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | None = None,
) -> None:
    """Show a network's architecture, its multiply-adds by block, and the gates' share.

    Args:
        model: A run directory, a model file, or a name of the registry.
        stage: Which stage of a run; its last finished one if not given.
        gate: Kind of gate, for a name of the registry.
        num_classes: Number of classes, for a name of the registry.
        in_channels: Channels of the images, for a name of the registry.
        image_size: Height and width of the images; those trained on, or 32, if not given.
    """
    console = Console(highlight=False)
    size = (32, 32)
    results: dict[str, Any] = {}
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}; set it to 1 or more pixels")
    if model not in list_models() and ("/" in model or model.endswith(".safetensors")):
        _demand_exists(Path(model))
    if model in list_models() or not Path(model).exists():
        architecture = Architecture(
            name=model, gate=gate, num_classes=num_classes, in_channels=in_channels
        )
        network = architecture.build()
    else:
        network, about = load(_locate(Path(model), stage))
        architecture, size, results = about.architecture, about.image_size, about.results
    if image_size is not None:
        size = (image_size, image_size)
    _print_info(console, network, architecture, size, results)


def list_(
    what: tyro.conf.Positional[Literal["models", "recipes", "runs", "all"]] = "all",
    *,
    pattern: str = "*",
    runs: Path = Path("runs"),
) -> None:
    """List networks, recipes and runs.

    Args:
        what: models, recipes, runs, or all of them.
        pattern: Shell pattern of the models' names.
        runs: Where run directories are.
    """
    if what in ("models", "all"):
        _print_list("models", {name: describe(name) for name in list_models(pattern)})
    if what in ("recipes", "all"):
        _print_list("recipes", {name: describe_recipe(name) for name in list_recipes()})
    if what in ("runs", "all"):
        _print_list(f"runs in {runs}", {str(path): _describe_run(path) for path in _runs(runs)})


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "evaluate": evaluate,
    "info": info,
    "list": list_,
}


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
    if name == "train":
        _dispatch_train(rest)
    else:
        tyro.cli(COMMANDS[name], prog=f"skipnet {name}", args=rest)


def _dispatch_train(words: list[str]) -> None:
    """`train RECIPE [flags]`, or `train --resume RUN`, which reads the run's configuration."""
    if not words or words[0] in ("-h", "--help"):
        print(_train_usage())
        return
    if words[0].startswith("-"):
        resume = _resume_argument(words)
        _, config = RunDirectory.open(resume)
        title = "--resume"
    else:
        config = recipe(words[0])
        title = words.pop(0)

    def command(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = config,
        *,
        output: Path | None = None,
        resume: Path | None = None,
    ) -> None:
        train(config, output=output, resume=resume)

    command.__doc__ = train.__doc__
    tyro.cli(command, prog=f"skipnet train {title}", args=words)


def _resume_argument(words: list[str]) -> Path:
    for index, word in enumerate(words):
        if word == "--resume" and index + 1 < len(words):
            return Path(words[index + 1])
        if word.startswith("--resume="):
            return Path(word.removeprefix("--resume="))
    raise UserError(
        f"train needs a recipe ({', '.join(list_recipes())}) or --resume RUN; see skipnet train -h"
    )


def _usage() -> str:
    lines = [f"  {name:9s} {_first_line(command)}" for name, command in COMMANDS.items()]
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


def _train_usage() -> str:
    lines = [f"  {name:26s} {describe_recipe(name)}" for name in list_recipes()]
    return "\n".join(
        [
            "usage: skipnet train RECIPE [--field value …] [--output RUN]",
            "       skipnet train --resume RUN",
            "",
            _first_line(train),
            "",
            "recipes:",
            *lines,
            "",
            "skipnet train RECIPE --help lists every field with the recipe's value.  Example:",
            "  skipnet train digits --hrl.target-compute 0.5 --seed 1",
        ]
    )


def _first_line(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").split("\n")[0]


def _locate(path: Path, stage: StageName | None) -> Path:
    """The model file meant by a run directory or a file."""
    if path.is_dir():
        model = RunDirectory.open(path)[0].model_path(stage)
        if not model.exists():
            what = f"no finished stage {stage}" if stage else "no finished stage yet"
            raise UserError(f"{path} has {what}: continue it with skipnet train --resume {path}")
        return model
    _demand_exists(path)
    if stage is not None:
        raise UserError(f"--stage chooses within a run directory, and {path} is none")
    return path


def _demand_exists(path: Path) -> None:
    if not path.exists():
        raise UserError(f"there is no run directory or model file {path}; see skipnet list runs")


def _image_size(source: DataConfig, info: ModelInfo) -> int | None:
    """What test images must be resized to: the size trained on, if that is square."""
    height, width = info.image_size
    return height if height == width else source.image_size


def _print_info(
    console: Console,
    network: SkipNet,
    architecture: Architecture,
    size: tuple[int, int],
    results: dict[str, Any],
) -> None:
    cost = network.cost(architecture.in_channels, *size)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    console.print(
        f"{architecture.name}, gate {architecture.gate or 'none (dense)'}, "
        f"{architecture.num_classes} classes, "
        f"{architecture.in_channels}x{size[0]}x{size[1]} images, {parameters:,} parameters"
    )
    table = Table()
    keep = results.get("keep_rates") or []
    for title in ("part", "MACs", "of dense", "gate before it", "keep rate"):
        table.add_column(title, justify="left" if title == "part" else "right")

    def row(part: str, macs: int, gate: str = "", rate: str = "") -> None:
        table.add_row(part, f"{macs:,}", f"{100 * macs / cost.dense:.2f} %", gate, rate)

    row("stem", cost.stem)
    for index, macs in enumerate(cost.blocks):
        gated = index > 0 and cost.gates
        gate = f"{cost.gates[index - 1]:,}" if gated else "always runs"
        rate = f"{100 * keep[index - 1]:.1f} %" if gated and keep else ""
        row(f"block {index}", macs, gate, rate)
        if cost.shortcuts[index]:
            row("  its projection (always runs)", cost.shortcuts[index])
    row("head", cost.head)
    console.print(table)
    console.print(
        f"dense: {cost.dense:,} MACs an image "
        f"({cost.dense_without_projections:,} without projections and classifier, as in the paper)"
    )
    if cost.gates:
        console.print(
            f"gates: {sum(cost.gates):,} MACs in all, {100 * sum(cost.gates) / cost.dense:.3f} % "
            f"of dense; least possible computation {100 * cost.always / cost.dense:.1f} %"
        )
    if results:
        console.print(
            f"as measured when saved: accuracy {results['accuracy']:.2f} %, computation "
            f"{100 * results['macs_fraction']:.1f} % of dense, blocks run "
            f"{100 * results['blocks_fraction']:.1f} %"
        )


def _print_list(title: str, entries: dict[str, str]) -> None:
    print(f"{title}:")
    width = max(map(len, entries), default=0)
    for name, text in entries.items():
        print(f"  {name:{width}s}  {text}")
    if not entries:
        print("  (none)")


def _runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/config.json"))


def _describe_run(path: Path) -> str:
    try:
        run, config = RunDirectory.open(path)
    except UserError as error:
        return str(error)
    parts = []
    for name in config.stages:
        if run.finished(name):
            result = run.results[name]["evaluation"]
            parts.append(
                f"{name} {result['accuracy']:.2f} % at {100 * result['macs_fraction']:.1f} %"
            )
        else:
            parts.append(f"{name} unfinished")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
