"""A patch as data, and what happens when it fires.

Row by row of a forward: read the region, call the edit, check what came back, write it into a copy. The checks are
made once per shape; the ledger counts from shapes alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import (
    Located,
    allowed_names,
    check_mask,
    check_mask_type,
    check_operands,
    inside_vmap,
    no_batch,
    region_lengths,
)
from ._ledger import Ledger, edit_name, touched
from ._lookup import BarePoint, bound, resolve
from ._published import published
from ._regions import Overwrite, read, written
from ._sessions import Session, session_for
from ._typing import Mask
from .edits import Edit, Set
from .errors import BatchAxisError, ChanpatchError, EditError, NaNError, TraceMismatchError, UnreachedError
from .points import HookPoint, HookPoints
from .sites import Site


@dataclass(frozen=True, eq=False)
class Patch:
    """A site, what is done to it, and to which of its elements.

    Args:
        site: Where.
        edit: A callable `activation -> activation`; it gets the region and returns a new tensor of the same shape,
            dtype and device. One with a keyword-only parameter `context` gets a `chanpatch.edits.Context` too.
        where: Which elements of the region are replaced: a bool tensor with one length per axis of the region, each
            equal to the region's or 1, or a function of the context that returns one. None means all of them.

    Raises:
        TypeError: If the edit cannot be called or the site is none.
        EditError: If `where` is no bool tensor, or an operand of the edit does not fit a traced site.
    """

    site: Site
    edit: Edit | Callable[..., Tensor]
    where: Mask | None = None

    def __post_init__(self) -> None:
        """Check what can be known before the model runs."""
        if not isinstance(self.site, Site):
            raise TypeError(f"A patch needs a Site, not {type(self.site).__name__}: Site('conv1', channel=5).")
        if not callable(self.edit):
            raise EditError(
                f"The edit at {self.site!r} is {type(self.edit).__name__}, which cannot be called. "
                "Use Set(value) to put a value there, or a function activation -> activation."
            )
        if isinstance(self.where, Tensor):
            check_mask_type(self.where, self.site)
        elif self.where is not None and not callable(self.where):
            raise EditError(
                f"where at {self.site!r} is {type(self.where).__name__}; it takes a bool tensor or a function."
            )
        point = self.site.point
        if point is not None:
            lengths = region_lengths(self.site, point)
            check_operands(self.edit, self.site, point.axes, lengths, point.dtype, point.device)
            if isinstance(self.where, Tensor):
                check_mask(self.where, self.site, point.axes, lengths)

    @cached_property
    def takes_context(self) -> bool:
        """Whether the edit has a keyword-only parameter `context`."""
        kind: Any = type(self.edit)
        return _class_takes_context(kind) if kind.__module__ == Set.__module__ else _takes_context(self.edit)

    @property
    def runs_only_ours(self) -> bool:
        """Whether no function of the user's runs in it, so that it leaves nothing behind but what it returns."""
        return type(self.edit).__module__ == Set.__module__ and not callable(self.where)

    def __repr__(self) -> str:
        return f"Patch({self.site!r}, {edit_name(self.edit)}{', where=...' if self.where is not None else ''})"


def _takes_context(edit: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(edit).parameters.get("context")
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    if parameter is None:
        return False
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty:
        raise EditError(
            f"{edit_name(edit)} takes `context` by position. An edit takes it by keyword alone: "
            "def function(activation, *, context)."
        )
    return parameter.kind is parameter.KEYWORD_ONLY


@cache
def _class_takes_context(kind: Any) -> bool:
    return _takes_context(kind.__call__)


class AppliedPatches:
    """Patches of one context or policy: a session that applies them, and what they have done.

    Args:
        points_or_model: What they are applied to.
        patches: In the order of application.
        allow_unreached: Names of hook points whose patches need not run.
        check_nan: Whether to look for NaN that an edit brought in.

    Raises:
        HookPointError, SiteError: If a site does not exist; all faults at once.
    """

    def __init__(
        self,
        points_or_model: HookPoints | nn.Module,
        patches: Patch | Iterable[Patch],
        *,
        allow_unreached: Iterable[str],
        check_nan: bool,
    ) -> None:
        self.patches = checked_patches(points_or_model, patches)
        self.allow_unreached = allowed_names(
            allow_unreached, (patch.site.name for patch in self.patches), "there is no patch"
        )
        self.check_nan = check_nan
        self.session = session_for(points_or_model)
        self.ledger = Ledger(self.patches)
        self.reached: set[int] = set()  # numbers of the patches that ran
        self._nan: dict[int, Tensor] = {}
        modules = self.session.modules
        for number, patch in enumerate(self.patches):
            point = resolve(modules, patch.site)
            firing = _Firing(self, number, patch, point, modules.get(point.module))
            self.session.listen(point, "patch", firing)

    def compare_nan(self, number: int, before: Tensor, after: Tensor) -> None:
        """Gather, on the device, whether a patch brought NaN in."""
        has_nan = (after.is_floating_point() or after.is_complex()) and after.layout == torch.strided
        if not has_nan or inside_vmap(after):
            return
        # To read a number of another device is to wait for it; a CPU has none to wait for.
        if not after.is_cpu or after.isnan().any():
            brought = (after.isnan() & ~before.isnan()).any()
            self._nan[number] = self._nan[number] | brought if number in self._nan else brought

    def forget(self) -> None:
        """Begin to count anew which patches ran and which brought NaN."""
        self.reached.clear()
        self._nan.clear()

    def raise_nan(self, cause: Exception | None = None) -> None:
        """Read the NaN flags, all at once, and raise for the first patch that brought NaN in.

        Args:
            cause: An exception in flight. It is chained where a distribution refused the NaN, and otherwise left in
                flight with a note.
        """
        flags, self._nan = self._nan, {}
        if not flags or isinstance(cause, ChanpatchError):
            return
        home = next(iter(flags.values())).device
        if not torch.stack([flag.to(home) for flag in flags.values()]).any():
            return
        number = next(number for number, flag in flags.items() if flag)
        message = (
            f"{self.patches[number]!r} brought NaN into a region that had none. Check its operands (a mean over no "
            "rows, 0/0); patched() and PatchedPolicy take check_nan=False where NaN is meant."
        )
        if cause is None or _is_refusal(cause):
            raise NaNError(message) from cause
        if hasattr(cause, "add_note"):  # from Python 3.11 on
            cause.add_note(message)

    def unreached(self, among: Iterable[int] | None = None) -> list[str]:
        """Return the names of the hook points whose patches did not run, among some patches or all."""
        if len(self.reached) == len(self.patches):
            return []
        numbers = set(range(len(self.patches)) if among is None else among) - self.reached
        names = dict.fromkeys(self.patches[number].site.name for number in sorted(numbers))
        return [name for name in names if name not in self.allow_unreached]

    def raise_unreached(self, names: Sequence[str], where: str, *, compiled: bool, advice: str = "") -> None:
        """Raise if there are hook points whose patches did not run.

        Args:
            names: Of the hook points.
            where: They did not run.
            compiled: Whether the reason may be that the model was compiled.
            advice: What to do.
        """
        if names:
            listed = ", ".join(f"'{name}'" for name in names)
            many = len(names) > 1
            raise UnreachedError(
                f"The {'patches' if many else 'patch'} at {listed} never ran {where}. "
                f"{'The model was compiled, or ' if compiled else ''}{listed} {'are' if many else 'is'} not on the "
                f"path that was called, or {'were' if many else 'was'} called by {'their' if many else 'its'} "
                f"forward(), which runs no hooks.{advice}"
            )


def checked_patches(points_or_model: HookPoints | nn.Module, patches: Patch | Iterable[Patch]) -> tuple[Patch, ...]:
    """Return patches whose sites are bound to the trace, or by names alone, all faults at once.

    Raises:
        TypeError: If something else than patches is among them.
        HookPointError, SiteError: If a site does not exist.
        EditError: If an operand does not fit a traced site.
    """
    each = tuple(patches) if isinstance(patches, Iterable) else (patches,)
    for patch in each:
        if not isinstance(patch, Patch):
            raise TypeError(f"Expected a Patch, not {type(patch).__name__}: zero_ablate(Site('conv1', channel=5)).")
    sites = bound(points_or_model, [patch.site for patch in each])
    return tuple(
        patch if site is patch.site else Patch(site, patch.edit, patch.where)
        for patch, site in zip(each, sites, strict=True)
    )


class _Firing(Located):
    """One patch at the moment it fires."""

    def __init__(
        self,
        applied: AppliedPatches,
        number: int,
        patch: Patch,
        point: HookPoint | BarePoint,
        module: nn.Module | None,
    ) -> None:
        super().__init__(patch.site, point, module)
        self._applied, self._number, self._patch = applied, number, patch
        self._edit: Callable[..., Tensor] = patch.edit
        self._takes_context = patch.takes_context
        self._needs_context = patch.takes_context or callable(patch.where)
        self._sets: Any = patch.edit.value if type(patch.edit) is Set else None
        self._check_nan = applied.check_nan and (not isinstance(self._sets, Real) or math.isnan(self._sets))
        self._kind: Any = None  # shape, dtype and device of the region
        self._size: tuple[Any, Any] = (None, 0)  # rows and elements of the region
        self._overwrite: Overwrite | None = None  # where the same is put there whatever is there

    def __call__(self, leaf: Tensor) -> Tensor:
        self.locate(leaf)
        if self._overwrite is not None:
            self._count(None)
            return self._overwrite(leaf)
        region = read(leaf, self.positions)
        context = self._context(leaf) if self._needs_context else None
        mask = None if self._patch.where is None else self._mask(self._patch.where, region, context)
        new = self._edited(region, context)
        self._count(mask)
        if new is region:
            return leaf
        self._check_result(new, region)
        if mask is not None:
            new = torch.where(mask, new, region)
        if self._check_nan:
            self._applied.compare_nan(self._number, region, new)
        return written(leaf, self.positions, new)

    def _count(self, mask: Tensor | None) -> None:
        applied = self._applied
        applied.reached.add(self._number)
        size = self._size if mask is None else touched(self._kind[0], self.batch_axis, mask)
        applied.ledger.count(applied.session.running, self._number, *size)

    def _check(self, leaf: Tensor) -> None:
        region = read(leaf, self.positions)
        self._kind = region.shape, region.dtype, region.device
        self._size = touched(region.shape, self.batch_axis)
        check_operands(self._edit, self.site, self.axes, region.shape, region.dtype, region.device)
        if isinstance(self._patch.where, Tensor):
            check_mask(self._patch.where, self.site, self.axes, region.shape)
        self._overwrite = None
        # A whole activation is left out, as each has strides of its own.
        if self._sets is not None and self.positions and not self._check_nan and self._patch.where is None:
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
                f"{self._patch!r} wrote into its region in place. Return a new tensor: "
                "activation * 0 instead of activation.mul_(0)."
            )
        return region if new is given else new

    def _mask(self, mask: Mask, region: Tensor, context: _Context | None) -> Tensor:
        if not isinstance(mask, Tensor):
            mask = mask(context)
            check_mask(mask, self.site, self.axes, region.shape)
        return mask.to(region.device)  # the user's own data is often on the CPU

    def _context(self, leaf: Tensor) -> _Context:
        axis = self.batch_axis
        if axis is None:
            return _Context(self._applied.session, self.site, None, slice(None))
        chosen = self.positions.get(axis, slice(None))
        chosen = chosen if isinstance(chosen, slice) else chosen.cpu()  # as the numbers of the rows are
        return _Context(self._applied.session, self.site, leaf.shape[axis], chosen)

    def _check_result(self, new: Any, region: Tensor) -> None:
        if not isinstance(new, Tensor):
            raise EditError(
                f"{self._patch!r} returned {type(new).__name__}. An edit returns a tensor: the new activation, "
                "or the one it got to change nothing."
            )
        if (new.shape, new.dtype, new.device) == self._kind:
            return
        what = next(what for what in ("shape", "dtype", "device") if getattr(new, what) != getattr(region, what))
        got, expected = getattr(new, what), getattr(region, what)
        if what == "shape":
            got, expected = tuple(got), f"{tuple(expected)} (axes {', '.join(self.axes)})"
        raise EditError(f"{self._patch!r} returned {what} {got}, but the region has {what} {expected}.")


class _Context:
    """The forward under way, as edits and `where` functions see it."""

    def __init__(self, session: Session, site: Site, batch: int | None, chosen: slice | Tensor) -> None:
        self.inputs, self.call, self.step = session.inputs, session.call, published.step
        self._site, self._batch, self._chosen, self._rows = site, batch, chosen, published.rows

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


def _is_refusal(error: Exception) -> bool:
    """Tell whether a torch distribution refused its parameters, when it was built or when it was sampled."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, (ValueError, RuntimeError)) and where.startswith("torch.distributions")


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
