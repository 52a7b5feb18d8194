"""Residual networks, and the registry that knows them by name."""

from skipnet.models import resnet_cifar as resnet_cifar
from skipnet.models import resnet_imagenet as resnet_imagenet
from skipnet.models.registry import Architecture as Architecture
from skipnet.models.registry import create as create
from skipnet.models.registry import defaults_of as defaults_of
from skipnet.models.registry import describe as describe
from skipnet.models.registry import list_models as list_models
from skipnet.models.registry import register as register
