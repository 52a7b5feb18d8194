"""Batch norms folded into the convolutions before them: fewer operations, the same numbers."""

import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a module in evaluation mode whose convolutions have taken in their batch norms.

    The given module may be changed: pass a copy.

    A module whose forward cannot be traced (it branches on its input, say) keeps its own forward,
    and its children are folded one by one.

    Args:
        module: Any module; a batch norm that follows no convolution stays.
    """
    if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return module
    if _shares_a_layer(module):  # Its two batch norms cannot both go into one convolution.
        return module
    with warnings.catch_warnings():
        # Here, as it takes a while; torch 2.11 warns of itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental.optimization import fuse
    try:
        return fuse(module)
    except Exception:  # Whatever a forward does to the stand-ins that tracing sends through it.
        for name, child in module.named_children():
            setattr(module, name, fold_batch_norms(child))
        return module


def _shares_a_layer(module: nn.Module) -> bool:
    """Whether a forward calls a layer with weights twice; False if it cannot be traced."""
    try:
        nodes = torch.fx.symbolic_trace(module).graph.nodes
    except Exception:
        return False
    called = [module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    heavy = [id(layer) for layer in called if next(layer.parameters(), None) is not None]
    return len(set(heavy)) < len(heavy)
