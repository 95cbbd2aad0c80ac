"""The contexts in which a model runs with patches or is recorded.

with patched(model, zero_ablate(Site("conv1", channel=5))) as ledger:
model(observations)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ContextDecorator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from ..engine.hooks import refuse_unhookable
from ..engine.sessions import RootCall, Session
from ..errors import ChanpatchError, NaNError, UnreachedError
from ..registry.points import HookPoints, model_of, resolve, root_of
from .checks import allowed_names
from .firing import Firing
from .ledger import Ledger
from .patch import Patch, checked_patches

Result = TypeVar("Result", covariant=True)


class Effect(Protocol[Result]):
    """A session of a context of the user's."""

    # fmt: off
    root: nn.Module
    modules: dict[str, nn.Module]
    @property
    def result(self) -> Result: ...  # noqa: D102  # of the context
    def failed(self, error: Exception) -> None: ...  # noqa: D102  # may raise another in its place
    def finish(self) -> None: ...  # noqa: D102  # raises if a patch or a record never ran
    def let_go(self) -> None: ...  # noqa: D102
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: object) -> None: ...
    # fmt: on


class Opened(ContextDecorator, Generic[Result]):
    """A context, and a decorator, in which a session is open.

    Args:
        session: Returns a new session for each entry; the first is built eagerly, so that errors surface here.
    """

    def __init__(self, session: Callable[[], Effect[Result]]) -> None:
        self._new = session
        self._next: Effect[Result] | None = session()
        self._open: list[Effect[Result]] = []

    def _recreate_cm(self) -> Opened[Result]:
        return Opened(self._new)

    def __enter__(self) -> Result:
        session, self._next = self._next, None
        if session is None or session.modules != dict(session.root.named_modules(remove_duplicate=False)):
            session = self._new()  # a module of the model was replaced meanwhile
        try:
            session.__enter__()
            self._open.append(session)
            return session.result
        except BaseException:  # an interrupt between the last of it and the body of `with`
            self._open = [other for other in self._open if other is not session]
            session.__exit__()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        session = self._open.pop()
        try:
            try:
                if isinstance(error, Exception):
                    session.failed(error)
            finally:
                session.__exit__()
            if error is None:
                session.finish()
        finally:
            session.let_go()


class Patching(Session):
    """A session that applies patches.

    Args:
        points_or_model: The model, or its HookPoints.
        patches: Patches in the order of application.
        allow_unreached: Names of hook points whose patches need not run.
        check_nan: Whether to look for NaN that an edit introduces.

    Attributes:
        patches: The patches, bound to their hook points.
        firings: One per patch.
        ledger: What each patch has done so far.

    Raises:
        HookPointError, SiteError: If a site does not exist; all faults at once.
    """

    def __init__(
        self,
        points_or_model: HookPoints | nn.Module,
        patches: Patch | Iterable[Patch],
        *,
        allow_unreached: Iterable[str] = (),
        check_nan: bool = True,
    ) -> None:
        super().__init__(*root_of(points_or_model))
        self.check_nan = check_nan
        self.patches = checked_patches(points_or_model, patches)
        names = [patch.site.name for patch in self.patches]
        self.allow_unreached = allowed_names(allow_unreached, names, "there is no patch")
        self.firings: list[Firing] = []
        for patch in self.patches:
            point = resolve(self.modules, patch.site)
            self.firings.append(Firing(patch, point, self.modules.get(point.module), check_nan=check_nan))
            self.listen(point, "patch", self.firings[-1])
        self.ledger = Ledger(self.firings)

    def forget(self) -> None:
        """Start a new root call: no patch is reached, and no NaN found."""
        for firing in self.firings:
            firing.forget()

    def raise_nan(self, cause: Exception | None = None) -> None:
        """Raise for the first patch that introduced NaN; see `raise_nan`."""
        raise_nan(self.firings, cause)

    def unreached(self, among: Iterable[int] | None = None) -> list[str]:
        """Return the names of the hook points whose patches did not run, among some patches (by number) or all."""
        numbers = range(len(self.firings)) if among is None else sorted(among)
        names = dict.fromkeys(self.patches[number].site.name for number in numbers if not self.firings[number].reached)
        return [name for name in names if name not in self.allow_unreached]

    def raise_unreached(self, names: Sequence[str], where: str, *, compiled: bool, advice: str = "") -> None:
        """Raise if there are hook points whose patches did not run.

        Args:
            names: Names of these hook points.
            where: The call or context in which they did not run.
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


def raise_nan(firings: Iterable[Firing], cause: Exception | None = None) -> None:
    """Read the NaN flags, all at once, and raise for the first patch that introduced NaN.

    Args:
        firings: Patches at their hook points.
        cause: An exception in flight. It is chained if a distribution refused the NaN, and otherwise left in flight
            with a note.
    """
    found = [firing for firing in firings if firing.nan is not None]
    flags = [flag for firing in found if (flag := firing.nan) is not None]
    for firing in found:
        firing.nan = None
    functorch = torch._C._functorch
    if not flags or isinstance(cause, ChanpatchError) or any(map(functorch.is_functorch_wrapped_tensor, flags)):
        return  # inside a transform no flag can be read
    if not torch.stack([flag.to(flags[0].device) for flag in flags]).any():
        return
    patch = next(firing.patch for firing, flag in zip(found, flags, strict=True) if flag)
    error = nan_error(patch)
    if cause is None or _is_refusal(cause):
        raise error from cause
    if hasattr(cause, "add_note"):  # Python 3.11 and later
        cause.add_note(str(error))


def nan_error(patch: Patch) -> NaNError:
    """Return the error of a patch that introduced NaN."""
    return NaNError(
        f"{patch!r} brought NaN into a region that had none. Check its operands (a mean over no rows, 0/0); patched() "
        "and PatchedPolicy take check_nan=False where NaN is meant."
    )


def _is_refusal(error: Exception) -> bool:
    """Return whether a torch distribution refused its parameters, when it was built or when it was sampled."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, (ValueError, RuntimeError)) and where.startswith("torch.distributions")


def patched(
    points_or_model: HookPoints | nn.Module,
    patches: Patch | Iterable[Patch],
    *,
    allow_unreached: Iterable[str] = (),
    check_nan: bool = True,
) -> Opened[Ledger]:
    """Run the model with patches inside while the context is open.

    It is a decorator too: `@patched(model, patch)` patches the model in each call of a function.

    Args:
        points_or_model: The model, or its HookPoints: then every site is checked against the trace at once.
        patches: One or more, applied in the order given; contexts nest, outer patches first.
        allow_unreached: Names of hook points whose patches need not run.
        check_nan: Raise when a patch brings NaN into a region that had none.

    Yields:
        The ledger: what each patch has done so far.

    Raises:
        HookPointError, SiteError: At once, if a site does not exist; all faults together.
        ValueError: At once, if `allow_unreached` has a name where there is no patch.
        EditError: In the forward, if an edit's result does not fit.
        NaNError: At the end of a root call.
        UnreachedError: At exit, if a patch never ran; it masks no exception in flight.
        UnsupportedModelError: At once, if the model ignores hooks.
        ConcurrencyError: In the forward, if it runs in another thread.

    Example:
        >>> import torch
        >>> from chanpatch import hook_points, zero_ablate
        >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(2, 2))
        >>> with patched(points, zero_ablate(points.site(".out"))) as ledger:
        ...     _ = points.model(torch.ones(4, 2))
        >>> print(ledger)
        Ledger of 1 patch
        site          edit  firings  rows  elements
        Site('.out')  Set   1        4     12
    """
    # Iterators would be exhausted on re-entry.
    chosen = tuple(patches) if isinstance(patches, Iterable) else patches
    allowed = allow_unreached if isinstance(allow_unreached, str) else tuple(allow_unreached)
    return Opened(lambda: _Patched(points_or_model, chosen, allow_unreached=allowed, check_nan=check_nan))


class _Patched(Patching):
    """The patches of one context."""

    confined = True

    def __init__(self, points_or_model: HookPoints | nn.Module, patches: Any, **settings: Any) -> None:
        refuse_unhookable(model_of(points_or_model))
        super().__init__(points_or_model, patches, **settings)

    def on_end(self, call: RootCall) -> None:
        self.raise_nan()

    @property
    def result(self) -> Ledger:
        return self.ledger

    def failed(self, error: Exception) -> None:
        self.raise_nan(cause=error)

    def finish(self) -> None:
        self.raise_nan()
        self.raise_unreached(self.unreached(), "inside patched()", compiled=True)
