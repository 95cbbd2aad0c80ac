"""A patch at the tensor of its hook point: read the region, apply the edit, check the result, write it into a copy.

    firing = Firing(patch, points["relu3"])
    new = firing(activation, moment)

No hook and no session is needed. The checks run once per kind of tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.moments import Moment
from ..engine.paths import inside_vmap
from ..engine.regions import Overwrite, read, written
from ..engine.sessions import Session
from ..errors import BatchAxisError, EditError, TraceMismatchError
from ..registry.names import BarePoint
from ..registry.sites import HookPoint, Site, no_batch
from .checks import Located, check_mask, check_operands
from .edits import Set
from .patch import Mask, Patch


class Firing(Located):
    """One patch at one hook point, and what it has done so far.

    Args:
        patch: The patch.
        point: Its hook point.
        module: The module there; needed for axis names without a trace.
        check_nan: Whether to look for NaN that the edit introduces.

    Attributes:
        reached: Whether it ran since `forget`.
        nan: Bool tensor on the activation's device: whether NaN was introduced since `forget`; None if none was found.
        counts: Firings, rows (None without a batch axis) and elements, by the method of the root call.
    """

    def __init__(
        self, patch: Patch, point: HookPoint | BarePoint, module: nn.Module | None = None, *, check_nan: bool = True
    ) -> None:
        super().__init__(patch.site, point, module)
        self.patch = patch
        self.reached = False
        self.nan: Tensor | None = None
        self.counts: dict[str, tuple[int, Any, Any]] = {}
        self._edit: Callable[..., Tensor] = patch.edit
        self._takes_context = patch.takes_context
        self._needs_context = patch.takes_context or callable(patch.where)
        self.wants_names = self._needs_context
        self._sets: Any = patch.edit.value if type(patch.edit) is Set else None
        self._check_nan = check_nan and (not isinstance(self._sets, Real) or math.isnan(self._sets))
        self._kind: Any = None  # shape, dtype and device of the region
        self._size: tuple[Any, Any] = (None, 0)  # rows and elements of the region
        self._overwrite: Overwrite | None = None  # writes a constant

    def __call__(self, leaf: Tensor, moment: Moment | Session) -> Tensor:
        """Return the tensor with its region patched, or the very same tensor if the edit changed nothing.

        Args:
            leaf: The tensor at the hook point.
            moment: The forward under way: its inputs, step, rows and call, for edits and `where` functions.
        """
        self.locate(leaf, moment)
        if self._overwrite is not None:
            self._count(moment, None)
            return self._overwrite(leaf)
        region = read(leaf, self.positions)
        context = self._context(leaf, moment) if self._needs_context else None
        mask = None if self.patch.where is None else self._mask(self.patch.where, region, context)
        new = self._edited(region, context)
        self._count(moment, mask)
        if new is region:
            return leaf
        self._check_result(new, region)
        if mask is not None:
            new = torch.where(mask, new, region)
        if self._check_nan:
            self._look_for_nan(region, new)
        return written(leaf, self.positions, new)

    def forget(self) -> None:
        """Start a new root call: not reached, and no NaN."""
        self.reached, self.nan = False, None

    def _count(self, moment: Moment | Session, mask: Tensor | None) -> None:
        self.reached = True
        rows, elements = self._size if mask is None else _touched(self._kind[0], self.batch_axis, mask)
        method = moment.running or ""
        firings, all_rows, all_elements = self.counts.get(method, (0, 0, 0))
        all_rows = None if rows is None or all_rows is None else all_rows + rows
        self.counts[method] = firings + 1, all_rows, all_elements + elements

    def _look_for_nan(self, before: Tensor, after: Tensor) -> None:
        if not (after.is_floating_point() or after.is_complex()) or after.layout != torch.strided:
            return
        # Reading a number from another device waits for it, so only a CPU stops here when there is no NaN.
        if inside_vmap(after) or not after.is_cpu or after.isnan().any():
            found = (after.isnan() & ~before.isnan()).any()
            self.nan = found if self.nan is None else self.nan | found

    def _check(self, leaf: Tensor) -> None:
        region = read(leaf, self.positions)
        self._kind = region.shape, region.dtype, region.device
        self._size = _touched(region.shape, self.batch_axis)
        check_operands(self._edit, self.site, self.axes, region.shape, region.dtype, region.device)
        if isinstance(self.patch.where, Tensor):
            check_mask(self.patch.where, self.site, self.axes, region.shape)
        self._overwrite = None
        # A whole activation is left out, as each has strides of its own.
        if self._sets is not None and self.positions and not self._check_nan and self.patch.where is None:
            if isinstance(self._sets, Real):
                self._overwrite = Overwrite(self.positions, self._edit(region))
            elif self._sets.shape == region.shape:
                self._overwrite = Overwrite(self.positions, self._sets)

    def _edited(self, region: Tensor, context: _Context | None) -> Tensor:
        given = region
        if region.is_inference():  # has no version counter, so that a write in place would not be seen
            given, version = region.clone(), None
        else:
            version = region._version
        new = self._edit(given, context=context) if self._takes_context else self._edit(given)
        if not _same(given, region) if version is None else region._version != version:
            raise EditError(
                f"{self.patch!r} wrote into its region in place. Return a new tensor: "
                "activation * 0 instead of activation.mul_(0)."
            )
        return region if new is given else new

    def _mask(self, mask: Mask, region: Tensor, context: _Context | None) -> Tensor:
        if not isinstance(mask, Tensor):
            mask = mask(context)
            check_mask(mask, self.site, self.axes, region.shape)
        return mask.to(region.device)  # the user's own data is often on the CPU

    def _context(self, leaf: Tensor, moment: Moment | Session) -> _Context:
        axis = self.batch_axis
        if axis is None:
            return _Context(moment, self.site, None, slice(None))
        chosen = self.positions.get(axis, slice(None))
        chosen = chosen if isinstance(chosen, slice) else chosen.cpu()  # as the numbers of the rows are
        return _Context(moment, self.site, leaf.shape[axis], chosen)

    def _check_result(self, new: Any, region: Tensor) -> None:
        if not isinstance(new, Tensor):
            raise EditError(
                f"{self.patch!r} returned {type(new).__name__}. An edit returns a tensor: the new activation, "
                "or the one it got to change nothing."
            )
        if (new.shape, new.dtype, new.device) == self._kind:
            return
        what = next(what for what in ("shape", "dtype", "device") if getattr(new, what) != getattr(region, what))
        got, expected = getattr(new, what), getattr(region, what)
        if what == "shape":
            got, expected = tuple(got), f"{tuple(expected)} (axes {', '.join(self.axes)})"
        raise EditError(f"{self.patch!r} returned {what} {got}, but the region has {what} {expected}.")


class _Context:
    """The forward under way, as edits and `where` functions see it."""

    def __init__(self, moment: Moment | Session, site: Site, batch: int | None, chosen: slice | Tensor) -> None:
        self.inputs, self.call, self.step = moment.inputs, moment.call, moment.step
        self._site, self._batch, self._chosen, self._rows = site, batch, chosen, moment.rows

    @property
    def rows(self) -> Tensor:
        if self._batch is None:
            raise BatchAxisError(f"The patch at {self._site!r} asks for rows. {no_batch(self._site)}")
        if self._rows is None:
            return torch.arange(self._batch)[self._chosen]
        if len(self._rows) != self._batch:
            raise TraceMismatchError(
                f"The patch at {self._site!r} sees {self._batch} rows, but {len(self._rows)} are in this forward."
            )
        return self._rows[self._chosen]


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _touched(region: torch.Size, batch_axis: int | None, mask: Tensor | None = None) -> tuple[Any, Any]:
    """Return how many rows, None without a batch axis, and elements of a region of this shape a patch applies to."""
    rows: Any = None if batch_axis is None else region[batch_axis]
    elements: Any = region.numel()
    if mask is None:
        return rows, elements
    if batch_axis is not None:
        others = [axis for axis in range(mask.dim()) if axis != batch_axis]
        chosen = mask.any(dim=others) if others else mask
        rows = chosen.sum() * (rows if mask.shape[batch_axis] == 1 else 1)
    return rows, mask.sum() * (elements // max(mask.numel(), 1))
