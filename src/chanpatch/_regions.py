"""Reading and writing a region of a tensor. A region keeps all axes; nothing is written in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._tree import inside_vmap
from .errors import UnsupportedModelError

Positions = Mapping[int, "slice | list[int] | Tensor"]


def read(tensor: Tensor, positions: Positions) -> Tensor:
    """Return the region at these positions, by axis number; the tensor itself where there are none.

    Raises:
        UnsupportedModelError: If the tensor is sparse, and the region not all of it.
    """
    if positions and tensor.layout != torch.strided:
        raise UnsupportedModelError(
            f"A {str(tensor.layout).removeprefix('torch.')} tensor has no regions. Use the whole hook point, or make "
            "the tensor dense in the model: tensor.to_dense()."
        )
    for axis, chosen in positions.items():
        if isinstance(chosen, slice):
            tensor = tensor.narrow(axis, chosen.start, chosen.stop - chosen.start)
        else:
            tensor = tensor.index_select(axis, torch.as_tensor(chosen, device=tensor.device))
    return tensor


def written(tensor: Tensor, positions: Positions, region: Tensor) -> Tensor:
    """Return a copy of the tensor with the region replaced; gradients flow to both.

    The copy is nobody else's: what is written into it downstream reaches neither the operand of an edit nor the
    activation that was read.
    """
    if not positions:
        return region.clone()
    (axis, chosen), *others = positions.items()
    if others:
        region = written(read(tensor, {axis: chosen}), dict(others), region)
    if isinstance(chosen, slice):
        return torch.slice_scatter(tensor, region, axis, chosen.start, chosen.stop)
    index = torch.as_tensor(chosen, device=tensor.device)
    # A copy of one tensor has no room for many regions, and vmap has no rule for writing into one of many.
    if inside_vmap(region) or inside_vmap(tensor):
        return tensor.index_copy(axis, index, region)
    return tensor.clone().index_copy_(axis, index, region)  # a clone keeps the strides, and so the last bits downstream
