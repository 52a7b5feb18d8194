"""Configuration of a training run: keyword-only dataclasses, validated, which become the flags."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from skipnet.data.sources import DataConfig
from skipnet.errors import UserError
from skipnet.routing.gates import INITIAL_KEEP, GateName
from skipnet.tasks.hybrid import BaselineName, EstimatorName, StatisticsName
from skipnet.tasks.rewards import CostName
from skipnet.tasks.supervised import DecideName

StageName = Literal["dense", "sp", "hrl"]
Precision = Literal["32-true", "bf16-mixed"]


@dataclass(kw_only=True)
class OptimizerConfig:
    """What turns gradients into steps."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd (with momentum) or adamw."""
    lr: float = 0.1
    """Learning rate, the highest of the schedule."""
    gate_lr: float | None = None
    """Learning rate of the gates, if another."""
    momentum: float = 0.9
    """Momentum of sgd, first beta of adamw."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    weight_decay: float = 1e-4
    """Weight decay, of every parameter."""
    clip_norm: float | None = None
    """Largest norm of the gradient; a longer one is scaled down."""

    def __post_init__(self) -> None:
        _choices(self)
        _positive(self, "lr")
        if self.gate_lr is not None:
            _positive(self, "gate_lr")
        if self.clip_norm is not None:
            _positive(self, "clip_norm")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), not {self.momentum}")
        if self.nesterov and self.name == "sgd" and self.momentum == 0:
            raise UserError("nesterov needs momentum above 0: raise it, or set nesterov to false")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay must be at least 0, not {self.weight_decay}")


@dataclass(kw_only=True)
class ScheduleConfig:
    """How the learning rate moves; a pure function of the step, see `learning_rate_factor`."""

    name: Literal["constant", "step", "cosine", "one-cycle"] = "step"
    """constant; step (times gamma at each milestone); cosine to 0; one-cycle (linear up, then down
    to 0)."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Where step changes, as shares of the stage."""
    gamma: float = 0.1
    """What step multiplies by."""
    peak: float = 0.3
    """Where one-cycle is highest, as a share of the stage."""
    warmup_iterations: int = 0
    """Iterations at the beginning that run at a fixed lower rate …"""
    warmup_factor: float = 0.1
    """… which is this share of the learning rate."""

    def __post_init__(self) -> None:
        _choices(self)
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise UserError(f"milestones are shares between 0 and 1, not {self.milestones}")
        if not 0 < self.peak < 1:
            raise UserError(f"peak is a share between 0 and 1, not {self.peak}")
        if self.warmup_iterations < 0:
            raise UserError(f"warmup_iterations must be at least 0, not {self.warmup_iterations}")


@dataclass(kw_only=True)
class StageConfig:
    """One stage of training: how long, how fast."""

    epochs: float | None = None
    """Length in passes over the training set; give this or iterations."""
    iterations: int | None = None
    """Length in optimizer steps; give this or epochs."""
    batch_size: int = 128
    """Images a step, over all devices and accumulated micro-batches together."""
    accumulate: int = 1
    """Micro-batches a step, for batches that do not fit into memory."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is evaluated and saved in their place."""

    def __post_init__(self) -> None:
        # Of its own: a recipe gives several stages the same, and one may be changed afterwards.
        self.optimizer = dataclasses.replace(self.optimizer)
        self.schedule = dataclasses.replace(self.schedule)
        if (self.epochs is None) == (self.iterations is None):
            raise UserError(
                "give a stage's length in epochs or in iterations, and set the other to None"
            )
        for name in ("epochs", "iterations"):
            if getattr(self, name) is not None:
                _positive(self, name)
        for name in ("batch_size", "accumulate"):
            _positive(self, name)
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay must lie between 0 and 1, not {self.ema_decay}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the stage, at least 1."""
        if self.iterations is not None:
            return self.iterations
        assert self.epochs is not None
        return max(1, round(self.epochs * steps_per_epoch))


@dataclass(kw_only=True)
class RoutedConfig(StageConfig):
    """A stage that trains gates: what computation costs it."""

    alpha: float = 0.0
    """Price of computation (the paper's alpha); its starting value if target_compute is given."""
    target_compute: float | None = None
    """Share of dense multiply-adds to aim at: alpha is then driven to meet it."""
    target_ramp: float = 0.5
    """Share of the stage over which the target falls from the start's computation."""
    alpha_rate: float = 0.03
    """Integral gain of the drive: alpha a step and unit of relative error."""
    alpha_damping: float = 3.0
    """Proportional gain of the drive: alpha a unit of relative error."""
    land: bool = True
    """Shift all gates' logits by one number so that the computation on training images meets
    target_compute: when settling begins, and again when the stage ends within 5 points of it."""
    settle: float = 0.2
    """Share of the stage, at its end, in which gates that aim at target_compute, having landed,
    stay as they are, and the blocks get used to them; 0 lets gates learn to the end."""
    gates_first: float = 0.0
    """Share of the stage, at its beginning, in which gates alone learn and the blocks of a trained
    network stay as they are; 0 lets blocks learn from the first step."""
    costs: CostName = "uniform"
    """C_i: uniform (the paper's 1), or macs (each block's multiply-adds over their mean)."""
    diversity: float = 0.0
    """Weight of what the decisions tell about the image (nats a gate): pushes gates to be certain,
    and to open for some images and not for others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _choices(self)
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"alpha must be at least 0, not {self.alpha}")
        if self.target_compute is not None and not 0 < self.target_compute <= 1:
            raise UserError(f"target_compute must lie in (0, 1], not {self.target_compute}")
        if not 0 <= self.target_ramp <= 1:
            raise UserError(f"target_ramp must lie in [0, 1], not {self.target_ramp}")
        if not 0 <= self.gates_first < 1:
            raise UserError(f"gates_first must lie in [0, 1), not {self.gates_first}")
        if not 0 <= self.settle < 1:
            raise UserError(f"settle must lie in [0, 1), not {self.settle}")
        if self.settles and self.target_ramp + self.settle > 1:
            raise UserError(
                f"target_ramp {self.target_ramp} and settle {self.settle} are more than the whole "
                "stage: lower one of them, or set settle to 0"
            )
        if self.settles and self.gates_first + self.settle >= 1:
            raise UserError(
                f"gates_first {self.gates_first} and settle {self.settle} leave no step in which "
                "gates and blocks learn: lower one of them"
            )
        _at_least_0(self, "alpha_rate", "alpha_damping", "diversity")

    @property
    def settles(self) -> bool:
        """Whether gates stop learning before the stage ends."""
        return self.target_compute is not None and self.land and self.settle > 0


@dataclass(kw_only=True)
class SupervisedConfig(RoutedConfig):
    """The SP stage: cross-entropy through decisions. See `tasks.supervised.Supervised`."""

    decide: DecideName = "straight-through"
    """How gates decide in training: straight-through (the paper's), gumbel (the same with noise),
    soft (the paper's ablation), sample or threshold (which leave the gates as they are)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decide in ("sample", "threshold") and self.target_compute is not None:
            raise UserError(
                f"decide {self.decide} leaves the gates as they are, which no target_compute can "
                "move: leave the target out, or use straight-through or gumbel"
            )
        if self.decide in ("sample", "threshold") and self.gates_first:
            raise UserError(
                f"decide {self.decide} leaves the gates as they are, and gates_first the blocks: "
                "nothing would learn; use straight-through or gumbel"
            )


@dataclass(kw_only=True)
class HybridConfig(RoutedConfig):
    """The HRL stage: the paper's equations, with a baseline. See `tasks.hybrid.Hybrid`."""

    target_compute: Annotated[float | None, tyro.conf.arg(aliases=["--target-compute"])] = None
    """Share of dense multiply-adds to aim at: alpha is then driven to meet it."""
    alpha: float = 0.1
    """Weight of skipping (the paper's alpha); its starting value if target_compute is given."""
    beta: float | None = 1.0
    """Weight of the prediction loss in the reward (1 on CIFAR and SVHN); none is alpha / N."""
    policy_weight: float = 1.0
    """Factor on the REINFORCE term: 1 in the equations, 0.01 in the released code."""
    supervised_weight: float = 1.0
    """Factor on the gradient of the prediction loss itself; 0 is the paper's pure RL."""
    estimator: EstimatorName = "reinforce"
    """How gates learn: reinforce (the paper's: all decisions are sampled), or flip (decisions are
    those of inference; what one gate an image would have changed is tried)."""
    flipped_share: float = 0.0
    """With flip, share of the images whose blocks learn from the flipped decision: so that blocks
    that are closed learn too, and none is open only because the others are used to it."""
    baseline: BaselineName = "batch-mean"
    """What reduces the estimator's variance; none is the paper's."""
    samples: int = 1
    """Decision vectors sampled an image; leave-one-out needs at least 2."""
    entropy_bonus: float = 0.0
    """Weight of the decisions' entropy (nats)."""
    statistics: StatisticsName = "executed"
    """What batch norms see: executed (the rows that run a block), all (every row, as in the
    released code), or frozen (their running statistics)."""
    sharpen_to: float | None = None
    """Scale the gates' logits to this mean magnitude when the stage starts, if it is lower.
    Straight-through training leaves logits near 0: without this, samples differ much from the
    thresholded decisions it optimised, and accuracy starts far down."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_0(self, "policy_weight", "supervised_weight")
        if not 0 <= self.flipped_share <= 1:
            raise UserError(f"flipped_share must lie in [0, 1], not {self.flipped_share}")
        if self.beta is not None:
            _at_least_0(self, "beta")
        if not math.isfinite(self.entropy_bonus):
            raise UserError(f"entropy_bonus must be finite, not {self.entropy_bonus}")
        _positive(self, "samples")
        if self.sharpen_to is not None:
            _positive(self, "sharpen_to")
        if self.baseline == "leave-one-out" and self.samples < 2 and self.estimator != "flip":
            raise UserError("baseline leave-one-out needs samples of at least 2")

    @property
    def settles(self) -> bool:
        # With nothing else to learn from than rewards, gates learn to the end.
        return super().settles and self.supervised_weight > 0


@dataclass(kw_only=True)
class ModelConfig:
    """Which network; the classes and the channels come from the data."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "cifar_resnet38"
    """Name in the registry (skipnet list models), or another library's network:
    torchvision/NAME, timm/NAME, transformers/ID."""
    weights: Annotated[str | None, tyro.conf.arg(aliases=["--weights"])] = None
    """What another library's network starts from: DEFAULT, the library's name of trained weights,
    or a safetensors file. A classifier of other classes starts anew."""
    blocks: tuple[int, ...] | None = None
    """Blocks of another library's network that may be skipped, from 1; all that can be if not
    given."""
    gate: GateName = "rnn"
    """Kind of gate of the sp and hrl stages."""
    initial_keep: float = INITIAL_KEEP
    """Probability of execution that the gates start from."""
    open_blocks: tuple[int, ...] | None = None
    """Gated blocks that run, from 0; all others are skipped. For static gates, to train a fixed
    subset of blocks with --sp.decide threshold."""

    def __post_init__(self) -> None:
        _choices(self)
        if not 0 < self.initial_keep < 1:
            raise UserError(f"initial_keep must lie between 0 and 1, not {self.initial_keep}")
        if "/" not in self.name and (self.weights is not None or self.blocks is not None):
            raise UserError(
                f"model.weights and model.blocks are for other libraries' networks, "
                f"torchvision/resnet50 for instance, not {self.name}"
            )
        if self.open_blocks is not None and self.gate != "static":
            raise UserError(f"open_blocks is for static gates, not {self.gate}: set gate to static")


@dataclass(kw_only=True)
class TrainConfig:
    """A whole training run: data, network, and up to three stages in order."""

    recipe: str
    """Name of the recipe, which names the run."""
    stages: tuple[StageName, ...] = ("dense", "sp", "hrl")
    """Which stages to run, in order: the dense network, supervised pre-training, hybrid RL."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dense: StageConfig
    sp: SupervisedConfig
    hrl: HybridConfig
    from_dense: bool = False
    """Whether the first stage with gates starts from this run's dense network, if it has one."""
    start: Path | None = None
    """A run directory, a model file or a name (skipnet list weights) whose weights the first stage
    starts from, whatever model.weights says."""
    teacher: Path | None = None
    """Run directory (its dense network), model file or name (skipnet list weights) whose answers sp
    and hrl learn from as well; none learns from the labels alone."""
    teacher_weight: float = 0.5
    """Share of the teacher's term in the loss; the labels have the rest."""
    teacher_temperature: float = 2.0
    """Temperature of the teacher's term."""
    recalibrate: int = 0
    """Batches to estimate the running statistics of batch norms anew on when a stage with gates
    ends, with the decisions of inference; 0 leaves them as training did."""
    seed: int = 0
    """Of the weights, the order, the augmentation and the sampled decisions."""
    precision: Precision = "32-true"
    """32-true or bf16-mixed."""
    channels_last: bool = True
    """Memory layout of images and weights: faster on CPUs and on GPUs with tensor cores."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    compile: bool = False
    """torch.compile for the dense and SP stages, with CUDA graphs on a GPU, where small blocks
    are bound by launches. A minute or more to start; no gain on a CPU; no effect on HRL, nor on an
    SP that settles."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: float | None = 1.0
    """Epochs between two evaluations on the test set; none evaluates at a stage's end only."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    tensorboard: bool = True
    """Write TensorBoard events too, if it is installed."""

    def __post_init__(self) -> None:
        _choices(self)
        if not self.stages:
            raise UserError("no stages to run: give at least one of dense, sp, hrl")
        if list(self.stages) != [name for name in ("dense", "sp", "hrl") if name in self.stages]:
            raise UserError(
                f"stages run in the order dense, sp, hrl, each once, not {' '.join(self.stages)}"
            )
        _positive(self, "log_every")
        if self.evaluate_every is not None:
            _positive(self, "evaluate_every")
        if self.checkpoint_seconds < 0:
            raise UserError(f"checkpoint_seconds must be at least 0, not {self.checkpoint_seconds}")
        if self.model.open_blocks is not None and (
            "hrl" in self.stages or ("sp" in self.stages and self.sp.decide != "threshold")
        ):
            raise UserError(
                "open_blocks trains a fixed subset of blocks, with nothing that moves the gates: "
                "use it with --sp.decide threshold and without the stage hrl"
            )
        if self.recalibrate < 0:
            raise UserError(f"recalibrate must be at least 0 batches, not {self.recalibrate}")
        if not 0 <= self.teacher_weight <= 1:
            raise UserError(f"teacher_weight must lie in [0, 1], not {self.teacher_weight}")
        _positive(self, "teacher_temperature")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, not {self.seed}")

    def stage(self, name: StageName) -> StageConfig:
        """Return the configuration of a stage by its name."""
        return {"dense": self.dense, "sp": self.sp, "hrl": self.hrl}[name]


Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values, as JSON holds them."""
    values: dict[str, Any] = dataclasses.asdict(
        config,
        dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items},
    )
    return values


def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """Build a configuration from what `to_dict` returned, read back from JSON.

    Raises:
        UserError: On fields that this version does not know, or lacks.
    """
    hints = get_type_hints(cls)
    if not isinstance(values, dict):
        raise UserError(f"not a {cls.__name__} of this version of skipnet: {values!r}")
    if strange := sorted(set(values) - set(hints)):
        raise UserError(
            f"not a {cls.__name__} of this version of skipnet: unknown fields {', '.join(strange)}"
        )
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)
        elif isinstance(value, str) and Path in get_args(hints[name]):
            value = Path(value)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(f"not a {cls.__name__} of this version of skipnet: {error}") from None


def differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of the fields in which two configurations differ."""
    names = []
    for entry in dataclasses.fields(one):
        name, a, b = prefix + entry.name, getattr(one, entry.name), getattr(other, entry.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            names += differences(a, b, name + ".")
        elif a != b:
            names.append(name)
    return names


def _choices(config: Any) -> None:
    """Check the fields that are one of several names: the flags are, a program's may not be."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise UserError(
                f"{name} is {getattr(config, name)!r}: use one of {', '.join(get_args(hint))}"
            )


def _at_least_0(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{name} must be at least 0, not {getattr(config, name)}")


def _positive(config: Any, name: str) -> None:
    if not getattr(config, name) > 0:
        raise UserError(f"{name} must be above 0, not {getattr(config, name)}")
