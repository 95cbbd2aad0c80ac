"""Sessions and contexts that patch a model."""

from __future__ import annotations

import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import nn

from ..engine.hooks import Station
from ..engine.moments import RootCall
from ..engine.sessions import Attached, Session
from ..engine.tree import Step
from ..errors import (
    ChanpatchError,
    DistributionError,
    EditError,
    NaNError,
    UnreachedError,
    UnsupportedModelError,
    did_you_mean,
)
from ..registry.points import HookPoints, bound, resolve, root_of
from ..registry.sites import Site
from .donors import Donor, joined
from .edit_context import call_key, state_of
from .firing import Firing, Ledger
from .patch import Patch, edit_name

Result = TypeVar("Result", covariant=True)
Model: TypeAlias = HookPoints | nn.Module
Patches: TypeAlias = Patch | Iterable[Patch]


class ContextSession(Session):
    """Session that patches or records a model. The constructor raises an error if the model would ignore hooks."""

    confined = True
    result: Any  # the value that the context yields

    def __init__(self, points_or_model: Model) -> None:
        super().__init__(*root_of(points_or_model))
        self.points_or_model = points_or_model
        self._on_path: list[Step] = []  # modules on the paths from the root to the listeners' modules

    def attach(self, scopes: Iterable[nn.Module] = ()) -> None:
        """Attach the listeners, and store the modules on the path from the root module to each listener's module."""
        names = {each.place.module for each in self.listeners if each.place.side != "tap"}
        self._on_path = [step for name in names for step in self.tree.path(name)]
        super().attach(scopes)

    def on_begin(self, call: RootCall) -> None:
        """Raise UnsupportedModelError if a module with a listener, or a parent of that module, was replaced."""
        if any([children.get(key) is not module for _, children, key, module in self._on_path]):
            self.check_modules()

    def check_modules(self) -> None:
        """Raise UnsupportedModelError if hooks or modules on the path to a listener were removed or replaced."""
        lost = [name for name, children, key, module in self._on_path if children.get(key) is not module]
        for listener in () if lost else self.listeners:
            module = self.modules.get(listener.place.module)
            if module is not None and ((station := Station.of(module)) is None or not station.has_hooks(module)):
                lost.append(listener.place.module)
        if lost:
            raise UnsupportedModelError(
                f"The module '{lost[0]}' was replaced, or its hooks were removed, while a patching or recording "
                "context was open. Modify the model before you open the context."
            )

    @property
    def no_call(self) -> str:
        """Sentence to append to an error message if the model was not called; empty if a root call has begun."""
        if self.has_begun:
            return ""
        call = f"{type(self.root).__name__}.{self.method}()"
        return f" {call} was not called on this model object while the context was open."

    def finish(self, error: Exception | None) -> None:
        """Check the session when the session's context exits. Raise an error if a check fails.

        If the context exits with an exception, `error` is that exception. A new error may replace that exception.
        """


class Exit:
    """Descriptor for `__exit__` that detects whether a context was entered by a `with` statement.

    A `with` statement looks up `__exit__` on entry; a direct call to `__enter__()` does not.
    """

    def __init__(self, leave: Callable[..., None]) -> None:
        self._leave = leave

    def __get__(self, context: Held | None, kind: type | None = None) -> Callable[..., None]:
        if context is None:
            return self._leave
        context.is_held = True
        return types.MethodType(self._leave, context)


class Held(ContextDecorator):
    """A context that a `with` statement or a variable must keep alive while the context is open.

    If a context is entered with `__enter__()` and is then freed while it is open, the next root call in each of the
    context's sessions raises an error.
    """

    is_held = False
    _open: tuple[tuple[Any, AbstractContextManager[None]], ...] = ()  # pairs (session, context)

    def hold(self, session: Any, context: AbstractContextManager[None]) -> None:
        """Enter the context that attaches a session, and keep references to the session and that context."""
        self._open = (*self._open, (session, context))
        context.__enter__()

    def last(self) -> tuple[Any, AbstractContextManager[None]]:
        """Return the pair (session, context) that was entered most recently and is still open."""
        if not self._open:
            raise RuntimeError("This context was never entered, or is already closed. Open it with a `with` statement.")
        return self._open[-1]

    def forget(self, context: AbstractContextManager[None]) -> None:
        """Drop the references to a context and its session."""
        self._open = tuple(each for each in self._open if each[1] is not context)

    def __del__(self) -> None:
        for session, context in () if self.is_held else self._open:
            session.dropped, session.enabled = context, True


class Opened(Held, Generic[Result]):
    """Context manager and decorator that opens a session. Each entry calls `session()` to create a new session."""

    def __init__(self, session: Callable[[], ContextSession]) -> None:
        self._new = session
        self._next: ContextSession | None = session()  # built eagerly, so that errors surface here

    def _recreate_cm(self) -> Opened[Result]:
        return Opened(self._new)

    def __enter__(self) -> Result:
        session, self._next = self._next, None
        if session is None or session.tree.has_changed():
            session = self._new()  # a module was replaced
        context = Attached(session)
        try:
            self.hold(session, context)
            return session.result  # type: ignore[no-any-return]
        except BaseException:  # an interrupt arrived before the body of `with`
            self.forget(context)
            raise

    @Exit
    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        session, context = self.last()
        try:
            if error is None:
                if session.failure is not None:
                    raise session.failure
                session.check_modules()
            context.__exit__(None, None, None)
            if error is None or isinstance(error, Exception):
                session.finish(error)
        finally:
            context.__exit__(None, None, None)  # again, in case an interrupt stopped the first call
            self.forget(context)
            session.let_go()


def checked_patches(points_or_model: Model | None, patches: Patches) -> tuple[Patch, ...]:
    """Check patches, and return the patches with their sites bound to the trace.

    If a model is passed instead of HookPoints, only the patches' types and the sites' names are checked. If None is
    passed, only the patches' types are checked. In both cases, the patches are returned unchanged.
    """
    if isinstance(patches, Patch) or not isinstance(patches, Iterable):
        patches = (patches,)
    each = tuple(patches)
    for patch in each:
        if not isinstance(patch, Patch):
            raise TypeError(f"Expected a Patch, such as zero_ablate(Site('conv1')); got {type(patch).__name__}.")
    if len(each) > 1:
        _refuse_shared_edits(each)
    if points_or_model is None:
        return each
    sites = bound(points_or_model, [patch.site for patch in each])
    pairs = zip(each, sites, strict=True)
    return tuple(patch if site is patch.site else Patch(site, patch.edit, patch.where) for patch, site in pairs)


def _refuse_shared_edits(patches: Iterable[Patch]) -> None:
    """Raise EditError if two patches share a stateful edit."""
    known: dict[object, Patch] = {}
    for patch in patches:
        if state_of(patch.edit) is None:
            continue
        if first := known.get(key := call_key(patch.edit)):
            raise EditError(
                f"{edit_name(patch.edit)} is the edit at both {first.site!r} and {patch.site!r}, so the two patches "
                "would share the edit's state. Use a separate edit object for each patch, or a plain function."
            )
        known[key] = patch


class Patching(ContextSession):
    """Session that applies patches. `firings` contains one Firing per patch, and `result` is the ledger."""

    def __init__(
        self, points_or_model: Model, patches: Patches, *, allow_unreached: Iterable[str] = (), check_nan: bool = True
    ) -> None:
        super().__init__(points_or_model)
        self.check_nan = check_nan
        self.patches = checked_patches(points_or_model, patches)
        forwards: Counter[tuple[str, Site]] = Counter()
        if any([isinstance(patch.edit, Donor) for patch in self.patches]):
            self.patches = joined(self.patches, forwards)  # counts the donors' forward passes
        self.allow_unreached = allowed_names(allow_unreached, (patch.site.name for patch in self.patches), "patched")
        self.firings: list[Firing] = []
        for patch in self.patches:
            point = resolve(self.modules, patch.site)
            self.firings.append(Firing(patch, point, self.modules.get(point.module), check_nan=check_nan))
            self.listen(point, "patch", self.firings[-1])
        self.result = Ledger(self.firings, forwards)

    def forget(self) -> None:
        """Prepare for a new root call: mark all patches as not reached, and clear the NaN flags."""
        for firing in self.firings:
            firing.reached, firing.nan = False, None

    def unreached(self, among: Iterable[int] | None = None) -> list[str]:
        """List the names of hook points whose patches have not run since the last reset.

        If `among` is given, consider only the patches with these indices. Names in `allow_unreached` are left out.
        """
        firings = self.firings if among is None else [self.firings[number] for number in sorted(among)]
        names = dict.fromkeys(firing.site.name for firing in firings if not firing.reached)
        return [name for name in names if name not in self.allow_unreached]


def allowed_names(names: str | Iterable[str], known: Iterable[str], used: str) -> frozenset[str]:
    """Return the value of the argument `allow_unreached` as a set. Raise ValueError if a name is not in `known`.

    `used` is "patched" or "recorded", for the error message.
    """
    if names == ():
        return frozenset()
    allowed, known = frozenset([names] if isinstance(names, str) else names), list(known)
    if unknown := allowed.difference(known):
        hint = did_you_mean(min(unknown), known)
        raise ValueError(f"allow_unreached must name only hook points that are {used}; got {sorted(unknown)}.{hint}")
    return allowed


def check_reached(fault: str, names: Iterable[str], *, compiled: bool = True, advice: str = "") -> None:
    """Raise UnreachedError for the hook points in `names`. If `names` is empty, do nothing.

    The message begins with `fault`, in which the names replace `{}`. If there are several names, "es" replaces `{es}`.
    If `compiled` is True, the message mentions a compiled module as a possible cause. The message ends with `advice`.
    """
    if listed := [f"'{name}'" for name in names]:
        causes = f"the module was not called, {'or ' * (not compiled)}its .forward() was called directly (bypassing "
        causes += f"hooks){', or the module was compiled' * compiled}"
        fault = fault.format(", ".join(listed), es="es" * (len(listed) > 1))
        raise UnreachedError(f"{fault}. Possible causes: {causes}.{advice}")


def raise_nan(firings: Sequence[Firing], cause: Exception | None = None) -> None:
    """Raise NaNError for the first patch that introduced NaN since the last call to this function.

    `cause` is the exception that is being handled, if there is one. If `cause` is a DistributionError, or was raised
    by torch.distributions, NaNError replaces `cause`. If `cause` is any other ChanpatchError, do nothing. For all other
    exceptions, do not raise, but add the NaNError's message to `cause` as a note.
    """
    found = [(firing.patch, firing.nan) for firing in firings if firing.nan is not None]
    if not found:
        return
    for firing in firings:
        firing.nan = None
    ours = isinstance(cause, ChanpatchError) and not isinstance(cause, DistributionError)
    if ours or any(torch._C._functorch.is_functorch_wrapped_tensor(flag) for _, flag in found):
        return  # values are unreadable inside a transform
    if not torch.stack([flag.to(found[0][1].device) for _, flag in found]).any():
        return
    error = nan_error(next(patch for patch, flag in found if flag))
    if cause is None or _of_a_distribution(cause):
        raise error from cause
    if hasattr(cause, "add_note"):  # Python 3.11 and later
        cause.add_note(str(error))


def nan_error(patch: Patch) -> NaNError:
    """Return the error for a patch that introduced NaN."""
    return NaNError(
        f"{patch!r} introduced NaN: at least one element is NaN only with the patch. Check whether a tensor in the "
        "edit was computed as 0/0 or as a mean over zero rows. If NaN is intended, pass check_nan=False to patched(), "
        "sweep() or PatchedPolicy."
    )


def _of_a_distribution(error: Exception) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("torch.distributions")
    return isinstance(error, DistributionError) or (inside and isinstance(error, (ValueError, RuntimeError)))


def patched(
    points_or_model: Model, patches: Patches, *, allow_unreached: Iterable[str] = (), check_nan: bool = True
) -> Opened[Ledger]:
    """Patch a model while the context is open or, as a decorator, during each call to the decorated function.

    Args:
        points_or_model: Model or HookPoints. With HookPoints, every site is checked against the trace.
        patches: One or more patches, applied in the given order. In nested contexts, the patches of outer contexts run
            first.
        allow_unreached: Names of hook points at which a patch does not have to run.
        check_nan: Whether to raise an error if a patch introduces NaN.

    Yields:
        Ledger that counts how many times each patch ran, and how many rows and elements each patch replaced.

    Raises:
        HookPointError, SiteError: If a site does not exist.
        ValueError: If `allow_unreached` contains the name of a hook point without a patch.
        UnsupportedModelError: If the model would ignore hooks.
        EditError, NaNError, ConcurrencyError: During a forward pass, if a patch fails or the model runs
            in another thread.
        UnreachedError: On exit, if a patch never ran.

    Example:
        >>> from chanpatch import hook_points, zero_ablate
        >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(2, 2))
        >>> with patched(points, zero_ablate(points.site(".out"))) as ledger:
        ...     _ = points.model(torch.ones(4, 2))
        >>> print(ledger)
        Ledger of 1 patch
        site          edit  firings  rows  elements
        Site('.out')  Set   1        4     12
    """
    # An iterator would be empty when the context is entered again.
    chosen = patches if isinstance(patches, Patch) or not isinstance(patches, Iterable) else tuple(patches)
    allowed = allow_unreached if isinstance(allow_unreached, str) else tuple(allow_unreached)
    return Opened(lambda: _Patched(points_or_model, chosen, allow_unreached=allowed, check_nan=check_nan))


class _Patched(Patching):
    """Session for one `patched` context."""

    def on_end(self, call: RootCall) -> None:
        raise_nan(self.firings)

    def finish(self, error: Exception | None) -> None:
        raise_nan(self.firings, error)
        if error is None:
            check_reached("The patch{es} at {} never ran inside patched()", self.unreached(), advice=self.no_call)
