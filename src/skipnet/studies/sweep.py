"""The trade-off curve: a dense and an SP run a seed, and from SP an HRL run a target or alpha."""

from collections.abc import Sequence
from dataclasses import replace

from skipnet.errors import UserError
from skipnet.studies.study import SP, Child, Settings, distinct, plan
from skipnet.training.config import TrainConfig


def sweep_settings(
    config: TrainConfig,
    *,
    targets: Sequence[float] = (),
    alphas: Sequence[float] = (),
    seeds: Sequence[int] = (),
    dense: bool = True,
) -> Settings:
    """Check what a sweep is asked for.

    Args:
        config: Whose stages must include hrl; without sp, HRL starts from `config.start` or from
            random weights.
        targets: Shares of dense multiply-adds to aim at …
        alphas: … or fixed weights of skipping; one of the two.
        seeds: The configuration's if none.
        dense: Whether to train the dense network too, if `config.stages` has it.

    Raises:
        UserError: When a value cannot work, or is given twice.
    """
    if bool(targets) == bool(alphas):
        raise UserError(
            "give --targets 0.3,0.5,… (shares of dense computation) or --alphas 0,0.1,… (weights "
            "of skipping)" + (", not both" if targets else "")
        )
    if "hrl" not in config.stages:
        raise UserError(f"a sweep needs the stage hrl, and stages is {' '.join(config.stages)}")
    for target in targets:
        if not 0 < target <= 1:
            raise UserError(f"targets must lie in (0, 1], and {target} does not")
    return {
        "targets": distinct("targets", targets),
        "alphas": distinct("alphas", alphas, least=0),
        "seeds": distinct("seeds", list(seeds) or [config.seed], least=0),
        "dense": dense and "dense" in config.stages,
    }


def sweep_children(config: TrainConfig, settings: Settings) -> list[Child]:
    """Lay out the runs of a sweep, seed by seed: SP, dense, then the points."""
    hrl = replace(config, stages=tuple(name for name in config.stages if name != "dense"))
    variants: dict[str, TrainConfig] = {}
    if SP in config.stages:
        variants[SP] = replace(config, stages=("sp",))
    if settings["dense"]:
        variants["dense"] = replace(config, stages=("dense",), start=None)
    for target in sorted(settings["targets"]):
        variants[f"target-{target}"] = replace(hrl, hrl=replace(config.hrl, target_compute=target))
    for alpha in sorted(settings["alphas"]):
        variants[f"alpha-{alpha}"] = replace(
            hrl, hrl=replace(config.hrl, target_compute=None, alpha=alpha)
        )
    return plan(config, variants, settings["seeds"])
