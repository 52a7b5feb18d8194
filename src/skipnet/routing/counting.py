"""Counting: exact multiply-adds (MACs) of modules, from shapes.

Convolutions, linear layers and LSTM cells are counted, one multiply-add as one; additions,
normalisation, activations and pooling are not, as in the papers. Others publish 2 x MACs as FLOPs.
"""

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipnet.errors import UserError
from skipnet.routing.gates import StaticGate

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def skeleton(module: ModuleT) -> ModuleT:
    """Return a copy of a module without weights or hooks, to be run on shapes alone.

    A copy, so that counting is safe beside other threads and shows no hook a batch that is none.
    """
    # In evaluation, for a batch norm in training is a dozen operations on shapes alone, too.
    copied = copy.deepcopy(module).to("meta").eval()
    for layer in copied.modules():
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            hooks.clear()
    return copied


def count_macs(module: nn.Module, *inputs: Any) -> tuple[int, Any]:
    """Run a `skeleton` and count its multiply-adds.

    Args:
        module: A skeleton of convolutions, linear layers, LSTM cells and layers that cost nothing.
        *inputs: Its arguments; tensors on the meta device, at least two rows (a batch norm in
            training has no statistics of one value).

    Returns:
        The multiply-adds of one row, and the module's output (meta tensors).

    Raises:
        UserError: On a layer with weights whose multiply-adds we do not know.
    """
    total = 0

    def count(layer: nn.Module, args: object, output: object) -> None:
        nonlocal total
        total += _layer_macs(layer, output)

    handles = [layer.register_forward_hook(count) for layer in _counted(module)]
    with torch.no_grad():
        output = module(*inputs)
    for handle in handles:
        handle.remove()
    return total, output


def _counted(module: nn.Module) -> Iterable[nn.Module]:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.LSTMCell):
            yield layer
        elif isinstance(layer, nn.MultiheadAttention) or (
            not any(layer.children())
            and next(layer.parameters(), None) is not None
            and not isinstance(layer, _BatchNorm | nn.GroupNorm | nn.LayerNorm | StaticGate)
        ):
            raise UserError(f"no rule for the multiply-adds of {type(layer).__name__} layers")


def _layer_macs(layer: nn.Module, output: object) -> int:
    if isinstance(layer, nn.LSTMCell):
        return 4 * layer.hidden_size * (layer.input_size + layer.hidden_size)
    assert isinstance(output, Tensor)
    if isinstance(layer, nn.Conv2d):
        return output[0].numel() * layer.weight[0].numel()
    assert isinstance(layer, nn.Linear)
    return output[0].numel() * layer.in_features
