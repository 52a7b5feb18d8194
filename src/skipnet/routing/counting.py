"""Counting: exact multiply-adds (MACs) of modules, from shapes.

Convolutions, linear layers and LSTM cells are counted, and the products of attention, one
multiply-add as one; additions, normalisation, activations and pooling are not, as in the papers.
Others publish 2 x MACs as FLOPs.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipnet.routing.gates import StaticGate

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def skeleton(module: ModuleT) -> ModuleT:
    """Return a copy of a module without weights or hooks, to be run on shapes alone.

    A copy, so that counting is safe beside other threads and shows no hook a batch that is none.
    """
    # In evaluation, for a batch norm in training is a dozen operations on shapes alone, too.
    # Without gradients: the library's counter stumbles over a parameter that is a module's input.
    copied = copy.deepcopy(module).to("meta").eval().requires_grad_(False)
    for layer in copied.modules():
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            hooks.clear()
    return copied


def count_macs(module: nn.Module, *inputs: Any) -> tuple[int, Any]:
    """Run a `skeleton` and count its multiply-adds.

    Args:
        module: A skeleton. Of convolutions, linear layers, LSTM cells and layers that cost nothing,
            layers are counted; of any other, matrix products and convolutions as they are called.
        *inputs: Its arguments; tensors on the meta device, at least two rows (a batch norm in
            training has no statistics of one value).

    Returns:
        The multiply-adds of one row, and the module's output (meta tensors).
    """
    if not all(map(_known, module.modules())):
        return _count_operations(module, *inputs)
    total = 0

    def count(layer: nn.Module, args: object, output: object) -> None:
        nonlocal total
        total += _layer_macs(layer, output)

    layers = [layer for layer in module.modules() if isinstance(layer, _COUNTED)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        output = module(*inputs)
    for handle in handles:
        handle.remove()
    return total, output


def _count_operations(module: nn.Module, *inputs: Any) -> tuple[int, Any]:
    """Count what PyTorch calls; more than a layer's rule says where a layer is used in parts."""
    from torch.utils.flop_counter import FlopCounterMode

    # Attention in inference has an operation of its own, which PyTorch does not count.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad():
            output = module(*inputs)
            with counter:  # Of one row: some parts are computed once a batch.
                module(*(x[:1] if isinstance(x, Tensor) else x for x in inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2, output


_COUNTED = (nn.Conv2d, nn.Linear, nn.LSTMCell)
_COST_NOTHING = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, StaticGate)


def _known(layer: nn.Module) -> bool:
    """Whether a layer's multiply-adds are those of the layers in it, or follow from its kind."""
    if isinstance(layer, _COUNTED + _COST_NOTHING):
        return True
    own = type(layer).__module__.startswith(("torch.", "skipnet."))
    has_weights = next(layer.parameters(recurse=False), None) is not None
    return own and not has_weights and not isinstance(layer, nn.MultiheadAttention)


def _layer_macs(layer: nn.Module, output: object) -> int:
    if isinstance(layer, nn.LSTMCell):
        return 4 * layer.hidden_size * (layer.input_size + layer.hidden_size)
    assert isinstance(output, Tensor)
    if isinstance(layer, nn.Conv2d):
        return output[0].numel() * layer.weight[0].numel()
    assert isinstance(layer, nn.Linear)
    return output[0].numel() * layer.in_features
