"""Weights of an earlier run that a run's first stage starts from."""

from pathlib import Path

from torch import Tensor

from skipnet.errors import UserError
from skipnet.models.weights import ModelInfo, load
from skipnet.routing.network import SkipNet
from skipnet.training.config import StageName
from skipnet.training.run import RunDirectory

# Which models of a run directory a stage starts from: the first of them that is there.
_PREDECESSORS: dict[StageName, tuple[StageName, ...]] = {
    "dense": ("dense",),
    "sp": ("dense", "sp"),
    "hrl": ("sp", "hrl", "dense"),
}
# Two ways to sum up the same pixels differ by less than this; a grey level is 0.004.
_SAME_STATISTICS = 1e-3


def locate_start(start: Path, stage: StageName) -> Path:
    """Find the model file that a stage starts from.

    Args:
        start: A model file, or a run directory, of which dense starts from the dense network, sp
            from the dense network or else sp, and hrl from sp, else hrl, else the dense network.
        stage: The stage to start.

    Raises:
        UserError: When there is none.
    """
    if not start.is_dir():
        if not start.is_file():
            raise UserError(f"there is no run directory or model file {start} to start from")
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
    wrong = []
    for what, one, other in (
        ("network", theirs.name, own.name),
        ("number of channels", theirs.in_channels, own.in_channels),
        ("gate", theirs.gate, gate),
    ):
        if one != other and not (what == "gate" and one is None):
            wrong.append(f"its {what} is {one}, not {other}")
    if found.classes != info.classes:
        wrong.append(f"its classes are {_listed(found.classes)}, not {_listed(info.classes)}")
    for what, values, expected in (("mean", found.mean, info.mean), ("std", found.std, info.std)):
        if len(values) == len(expected) and not all(
            abs(a - b) < _SAME_STATISTICS for a, b in zip(values, expected, strict=True)
        ):
            wrong.append(
                f"its images were normalised by {what} {_rounded(values)}, not "
                f"{_rounded(expected)} (set --data.mean and --data.std to what it had)"
            )
    if wrong:
        raise UserError(f"cannot start from {path}: {'; '.join(wrong)}")
    return network.state_dict()


def load_start(network: SkipNet, weights: dict[str, Tensor]) -> None:
    """Copy weights that `start_weights` has read; gates that they lack stay as they are."""
    missing = network.load_state_dict(weights, strict=False).missing_keys
    assert all(name.startswith("gate.") for name in missing)


def _listed(classes: tuple[str, ...]) -> str:
    return f"{', '.join(classes[:3])}{' …' if len(classes) > 3 else ''} ({len(classes)})"


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
