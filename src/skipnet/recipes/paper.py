"""The paper's recipes: its four benchmarks, each with its networks and gates, as one table.

SkipNet, section 4 and the released code; He et al. 2015, section 4.2 (CIFAR) and 3.4 (ImageNet).
The equations are taken as they are; the weight of the REINFORCE term is the released code's.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from skipnet.data.sources import DataConfig
from skipnet.routing.gates import GateName
from skipnet.training.config import (
    HybridConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    SupervisedConfig,
    TrainConfig,
)

GateKind = Literal["rnn", "ff"]
GATE_TITLES: dict[GateName, str] = {
    "rnn": "recurrent gates",
    "ff1": "feed-forward gates I",
    "ff2": "feed-forward gates II",
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What the recipes of one data set have in common.

    Attributes:
        title: What the data set is called.
        data: Where it is, and how it is augmented.
        model: Name of the network in the registry, but for its depth.
        depths: Layers of its networks.
        gates: Kinds of gates.
        iterations: Steps of the dense and the SP stage, or None if they are counted in epochs.
        epochs: Passes over the training set, likewise.
        milestones: Where their learning rate, 0.1 at first, is divided by 10, as shares.
        hrl_iterations: Steps of the HRL stage, likewise.
        hrl_epochs: Passes of the HRL stage, likewise.
        batch_size: Images a step.
        beta: Weight of the prediction loss in the reward; None is alpha / N.
        evaluate_every: Epochs between evaluations.
    """

    title: str
    data: DataConfig
    model: str = "cifar_resnet"
    depths: tuple[int, ...]
    gates: tuple[GateKind, ...] = ("rnn", "ff")
    iterations: int | None = None
    epochs: float | None = None
    milestones: tuple[float, ...] = (0.5, 0.75)
    hrl_iterations: int | None = None
    hrl_epochs: float | None = None
    batch_size: int = 128
    beta: float | None = 1.0
    evaluate_every: float = 1


_CIFAR10 = Benchmark(
    title="CIFAR-10",
    data=DataConfig(name="uoft-cs/cifar10", padding=4, flip=True),
    depths=(38, 74, 110),
    iterations=64_000,
    hrl_iterations=10_000,
    evaluate_every=5,
)
BENCHMARKS = {
    "cifar10": _CIFAR10,
    "cifar100": replace(
        _CIFAR10,
        title="CIFAR-100",
        data=replace(_CIFAR10.data, name="uoft-cs/cifar100", label_column="fine_label"),
    ),
    # Where the learning rate falls on SVHN the paper does not say: at the shares of CIFAR.
    "svhn": Benchmark(
        title="SVHN",
        data=DataConfig(
            name="ufldl-stanford/svhn",
            subset="cropped_digits",
            train_split="train+extra",
            padding=0,
            flip=False,
        ),
        depths=(38, 74, 110, 152),
        epochs=50,
        hrl_epochs=50,
    ),
    "imagenet": Benchmark(
        title="ImageNet",
        data=DataConfig(
            name="ILSVRC/imagenet-1k",
            test_split="validation",
            channels=3,
            image_size=224,
            resize=256,
            crop="random-resized",
            padding=0,
            # The usual ones, of all training images; a sample's would differ from set to set.
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        model="resnet",
        depths=(34, 50, 101),
        gates=("rnn",),
        epochs=90,
        milestones=(1 / 3, 2 / 3),
        hrl_epochs=40,
        batch_size=256,
        beta=None,
    ),
}


def paper(data_set: str, depth: int, kind: GateKind = "rnn") -> TrainConfig:
    """Return the paper's recipe for a network on a data set.

    Args:
        data_set: A key of `BENCHMARKS`.
        depth: Layers of the ResNet, one of the benchmark's.
        kind: "rnn", or "ff": feed-forward gates I, and II above 100 layers.
    """
    benchmark = BENCHMARKS[data_set]
    # A deep network of basic blocks starts at a tenth of the learning rate (He et al., 4.2).
    warmup = 400 if benchmark.model == "cifar_resnet" and depth >= 110 else 0
    optimizer = OptimizerConfig(lr=0.1, weight_decay=1e-4)
    schedule = ScheduleConfig(
        name="step", milestones=benchmark.milestones, gamma=0.1, warmup_iterations=warmup
    )
    # StageConfig and SupervisedConfig copy both.
    dense, sp = (
        stage(
            iterations=benchmark.iterations,
            epochs=benchmark.epochs,
            batch_size=benchmark.batch_size,
            optimizer=optimizer,
            schedule=schedule,
        )
        for stage in (StageConfig, SupervisedConfig)
    )
    assert isinstance(sp, SupervisedConfig)
    return TrainConfig(
        recipe=_name(data_set, depth, kind),
        model=ModelConfig(name=f"{benchmark.model}{depth}", gate=_gate(depth, kind)),
        data=replace(benchmark.data),
        dense=dense,
        sp=sp,
        hrl=HybridConfig(
            iterations=benchmark.hrl_iterations,
            epochs=benchmark.hrl_epochs,
            batch_size=benchmark.batch_size,
            optimizer=OptimizerConfig(lr=1e-4, weight_decay=1e-4),
            schedule=ScheduleConfig(name="constant"),
            alpha=0.1,
            beta=benchmark.beta,
            policy_weight=0.01,
            baseline="none",
        ),
        evaluate_every=benchmark.evaluate_every,
    )


def _gate(depth: int, kind: GateKind) -> GateName:
    if kind == "rnn":
        return "rnn"
    return "ff2" if depth > 100 else "ff1"


def _name(data_set: str, depth: int, kind: GateKind) -> str:
    return f"{data_set}-resnet{depth}-{kind}"


def _summary(data_set: str, depth: int, kind: GateKind) -> str:
    gates = GATE_TITLES[_gate(depth, kind)]
    return f"The paper's ResNet-{depth} with {gates} on {BENCHMARKS[data_set].title}."


_ROWS = [
    (data_set, depth, kind)
    for data_set, benchmark in BENCHMARKS.items()
    for depth in benchmark.depths
    for kind in benchmark.gates
]
PAPER_RECIPES = {_name(*row): (partial(paper, *row), _summary(*row)) for row in _ROWS}
"""What makes each recipe, and what it is, by its name."""

PAPER_FAMILIES = {
    f"{data_set}-resnet{{{','.join(map(str, one.depths))}}}-"
    + (one.gates[0] if len(one.gates) == 1 else f"{{{','.join(one.gates)}}}"): (
        f"The paper's networks on {one.title}."
    )
    for data_set, one in BENCHMARKS.items()
}
"""The same names, a line a data set, as a shell would expand them."""
