"""What is there before a stage's first step: weights, a teacher, and how gates begin."""

from pathlib import Path

import torch
from torch import Tensor

from skipnet.errors import UserError
from skipnet.models.weights import ModelInfo, find_weights, load
from skipnet.routing.gates import StaticGate
from skipnet.routing.network import SkipNet
from skipnet.training.config import ModelConfig, StageName, TrainConfig
from skipnet.training.run import RunDirectory

# Which models of a run directory a stage starts from: the first of them that is there.
_PREDECESSORS: dict[StageName, tuple[StageName, ...]] = {
    "dense": ("dense",),
    "sp": ("dense", "sp"),
    "hrl": ("sp", "hrl", "dense"),
}
# Two ways to sum up the same pixels differ by less than this; a grey level is 0.004.
_SAME_STATISTICS = 1e-3
CERTAIN = 8.0
"""Logit of a static gate that is not to change its mind."""


def locate_start(start: Path, stage: StageName) -> Path:
    """Find the model file that a stage starts from.

    Args:
        start: A model file, a name of `list_weights`, or a run directory, of which dense starts
            from the dense network, sp from the dense network or else sp, and hrl from sp, else hrl,
            else the dense network.
        stage: The stage to start.

    Raises:
        UserError: When there is none.
    """
    start = find_weights(start)
    if not start.is_dir():
        if not start.is_file():
            raise UserError(
                f"there is no run directory or model file {start} to start from (skipnet list runs "
                "and skipnet list weights show what there is)"
            )
        return start
    run, _ = RunDirectory.open(start)
    wanted = _PREDECESSORS[stage]
    for name in wanted:
        if run.finished(name):
            return run.model_path(name)
    raise UserError(
        f"{start} has no finished stage {' or '.join(wanted)} that {stage} could start from: "
        f"finish it (skipnet train --resume {start}), or name a model file"
    )


def start_weights(path: Path, info: ModelInfo, *, gated: bool) -> dict[str, Tensor]:
    """Read the weights to start from, and check that they fit.

    Args:
        path: The model file.
        info: Of the network to train.
        gated: Whether the network to train has gates; a file without has none to give, and theirs
            stay as they were initialised.

    Returns:
        Tensors by name.

    Raises:
        UserError: When the file is of another architecture, other classes or other normalisation,
            or has gates and the network to train has none.
    """
    network, found = load(path)
    theirs, own = found.architecture, info.architecture
    gate = own.gate if gated else None
    wrong = [
        f"its {what} is {one}, not {other}"
        for what, one, other in (
            ("network", theirs.name, own.name),
            ("gate", theirs.gate, gate),
            ("choice of blocks", theirs.blocks, own.blocks),
            ("constructor", theirs.options, own.options),
        )
        if one != other and not (what == "gate" and one is None)
    ] + _other_data(found, info)
    if wrong:
        raise UserError(f"cannot start from {path}: {'; '.join(wrong)}")
    return network.state_dict()


def load_start(network: SkipNet, weights: dict[str, Tensor]) -> None:
    """Copy weights that `start_weights` has read; gates that they lack stay as they are."""
    missing = network.load_state_dict(weights, strict=False).missing_keys
    assert all(name.startswith("gate.") for name in missing)


def load_teacher(config: TrainConfig, info: ModelInfo) -> SkipNet | None:
    """Read the network that sp and hrl learn from, if there is one.

    Raises:
        UserError: When it cannot be read, or is of other data.
    """
    if config.teacher is None:
        return None
    path = find_weights(config.teacher)
    if path.is_dir():
        path = RunDirectory.open(path)[0].model_path("dense")
    teacher, found = load(path)
    wrong = _other_data(found, info)
    if wrong:
        raise UserError(f"the teacher {path} was trained on other data: {'; '.join(wrong)}")
    if config.channels_last:
        teacher.to(memory_format=torch.channels_last)
    return teacher.requires_grad_(False)


def open_gates(network: SkipNet, config: ModelConfig) -> None:
    """Start the gates as the configuration says.

    Raises:
        UserError: When it names blocks that are not there.
    """
    if network.gate is None:
        return
    if config.open_blocks is None:
        network.gate.set_keep_(config.initial_keep)
        return
    assert isinstance(network.gate, StaticGate)
    if any(not 0 <= block < network.num_gates for block in config.open_blocks):
        raise UserError(
            f"open_blocks names gated blocks from 0 to {network.num_gates - 1}, not "
            f"{' '.join(map(str, config.open_blocks))}"
        )
    with torch.no_grad():
        network.gate.logits.fill_(-CERTAIN)
        network.gate.logits[list(config.open_blocks)] = CERTAIN


def sharpen(network: SkipNet, images: Tensor, magnitude: float) -> None:
    """Scale the logits of all gates by one factor, up to a mean magnitude on some images."""
    assert network.gate is not None
    network.eval()
    with torch.no_grad():
        _, routing = network(images, execute="compacted")
    mean = routing.logits.abs().mean().item()
    if 0 < mean < magnitude:
        network.gate.scale_logits_(magnitude / mean)


def _other_data(found: ModelInfo, own: ModelInfo) -> list[str]:
    """In what the images of a model file differ from those of a network to train."""
    theirs, ours = found.architecture.in_channels, own.architecture.in_channels
    wrong = [] if theirs == ours else [f"its number of channels is {theirs}, not {ours}"]
    if found.classes != own.classes:
        wrong.append(f"its classes are {_listed(found.classes)}, not {_listed(own.classes)}")
    for what, values, expected in (("mean", found.mean, own.mean), ("std", found.std, own.std)):
        if len(values) == len(expected) and not all(
            abs(a - b) < _SAME_STATISTICS for a, b in zip(values, expected, strict=True)
        ):
            wrong.append(
                f"its images were normalised by {what} {_rounded(values)}, not "
                f"{_rounded(expected)} (set --data.mean and --data.std to what it had)"
            )
    return wrong


def _listed(classes: tuple[str, ...]) -> str:
    return f"{', '.join(classes[:3])}{' …' if len(classes) > 3 else ''} ({len(classes)})"


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
