"""SkipNet: residual networks that decide, image by image, which of their blocks to run."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from skipnet.errors import extras_named as _extras_named

if TYPE_CHECKING:
    from skipnet.analysis.evaluate import Evaluation as Evaluation
    from skipnet.analysis.evaluate import evaluate as evaluate
    from skipnet.data.images import ImageSet as ImageSet
    from skipnet.data.sources import DataConfig as DataConfig
    from skipnet.errors import Interrupted as Interrupted
    from skipnet.errors import UserError as UserError
    from skipnet.execution.export import export as export
    from skipnet.execution.session import InferenceSession as InferenceSession
    from skipnet.models import Architecture as Architecture
    from skipnet.models import create as create
    from skipnet.models import list_models as list_models
    from skipnet.models import register as register
    from skipnet.models.adapters import skippable as skippable
    from skipnet.models.weights import ModelInfo as ModelInfo
    from skipnet.models.weights import list_weights as list_weights
    from skipnet.models.weights import load as load
    from skipnet.models.weights import save as save
    from skipnet.recipes import list_recipes as list_recipes
    from skipnet.recipes import recipe as recipe
    from skipnet.routing.cost import Cost as Cost
    from skipnet.routing.decisions import Fixed as Fixed
    from skipnet.routing.decisions import Gumbel as Gumbel
    from skipnet.routing.decisions import Random as Random
    from skipnet.routing.decisions import Sample as Sample
    from skipnet.routing.decisions import Soft as Soft
    from skipnet.routing.decisions import StraightThrough as StraightThrough
    from skipnet.routing.decisions import Threshold as Threshold
    from skipnet.routing.gates import FFGateI as FFGateI
    from skipnet.routing.gates import FFGateII as FFGateII
    from skipnet.routing.gates import RNNGate as RNNGate
    from skipnet.routing.gates import StaticGate as StaticGate
    from skipnet.routing.network import SkipNet as SkipNet
    from skipnet.routing.trace import Routing as Routing
    from skipnet.training.config import TrainConfig as TrainConfig
    from skipnet.training.train import train as train

__version__ = importlib.metadata.version("skipnet")

# Where each public name lives. They are imported when first used, so that an inference session
# starts without torch.
_HOMES = {
    "analysis.evaluate": ("Evaluation", "evaluate"),
    "data.images": ("ImageSet",),
    "data.sources": ("DataConfig",),
    "errors": ("Interrupted", "UserError"),
    "execution.export": ("export",),
    "execution.session": ("InferenceSession",),
    "models": ("Architecture", "create", "list_models", "register"),
    "models.adapters": ("skippable",),
    "models.weights": ("ModelInfo", "list_weights", "load", "save"),
    "recipes": ("list_recipes", "recipe"),
    "routing.cost": ("Cost",),
    "routing.decisions": (
        "Fixed",
        "Gumbel",
        "Random",
        "Sample",
        "Soft",
        "StraightThrough",
        "Threshold",
    ),
    "routing.gates": ("FFGateI", "FFGateII", "RNNGate", "StaticGate"),
    "routing.network": ("SkipNet",),
    "routing.trace": ("Routing",),
    "training.config": ("TrainConfig",),
    "training.train": ("train",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'skipnet' has no attribute {name!r}")
    with _extras_named():
        value = getattr(importlib.import_module(f"skipnet.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
