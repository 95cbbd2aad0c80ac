"""What in a model draws at random, or treats the rows of a batch together, while it is trained."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import batchnorm, dropout


def training_modules(model: nn.Module) -> list[str]:
    """Return the modules in training mode whose output is drawn at random, or depends on the batch or on what ran."""
    found = []
    for name, module in model.named_modules():
        drawn = isinstance(module, dropout._DropoutNd) and module.p > 0
        drawn |= isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0
        if module.training and (drawn or isinstance(module, (batchnorm._BatchNorm, nn.RReLU))):
            found.append(f"'{name}' ({type(module).__name__})")
    return found
