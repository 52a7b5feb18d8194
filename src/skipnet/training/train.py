"""A whole run: data, then each stage in order, then one table."""

import math
import os
import warnings
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from skipnet.analysis.evaluate import Evaluation, evaluate, throughput
from skipnet.data.augment import normalize
from skipnet.data.images import Images
from skipnet.data.loaders import TrainLoader
from skipnet.data.sources import load, normalization
from skipnet.errors import Interrupted, UserError
from skipnet.models import libraries
from skipnet.models.registry import Architecture
from skipnet.models.weights import ModelInfo, load_weights, read_tensors, save
from skipnet.models.weights import load as load_model
from skipnet.routing.cost import Cost
from skipnet.routing.decisions import Decision, Sample
from skipnet.routing.network import SkipNet
from skipnet.seeding import EVALUATION, WEIGHTS, sub_seed
from skipnet.training.config import (
    HybridConfig,
    RoutedConfig,
    StageConfig,
    StageName,
    SupervisedConfig,
    TrainConfig,
)
from skipnet.training.finish import land, recalibrate
from skipnet.training.loop import StopRequest, fit, resume_command
from skipnet.training.objective import stage_task
from skipnet.training.processes import all_rows, launch, share_statistics
from skipnet.training.progress import Progress
from skipnet.training.run import RunDirectory
from skipnet.training.start import (
    load_start,
    load_teacher,
    locate_start,
    open_gates,
    sharpen,
    start_weights,
)

if TYPE_CHECKING:  # Fabric takes as long to import as torch does; only training needs it
    from lightning_fabric import Fabric


def train(
    config: TrainConfig,
    *,
    output: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> RunDirectory:
    """Run the stages of a configuration in order and leave one run directory.

    Args:
        config: What to do; see `skipnet.recipes`.
        output: The run directory to make; `runs/<recipe>-<time>` if not given.
        resume: A run directory to continue, which must have been started with `config`.
        console: Where to print; stdout if not given.

    Returns:
        The run directory, with `results` of every stage.

    Raises:
        UserError: On a mistake in the configuration or the data, a diverged loss, or a full disk.
        Interrupted: When stopped by Ctrl-C or SIGTERM; `resume` continues.
    """
    if resume is not None and output is not None:
        raise UserError("give --resume (an existing run) or --output (a new one), not both")
    output = None if output is None else Path(output)
    resume = None if resume is None else Path(resume)
    # What can be told before a large data set is read.
    if output is not None:
        RunDirectory.demand_new(output)
    if resume is not None:
        RunDirectory.open(resume)[0].demand_same(config)
    elif config.start is not None:
        locate_start(config.start, config.stages[0])
    Architecture(name=config.model.name, gate=config.model.gate).demand_known()
    fabric = launch(config)
    console = console or Console(highlight=False)
    progress = Progress(console, enabled=fabric.is_global_zero)

    training_set, test_set = load(config.data)
    info = network_info(config, training_set)
    if resume is None and libraries.is_library_name(config.model.name):
        # Told once: a resume need not have the start, or the hub, that said so.
        data = replace(config.data, mean=info.mean, std=info.std)
        config = replace(config, data=data)
    for idle in _without_effect(config) if fabric.is_global_zero else ():
        warnings.warn(idle, stacklevel=2)
    training_set, test_set = training_set.to(fabric.device), test_set.to(fabric.device)
    # A target out of reach, a batch that is too large, or weights that do not fit are told before a
    # directory is made.
    demand_possible(config, info, start=resume is None)
    teacher = load_teacher(config, info)
    if teacher is not None:
        teacher.to(fabric.device)
    loaders = {name: _loader(fabric, config, name, info, training_set) for name in config.stages}
    run = _run_directory(fabric, config, output, resume)
    if config.tensorboard and fabric.is_global_zero:
        run.open_tensorboard()
    with run.locked() if fabric.is_global_zero else nullcontext(), StopRequest() as stop:
        if fabric.is_global_zero:
            run.sweep()
        try:
            for name, loader in loaders.items():
                if not run.finished(name):
                    with closing(loader):
                        _run_stage(
                            fabric,
                            config,
                            name,
                            info,
                            loader,
                            test_set,
                            teacher,
                            run,
                            progress,
                            stop,
                        )
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped at once; continue from the last checkpoint with: {resume_command(run)}"
            ) from None
        finally:
            progress.stop()
    if fabric.is_global_zero:
        _measure_throughput(config, run, test_set, fabric.device)
        console.print(results_table(run.results, config))
        console.print(f"Run directory: {run.path}", soft_wrap=True)
        console.print(
            f"Next: skipnet evaluate {run.path}   or   skipnet info {run.path}", soft_wrap=True
        )
    fabric.barrier()
    return run


def network_info(config: TrainConfig, training_set: Images) -> ModelInfo:
    """Return what the model files of a run say, but for results: the network and its images."""
    model, image_size = config.model, training_set.shape[1:]
    foreign = libraries.is_library_name(model.name)
    expected = None
    if foreign and config.data.mean is None:
        if config.start is not None:
            start = load_model(locate_start(config.start, config.stages[0]))[1]
            expected = start.mean, start.std
        elif model.weights is not None:
            expected = libraries.statistics(model.name, model.weights)
    mean, std = expected or normalization(config.data, training_set)
    return ModelInfo(
        architecture=Architecture(
            name=model.name,
            gate=model.gate,
            num_classes=len(training_set.classes),
            in_channels=training_set.shape[0],
            blocks=model.blocks,
            options=libraries.options(model.name, image_size),
        ),
        classes=training_set.classes,
        mean=mean,
        std=std,
        image_size=image_size,
    )


def demand_possible(config: TrainConfig, info: ModelInfo, *, start: bool) -> None:
    """Check what needs to know the data and can be told before anything is made.

    Args:
        config: Of the run.
        info: Its network, see `network_info`.
        start: Whether to check the weights it starts from.

    Raises:
        UserError: When a target is out of reach, or the weights to start from do not fit.
    """
    network = info.architecture.build(verify=True)
    if set(config.stages) & {"sp", "hrl"}:
        channels = info.architecture.in_channels
        open_gates(network, config.model)
        for name in config.stages:
            _demand_reachable(config.stage(name), network.cost(channels, *info.image_size))
    if start and config.start is not None:
        _start_weights(config.start, config.stages[0], info)
    elif start and config.model.weights is not None:
        libraries.load_trained(network, config.model.name, config.model.weights)
    load_teacher(config, info)


def results_table(results: dict[str, Any], config: TrainConfig) -> Table:
    """Return the table a run ends with: a row a finished stage."""
    table = Table(title=f"{config.recipe}: {config.model.name}, gate {config.model.gate}")
    for title in ("", "accuracy", "MACs", "of dense", "blocks run", "by input", "images/s"):
        table.add_column(title, justify="left" if not title else "right")
    titles = {"dense": "dense", "sp": "SP", "hrl": "HRL"}
    for name in config.stages:
        result = results[name]["evaluation"]
        table.add_row(
            titles[name],
            f"{result['accuracy']:.2f} %",
            f"{result['macs'] / 1e6:.2f}M",
            f"{100 * result['macs_fraction']:.1f} %",
            f"{100 * result['blocks_fraction']:.1f} %",
            by_input(result),
            f"{results[name]['images_per_s']:,.0f}",
        )
    return table


def by_input(evaluation: dict[str, Any]) -> str:
    """How many gates depend on the input, of how many; nothing for a dense network."""
    if not evaluation["keep_rates"]:
        return ""
    return f"{evaluation['gates_by_input']} of {len(evaluation['keep_rates'])}"


def _run_stage(
    fabric: "Fabric",
    config: TrainConfig,
    name: StageName,
    info: ModelInfo,
    loader: TrainLoader,
    test_set: Images,
    teacher: SkipNet | None,
    run: RunDirectory,
    progress: Progress,
    stop: StopRequest,
) -> None:
    stage = config.stage(name)
    if name == "dense":
        info = replace(info, architecture=replace(info.architecture, gate=None))
    torch.manual_seed(sub_seed(config.seed, WEIGHTS, _STAGE_SEEDS[name]))
    network = info.architecture.build()
    open_gates(network, config.model)
    if name == "hrl" and run.finished("sp"):
        path = run.model_path("sp")
        load_weights(network, read_tensors(path)[0], path)
    first = name == config.stages[0]
    follows = name == "hrl" and run.finished("sp")
    if config.from_dense and not (first or follows) and run.finished("dense"):
        load_start(network, read_tensors(run.model_path("dense"))[0])
        follows = True
    begins = run.checkpoint_step(name) is None
    if begins and config.model.weights is not None and config.start is None and not follows:
        left = libraries.load_trained(network, config.model.name, config.model.weights)
        if left:
            progress.note(
                f"{name:5s} starts with a new classifier ({', '.join(left)}): that of "
                f"{config.model.weights} is of other classes"
            )
    if begins and first and config.start is not None:
        load_start(network, _start_weights(config.start, name, info))
        if config.model.open_blocks is not None:  # Which ask for another subset than the start's.
            open_gates(network, config.model)
    if isinstance(stage, HybridConfig) and stage.sharpen_to is not None:
        sharpen(network.to(fabric.device), loader.batch(0)[0], stage.sharpen_to)

    def measure(model: SkipNet, decide: str | Decision = "threshold") -> Evaluation:
        share_statistics(fabric, model)
        return evaluate(
            model,
            test_set,
            mean=info.mean,
            std=info.std,
            decide=decide,
            channels_last=config.channels_last,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            gather=lambda rows: all_rows(fabric, rows),
        )

    def land_on_target(model: SkipNet, reach: float = math.inf) -> float:
        assert isinstance(stage, RoutedConfig) and stage.target_compute is not None
        progress.doing(f"{name:5s} landing on {100 * stage.target_compute:.1f} % of dense")
        share_statistics(fabric, model)
        batches = _landing_batches(config, loader, info)
        return land(model, batches, stage.target_compute, reach=reach)

    trained, seconds = fit(
        fabric,
        network,
        stage_task(
            config,
            stage,
            network,
            total=stage.total_steps(loader.steps_per_epoch),
            rank=fabric.global_rank,
            teacher=teacher,
            land=partial(land_on_target, network),
        ),
        loader,
        name=name,
        stage=stage,
        config=config,
        run=run,
        evaluate=measure,
        progress=progress,
        stop=stop,
        compiled=config.compile and _compilable(stage, name),
    )
    if config.recalibrate and trained.num_gates:
        steps = range(min(config.recalibrate, loader.steps_per_epoch))
        progress.doing(f"{name:5s} recalibrating on {len(steps)} batches")
        recalibrate(trained, (_layout(loader.batch(step)[0], config) for step in steps))
    if isinstance(stage, RoutedConfig) and stage.target_compute is not None and stage.land:
        landed = land_on_target(trained, REACH)
        if abs(landed - stage.target_compute) > MISSED:
            progress.note(
                f"{name:5s} ends at {100 * landed:.1f} % of the dense computation, off its target "
                f"of {100 * stage.target_compute:.1f} %: train longer, or raise --{name}.alpha-rate"
            )
    progress.doing(f"{name:5s} evaluating")
    result = measure(trained)
    results: dict[str, Any] = {"evaluation": result.to_dict(), "seconds": seconds}
    if trained.num_gates:
        generator = torch.Generator(fabric.device)
        generator.manual_seed(sub_seed(config.seed, EVALUATION, fabric.global_rank))
        results["sampled"] = measure(trained, Sample(generator)).to_dict()
    progress.finished(name, result, seconds)
    if fabric.is_global_zero:
        save(trained, run.model_path(name), replace(info, results=results["evaluation"]))
        run.finish_stage(name, results)
    else:
        run.results[name] = results
    fabric.barrier()


def _landing_batches(config: TrainConfig, loader: TrainLoader, info: ModelInfo) -> list[Tensor]:
    """Training images, evenly spread, prepared as for testing: an augmented one costs otherwise."""
    count = len(loader.images)
    rows = torch.linspace(0, count - 1, min(count, LANDING_IMAGES)).long()
    pixels = normalize(loader.images.take(rows), info.mean, info.std)
    return [_layout(part, config) for part in pixels.split(256)]


def _start_weights(start: Path, name: StageName, info: ModelInfo) -> dict[str, Tensor]:
    return start_weights(locate_start(start, name), info, gated=name != "dense")


def _loader(
    fabric: "Fabric", config: TrainConfig, name: StageName, info: ModelInfo, training_set: Images
) -> TrainLoader:
    """The batches of a stage."""
    stage = config.stage(name)
    loader = TrainLoader(
        training_set,
        batch_size=stage.batch_size,
        seed=sub_seed(config.seed, WEIGHTS, _STAGE_SEEDS[name]),
        padding=config.data.padding,
        flip=config.data.flip,
        mean=info.mean,
        std=info.std,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    share = stage.batch_size // fabric.world_size
    if share % stage.accumulate:
        raise UserError(
            f"{name}: the {share} images of each of {fabric.world_size} processes cannot be split "
            f"evenly into {stage.accumulate} micro-batches; change batch_size or accumulate"
        )
    return loader


def _compilable(stage: StageConfig, name: StageName) -> bool:
    """Whether every step of a stage does the same on the same shapes, without random draws."""
    if name == "dense":
        return True
    if not isinstance(stage, SupervisedConfig) or stage.settles:
        return False
    return stage.decide in ("straight-through", "soft")


def _without_effect(config: TrainConfig) -> list[str]:
    """What is asked for, and nothing will come of."""
    idle = []
    for name in config.stages:
        stage = config.stage(name)
        if config.compile and not _compilable(stage, name):
            why = "it draws decisions, and runs blocks on the rows they choose"
            if isinstance(stage, RoutedConfig) and stage.settles and name == "sp":
                why = "its last steps run blocks on some rows (--sp.settle 0 lets it compile)"
            idle.append(f"compile has no effect on {name}: {why}")
    if not set(config.stages) & {"sp", "hrl"}:
        why = "the stage dense has no gates, and learns from the labels alone"
        idle += [
            f"{field} has no effect: {why}"
            for field in ("teacher", "recalibrate")
            if getattr(config, field)
        ]
    flips = "hrl" in config.stages and config.hrl.estimator == "flip"
    if flips and config.hrl.baseline != HybridConfig.baseline:
        idle.append("hrl.baseline has no effect: flip compares two decisions, and needs none")
    if "hrl" in config.stages and config.hrl.flipped_share and not flips:
        idle.append("hrl.flipped_share has no effect: the estimator reinforce flips nothing")
    return idle


def _demand_reachable(stage: StageConfig, cost: Cost) -> None:
    if not isinstance(stage, RoutedConfig) or stage.target_compute is None:
        return
    least, most = cost.always / cost.dense, (cost.always + sum(cost.blocks[1:])) / cost.dense
    if not least <= stage.target_compute <= most:
        raise UserError(
            f"target_compute {stage.target_compute} is out of reach: this network takes from "
            f"{least:.3f} (every gate closed) to {most:.3f} (every gate open) of the dense "
            "computation"
        )


def _layout(images: Tensor, config: TrainConfig) -> Tensor:
    return images.to(memory_format=torch.channels_last) if config.channels_last else images


def _run_directory(
    fabric: "Fabric", config: TrainConfig, output: Path | None, resume: Path | None
) -> RunDirectory:
    path = resume
    if path is None:
        path = RunDirectory.create(config, output).path if fabric.is_global_zero else None
        path = fabric.broadcast(path)
        assert path is not None
    run = RunDirectory(path)
    if fabric.is_global_zero:
        run.record_environment()
    return run


def _measure_throughput(
    config: TrainConfig, run: RunDirectory, test_set: Images, device: torch.device
) -> None:
    """Time the networks of all stages in turns and add images/s to their results."""
    models: dict[str, SkipNet] = {}
    info = None
    for name in config.stages:
        model, info = load_model(run.model_path(name))
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        models[name] = model.to(device)
    assert info is not None
    rates = throughput(
        models, test_set, mean=info.mean, std=info.std, channels_last=config.channels_last
    )
    for stage, rate in rates.items():
        run.results[stage]["images_per_s"] = rate
    run.write_results()


REACH = 0.05
"""From so far off its target, as a share of dense, a stage still lands when it ends: there is no
training after it, and to close blocks that the network has not learned to do without costs more
accuracy than the target is worth."""

MISSED = 0.02
"""So far off its target, as a share of dense, a stage says so."""

LANDING_IMAGES = 2048
"""On so many training images the computation is made to meet its target."""

# Every stage draws its own weights and order, whichever stages run before it.
_STAGE_SEEDS: dict[StageName, int] = {"dense": 0, "sp": 1, "hrl": 2}
