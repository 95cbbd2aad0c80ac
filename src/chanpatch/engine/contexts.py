"""One way to enter and leave. Contexts restore all, also after Ctrl-C, and raise if they are freed while open."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from typing import Any

import torch


@contextmanager
def finally_twice(end: Callable[[], object]) -> Iterator[None]:
    """Call `end` at the end, twice, so that it is done even if an interrupt cuts it short once."""
    try:
        try:
            yield
        finally:
            end()
    finally:
        end()


class Exit:
    """The `__exit__` of a context. `with` binds it before it enters the context; a call of `__enter__` does not."""

    def __init__(self, leave: Callable[..., None]) -> None:
        self._leave = leave

    def __get__(self, context: Held | None, kind: type | None = None) -> Callable[..., None]:
        if context is None:
            return self._leave
        context.is_held = True
        return types.MethodType(self._leave, context)


class Held(ContextDecorator):
    """A context that must be held while it is open, by `with` or in a variable.

    If it was entered by a call of `__enter__` and freed while open, the next root call of each session raises.
    """

    is_held = False
    _open: tuple[tuple[Any, AbstractContextManager[None]], ...] = ()  # sessions that are open, and their contexts

    def hold(self, session: Any, context: AbstractContextManager[None]) -> None:
        """Enter the context of a session."""
        self._open = (*self._open, (session, context))
        context.__enter__()

    def last(self) -> tuple[Any, AbstractContextManager[None]]:
        """Return the session that was entered last, and its context."""
        if not self._open:
            raise RuntimeError("This context is not open: it was closed before, or never entered. Use `with`.")
        return self._open[-1]

    def forget(self, context: AbstractContextManager[None]) -> None:
        """Hold a context no longer."""
        self._open = tuple(each for each in self._open if each[1] is not context)

    def __del__(self) -> None:
        for session, context in () if self.is_held else self._open:
            session.dropped, session.enabled = context, True


@contextmanager
def compiled_code_runs_eagerly() -> Iterator[None]:
    """Run compiled code eagerly, since it ignores hooks that are added later; contexts may close in any order."""
    token = object()

    def end() -> None:
        if token in _eager:
            _eager.remove(token)
        _settle_stance()

    with finally_twice(end):
        _eager.append(token)
        _settle_stance()
        yield


_eager: list[object] = []
_stance: list[Any] = []  # the one in force, if any


def _settle_stance() -> None:
    if _eager and not _stance and "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        # Without dynamo, nothing was compiled. An interrupt cannot come between setting it and noting it.
        _stance.extend(map(torch.compiler.set_stance, ["force_eager"]))
    elif _stance and not _eager:
        _stance[0].__exit__(None, None, None)
        _stance.clear()


is_compiling = torch.compiler.is_dynamo_compiling  # looked up once: asked at every hook


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function; a model that is being compiled calls it as it is, instead of tracing into it."""
    if is_compiling():
        return torch._dynamo.disable(function)  # type: ignore[no-any-return, no-untyped-call]
    return function
