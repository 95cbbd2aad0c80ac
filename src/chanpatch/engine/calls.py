"""Ways to observe or change a forward pass without a `Station`: call observers, taps and wrapped methods."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .hooks import KEYS, STAGES, RunEagerly, Station, Undoable, drop


@contextmanager
def left_twice(context: Undoable) -> Iterator[None]:
    """Open `context`, and close it twice at the end, because an interrupt may stop the first attempt to close it."""
    try:
        with context:
            yield
    finally:
        context.__exit__()


class Observed(RunEagerly):
    """Context that runs callbacks at every call to one of the given modules, and at every tap.

    Before a module runs, `on_inputs` receives (module, args, kwargs). After a module has run, `on_output` receives
    (module, output). At a tap, `on_tap` receives (name, tensor). Calls to copies of the modules run no callbacks.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        on_inputs: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object] | None = None,
        on_output: Callable[[nn.Module, Any], object] | None = None,
        on_tap: Callable[[str, Tensor], object] | None = None,
    ) -> None:
        self._modules, self._on_tap = (known := set(modules)), on_tap

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if on_inputs is not None and module in known:
                on_inputs(module, args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if on_output is not None and module in known:
                on_output(module, output)

        self._before, self._after = before, after  # not methods, so that a copy of a module has the same hooks
        self._key = next(KEYS)

    def _do(self) -> None:
        for module in self._modules:
            module._forward_pre_hooks_with_kwargs[self._key] = True
            module._forward_pre_hooks[self._key] = self._before
            module._forward_hooks[self._key] = self._after
        if self._on_tap is not None:
            _tap_observers.append(self._on_tap)
        super()._do()

    def _undo(self) -> None:
        if self._on_tap in _tap_observers:
            _tap_observers.remove(self._on_tap)
        for module in self._modules:
            drop(module, [self._key])
        super()._undo()


_tap_observers: list[Callable[[str, Tensor], object]] = []
_tap_sessions: dict[str, weakref.WeakKeyDictionary[Any, None]] = {}  # weak references, so patched policies can be freed


def tap(name: str, tensor: Tensor) -> Tensor:
    """Turn a tensor in a `forward` method into a hook point. Return the tensor with all active patches applied.

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


class WrappedMethod(Undoable):
    """Context in which a call to a module's method runs `around(method, *args, **kwargs)` instead of the method.

    Several open contexts may wrap the same method, and these contexts may close in any order.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        found = vars(module).get(name)
        self._wrapper = found if isinstance(found, _MethodWrapper) else _MethodWrapper(module, name)
        self._attributes, self._name, self._around = vars(module), name, around

    def _do(self) -> None:
        self._attributes[self._name] = self._wrapper
        self._wrapper.around.append(self._around)

    def _undo(self) -> None:
        wrapper = self._wrapper
        if self._around in wrapper.around:
            wrapper.around.remove(self._around)
        if not wrapper.around and self._attributes.get(self._name) is wrapper:
            if wrapper.own is None:
                del self._attributes[self._name]
            else:  # a function that the user assigned
                self._attributes[self._name] = wrapper.own


class _MethodWrapper:
    """Instance attribute that replaces a module's method.

    A call to the attribute calls the first function in `around`. Each function receives the next function as its first
    argument, and the last function receives the original method. A copy of the module has the original method.
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


class DisabledSessions(Undoable):
    """Context in which the listeners of the given sessions do not run. Several open contexts may close in any order."""

    def __init__(self, sessions: Iterable[Any]) -> None:
        self._sessions, self._token = tuple(sessions), object()

    def _do(self) -> None:
        for session in self._sessions:
            session.disabled_by.add(self._token)
            session.enabled = False

    def _undo(self) -> None:
        for session in self._sessions:
            session.disabled_by.discard(self._token)
            session.enabled = not session.disabled_by


class Interrupted(DisabledSessions):
    """Context for an extra run of a model inside one of its forward passes. All sessions on the model are disabled."""

    def __init__(self, model: nn.Module) -> None:
        stations = [station for module in model.modules() if (station := Station.of(module)) is not None]
        names = ("_errors_before", "_copied", "_calls", "_just_patched")  # attributes that describe open calls
        self._calls = [(vars(at), {name: vars(at)[name] for name in names}) for at in stations]
        super().__init__(
            {each.session for at in stations for each in at.listeners}.union(*(at.scopes for at in stations))
        )

    def _do(self) -> None:
        for own, calls in self._calls:
            own.update({name: type(each)() for name, each in calls.items()})
        super()._do()

    def _undo(self) -> None:
        super()._undo()
        for own, calls in self._calls:
            own.update(calls)
