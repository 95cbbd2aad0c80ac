"""Ways to hook into a forward pass other than `Station`: call observers, taps and wrapped methods."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .hooks import STAGES, compiled_code_runs_eagerly, drop, finally_twice


@contextmanager
def observed(
    modules: Iterable[nn.Module],
    on_inputs: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object] | None = None,
    on_output: Callable[[nn.Module, Any], object] | None = None,
    on_tap: Callable[[str, Tensor], object] | None = None,
) -> Iterator[None]:
    """While the context is open, run `on_tap` at every tap, and the other callbacks at every call to a given module.

    Calls to copies of the modules do not run the callbacks.
    """
    known = set(modules)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if on_inputs is not None and module in known:
            on_inputs(module, args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if on_output is not None and module in known:
            on_output(module, output)

    def end() -> None:
        if on_tap in _tap_observers:
            _tap_observers.remove(on_tap)
        for module in known:
            drop(module, lambda hook: hook is before or hook is after)

    with finally_twice(end):
        for module in known:
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after)
        if on_tap is not None:
            _tap_observers.append(on_tap)
        with compiled_code_runs_eagerly():
            yield


_tap_observers: list[Callable[[str, Tensor], object]] = []
_tap_sessions: dict[str, weakref.WeakKeyDictionary[Any, None]] = {}  # weak references, so patched policies can be freed


def tap(name: str, tensor: Tensor) -> Tensor:
    """Turn a tensor in a `forward` method into a hook point, and return the tensor (patched, if a patch is active).

    Args:
        name: Name of the hook point. If the tap runs several times per forward pass, the hook points are `name#0`,
            `name#1`, ...
        tensor: Any tensor in the forward pass.

    Raises:
        HookPointError, TraceMismatchError, SiteError, EditError: For the same reasons as at other hook points.

    Example:
        >>> import torch
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, query, key):
        ...         return tap("pattern", (query @ key.mT).softmax(-1))
    """
    for observer in _tap_observers:
        observer(name, tensor)
    if name not in _tap_sessions:
        return tensor
    here = []
    for session in [*_tap_sessions[name]]:
        if session.in_this_thread():
            session.enter_call(name)
            session.leave_call(name)
            here += [each for each in session.listeners if each.place.side == "tap" and each.place.module == name]
    for listener in sorted(here, key=lambda each: STAGES.index(each.stage)):
        tensor = listener(tensor)
    return tensor


def hear_tap(name: str, session: Any) -> None:
    """Subscribe a session to all taps with the given name."""
    _tap_sessions.setdefault(name, weakref.WeakKeyDictionary())[session] = None


def forget_taps(session: Any) -> None:
    """Unsubscribe a session from all taps."""
    for name, sessions in [*_tap_sessions.items()]:
        sessions.pop(session, None)
        if not sessions:
            _tap_sessions.pop(name, None)


@contextmanager
def wrapped_method(module: nn.Module, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """While the context is open, make each call to a module's method run `around(method, *args, **kwargs)` instead.

    Several contexts may wrap the same method, and may close in any order.
    """
    found = vars(module).get(name)
    wrapper = found if isinstance(found, _MethodWrapper) else _MethodWrapper(module, name)

    def end() -> None:
        if around in wrapper.around:
            wrapper.around.remove(around)
        if not wrapper.around and vars(module).get(name) is wrapper:
            if wrapper.own is None:
                del vars(module)[name]
            else:  # a function that the user assigned
                vars(module)[name] = wrapper.own

    with finally_twice(end):
        vars(module)[name] = wrapper
        wrapper.around.append(around)
        yield


class _MethodWrapper:
    """Instance attribute that shadows a module's method and runs the functions in `around`.

    A copy of the module gets the original method instead of the wrapper.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.own, self.around = vars(module).get(name), list[Callable[..., Any]]()
        self._module, self._name, self._method = module, name, getattr(module, name)
        functools.update_wrapper(self, self._method)  # some models inspect method signatures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._method
        for around in reversed(self.around):
            call = functools.partial(around, call)
        return call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return types.MethodType(getattr(type(self._module), self._name), memo.get(id(self._module), self._module))
