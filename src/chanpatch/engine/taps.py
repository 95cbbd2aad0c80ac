"""Places in a `forward` that are no module's input or output: the user marks them with `tap`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from .paths import Path

Stage: TypeAlias = Literal["before", "patch", "after"]
STAGES: tuple[Stage, ...] = ("before", "patch", "after")  # the order in which listeners at one place run


class Place(Protocol):
    """Where a listener listens; a HookPoint is one."""

    @property
    def name(self) -> str:  # noqa: D102
        ...

    @property
    def module(self) -> str:  # noqa: D102
        ...

    @property
    def side(self) -> Literal["in", "out", "tap"]:  # noqa: D102
        ...

    @property
    def path(self) -> Path:  # noqa: D102
        ...

    @property
    def call(self) -> int | None:  # noqa: D102
        ...


class Scope(Protocol):
    """Listeners that are attached together; `chanpatch.engine.sessions.Session` is the one class of them."""

    confined: bool
    root: nn.Module
    method: str

    @property
    def listeners(self) -> Sequence[Any]:  # noqa: D102
        ...

    @property
    def users_own(self) -> list[Any]:  # noqa: D102
        ...

    def begin(self, station: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: D102
        ...

    def end(self, station: Any, *, failed: bool) -> None:  # noqa: D102
        ...

    def run(self, method: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: D102
        ...

    def count(self, counted: object) -> None:  # noqa: D102
        ...

    def in_this_thread(self) -> bool:  # noqa: D102
        ...


class Listener(Protocol):
    """A function of the tensor found at a place."""

    @property
    def session(self) -> Scope:  # noqa: D102
        ...

    @property
    def place(self) -> Place:  # noqa: D102
        ...

    @property
    def stage(self) -> Stage:  # noqa: D102
        ...

    def __call__(self, tree: Any, /) -> Any:  # noqa: D102
        ...


observers: list[Callable[[str, Tensor], None]] = []


_waiting: dict[str, list[weakref.ref[Scope]]] = {}  # weak, so that a patched policy can be freed


def tap(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor, and make this place in a `forward` a hook point; free when nobody looks.

    Args:
        name: The hook point's name. Where the same tap runs more than once in a forward, each time is one call of
            it (`name#0`, `name#1`); a name made of the module's own, such as `f"block{i}.pattern"`, reads better.
        tensor: Any tensor of the forward.

    Returns:
        The same tensor, or what the open patches made of it.

    Raises:
        HookPointError: Where a context is open, if a site there names no call of a tap that runs more than once in a
            root call, or names one outside of any.
        TraceMismatchError: Where a context is open, if the tap runs more often, or the tensor has another shape or
            dtype, than in the trace.
        SiteError, EditError: Where a context is open, if the tensor has no such region, or a patch does not fit it.

    Example:
        >>> import torch
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, query, key):
        ...         return tap("pattern", (query @ key.mT).softmax(-1))
    """
    for observer in observers:
        observer(name, tensor)
    if name not in _waiting:
        return tensor
    sessions = [session for session in _alive(name) if session.in_this_thread()]
    for session in sessions:
        session.count(name)
    here = [item for session in sessions for item in session.listeners if _listens(item, name)]
    for listener in sorted(here, key=lambda item: STAGES.index(item.stage)):
        tensor = listener(tensor)
    return tensor


def wait(name: str, session: Scope) -> None:
    """Let a session hear of a tap while it is open."""
    if session not in _alive(name):
        _waiting.setdefault(name, []).append(weakref.ref(session))


def forget(session: Scope) -> None:
    """Let a session hear of no tap any more."""
    for name in list(_waiting):
        _waiting[name] = [reference for reference in _waiting[name] if reference() not in (None, session)]
        if not _waiting[name]:
            del _waiting[name]


def _alive(name: str) -> list[Scope]:
    return [session for reference in _waiting.get(name, ()) if (session := reference()) is not None]


def _listens(listener: Listener, name: str) -> bool:
    return listener.place.side == "tap" and listener.place.module == name
