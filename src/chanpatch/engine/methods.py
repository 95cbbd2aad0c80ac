"""Methods of a model, other than its forward, whose calls a session wants to know of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .taps import Scope

_methods: WeakKeyDictionary[nn.Module, dict[str, list[Scope]]] = WeakKeyDictionary()


_replaced: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def watch_method(session: Scope) -> None:
    """Make each call of the session's method on the model itself a root call."""
    root, method = session.root, session.method
    sessions = _methods.setdefault(root, {}).setdefault(method, [])
    if not sessions:
        original = getattr(root, method)
        _replaced.setdefault(root, {})[method] = vars(root).get(method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            call = original
            for each in reversed(sessions):
                call = functools.partial(_as_root_call, each, method, call)
            return call(*args, **kwargs)

        vars(root)[method] = watched
    sessions.append(session)


def _as_root_call(session: Scope, method: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return session.run(method, function, args, kwargs)


def unwatch_method(session: Scope) -> None:
    """Undo `watch_method`; the last session to leave takes the wrapper off."""
    sessions = _methods.get(session.root, {}).get(session.method, [])
    if session in sessions:
        sessions.remove(session)
        if not sessions:
            before = _replaced[session.root].pop(session.method)
            del vars(session.root)[session.method]
            if before is not None:  # the user had put a function of her own there
                vars(session.root)[session.method] = before
