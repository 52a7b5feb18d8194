"""Images for training and evaluation: sources, whole-batch augmentation, stateless loaders."""

from skipnet.data.augment import flip as flip
from skipnet.data.augment import normalize as normalize
from skipnet.data.augment import pad_crop as pad_crop
from skipnet.data.augment import random_flips as random_flips
from skipnet.data.augment import random_offsets as random_offsets
from skipnet.data.loaders import TrainLoader as TrainLoader
from skipnet.data.loaders import eval_batches as eval_batches
from skipnet.data.sources import DataConfig as DataConfig
from skipnet.data.sources import ImageSet as ImageSet
from skipnet.data.sources import load as load
from skipnet.data.sources import load_split as load_split
from skipnet.data.sources import normalization as normalization
