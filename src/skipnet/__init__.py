"""SkipNet: residual networks that decide, image by image, which of their blocks to run."""

import importlib.metadata

from skipnet.analysis.evaluate import Evaluation as Evaluation
from skipnet.analysis.evaluate import evaluate as evaluate
from skipnet.data.sources import DataConfig as DataConfig
from skipnet.data.sources import ImageSet as ImageSet
from skipnet.errors import UserError as UserError
from skipnet.models import create as create
from skipnet.models import list_models as list_models
from skipnet.models import register as register
from skipnet.models.weights import ModelInfo as ModelInfo
from skipnet.models.weights import load as load
from skipnet.models.weights import save as save
from skipnet.recipes import list_recipes as list_recipes
from skipnet.recipes import recipe as recipe
from skipnet.routing.cost import Cost as Cost
from skipnet.routing.decisions import Fixed as Fixed
from skipnet.routing.decisions import Random as Random
from skipnet.routing.decisions import Sample as Sample
from skipnet.routing.decisions import Soft as Soft
from skipnet.routing.decisions import StraightThrough as StraightThrough
from skipnet.routing.decisions import Threshold as Threshold
from skipnet.routing.gates import FFGateI as FFGateI
from skipnet.routing.gates import FFGateII as FFGateII
from skipnet.routing.gates import RNNGate as RNNGate
from skipnet.routing.network import SkipNet as SkipNet
from skipnet.routing.trace import Routing as Routing
from skipnet.training.config import TrainConfig as TrainConfig
from skipnet.training.loop import Interrupted as Interrupted
from skipnet.training.train import train as train

__version__ = importlib.metadata.version("skipnet")
