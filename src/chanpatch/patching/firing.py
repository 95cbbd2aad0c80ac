"""A patch as data, and what happens when it fires.

Row by row of a forward: read the region, call the edit, check what came back, write it into a copy. The checks are
made once per shape; the ledger counts from shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.paths import inside_vmap
from ..engine.regions import Overwrite, read, written
from ..engine.sessions import Session, published
from ..errors import BatchAxisError, ChanpatchError, EditError, NaNError, TraceMismatchError, UnreachedError
from ..registry.lookup import no_batch, resolve, session_for
from ..registry.names import BarePoint
from ..registry.points import HookPoints
from ..registry.sites import HookPoint, Site
from .checks import Located, allowed_names, check_mask, check_operands
from .edits import Set
from .ledger import Ledger, touched
from .patch import Mask, Patch, checked_patches


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
