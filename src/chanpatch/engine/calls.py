"""Other ways into a forward: observers of calls, taps, wrapped methods, and compiled code."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

Stage: TypeAlias = Literal["before", "patch", "after"]
STAGES: tuple[Stage, ...] = ("before", "patch", "after")  # the order in which listeners at one place run


@contextmanager
def observed(
    modules: Iterable[nn.Module],
    on_inputs: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object] | None = None,
    on_output: Callable[[nn.Module, Any], object] | None = None,
    on_tap: Callable[[str, Tensor], object] | None = None,
) -> Iterator[None]:
    """Call back at every call of these modules, but not of copies that a forward makes, and at every tap."""
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


def drop(module: nn.Module, ours: Callable[[Any], bool]) -> None:
    """Take hooks off a module."""
    # The pre-hook goes last: a station is found by it, so an interrupted removal can be repeated.
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = vars(module).get(name, {})
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            for flags in ("_with_kwargs", "_always_called"):
                vars(module).get(f"{name}{flags}", {}).pop(key, None)
            del hooks[key]


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


_tap_observers: list[Callable[[str, Tensor], object]] = []
_tap_sessions: dict[str, list[weakref.ref[Any]]] = {}  # weak, so that a patched policy can be freed


def tap(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor, and make this place in a `forward` a hook point.

    Args:
        name: Name of the hook point. If the tap runs more than once in a forward, its calls are `name#0`, `name#1`, ...
        tensor: Any tensor of the forward. While a context is open, the patched tensor is returned.

    Raises:
        HookPointError, TraceMismatchError, SiteError, EditError: While a context is open, as at other hook points.

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
    sessions = [session for session in _hearing(name) if session.in_this_thread()]
    for session in sessions:
        session.enter_call(name)
        session.leave_call(name)
    here = [each for session in sessions for each in session.listeners if each.place.side == "tap"]
    for listener in sorted(here, key=lambda each: STAGES.index(each.stage)):
        if listener.place.module == name:
            tensor = listener(tensor)
    return tensor


def hear_tap(name: str, session: Any) -> None:
    """Let a session hear of a tap while it is open."""
    if session not in _hearing(name):
        _tap_sessions.setdefault(name, []).append(weakref.ref(session))


def forget_taps(session: Any) -> None:
    """Let a session hear of no tap any more."""
    for name in list(_tap_sessions):
        _tap_sessions[name] = [each for each in _tap_sessions[name] if each() not in (None, session)]
        if not _tap_sessions[name]:
            del _tap_sessions[name]


def _hearing(name: str) -> list[Any]:
    return [session for each in _tap_sessions.get(name, ()) if (session := each()) is not None]


@contextmanager
def wrapped_method(module: nn.Module, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Call `around(method, *args, **kwargs)` in place of a method of this module; wrappers may close in any order."""
    found = vars(module).get(name)
    wrapper = found if isinstance(found, _MethodWrapper) else _MethodWrapper(module, name)

    def end() -> None:
        if around in wrapper.around:
            wrapper.around.remove(around)
        if not wrapper.around and vars(module).get(name) is wrapper:
            if wrapper.own is None:
                del vars(module)[name]
            else:  # a function that the user had put there
                vars(module)[name] = wrapper.own

    with finally_twice(end):
        vars(module)[name] = wrapper
        wrapper.around.append(around)
        yield


class _MethodWrapper:
    """An instance attribute in place of a method; a copy of the module has the plain method again."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.own, self.around = vars(module).get(name), list[Callable[..., Any]]()
        self._module, self._name, self._method = module, name, getattr(module, name)
        functools.update_wrapper(self, self._method)  # some models look at the arguments that a layer takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._method
        for around in reversed(self.around):
            call = functools.partial(around, call)
        return call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return types.MethodType(getattr(type(self._module), self._name), memo.get(id(self._module), self._module))


is_compiling = torch.compiler.is_dynamo_compiling  # looked up once: asked at every hook


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function; a model that is being compiled calls it as it is, instead of tracing into it."""
    if is_compiling():
        return torch._dynamo.disable(function)  # type: ignore[no-any-return, no-untyped-call]
    return function


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


def refuse_unhookable(model: nn.Module) -> None:
    """Raise for a model whose module calls ignore hooks."""
    for name, module in model.named_modules():
        if why := _unhookable(module):
            raise UnsupportedModelError(f"{repr(name) if name else 'The model'} {why}")


def _unhookable(module: nn.Module) -> str:
    if "_orig_mod" in module._modules:
        return (
            "is compiled by torch.compile, which ignores hooks that are added after its first call. Pass the original "
            "module (compiled._orig_mod), or compile the PatchedPolicy made of it."
        )
    if module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
        return (
            "was compiled in place, so hooks that are added now are ignored. Work on a copy that is not compiled, or "
            "compile the PatchedPolicy made of it."
        )
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "is a TorchScript module, which runs its submodules without their hooks. Pass the original Python module."
        )
    devices = len(module.device_ids) if isinstance(module, nn.DataParallel) else 1
    if devices > 1:
        return (
            f"is a DataParallel over {devices} devices, which runs copies of its module. Pass the module inside "
            "(.module) and run it on one device."
        )
    return ""
