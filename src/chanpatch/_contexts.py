"""Contexts of the user's: what is patched or recorded while one is open."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from ._sessions import Session

Result = TypeVar("Result", covariant=True)


class Effect(Protocol[Result]):
    """What a context does while it is open."""

    @property
    def session(self) -> Session: ...
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
