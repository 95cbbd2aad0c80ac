"""Find the modules that behave differently in training mode."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.modules import batchnorm, dropout


def training_modules(model: nn.Module) -> list[str]:
    """List the modules in training mode that behave differently in that mode, as text such as `'1' (Dropout)`.

    The outputs of these modules may be random, or may depend on other rows of the batch or on earlier calls.
    """
    named = model.named_modules()
    return [f"'{name}' ({type(each).__name__})" for name, each in named if each.training and depends_on_training(each)]


def depends_on_training(module: nn.Module) -> bool:
    """Return whether a module's type or code suggests that the module behaves differently in training mode."""
    kind = type(module)
    if inspect.unwrap(kind.train) is not nn.Module.train:
        return True
    forward: Any = inspect.unwrap(getattr(kind, "forward", nn.Module.forward))
    if not str(forward.__module__).startswith("torch.nn.modules."):
        return "training" in getattr(getattr(forward, "__code__", None), "co_names", ())
    if isinstance(module, dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout > 0
    tracks = isinstance(module, batchnorm._NormBase) and module.track_running_stats
    return tracks or isinstance(module, (batchnorm._BatchNorm, nn.RReLU))
