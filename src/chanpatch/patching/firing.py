"""Apply a patch to a tensor, with or without hooks: `Firing(patch, point)(tensor, moment)`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..engine.moments import Moment
from ..engine.paths import Place, inside_vmap
from ..engine.sessions import Session
from ..errors import EditError, TraceMismatchError, UnsupportedModelError
from ..registry.axes import axis_names
from ..registry.points import names_by_trace
from ..registry.sites import Axes, Coordinates, HookPoint, Site, read, unusual_layout, written
from ..results import Records
from .edit_context import Context
from .edits import Set, check_mask, check_operands, fits, shown_axes
from .patch import Mask, Patch, edit_name


class Located:
    """Location of a site's region in the tensor at a hook point.

    `axes` and `batch_axis` describe the tensor. `positions` maps the number of each indexed axis to the positions that
    the site selects on this axis.
    """

    wants_names = False  # whether all axis names and the batch axis must be known

    def __init__(self, site: Site, point: Place, module: nn.Module | None) -> None:
        self.site, self._point, self._module = site, point, module
        self.axes: Axes = ()
        self.batch_axis: int | None = None
        self.positions: dict[int, slice | Tensor] = {}
        self._known: tuple[Any, ...] | None = None
        self._lens = point.lens if isinstance(point, HookPoint) else None

    def locate(self, leaf: Tensor, moment: Moment | Session) -> None:
        """Find the site's region in a tensor. Raise an error if the tensor does not match the trace or the site.

        The location is computed again only if the tensor's type, shape, dtype, device or layout has changed.
        """
        known = leaf.shape, type(leaf), leaf.dtype, leaf.device, leaf.layout
        if known == self._known:
            return
        self._known = None
        # The cached positions must also work outside inference mode.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if isinstance(self._point, HookPoint):
                self.axes, self.batch_axis = self._point.axes, self._point.batch_axis
                leaf = traced_view(leaf, self._point)
            else:
                self.axes, self.batch_axis = self._bare_axes(self._point, leaf, moment)
            self.positions = {
                axis: chosen if isinstance(chosen, slice) else torch.tensor(chosen, device=leaf.device)
                for axis, chosen in self.site.positions(self.axes, leaf.shape).items()
            }
            self._check(leaf)
        if type(leaf) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            self._known = known  # positions from inside a transform or for a tensor subclass are not reused
            self._remember()

    def _bare_axes(self, point: Place, leaf: Tensor, moment: Moment | Session) -> tuple[Axes, int | None]:
        """Infer the axis names and the batch axis from the module's type or, if that is not enough, from a trace."""
        names: Sequence[str | None] = (None,) * leaf.dim()
        if self._module is not None:
            names = axis_names(self._module, point.side, point.path, leaf.dim(), None)
        axes = tuple(name or f"axis{number}" for number, name in enumerate(names))
        lacks = self.wants_names and (None in names or "batch" not in names)
        lacks |= any(axis not in axes for axis, _ in self.site.indices)
        readable = not torch._C._functorch.is_functorch_wrapped_tensor(leaf)
        if lacks and readable and isinstance(moment, Session) and (call := moment.root_call) is not None:
            known = names_by_trace(moment.root, call.method, call.args, call.kwargs).get(point.name)
            if known is not None and len(known[0]) == leaf.dim():
                return known
        return axes, axes.index("batch") if "batch" in axes else None

    def _mask(self, mask: Mask, region: Tensor, context: Context | None) -> Tensor:
        if not isinstance(mask, Tensor):
            given: Any = context and context.mask_of(mask)  # there is always a context if `where` is a function
            mask = torch.full((1,) * region.dim(), given) if isinstance(given, bool) else given
            check_mask(mask, self.site, self.axes, region.shape)
        return mask.to(region.device)  # masks are often made on the CPU

    def _check(self, leaf: Tensor) -> None:
        """Raise an error if the site's region in this tensor cannot be patched or recorded."""

    def _remember(self) -> None:
        """Store the location, so that later contexts that use the same patch need not compute it again."""


class Firing(Located):
    """One patch at one hook point. If the model was not traced, axis names are inferred from `module`.

    Attributes:
        reached: Whether the patch has run since the last reset.
        nan: Bool tensor that is True if the patch has introduced NaN since the last reset. None if no activation has
            been checked since then or, on the CPU, if no NaN has been found.
        counts: Dict that maps the method of a root call to a tuple: the numbers of firings, rows and elements. The
            number of rows is None if the batch axis is unknown.
    """

    def __init__(self, patch: Patch, point: Place, module: nn.Module | None = None, *, check_nan: bool = True) -> None:
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
        self._size: tuple[Any, Any] = (None, 0)  # number of rows, and number of elements, in the region
        self._filled: Tensor | None = None  # mask of the region, for a fast fill with a number
        if point is patch.site.point and (fit := _FITS.get(patch)) and fit["_check_nan"] == self._check_nan:
            vars(self).update(fit)

    def __call__(self, leaf: Tensor, moment: Moment | Session) -> Tensor:
        """Return a tensor in which the region is patched. If the edit returns its input, return `leaf` itself."""
        self.locate(leaf, moment)
        if self._lens is None:
            return self._patched(leaf, moment)
        seen = self._lens.split(leaf)
        patched = self._patched(seen, moment)
        return leaf if patched is seen else self._lens.merge(patched, leaf)

    def _patched(self, leaf: Tensor, moment: Moment | Session) -> Tensor:
        if self._filled is not None and leaf.is_contiguous():
            self._count(moment, None)
            return leaf.masked_fill(self._filled, self._sets)
        region = read(leaf, self.positions)
        context = None
        if self.wants_names:  # the edit or the `where` function needs the context
            context = Context(moment, self.site, self.batch_axis, leaf, self.positions)
        mask = None if self.patch.where is None else self._mask(self.patch.where, region, context)
        new = self._edited(region, context)
        patched = leaf
        if new is not region:
            self._check_result(new, region)
            if mask is not None:
                new = torch.where(mask, new, region)
            if self._check_nan:
                self._look_for_nan(region, new)
            ours = type(self._edit).__module__ == Set.__module__ and not isinstance(self._sets, Tensor)
            is_new = ours or mask is not None  # an operand, or a tensor from a custom function, must be copied
            patched = new if is_new and not self.positions else written(leaf, self.positions, new)
        self._count(moment, mask)
        return patched

    def _count(self, moment: Moment | Session, mask: Tensor | None) -> None:
        self.reached = True
        rows, elements = self._size if mask is None else _touched(self._kind[0], self.batch_axis, mask)
        method = moment.running or ""
        if (before := self.counts.get(method)) is not None:
            rows = None if rows is None or before[1] is None else before[1] + rows
            self.counts[method] = before[0] + 1, rows, before[2] + elements
        else:
            self.counts[method] = 1, rows, elements

    def _look_for_nan(self, before: Tensor, after: Tensor) -> None:
        if not (after.is_floating_point() or after.is_complex()) or after.is_meta or unusual_layout(after):
            return
        # The value is read immediately only on the CPU, because reading from another device would synchronize.
        if inside_vmap(after) or not after.is_cpu or (total := after.sum().item()) != total:  # a sum needs no memory
            found = (after.isnan() & ~before.isnan()).any()
            self.nan = found if self.nan is None else self.nan | found

    def _check(self, leaf: Tensor) -> None:
        region = read(leaf, self.positions)
        ours = type(self._edit).__module__ == Set.__module__
        if (ours or self.patch.where is not None) and (layout := unusual_layout(leaf)):
            raise UnsupportedModelError(
                f"{self.patch!r} is applied to a {layout} tensor, which can be patched only with a custom function and "
                "without `where`. Use edit(site, function), or make the tensor dense in the model."
            )
        self._kind = region.shape, region.dtype, region.device
        self._size = _touched(region.shape, self.batch_axis)
        number = isinstance(self._sets, Real)
        if not (number and self._point is self.site.point):  # otherwise, Patch has already checked the number
            check_operands(self._edit, self.site, self.axes, region.shape, region.dtype, region.device)
        if isinstance(self.patch.where, Tensor):
            check_mask(self.patch.where, self.site, self.axes, region.shape)
        self._filled = None
        plain = number and not self._check_nan and self.positions and self.patch.where is None
        if plain and leaf.numel() <= 2**10 and leaf.is_floating_point():  # faster if small
            mask = torch.zeros_like(leaf, dtype=torch.bool)
            self._filled = written(mask, self.positions, torch.ones_like(region, dtype=torch.bool))

    def _remember(self) -> None:
        if self._point is self.site.point:
            _FITS[self.patch] = {name: getattr(self, name) for name in _FIT}

    def _edited(self, region: Tensor, context: Context | None) -> Tensor:
        counted = not region.is_inference()  # if torch does not count writes, a copy reveals in-place edits
        given, version = (region, region._version) if counted else (region.clone(), 0)
        new = self._edit(given, context=context) if self._takes_context else self._edit(given)
        if given._version != version if counted else not torch.isclose(given, region, 0, 0, equal_nan=True).all():
            raise EditError(
                f"The edit in {self.patch!r} modified the activation in place. Return a new tensor, such as activation "
                "* 0 instead of activation.mul_(0)."
            )
        return region if new is given else new

    def _check_result(self, new: Any, region: Tensor) -> None:
        if not isinstance(new, Tensor):
            raise EditError(
                f"The edit in {self.patch!r} returned {type(new).__name__}. An edit must return a tensor: either a new "
                "activation or, to change nothing, the activation that was passed to the edit."
            )
        if (new.shape, new.dtype, new.device) != self._kind:
            what = next(what for what in ("shape", "dtype", "device") if getattr(new, what) != getattr(region, what))
            got, expected = getattr(new, what), getattr(region, what)
            if what == "shape":
                got, expected = tuple(got), f"{tuple(expected)} (axes {', '.join(self.axes)})"
            raise EditError(
                f"The edit in {self.patch!r} returned a tensor with {what} {got}. An edit must return a tensor with "
                f"the region's {what}: {expected}."
            )


# Results of `locate` for patches at traced hook points, reused because the same patch is often applied many times.
_FITS: WeakKeyDictionary[Patch, dict[str, Any]] = WeakKeyDictionary()
_FIT = ("axes", "batch_axis", "positions", "_known", "_check_nan", "_kind", "_size", "_filled")


def _touched(region: torch.Size, batch_axis: int | None, mask: Tensor | None = None) -> tuple[Any, Any]:
    """Return the number of rows and the number of elements in a region, given the region's shape.

    With a mask, count only selected elements, and only rows with selected elements. If the batch axis is unknown, the
    number of rows is None.
    """
    rows: Any = None if batch_axis is None else region[batch_axis]
    if mask is None:
        return rows, region.numel()
    if batch_axis is not None:
        others = [axis for axis in range(mask.dim()) if axis != batch_axis]
        chosen = mask.any(dim=others) if others else mask
        rows = chosen.sum() * (rows if mask.shape[batch_axis] == 1 else 1)
    return rows, mask.sum() * (region.numel() // max(mask.numel(), 1))


class Ledger(Records):
    """Table of how many times each patch ran (its firings), and how many rows and elements the patch replaced.

    The counts are separate for each method of the model that was called. If patches have donors, the forward passes on
    donor inputs are also counted. If several patches share such a forward pass, the pass is counted for the patch that
    is reached first.
    """

    _most = None

    def __init__(self, firings: Sequence[Firing], forwards: Mapping[tuple[str, Site], int] = {}) -> None:
        self._firings, self._forwards = firings, forwards

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per patch and method, with keys `method`, `site`, `edit`, `firings`, `rows` and `elements`.

        If a patch never ran, its counts are 0. `rows` is None if the batch axis is unknown. If there are donors, each
        dict also has the key `donor forwards`.
        """
        return [
            {
                "method": method,
                "site": repr(each.patch.site),
                "edit": edit_name(each.patch.edit),
                "firings": firings,
                "rows": None if rows is None else int(rows),
                "elements": int(elements),
                **({"donor forwards": self._forwards.get((method, each.site), 0)} if self._forwards else {}),
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


def traced_view(leaf: Tensor, point: HookPoint) -> Tensor:
    """Return the model's tensor with the axes of the hook point, after the hook point's view or basis is applied.

    Raises:
        TraceMismatchError: If the tensor's dtype differs from the trace, or if the length of an axis that is neither
            the batch axis nor a free axis differs from the trace.
    """
    base = point.lens.base if isinstance(point.lens, Coordinates) else point
    lengths = base.lengths
    if base.batch_axis is None and "batch" in base.axes:
        lengths[base.axes.index("batch")] = None
    seen = leaf
    with suppress(ValueError):
        seen = leaf if base.lens is None else base.lens.split(leaf)
    if not fits(seen, lengths):
        raise TraceMismatchError(
            f"Hook point '{point.name}' has shape {tuple(leaf.shape)} in this forward pass, but axes "
            f"{shown_axes(base.axes, lengths)} in the trace. Call hook_points() with inputs like the ones in this "
            "forward pass. For inputs of varying length, pass free={'position': 1} to hook_points()."
        )
    if leaf.dtype != point.dtype:
        raise TraceMismatchError(
            f"Hook point '{point.name}' is {leaf.dtype} in this forward pass, but {point.dtype} in the trace. Call "
            "hook_points() with the same dtype and torch.autocast settings as in this forward pass."
        )
    return seen if base is point else point.lens.split(leaf)  # type: ignore[union-attr]
