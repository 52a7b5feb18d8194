"""Recipes: functions that return a whole configuration. A variant calls its base."""

from collections.abc import Callable

from skipnet.errors import UserError, unknown
from skipnet.recipes.cifar import cifar10_resnet20_rnn_short, cifar10_resnet38_rnn_short
from skipnet.recipes.digits import digits
from skipnet.recipes.finetune import finetune
from skipnet.recipes.paper import PAPER_FAMILIES, PAPER_RECIPES
from skipnet.training.config import TrainConfig

_OWN: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    "cifar10-resnet20-rnn-short": cifar10_resnet20_rnn_short,
    "cifar10-resnet38-rnn-short": cifar10_resnet38_rnn_short,
    "finetune": finetune,
}
RECIPES: dict[str, Callable[[], TrainConfig]] = _OWN | {
    name: build for name, (build, _) in PAPER_RECIPES.items()
}


def recipe(name: str) -> TrainConfig:
    """Return a recipe's configuration.

    Raises:
        UserError: On an unknown name, with the nearest ones.
    """
    if name not in RECIPES:
        raise UserError(unknown("recipe", name, RECIPES))
    return RECIPES[name]()


def list_recipes() -> list[str]:
    """Return the names of all recipes."""
    return list(RECIPES)


def list_families() -> dict[str, str]:
    """Return names and descriptions in few lines: those of the paper's recipes are put together."""
    return {name: describe_recipe(name) for name in _OWN} | PAPER_FAMILIES


def describe_recipe(name: str) -> str:
    """Return a recipe's description in one line."""
    if name in PAPER_RECIPES:
        return PAPER_RECIPES[name][1]
    return (RECIPES[name].__doc__ or "").split("\n")[0]
