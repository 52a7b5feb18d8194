"""The loop: optimizer steps on a task, whatever it is, that survive being stopped at any moment."""

import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from skipnet.analysis.evaluate import Evaluation
from skipnet.data.loaders import TrainLoader
from skipnet.errors import Interrupted, UserError
from skipnet.routing.network import SkipNet
from skipnet.tasks.task import Task
from skipnet.training.config import OptimizerConfig, StageConfig, StageName, TrainConfig
from skipnet.training.progress import Progress
from skipnet.training.run import RunDirectory
from skipnet.training.schedule import learning_rate_factor

if TYPE_CHECKING:  # Fabric takes as long to import as torch does; only training needs it
    from lightning_fabric import Fabric


class StopRequest:
    """Notes Ctrl-C and SIGTERM, so that the step in progress can end and be saved.

    A second Ctrl-C stops at once; not so under torchrun, which passes on to every process a signal
    that the terminal has sent it already.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Signals can be handled in the main thread only; elsewhere the caller stops us its own way.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.requested = True


def fit(
    fabric: "Fabric",
    network: SkipNet,
    task: Task,
    loader: TrainLoader,
    *,
    name: StageName,
    stage: StageConfig,
    config: TrainConfig,
    run: RunDirectory,
    evaluate: Callable[[SkipNet], Evaluation],
    progress: Progress,
    stop: StopRequest,
    compiled: bool = False,
) -> tuple[SkipNet, float]:
    """Train a network for one stage, from its checkpoint if there is one.

    Args:
        fabric: Launched; knows devices and precision.
        network: Trained in place.
        task: The objective.
        loader: Batches by step.
        name: Name of the stage.
        stage: Its configuration.
        config: The run's.
        run: Where checkpoints and metrics go.
        evaluate: Evaluates a network on the test set.
        progress: Shows the live line.
        stop: Whether to stop early.
        compiled: Whether to compile the network for the training steps, which must all be alike.

    Returns:
        The network to use (the moving average of the weights if there is one, else `network`), and
        the seconds the stage has taken, earlier attempts included.

    Raises:
        Interrupted: When asked to stop; a checkpoint is written.
        UserError: When the loss is no longer finite; the last checkpoint was written before.
    """
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(network, stage.optimizer)
    # A wrapper around the same weights: evaluation and checkpoints see the network itself.
    module: nn.Module = network
    if compiled:
        module = compile_network(network, fabric.device, accumulate=stage.accumulate)
    model, fabric_optimizer = fabric.setup(module, optimizer)
    average = None
    if stage.ema_decay is not None:  # After the set-up, which makes all ranks' weights the same.
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(stage.ema_decay))

    first, before = 0, 0.0
    # Metrics since the last log line; in float64, which JSON keeps to the last bit.
    sums: dict[str, Tensor] = {}
    counted = 0
    began = time.monotonic()
    saved = run.load_checkpoint(name)
    if saved is not None:
        tensors, state = saved
        network.load_state_dict(_under("model.", tensors))
        if average is not None:
            average.load_state_dict(_under("average.", tensors))
        optimizer.load_state_dict(_optimizer_state(optimizer, _under("optimizer.", tensors)))
        task.load_state_dict(state["task"])
        first, before, counted = state["step"], state["seconds"], state["counted"]
        sums = {key: torch.tensor(x, dtype=torch.float64) for key, x in state["sums"].items()}
    if fabric.is_global_zero:
        # A run that was killed may have logged steps beyond its checkpoint.
        run.forget_after(name, first)

    def checkpoint(step: int) -> None:
        totals = _mean_over_ranks(fabric, {key: value.item() for key, value in sums.items()})
        if not fabric.is_global_zero:
            return
        tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
        if average is not None:
            tensors |= {f"average.{key}": value for key, value in average.state_dict().items()}
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
        seconds = before + time.monotonic() - began
        state = {"stage": name, "step": step, "seconds": seconds, "task": task.state_dict()}
        state |= {"counted": counted, "sums": totals}
        run.save_checkpoint({k: v for k, v in tensors.items() if v is not None}, state)

    total = stage.total_steps(loader.steps_per_epoch)
    evaluation_steps = _evaluation_steps(config.evaluate_every, loader.steps_per_epoch, total)
    timed = 0  # Steps since last_logged, which a resume does not carry over.
    last_saved = last_logged = time.monotonic()
    network.train()
    progress.start(name, first, total)
    for step in range(first, total):
        factor = learning_rate_factor(stage.schedule, step, total)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        images, labels = loader.batch(step)
        if config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        for part in range(stage.accumulate):
            rows = slice(
                part * len(labels) // stage.accumulate, (part + 1) * len(labels) // stage.accumulate
            )
            with fabric.no_backward_sync(model, enabled=part < stage.accumulate - 1):
                metrics = task(model, images[rows], labels[rows], step * stage.accumulate + part)
                fabric.backward(metrics["loss"] / stage.accumulate)
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0) + value.detach().double() / stage.accumulate
        if stage.optimizer.clip_norm is not None:
            # A gradient that is not finite makes the weights so, and is reported by the loop.
            norm = fabric.clip_gradients(
                model,
                fabric_optimizer,
                max_norm=stage.optimizer.clip_norm,
                error_if_nonfinite=False,
            )
            assert norm is not None
            sums["gradient_norm"] = sums.get("gradient_norm", 0) + norm.double()
        fabric_optimizer.step()
        fabric_optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update_parameters(network)
            _copy_what_stays(network, average.module)
        done = step + 1
        counted += 1
        timed += 1

        now = time.monotonic()
        stopping, saving = _any_rank(
            fabric, stop.requested, now - last_saved >= config.checkpoint_seconds
        )
        logging = done % config.log_every == 0 or done == total
        evaluating = done in evaluation_steps
        if logging or saving or evaluating or stopping or progress.due():
            means = {key: value.item() / counted for key, value in sums.items()}
            progress.update(done, means)
        if logging or saving or evaluating or stopping:
            means = _mean_over_ranks(fabric, means)
            _demand_finite(means["loss"], network, run, name, done)
        if logging:
            line = {"stage": name, "step": done, "epoch": done / loader.steps_per_epoch, **means}
            line["lr"] = stage.optimizer.lr * factor
            line["images_per_s"] = timed * stage.batch_size / (now - last_logged)
            if fabric.is_global_zero:
                run.log(line)
            sums, counted, timed, last_logged = {}, 0, 0, now
        if evaluating:
            result = evaluate(_trained(network, average))
            if fabric.is_global_zero:
                run.log({"stage": name, "step": done, "evaluation": result.to_dict()})
            progress.evaluated(done, total, result)
            last_logged += time.monotonic() - now
        if saving or stopping or done == total:  # What follows a stage's last step takes a while.
            checkpoint(done)
            last_saved = time.monotonic()
        if stopping and done < total:  # Else the stage is complete, and the next one will stop.
            progress.stop()
            raise Interrupted(
                f"stopped in stage {name} at step {done} of {total}; continue with: "
                f"{resume_command(run)}"
            )
    return _trained(network, average), before + time.monotonic() - began


def compile_network(network: SkipNet, device: torch.device, *, accumulate: int = 1) -> Any:
    """Compile for training on batches of one size; on a GPU a step becomes CUDA graphs.

    Args:
        network: Which stays as it is, and shares its weights with what returns.
        device: Where it will run.
        accumulate: Micro-batches a step.
    """
    # Graphs keep gradients in memory that the next replay overwrites: they cannot be accumulated.
    graphs = device.type == "cuda" and accumulate == 1
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if graphs else "default")


def resume_command(run: RunDirectory) -> str:
    """Return what to type to continue a run."""
    return f"skipnet train --resume {shlex.quote(str(run.path))}"


def build_optimizer(network: SkipNet, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer, with the gates as a group of their own."""
    gates = [] if network.gate is None else list(network.gate.parameters())
    ids = {id(parameter) for parameter in gates}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in ids]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": config.lr}]
    if gates:
        groups.append({"params": gates, "lr": config.gate_lr or config.lr})
    for group in groups:
        group["base_lr"] = group["lr"]
    if config.name == "adamw":
        betas = (config.momentum, 0.999)
        return torch.optim.AdamW(groups, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:  # The file holds it contiguous, the run channels_last.
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _copy_what_stays(network: nn.Module, average: nn.Module) -> None:
    """Take what does not learn as it is: gates that have landed were moved at once."""
    with torch.no_grad():
        for own, mean in zip(network.parameters(), average.parameters(), strict=True):
            if not own.requires_grad:
                mean.copy_(own)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _trained(network: SkipNet, average: AveragedModel | None) -> SkipNet:
    if average is None:
        return network
    assert isinstance(average.module, SkipNet)
    return average.module


def _evaluation_steps(every: float | None, steps_per_epoch: int, total: int) -> set[int]:
    """The steps after which to evaluate; the end is left to whoever called the loop."""
    if every is None:
        return set()
    interval = max(1, round(every * steps_per_epoch))
    return set(range(interval, total, interval))


def _mean_over_ranks(fabric: "Fabric", means: dict[str, float]) -> dict[str, float]:
    if fabric.world_size == 1:
        return means
    values = torch.tensor(list(means.values()), device=fabric.device, dtype=torch.float64)
    reduced = fabric.all_reduce(values, reduce_op="mean")
    assert isinstance(reduced, Tensor)
    return dict(zip(means, reduced.tolist(), strict=True))


def _any_rank(fabric: "Fabric", *flags: bool) -> tuple[bool, ...]:
    """Which flags are set on any rank: all must save, or leave the loop, at the same step."""
    if fabric.world_size == 1:
        return flags
    values = torch.tensor(flags, device=fabric.device, dtype=torch.float32)
    reduced = fabric.all_reduce(values, reduce_op="sum")
    assert isinstance(reduced, Tensor)
    return tuple(bool(value) for value in reduced.tolist())


def _demand_finite(
    loss: float, network: SkipNet, run: RunDirectory, name: StageName, step: int
) -> None:
    """Stop before a network that has diverged can take the place of a good checkpoint."""
    # Buffers too: a running variance can be infinite behind weights that are not.
    if math.isfinite(loss) and all(x.isfinite().all() for x in network.state_dict().values()):
        return
    saved = run.checkpoint_step(name)
    kept = (
        "no checkpoint was written yet" if saved is None else f"step {saved} is kept in {run.path}"
    )
    raise UserError(
        f"stage {name} diverged by step {step}: the loss or a weight is not finite ({kept}); "
        f"start again with a lower --{name}.optimizer.lr or with --{name}.optimizer.clip-norm 1"
    )
