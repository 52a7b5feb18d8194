"""Recipes: functions that return a whole configuration. A variant calls its base."""

from collections.abc import Callable

from skipnet.errors import UserError
from skipnet.models.registry import unknown
from skipnet.recipes.cifar import CIFAR_RECIPES
from skipnet.recipes.digits import digits
from skipnet.training.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {"digits": digits, **CIFAR_RECIPES}


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


def describe_recipe(name: str) -> str:
    """Return the first line of a recipe's documentation."""
    return (RECIPES[name].__doc__ or "").split("\n")[0]
