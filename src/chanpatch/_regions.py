"""Reading and writing a region of a tensor. A region keeps all axes; nothing is written in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Positions = Mapping[int, "slice | list[int]"]


def read(tensor: Tensor, positions: Positions) -> Tensor:
    """Return the region at these positions, by axis number; the tensor itself where there are none."""
    for axis, chosen in positions.items():
        if isinstance(chosen, slice):
            tensor = tensor.narrow(axis, chosen.start, chosen.stop - chosen.start)
        else:
            tensor = tensor.index_select(axis, torch.tensor(chosen, device=tensor.device))
    return tensor


def written(tensor: Tensor, positions: Positions, region: Tensor) -> Tensor:
    """Return a copy of the tensor with the region replaced; gradients flow to both.

    The copy is nobody else's: what is written into it downstream reaches neither the operand of an edit nor the
    activation that was read.
    """
    if not positions:
        return region.clone()
    copy = tensor.clone()
    if all(isinstance(chosen, slice) for chosen in positions.values()):
        read(copy, positions).copy_(region)
        return copy
    lengths = tensor.shape
    grid = [torch.arange(length, device=tensor.device)[positions[axis]] if axis in positions
            else torch.arange(length, device=tensor.device) for axis, length in enumerate(lengths)]  # fmt: skip
    index = tuple(line.view([-1 if i == axis else 1 for i in range(len(grid))]) for axis, line in enumerate(grid))
    copy[index] = region
    return copy
