"""Reading and writing a region of a tensor. A region keeps all axes; nothing is written in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .paths import inside_vmap

Positions = Mapping[int, "slice | list[int] | Tensor"]


_FEW = 2**10  # elements up to which one kernel over all of them takes less than a copy and a write into that


_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


class Overwrite:
    """Writes one region, again and again, into tensors of one shape, dtype and device.

    Args:
        positions: As for `written`.
        region: What is written there.
    """

    def __init__(self, positions: Positions, region: Tensor) -> None:
        self._positions, self._region = positions, region
        self._tensors = 0
        self._mask: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a copy of the tensor with the region replaced, as `written` does."""
        if self._mask is not None and tensor.is_contiguous():
            return torch.where(self._mask, self._region, tensor)
        self._tensors += 1
        if self._tensors == 2:  # making a mask takes as much as four tensors save
            self._mask = self._mask_of(tensor)
        return written(tensor, self._positions, self._region)

    def _mask_of(self, tensor: Tensor) -> Tensor | None:
        """Return where the region lies; None unless it broadcasts to the tensor, and that is small enough."""
        broadcasts = self._region.is_contiguous() and all(self._region.shape[axis] == 1 for axis in self._positions)
        small = tensor.numel() <= _FEW and tensor.dtype in _PLAIN_DTYPES
        if not (broadcasts and small) or torch._C._functorch.peek_interpreter_stack() is not None:
            return None  # what is made inside a transform is of no use after it
        with torch.inference_mode(False):  # and what is made in inference mode is of none for gradients
            lengths = [length if axis in self._positions else 1 for axis, length in enumerate(tensor.shape)]
            mask = torch.zeros(lengths, dtype=torch.bool, device=tensor.device)
            return written(mask, self._positions, torch.ones_like(read(mask, self._positions)))
