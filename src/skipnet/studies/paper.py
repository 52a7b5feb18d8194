"""What the SkipNet paper reports, to be shown beside curves of the same network and data set."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PaperPoint:
    """One figure of the paper's.

    Attributes:
        label: What it is.
        accuracy: Percent.
        share: Of the dense network's computation.
        counted: What `share` counts: multiply-adds, or blocks, as the released checkpoints do (the
            first counts as run, gates do not count).
    """

    label: str
    accuracy: float
    share: float
    counted: Literal["MACs", "blocks"]


def _released(accuracy: float, share: float, stage: str = "HRL") -> PaperPoint:
    return PaperPoint(f"paper, {stage}", accuracy, share, "blocks")


def _hard(accuracy: float, macs: float, dense: float) -> PaperPoint:
    return PaperPoint("paper, hard gating", accuracy, macs / dense, "MACs")


# Dense and hard gating: the paper's tables, hard gating in 1e8 multiply-adds of the networks' 83.0,
# 168.0 and 252.9M. Released checkpoints: the authors' repository.
DENSE: dict[tuple[str, str], float] = {
    ("cifar_resnet38", "cifar10"): 92.50,
    ("cifar_resnet74", "cifar10"): 92.95,
    ("cifar_resnet110", "cifar10"): 93.60,
    ("cifar_resnet38", "cifar100"): 68.54,
    ("cifar_resnet74", "cifar100"): 70.64,
    ("cifar_resnet110", "cifar100"): 71.21,
    ("cifar_resnet38", "svhn"): 97.94,
    ("cifar_resnet74", "svhn"): 97.92,
    ("cifar_resnet110", "svhn"): 98.09,
    ("cifar_resnet152", "svhn"): 98.14,
    ("resnet34", "imagenet"): 73.30,
    ("resnet50", "imagenet"): 76.15,
    ("resnet101", "imagenet"): 77.37,
}
"""Accuracy of the paper's dense networks by (network, data set), percent."""

POINTS: dict[tuple[str, str], tuple[PaperPoint, ...]] = {
    ("cifar_resnet38", "cifar10"): (_released(92.75, 0.7027), _hard(90.83, 0.58e8, 83.0e6)),
    ("cifar_resnet74", "cifar10"): (_released(92.77, 0.5234), _hard(92.38, 0.92e8, 168.0e6)),
    ("cifar_resnet110", "cifar10"): (_released(93.30, 0.4953), _hard(88.11, 0.18e8, 252.9e6)),
    ("cifar_resnet38", "cifar100"): (_hard(67.68, 0.50e8, 83.0e6),),
    ("cifar_resnet74", "cifar100"): (_hard(67.79, 0.61e8, 168.0e6),),
    ("cifar_resnet110", "cifar100"): (_hard(63.66, 0.96e8, 252.9e6),),
    ("resnet101", "imagenet"): (
        _released(77.486, 0.8498, "SP"),
        _released(76.942, 0.7006),
    ),
}
"""Points of its trade-off by (network, data set)."""


def data_set(name: str) -> str:
    """Return a data set's plain name: `uoft-cs/cifar10` and `data/CIFAR-10` are cifar10."""
    plain = re.sub(r"[^a-z0-9]", "", name.rstrip("/").rsplit("/", 1)[-1].lower())
    return "imagenet" if plain == "imagenet1k" else plain
