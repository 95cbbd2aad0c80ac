"""Writing sites: the field's verbs for patches, and the context in which a model runs with them.

patch = zero_ablate(points.site("embedder.relu3", channel=55))
with patched(model, patch):
    model(observations)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ContextDecorator
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from ..engine.hooks import refuse_unhookable
from ..engine.sessions import Session
from ..registry.lookup import model_of
from ..registry.points import HookPoints
from .firing import AppliedPatches
from .ledger import Ledger
from .patch import Patch

Result = TypeVar("Result", covariant=True)


class Effect(Protocol[Result]):
    """What a context does while it is open."""

    @property
    def session(self) -> Session:
        """The session that is open inside the context."""

    @property
    def result(self) -> Result:
        """What the context gives the user."""

    def failed(self, error: Exception) -> None:
        """Tell more of an exception of the user's own; may raise another in its place."""

    def finish(self) -> None:
        """Raise for what should have happened by now and did not."""


class Opened(ContextDecorator, Generic[Result]):
    """A context, and a decorator, in which a session is open.

    Args:
        effect: Makes anew, for each entry, what happens inside; the first is made at once, so that faults are told.
    """

    def __init__(self, effect: Callable[[], Effect[Result]]) -> None:
        self._effect = effect
        self._next: Effect[Result] | None = effect()
        self._open: list[Effect[Result]] = []

    def _recreate_cm(self) -> Opened[Result]:
        return Opened(self._effect)

    def __enter__(self) -> Result:
        effect, self._next = self._next, None
        if effect is None or _is_outdated(effect.session):
            effect = self._effect()
        try:
            effect.session.__enter__()
            self._open.append(effect)
            return effect.result
        except BaseException:  # an interrupt between the last of it and the body of `with`
            self._open = [other for other in self._open if other is not effect]
            effect.session.__exit__()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        effect = self._open.pop()
        try:
            try:
                if isinstance(error, Exception):
                    effect.failed(error)
            finally:
                effect.session.__exit__()
            if error is None:
                effect.finish()
        finally:
            effect.session.let_go()


def _is_outdated(session: Session) -> bool:
    """Tell whether a module of the model was replaced since the session was made."""
    return session.modules != dict(session.root.named_modules(remove_duplicate=False))


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
        Site('.out') Set: 1 firings, 4 rows, 12 elements
    """
    # Of iterators nothing would be left for a second entry.
    chosen = tuple(patches) if isinstance(patches, Iterable) else patches
    allowed = allow_unreached if isinstance(allow_unreached, str) else tuple(allow_unreached)
    return Opened(lambda: _Patched(points_or_model, chosen, allow_unreached=allowed, check_nan=check_nan))


class _Patched(AppliedPatches):
    """The patches of one context."""

    def __init__(self, points_or_model: HookPoints | nn.Module, patches: Any, **settings: Any) -> None:
        refuse_unhookable(model_of(points_or_model))
        super().__init__(points_or_model, patches, **settings)
        self.session.on_end = lambda call: self.raise_nan()
        self.session.confine_to_thread()

    @property
    def result(self) -> Ledger:
        return self.ledger

    def failed(self, error: Exception) -> None:
        self.raise_nan(cause=error)

    def finish(self) -> None:
        self.raise_nan()
        self.raise_unreached(self.unreached(), "inside patched()", compiled=True)
