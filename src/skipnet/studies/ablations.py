"""Ablations: named changes of a recipe, each of which leaves out or swaps one thing."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from skipnet.errors import UserError, unknown
from skipnet.models.registry import Architecture, defaults_of
from skipnet.routing.gates import GateName
from skipnet.routing.network import SkipNet
from skipnet.studies.study import Child, Settings, distinct, plan
from skipnet.training.config import StageConfig, SupervisedConfig, TrainConfig, differences

Variant = Callable[[TrainConfig], TrainConfig]

# SkipNet, section 3.1: gates I for networks of fewer layers, gates II for more.
FF_LAYERS = 100
RECALIBRATION_BATCHES = 50
# What a recipe that flips gets where it is to sample (docs/log.md).
SUITS_REINFORCE: dict[str, Any] = {"policy_weight": 0.2, "sharpen_to": 2.0, "flipped_share": 0.0}
SUITS_FLIP: dict[str, Any] = {"flipped_share": 0.5}


def hrl(config: TrainConfig) -> TrainConfig:
    """The recipe: SP, then HRL."""
    return replace(config, stages=("sp", "hrl"))


def dense(config: TrainConfig) -> TrainConfig:
    """The network without gates, trained as the recipe says."""
    return replace(config, stages=("dense",), start=None)


def sp(config: TrainConfig) -> TrainConfig:
    """SP alone, as HRL finds it."""
    return replace(config, stages=("sp",))


def soft(config: TrainConfig) -> TrainConfig:
    """Soft gates in training, hard ones at test, at the same price; as long as dense."""
    price = {"alpha": config.hrl.alpha, "target_compute": config.hrl.target_compute}
    return _alone(config, decide="soft", **price)


def pure_rl(config: TrainConfig) -> TrainConfig:
    """Rewards only: no gradient of the prediction loss, from random weights; as long as dense."""
    config = no_sp(reinforce(config))
    return replace(config, hrl=replace(config.hrl, supervised_weight=0.0))


def no_sp(config: TrainConfig) -> TrainConfig:
    """HRL from random weights; as long as dense."""
    gate_lr = config.hrl.optimizer.gate_lr
    length = _length(config.dense)
    length["optimizer"] = replace(config.dense.optimizer, gate_lr=gate_lr)
    return replace(config, stages=("hrl",), start=None, hrl=replace(config.hrl, **length))


def sdv(config: TrainConfig) -> TrainConfig:
    """Blocks skipped at random at the target's rate, in training and at test (see sampled)."""
    config = _with_gate(config, "static")
    keep = _keep_rate(config)
    return _alone(replace(config, model=replace(config.model, initial_keep=keep)), decide="sample")


def ff(config: TrainConfig) -> TrainConfig:
    """Feed-forward gates, or recurrent ones where the recipe has feed-forward."""
    if config.model.gate in ("ff1", "ff2"):
        return _with_gate(hrl(config), "rnn")
    layers = sum(
        isinstance(layer, nn.Conv2d | nn.Linear) for layer in _network(config, None).modules()
    )
    return _with_gate(hrl(config), "ff1" if layers < FF_LAYERS else "ff2")


def static(config: TrainConfig) -> TrainConfig:
    """Gates that cannot see the input: the learned best fixed subset of blocks."""
    return _with_gate(hrl(config), "static")


def gumbel(config: TrainConfig) -> TrainConfig:
    """SP through noisy decisions instead of straight-through ones."""
    return replace(hrl(config), sp=replace(config.sp, decide="gumbel"))


def fixed_alpha(config: TrainConfig) -> TrainConfig:
    """The recipe's alpha (or else the paper's 0.1) to the end, no budget."""
    return _hrl(config, target_compute=None, alpha=config.hrl.alpha or 0.1)


def reinforce(config: TrainConfig) -> TrainConfig:
    """The paper's estimator: all decisions of an image are sampled."""
    if config.hrl.estimator == "reinforce":
        return hrl(config)
    return _hrl(config, estimator="reinforce", **SUITS_REINFORCE)


def flip(config: TrainConfig) -> TrainConfig:
    """The estimator that tries the other decision of one gate an image."""
    if config.hrl.estimator == "flip":
        return hrl(config)
    return _hrl(config, estimator="flip", **SUITS_FLIP)


def no_flipped(config: TrainConfig) -> TrainConfig:
    """Blocks learn from the decisions of inference alone, and never from a flipped one."""
    return _hrl(config, flipped_share=0.0)


def no_baseline(config: TrainConfig) -> TrainConfig:
    """REINFORCE without a baseline."""
    return _hrl(reinforce(config), baseline="none")


def no_sharpen(config: TrainConfig) -> TrainConfig:
    """REINFORCE begins with the logits as SP leaves them."""
    return _hrl(reinforce(config), sharpen_to=None)


def no_landing(config: TrainConfig) -> TrainConfig:
    """The computation is left where the budget has driven it, and gates learn to the end."""
    return _hrl(config, land=config.hrl.land and config.hrl.target_compute is None)


def no_settling(config: TrainConfig) -> TrainConfig:
    """Gates learn to the end."""
    return _hrl(config, settle=0.0 if config.hrl.settles else config.hrl.settle)


def all_rows(config: TrainConfig) -> TrainConfig:
    """Every row through every block, batch statistics over all, as in the released code."""
    return _hrl(config, statistics="all")


def frozen(config: TrainConfig) -> TrainConfig:
    """HRL with the batch statistics that SP left."""
    return _hrl(config, statistics="frozen")


def no_clip(config: TrainConfig) -> TrainConfig:
    """HRL without a limit on the gradient's norm."""
    return _hrl(config, optimizer=replace(config.hrl.optimizer, clip_norm=None))


def macs_costs(config: TrainConfig) -> TrainConfig:
    """Blocks cost their multiply-adds instead of 1 each."""
    return _hrl(config, costs="macs")


def recalibrated(config: TrainConfig) -> TrainConfig:
    """Batch statistics estimated anew after training, with the decisions of inference."""
    return replace(hrl(config), recalibrate=RECALIBRATION_BATCHES)


VARIANTS: dict[str, Variant] = {
    "hrl": hrl,
    "dense": dense,
    "sp": sp,
    "soft": soft,
    "pure-rl": pure_rl,
    "no-sp": no_sp,
    "sdv": sdv,
    "ff": ff,
    "static": static,
    "gumbel": gumbel,
    "fixed-alpha": fixed_alpha,
    "reinforce": reinforce,
    "flip": flip,
    "no-flipped": no_flipped,
    "no-baseline": no_baseline,
    "no-sharpen": no_sharpen,
    "no-landing": no_landing,
    "no-settling": no_settling,
    "all-rows": all_rows,
    "frozen": frozen,
    "no-clip": no_clip,
    "macs-costs": macs_costs,
    "recalibrated": recalibrated,
}
"""Variants by name, each a function of the recipe's configuration."""


def ablation_settings(
    config: TrainConfig, *, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Settings:
    """Check what ablations are asked for.

    Args:
        config: The recipe's, whose stages must include sp and hrl.
        only: Names of variants; all that change something if none.
        seeds: The configuration's if none.

    Raises:
        UserError: On an unknown variant, one that changes nothing or cannot be made, or a bad seed.
    """
    if not {"sp", "hrl"} <= set(config.stages):
        raise UserError(
            f"ablations need the stages sp and hrl, and stages is {' '.join(config.stages)}"
        )
    trained = [name for name in VARIANTS if name != "dense" or name in config.stages]
    if config.hrl.target_compute is None:  # At whose rate it would skip.
        trained.remove("sdv")
    names = list(only) or [name for name in trained if not _same(config, name)]
    for name in distinct("only", names):
        if name not in VARIANTS:
            raise UserError(unknown("variant", name, VARIANTS))
        if _same(config, name):
            raise UserError(f"{name} is what this recipe does anyway: leave it out of --only")
    return {"variants": names, "seeds": distinct("seeds", list(seeds) or [config.seed], least=0)}


def ablation_children(config: TrainConfig, settings: Settings) -> list[Child]:
    """Lay out the runs: those of the same SP share one."""
    variants = {name: VARIANTS[name](config) for name in settings["variants"]}
    return plan(config, variants, settings["seeds"])


def describe_variant(name: str) -> str:
    """Return the first line of a variant's documentation."""
    return (VARIANTS[name].__doc__ or "").split("\n")[0]


def _same(config: TrainConfig, name: str) -> bool:
    """Whether a variant other than the recipe itself changes nothing."""
    return name != "hrl" and not differences(VARIANTS[name](config), hrl(config))


def _hrl(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(hrl(config), hrl=replace(config.hrl, **changes))


def _with_gate(config: TrainConfig, gate: GateName) -> TrainConfig:
    return replace(config, model=replace(config.model, gate=gate, open_blocks=None))


def _alone(config: TrainConfig, **changes: Any) -> TrainConfig:
    """One supervised stage, which gets the length and the rates that the dense network has."""
    stage = SupervisedConfig(**_length(config.dense), **changes)
    return replace(config, stages=("sp",), sp=stage, start=None)


def _length(stage: StageConfig) -> dict[str, Any]:
    return {entry.name: getattr(stage, entry.name) for entry in dataclasses.fields(StageConfig)}


def _network(config: TrainConfig, gate: GateName | None) -> SkipNet:
    classes = defaults_of(config.model.name).num_classes
    return Architecture(name=config.model.name, gate=gate, num_classes=classes).build()


def _keep_rate(config: TrainConfig) -> float:
    """The rate at which random skipping costs the target, on images as the network is known for."""
    target = config.hrl.target_compute
    if target is None:
        raise UserError(
            "sdv skips at the rate of a target, and this recipe has none: give "
            "--hrl.target-compute, or leave sdv out with --only"
        )
    size = defaults_of(config.model.name).image_size
    cost = _network(config, config.model.gate).cost(3, size, size)
    keep = (target * cost.dense - cost.always) / sum(cost.blocks[1:])
    if not 0 < keep < 1:
        raise UserError(f"no rate of random skipping costs {target} of the dense computation")
    return keep
