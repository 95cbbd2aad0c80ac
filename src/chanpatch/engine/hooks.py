"""The only torch hooks: those of a `Station` per module, observers for the trace, taps, and method wrappers.

A station serves every open session: records of the unpatched value, then patches in order of entry, then records.
Patches are written to an output before any other hook of the module runs, and to an input after all pre-hooks. Records
are taken last, so that a record is the tensor that flows on.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ConcurrencyError, UnsupportedModelError
from .containers import CopiedContainer, containers, copied_containers, with_copies, written_into
from .paths import Path, get

Stage: TypeAlias = Literal["before", "patch", "after"]
STAGES: tuple[Stage, ...] = ("before", "patch", "after")  # the order in which listeners at one place run


@dataclass(frozen=True)
class Place:
    """The place of a tensor: all that the name of a hook point says.

    Attributes:
        name: Name of the hook point.
        module: Name of the module, or of the tap.
        side: `"in"`, `"out"` or `"tap"`.
        path: Place of the tensor in a nested input or output.
        call: Index of the call, if the module is called more than once.
    """

    name: str
    module: str = field(repr=False)
    side: Literal["in", "out", "tap"] = field(repr=False)
    path: Path = field(repr=False)
    call: int | None = field(repr=False)


class Station:
    """The hooks of one module, and the listeners there.

    A listener has a session, a place and a stage. A session has `begin` and `end` for root calls, and `enter_call` and
    `leave_call` for all calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self.listeners: list[Any] = []
        self.scopes: list[Any] = []  # sessions for which a call of the module may be a root call
        self.module_id = id(module)
        self._module = weakref.ref(module)
        self._on_inputs: list[Any] = []
        self._on_output: list[Any] = []  # before any other hook of the module
        self._at_last: list[Any] = []  # records of the output, after all other hooks
        self._counting: list[Any] = []
        self._errors_before: list[BaseException | None] = []  # in flight when each call under way was entered
        self._patched_output: Any = None  # of the call whose hooks are running
        self._copies: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._copied_containers: dict[int, CopiedContainer] = {}  # by the id of the copy, in the calls under way
        module.register_forward_pre_hook(_Hook(self, self._enter), with_kwargs=True)
        module.register_forward_hook(_Hook(self, self._leave), with_kwargs=True, always_call=True, prepend=True)
        self._hooks = 1  # of the output
        self._calls: list[tuple[Any, int]] = []

    @staticmethod
    def of(module: nn.Module) -> Station | None:
        """Return the module's station, which the module itself holds by its hooks, so that both are freed together."""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Hook) and hook.station.module_id == id(module):
                return hook.station
        return None

    @functools.cached_property
    def inside(self) -> frozenset[int]:
        """The ids of the modules inside."""
        module = self._module()
        return frozenset() if module is None else frozenset(map(id, module.modules()))

    @property
    def is_open(self) -> bool:
        """Whether anybody listens."""
        return bool(self.listeners or self.scopes)

    def is_inside_itself(self) -> bool:
        """Return whether the module is called inside a call of itself, and not after one that was cut short."""
        calls, frame = 0, sys._getframe()
        while frame is not None and calls < 2:
            calls += frame.f_code is _CALL and id(frame.f_locals.get("self")) == self.module_id
            frame = frame.f_back  # type: ignore[assignment]
        return calls > 1

    def plan(self) -> None:
        """Order the listeners by stage, then by entry."""
        ordered = sorted(self.listeners, key=lambda listener: STAGES.index(listener.stage))
        self._on_inputs = [listener for listener in ordered if listener.place.side == "in"]
        output = [listener for listener in ordered if listener.place.side == "out"]
        self._on_output = [listener for listener in output if listener.stage != "after"]
        self._at_last = [listener for listener in output if listener.stage == "after"]
        self._counting = list(dict.fromkeys([listener.session for listener in self.listeners]))

    def remove(self, session: Any) -> None:
        """Forget a session, and leave the module, and copies of it, if it was the last one."""
        self._copied_containers.clear()  # of calls that an interrupt cut short
        self._errors_before.clear()
        self.listeners = [listener for listener in self.listeners if listener.session is not session]
        self.scopes = [other for other in self.scopes if other is not session]
        self.plan()
        module = self._module()
        if not self.is_open and module is not None:
            for each in (module, *self._copies):
                _drop(each, lambda hook: isinstance(hook, _Hook) and hook.station is self)

    def note_copy(self, memo: dict[int, Any]) -> None:
        """Remember the copy that is being made of the module, or of a copy, to take the hooks off it too."""
        originals = [self.module_id, *map(id, self._copies)]
        self._copies.update(memo[original] for original in originals if original in memo)

    def has_hooks(self, module: nn.Module) -> bool:
        """Return whether the module still has the hooks of the station."""
        ours = [hook for hook in module._forward_hooks.values() if isinstance(hook, _Hook) and hook.station is self]
        return len(ours) == self._hooks

    def order(self) -> None:
        """Run the hook of inputs after all other pre-hooks, in calls from now on."""
        hooks: Any = getattr(self._module(), "_forward_pre_hooks", {})
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.station is self]:
            hooks.move_to_end(key)

    def _order_output(self, module: nn.Module) -> None:
        """Run patches of the output before all other hooks, and records after them."""
        hooks: Any = module._forward_hooks
        if not any(isinstance(hook, _Hook) and hook.station is self and hook.is_last for hook in hooks.values()):
            module.register_forward_hook(_Hook(self, self._leave_last), with_kwargs=True, always_call=True)
        self._hooks = 2
        ours = [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.station is self]
        first, last = sorted(ours, key=lambda key: hooks[key].is_last)
        hooks.move_to_end(first, last=False)
        hooks.move_to_end(last)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if id(module) != self.module_id:
            return self._refuse_copy(module)
        self._errors_before.append(sys.exc_info()[1])
        if len(module._forward_hooks) > self._hooks or (self._at_last and self._hooks == 1):
            self._order_output(module)
        listening = any(listener.session.enabled for listener in self._on_inputs)
        late = listening and not is_ours(next(reversed(module._forward_pre_hooks.values())))
        for session in self.scopes:
            session.begin(self, args, kwargs)
        for session in self._counting:
            session.enter_call(self)
        if not listening:
            return None
        if late:
            self.order()
            raise UnsupportedModelError(
                f"A pre-hook was registered on this {type(module).__name__} after its input was patched or recorded, "
                "so it would see the patched input. Register it before the context opens, or call the model again."
            )
        given: Any = (args, kwargs)
        changed = given
        for listener in self._on_inputs:
            changed = listener(changed)
        if changed is given:
            return None
        copies = [*copied_containers(given, changed)]
        self._copied_containers |= {id(each.copy): each for each in copies}
        return with_copies(changed, copies)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if id(module) != self.module_id:
            return None
        failed = self._has_failed()
        for session in self._counting:
            session.leave_call(self)
        changed = output if failed else self._heard(self._on_output, output)
        if changed is not output and not isinstance(output, Tensor):
            users = {id(own) for session in self._counting for own in session.users_own}
            changed = written_into(output, changed, (args, kwargs), users)
        if self._copied_containers:
            for container in containers((args, kwargs)):
                if each := self._copied_containers.pop(id(container), None):
                    each.write_back()
        self._patched_output = None if changed is output else changed
        if self._hooks == 1:
            self._end(failed=failed)
        else:
            self._calls = [(session, session.call) for session in self._counting]
        return None if changed is output else changed

    def _leave_last(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if id(module) != self.module_id:
            return None
        failed, patched_output, self._patched_output = self._has_failed(), self._patched_output, None
        if patched_output is not None and not failed:
            self._refuse_replaced(module, patched_output, output)
        for session, call in self._calls:  # hooks of others may have called other modules
            session.call = call
        changed = output if failed else self._heard(self._at_last, output)
        self._end(failed=failed)
        return None if changed is output else changed

    def _heard(self, listeners: list[Any], output: Any) -> Any:
        """Return the output that the listeners leave; if one raises, the call has failed."""
        try:
            for listener in listeners:
                output = listener(output)
        except BaseException:
            self._end(failed=True)
            raise
        return output

    def _has_failed(self) -> bool:
        """Return whether torch calls a hook on the way out of an exception that this call of the module raised."""
        error = sys.exc_info()[1]
        return error is not None and bool(self._errors_before) and error is not self._errors_before[-1]

    def _end(self, *, failed: bool) -> None:
        if self._errors_before:
            self._errors_before.pop()
        for session in self.scopes:
            session.end(self, failed=failed)

    def _refuse_replaced(self, module: nn.Module, patched_output: Any, output: Any) -> None:
        """Raise if a hook of the user's replaced a tensor that was just patched."""
        for listener in self._on_output:
            path = listener.place.path
            if listener.stage == "patch" and listener.session.enabled:
                with suppress(LookupError, AttributeError, TypeError):
                    if get(output, path) is get(patched_output, path):
                        continue
                others = [hook for hook in module._forward_hooks.values() if not is_ours(hook)]
                names = ", ".join(str(getattr(hook, "__qualname__", hook)) for hook in others)
                raise UnsupportedModelError(
                    f"A forward hook of '{listener.place.name}' replaced the tensor that was just patched there. "
                    f"Remove that hook while the patch is in place, or patch the input of the next module: {names}."
                )

    def _refuse_copy(self, module: nn.Module) -> None:
        if self.is_open:
            raise ConcurrencyError(
                f"This {type(module).__name__} is a copy (deepcopy or a DataParallel replica) of a module that is "
                "being patched or recorded, and was made meanwhile. Use the module that was patched, on one device."
            )


_CALL = nn.Module._call_impl.__code__  # the frame that runs a module's hooks and its forward


class _Hook:
    """The function that torch calls; copies of the module share it, and are refused while the module is patched."""

    def __init__(self, station: Station, run: Callable[..., Any]) -> None:
        self.station, self._run, self.is_last = station, run, run == station._leave_last

    def __call__(self, module: nn.Module, *passed: Any) -> Any:
        run = eager(self._run) if is_compiling() else self._run
        return run(module, *passed)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        self.station.note_copy(memo)
        return self

    def __reduce__(self) -> NoReturn:
        raise ConcurrencyError(
            "A module cannot be pickled while it is patched or recorded: its copy would run without the patches. Save "
            "its state_dict(), close the context first, or pickle a PatchedPolicy as a whole."
        )


def is_ours(hook: object) -> bool:
    """Return whether a hook is chanpatch's own."""
    return isinstance(hook, _Hook)


def drop_hooks(model: nn.Module) -> None:
    """Take chanpatch's own hooks off a model that was copied while they were on; a twin inside it keeps its own."""
    for module in model.modules():
        _drop(module, functools.partial(_is_of_another, Station.of(module)))


def _is_of_another(station: Station | None, hook: object) -> bool:
    return isinstance(hook, _Hook) and hook.station is not station


def _drop(module: nn.Module, ours: Callable[[Any], bool]) -> None:
    # The pre-hook goes last: a station is found by it, so an interrupted removal can be repeated.
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = vars(module).get(name, {})
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            for flags in ("_with_kwargs", "_always_called"):
                vars(module).get(f"{name}{flags}", {}).pop(key, None)
            del hooks[key]


@contextmanager
def observed(
    modules: Iterable[nn.Module],
    on_inputs: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object] | None = None,
    on_output: Callable[[nn.Module, Any], object] | None = None,
    on_tap: Callable[[str, Tensor], object] | None = None,
) -> Iterator[None]:
    """Call back at every call of these modules, and at every tap; changes nothing.

    Copies of the modules that a forward makes and calls are not observed.
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
            _drop(module, lambda hook: hook is before or hook is after)

    with finally_twice(end):
        for module in known:
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after)
        if on_tap is not None:
            _tap_observers.append(on_tap)
        with compiled_code_runs_eagerly():
            yield


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
    """Call `around(method, *args, **kwargs)` in place of a method of this module.

    Several wrappers nest in order of entry, and may close in any order.
    """
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
    """Run compiled code eagerly, since hooks that are added after compilation are ignored there.

    All open contexts share one stance, in whatever order they close.
    """
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
    """Raise for a model whose module calls bypass hooks: what is patched there would be ignored in silence."""
    for name, module in model.named_modules():
        why = _unhookable(module)
        if why:
            raise UnsupportedModelError(f"{repr(name) if name else 'The model'} {why}")


def _unhookable(module: nn.Module) -> str | None:
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
            "is a TorchScript module, which runs its submodules without their hooks. Pass the Python module that it "
            "was made from."
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return (
            f"is a DataParallel over {len(module.device_ids)} devices, which runs copies of its module. Pass the "
            "module inside (.module) and run it on one device."
        )
    return None
