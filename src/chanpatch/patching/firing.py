"""A patch at the tensor of its hook point, without a hook or a session: `Firing(patch, point)(activation, moment)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.moments import Moment
from ..engine.paths import inside_vmap
from ..engine.regions import Overwrite, read, written
from ..engine.sessions import Session
from ..errors import EditError
from ..registry.names import BarePoint
from ..registry.sites import HookPoint
from ..results import Records
from .checks import Located, check_mask, check_operands
from .edits import Context, Set
from .patch import Mask, Patch, edit_name


class Firing(Located):
    """One patch at one hook point, and its counts; `module`, the module there, gives axis names without a trace.

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
        self._edit, self._takes_context = patch.edit, patch.takes_context
        self.wants_names = patch.takes_context or callable(patch.where)
        self._sets: Any = patch.edit.value if type(patch.edit) is Set else None
        self._check_nan = check_nan and (not isinstance(self._sets, Real) or math.isnan(self._sets))
        self._kind: Any = None  # shape, dtype and device of the region
        self._size: tuple[Any, Any] = (None, 0)  # rows and elements of the region
        self._overwrite: Overwrite | None = None  # writes a constant

    def __call__(self, leaf: Tensor, moment: Moment | Session) -> Tensor:
        """Return the tensor with its region patched; the same object if the edit changed nothing."""
        self.locate(leaf, moment)
        if self._overwrite is not None:
            self._count(moment, None)
            return self._overwrite(leaf)
        region = read(leaf, self.positions)
        context = None
        if self.wants_names:  # the edit or the `where` function takes the context
            context = Context(moment, self.site, self.batch_axis, leaf.shape, self.positions)
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
        # Reading a number from another device would wait for it, so only a CPU looks first.
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
        fits = isinstance(self._sets, Real) or (self._sets is not None and self._sets.shape == region.shape)
        # Whole activations are left out: their strides may differ.
        if fits and self.positions and not self._check_nan and self.patch.where is None:
            self._overwrite = Overwrite(self.positions, self._edit(region))

    def _edited(self, region: Tensor, context: Context | None) -> Tensor:
        counted = not region.is_inference()  # if writes are not counted, a copy shows whether the edit wrote in place
        given, version = (region, region._version) if counted else (region.clone(), 0)
        new = self._edit(given, context=context) if self._takes_context else self._edit(given)
        if given._version != version if counted else not torch.isclose(given, region, 0, 0, equal_nan=True).all():
            raise EditError(
                f"{self.patch!r} wrote into its region in place. Return a new tensor: "
                "activation * 0 instead of activation.mul_(0)."
            )
        return region if new is given else new

    def _mask(self, mask: Mask, region: Tensor, context: Context | None) -> Tensor:
        if not isinstance(mask, Tensor):
            mask = mask(context)
            check_mask(mask, self.site, self.axes, region.shape)
        return mask.to(region.device)  # masks are often made on the CPU

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


def _touched(region: torch.Size, batch_axis: int | None, mask: Tensor | None = None) -> tuple[Any, Any]:
    """Return the number of rows (None without a batch axis) and of elements in the region, or in the mask."""
    rows: Any = None if batch_axis is None else region[batch_axis]
    elements: Any = region.numel()
    if mask is None:
        return rows, elements
    if batch_axis is not None:
        others = [axis for axis in range(mask.dim()) if axis != batch_axis]
        chosen = mask.any(dim=others) if others else mask
        rows = chosen.sum() * (rows if mask.shape[batch_axis] == 1 else 1)
    return rows, mask.sum() * (elements // max(mask.numel(), 1))


class Ledger(Records):
    """Counts of the firings of each patch, and of the rows and elements that it wrote, by method."""

    _most = None

    def __init__(self, firings: Sequence[Firing]) -> None:
        self._firings = firings

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch and method: method, site, edit, firings, rows, elements.

        A patch that never fired has a record of zeros. `rows` is None if the batch axis is not proved.
        """
        return [
            {
                "method": method,
                "site": repr(each.patch.site),
                "edit": edit_name(each.patch.edit),
                "firings": firings,
                "rows": None if rows is None else int(rows),
                "elements": int(elements),
            }
            for each in self._firings
            for method, (firings, rows, elements) in sorted(each.counts.items()) or [("", (0, 0, 0))]
        ]

    def _lines(self) -> list[dict[str, Any]]:
        records = self.to_records()
        if {record["method"] for record in records} <= {"", "__call__"}:
            return [{name: value for name, value in record.items() if name != "method"} for record in records]
        return records

    def _title(self) -> str:
        return f"Ledger of {len(self._firings)} patch{'es' * (len(self._firings) != 1)}"
