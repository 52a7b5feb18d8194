"""`skipnet evaluate | info | list | export`: what is done with networks that are there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from skipnet.analysis.evaluate import evaluate as evaluate_model
from skipnet.data.sources import DataConfig, load_split
from skipnet.errors import UserError
from skipnet.models import Architecture, defaults_of, describe, libraries, list_models
from skipnet.models.original import DataName, read_checkpoint
from skipnet.models.weights import ModelInfo, find_weights, list_weights, load, save
from skipnet.recipes import describe_recipe, list_recipes
from skipnet.routing.decisions import Sample
from skipnet.routing.gates import GateName
from skipnet.routing.network import ExecutorName, SkipNet
from skipnet.seeding import EVALUATION, sub_seed
from skipnet.sharing import is_hub_id
from skipnet.training.config import StageName
from skipnet.training.run import RunDirectory


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
    keep_rates (one a gate), num_images; what depends on the input: macs_spread (standard deviation
    over the images, of dense), num_paths (different decision vectors), gates_by_input (gates open
    for 5 to 95 % of the images), gate_information and class_information (bits a decision tells
    about the image and about its class, one a gate); and, for a network with gates, the same for
    sampled instead of thresholded decisions under "sampled".

    Args:
        model: A run directory, a model file, or a name of skipnet list weights.
        data: digits, a Hugging Face hub name, or a folder of parquet files or images; what the run
            was trained on if not given.
        stage: Which stage of a run; its last finished one if not given.
        test_split: Name of the split.
        image_column: Column of the images; found by its type or name if not given.
        label_column: Column of the labels; label, labels or fine_label if not given.
        on_bad_image: Stop at an image that cannot be read, or leave it out with a warning.
        execute: masked runs every block on every image, compacted only where it is needed, auto
            the faster of the two.
        batch_size: Images a batch.
        seed: Of the sampled decisions.
    """
    path = locate(model, stage)
    network, about = load(path)
    source = test_source(
        path,
        about,
        data,
        test_split=test_split,
        image_column=image_column,
        label_column=label_column,
        on_bad_image=on_bad_image,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = load_split(source, "test", about.classes if about.named else None).to(device)
    if len(images.classes) != len(about.classes):
        raise UserError(
            f"{source.name} has {len(images.classes)} classes, and {model} tells "
            f"{len(about.classes)} apart"
        )
    network.to(device)

    def measure(**decide: Any) -> dict[str, Any]:
        return evaluate_model(
            network,
            images,
            mean=about.mean,
            std=about.std,
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
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
) -> None:
    """Show a network's architecture, its multiply-adds by block, and the gates' share.

    Args:
        model: A run directory, a model file, or a name of skipnet list models or weights.
        stage: Which stage of a run; its last finished one if not given.
        gate: Kind of gate, for a name of the registry.
        num_classes: Number of classes, for a name of the registry; 10 or 1000 if not given.
        in_channels: Channels of the images, for a name of the registry; 3 if not given.
        image_size: Height and width of the images; those trained on, or 32 or 224, if not given.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}; set it to 1 or more pixels")
    network, about = open_model(
        model,
        stage=stage,
        gate=gate,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
    )
    size = about.image_size if image_size is None else (image_size, image_size)
    console = Console(highlight=False)
    _print_info(console, network, about.architecture, size, about.results)


def list_(
    what: tyro.conf.Positional[Literal["models", "weights", "recipes", "runs", "all"]] = "all",
    *,
    pattern: str = "*",
    runs: Path = Path("runs"),
) -> None:
    """List networks, trained weights, recipes and runs.

    Args:
        what: models, weights (trained networks in the package), recipes, runs, or all of them.
        pattern: Shell pattern of the models' names.
        runs: Where run directories are.
    """
    if what in ("models", "all"):
        _print_list("models", {name: describe(name) for name in list_models(pattern)})
    if what in ("weights", "all"):
        _print_list("weights", {name: _describe_weights(name) for name in list_weights()})
    if what in ("recipes", "all"):
        _print_list("recipes", {name: describe_recipe(name) for name in list_recipes()})
    if what in ("runs", "all"):
        _print_list(f"runs in {runs}", {str(path): _describe_run(path) for path in _runs(runs)})


def import_(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT.pth.tar")],
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.safetensors")],
    *,
    trained_on: DataName | None = None,
) -> None:
    """Read a checkpoint of the original SkipNet code, and write a model file.

    CIFAR networks with feed-forward gates I and II or recurrent ones, and ImageNet's with recurrent
    ones, of SP or HRL: which it is, is told from the names and shapes in it. Nothing that the
    pickle names is run.

    Args:
        checkpoint: The file.
        output: The model file to write; an earlier one is replaced.
        trained_on: Its data set, for the normalisation of images and the names of classes; told
            from arch and number of classes if not given.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"the file to write must end in .safetensors, and {output} does not")
    network, about, said = read_checkpoint(checkpoint, trained_on)
    save(network, output, about)
    architecture = about.architecture
    print(
        f"{output}: {architecture.name}, gate {architecture.gate or 'none (dense)'}, "
        f"{architecture.num_classes} classes"
    )
    if said:
        print("of itself it says: " + ", ".join(f"{key} {value}" for key, value in said.items()))
    print(f"Next: skipnet evaluate {output} --data DIR   or   skipnet info {output}")


def export(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")],
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.onnx")],
    *,
    stage: StageName | None = None,
) -> None:
    """Write a trained network as one portable ONNX file in which skipped blocks are not computed.

    Standard operators, any batch size; preprocessing and class names travel in the file. It is held
    against PyTorch before the command ends.

    Args:
        model: A run directory, a model file, or a name of skipnet list weights.
        output: The file to write; an earlier one is replaced.
        stage: Which stage of a run; its last finished one if not given.
    """
    from skipnet.execution.export import export as export_network

    if output.suffix != ".onnx":
        raise UserError(f"the file to write must end in .onnx, and {output} does not")
    network, about = load(locate(model, stage))
    error = export_network(network, output, about)
    size = output.stat().st_size / 1e6
    print(f"{output}: {size:.1f} MB, logits within {error:.1g} of PyTorch's")
    print(f"Next: skipnet predict {output} IMAGE…   or   skipnet benchmark {model}")


def open_model(
    model: str,
    *,
    stage: StageName | None = None,
    gate: GateName | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
) -> tuple[SkipNet, ModelInfo]:
    """Open a run directory or a model file, or build a network of the registry.

    Args:
        model: Path or name.
        stage: Which stage of a run.
        gate: Kind of gate, for a name of the registry.
        num_classes: Number of classes, for a name of the registry.
        in_channels: Channels of the images, for a name of the registry.
        image_size: Height and width of the images, for a name of the registry.

    Raises:
        UserError: When it is neither.
    """
    named = model in list_models() or libraries.is_library_name(model)
    if not (named or is_hub_id(model)) and (
        "/" in model or model.endswith((".safetensors", ".onnx"))
    ):
        _demand_exists(Path(model))
    if not named and find_weights(model).exists():
        if gate is not None or num_classes is not None or in_channels is not None:
            raise UserError(
                f"{model} says itself what gate, classes and channels it has: leave out --gate, "
                "--num-classes and --in-channels, which are for names of the registry"
            )
        return load(locate(Path(model), stage))
    if stage is not None:
        raise UserError(f"--stage chooses within a run directory, and {model} is none")
    in_channels = 3 if in_channels is None else in_channels
    defaults = defaults_of(model)
    classes = defaults.num_classes if num_classes is None else num_classes
    size = defaults.image_size if image_size is None else image_size
    architecture = Architecture(
        name=model,
        gate=gate,
        num_classes=classes,
        in_channels=in_channels,
        options=libraries.options(model, (size, size)),
    )
    about = ModelInfo(
        architecture=architecture,
        classes=tuple(map(str, range(classes))),
        mean=(0.5,) * in_channels,
        std=(0.25,) * in_channels,
        image_size=(size, size),
    )
    return architecture.build(), about


def locate(path: Path, stage: StageName | None = None) -> Path:
    """Find the model file meant by a run directory or a file.

    Raises:
        UserError: When there is none.
    """
    path = find_weights(path)
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
        raise UserError(
            f"there is no run directory or model file {path}; see skipnet list runs, and skipnet "
            "list weights"
        )
    if path.suffix == ".onnx":
        raise UserError(
            f"{path} is an exported file, which skipnet predict runs: name the run directory or "
            "the .safetensors file it was made from"
        )


def test_source(path: Path, about: ModelInfo, data: str | None, **settings: Any) -> DataConfig:
    """Find the test images for a model: what is named, or what its run was trained on.

    Args:
        path: The model file.
        about: What it says about itself.
        data: Name or folder of the data set, or None.
        **settings: Fields of the configuration to set, where they are not None.

    Raises:
        UserError: When nothing says which images.
    """
    if data is not None:
        source = DataConfig(name=data)
    elif (path.parent / "config.json").exists():
        source = RunDirectory.open(path.parent)[1].data
    else:
        raise UserError(f"{path} does not say what it was trained on: name a test set with --data")
    # Images are resized to the size trained on, if that is square.
    height, width = about.image_size
    return replace(
        source,
        channels=1 if about.architecture.in_channels == 1 else 3,
        image_size=height if height == width else source.image_size,
        **{name: value for name, value in settings.items() if value is not None},
    )


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

    total = len(cost.blocks) + len(network.fixed_blocks)
    numbers = [number for number in range(total) if number not in network.fixed_blocks]
    row("stem", cost.stem)
    for index, macs in enumerate(cost.blocks):
        gated = index > 0 and cost.gates
        gate = f"{cost.gates[index - 1]:,}" if gated else "always runs"
        rate = f"{100 * keep[index - 1]:.1f} %" if gated and keep else ""
        row(f"block {numbers[index]}", macs, gate, rate)
        if cost.shortcuts[index]:
            fixed = not isinstance(network.entries[index], nn.Identity)
            title = "  before it (always runs)" if fixed else "  its projection (always runs)"
            row(title, cost.shortcuts[index])
    row("head", cost.head)
    console.print(table)
    console.print(
        f"dense: {cost.dense:,} MACs an image "
        f"({cost.dense_without_projections:,} without projections and classifier, as in the paper)"
    )
    if network.fixed_blocks:
        console.print(
            f"always run: blocks {', '.join(map(str, network.fixed_blocks))} (asked for, or they "
            "change the shape of their features without a projection)"
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


def _describe_weights(name: str) -> str:
    results = load(name)[1].results
    return f"{results['accuracy']:.2f} % at {100 * results['macs_fraction']:.1f} % of dense"


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
