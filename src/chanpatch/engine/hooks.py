"""Torch hooks: one `Station` per module runs the listeners of all open sessions.

Listeners run in this order: recordings with `before=True`, then patches in the order they were entered, then all
other recordings. Outputs are patched before any of the user's forward hooks run, and inputs are patched after all of
the user's pre-hooks. Recordings without `before=True` run after the user's hooks, so they contain the final tensor.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ConcurrencyError, UnsupportedModelError
from .containers import (
    containers,
    contents,
    copied_containers,
    holds,
    patched_tensors,
    refuse_replaced,
    with_copies,
    written_into,
)

Stage: TypeAlias = Literal["before", "patch", "after"]
STAGES: tuple[Stage, ...] = ("before", "patch", "after")  # execution order of the listeners at one place


class Station:
    """The hooks on one module, and the listeners attached to that module.

    Each listener has a session, a place and a stage. The station calls a session's `begin` and `end` if a call to the
    module may be a root call, and the session's `enter_call` and `leave_call` around every call to the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.listeners: list[Any] = []  # empty, like `scopes`, while no session is attached
        self.scopes: list[Any] = []  # sessions for which a call to this module may be a root call
        self.module_id = id(module)
        self._module = weakref.ref(module)
        self._on_inputs: list[Any] = []
        self._on_output: list[Any] = []  # listeners that run before any other forward hook on the module
        self._at_last: list[Any] = []  # listeners that record the output after all other hooks have run
        self._counting: list[Any] = []  # sessions that count the calls to this module
        self._errors_before: list[BaseException | None] = []  # for each open call, the exception in flight at its start
        self._just_patched: list[tuple[Any, Tensor, int | None]] = []  # (place, tensor, version), in this call
        self._copies: list[weakref.ref[nn.Module]] = []
        self._copied: dict[int, tuple[Any, list[Any]]] = {}  # copied containers in open calls, with their contents
        self._hooks = 0  # number of forward hooks that this station has put on the module
        self._calls: list[tuple[Any, int]] = []
        self._keys = next(KEYS), next(KEYS)

    @staticmethod
    def of(module: nn.Module) -> Station | None:
        """Return the module's station, or None if the module has no hooks from a station of its own."""
        for hook in module._forward_pre_hooks.values() if module._forward_pre_hooks else ():
            if isinstance(hook, _Hook) and hook.station.module_id == id(module):
                return hook.station
        return None

    @staticmethod
    def on(module: nn.Module) -> Station:
        """Return the module's station. If no session is attached yet, first put the station's hooks on the module."""
        station = Station.of(module)
        if station is None:
            station = Station(module)
            key, before = station._keys[0], _Hook(station, station._enter)
            module._forward_pre_hooks_with_kwargs[key] = True
            module._forward_pre_hooks[key] = before
            station._put(module, 0)
        return station

    def _put(self, module: Any, number: int) -> None:
        """Make `_leave` (`number` 0) run before all other forward hooks on the module, or `_finish` (1) after them."""
        key = self._keys[number]
        module._forward_hooks_with_kwargs[key] = module._forward_hooks_always_called[key] = True
        module._forward_hooks[key] = _Hook(self, self._finish if number else self._leave)
        module._forward_hooks.move_to_end(key, last=bool(number))
        self._hooks = number + 1

    @functools.cached_property
    def inside(self) -> frozenset[int]:
        """Ids of the module and of all its submodules."""
        module = self._module()
        return frozenset() if module is None else frozenset(map(id, module.modules()))

    def is_inside_itself(self) -> bool:
        """Return whether the module is called inside another call to the same module."""
        calls, frame = 0, sys._getframe()
        while frame is not None and calls < 2:
            calls += frame.f_code is _CALL and id(frame.f_locals.get("self")) == self.module_id
            frame = frame.f_back  # type: ignore[assignment]
        return calls > 1

    def plan(self) -> None:
        """Rebuild the lists of listeners that the hooks run, sorted by stage, then by the order of attachment."""
        self._on_inputs, self._on_output, self._at_last, self._counting = [], [], [], []
        if self.listeners:
            self._counting = list(dict.fromkeys([listener.session for listener in self.listeners]))
            for listener in sorted(self.listeners, key=lambda each: STAGES.index(each.stage)):
                output = self._at_last if listener.stage == "after" else self._on_output
                (self._on_inputs if listener.place.side == "in" else output).append(listener)

    def remove(self, session: Any) -> None:
        """Detach a session. If no session remains, also remove the hooks from the module and the module's copies."""
        self._copied.clear()  # interrupted calls may have left entries
        self._errors_before.clear()
        self.listeners = [listener for listener in self.listeners if listener.session is not session]
        self.scopes = [other for other in self.scopes if other is not session]
        self.plan()
        if not (self.listeners or self.scopes):
            self._calls, self._just_patched = [], []
            for each in (self._module, *self._copies):
                if (module := each()) is not None:
                    drop(module, self._keys)
            self._copies.clear()

    def note_copy(self, memo: dict[int, Any]) -> None:
        """Remember the module's copies, which are in a `deepcopy` memo, so that `remove` also removes their hooks."""
        originals = [self.module_id, *(id(copy()) for copy in self._copies)]
        self._copies += [weakref.ref(memo[original]) for original in originals if original in memo]

    def has_hooks(self, module: nn.Module) -> bool:
        """Return whether all of this station's forward hooks are still on the module."""
        return all(key in module._forward_hooks for key in self._keys[: self._hooks])

    def order(self) -> None:
        """Make the station's pre-hook run after all other pre-hooks, starting with the next call to the module."""
        hooks: Any = getattr(self._module(), "_forward_pre_hooks", {})
        if self._keys[0] in hooks:
            hooks.move_to_end(self._keys[0])

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if id(module) != self.module_id:
            return self._refuse_copy(module)
        self._errors_before.append(sys.exc_info()[1])
        if len(module._forward_hooks) > self._hooks or (self._at_last and self._hooks == 1):
            self._put(module, 0)
            self._put(module, 1)
        late = bool(self._on_inputs) and not is_ours(next(reversed(module._forward_pre_hooks.values())))
        for session in self.scopes:
            session.begin(self, args, kwargs)
        for session in self._counting:
            session.enter_call(self)
        if not self._on_inputs or not any(listener.session.enabled for listener in self._on_inputs):
            return None
        if late:
            self.order()
            raise UnsupportedModelError(
                f"A pre-hook was registered on this {type(module).__name__} while a patch was active, and would "
                "receive the patched input. Register the pre-hook before you apply the patch, or call the model again."
            )
        given: Any = (args, kwargs)
        changed = given
        for listener in self._on_inputs:
            changed = listener(changed)
        if changed is given:
            return None
        copies = [*copied_containers(given, changed)]
        self._copied |= {id(copy): (copy, contents(copy)) for _, copy in copies}
        return with_copies(changed, copies)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if id(module) != self.module_id:
            return None
        failed = self._has_failed()
        for session in self._counting:
            session.leave_call(self)
        changed = output if failed else self._heard(self._on_output, output)
        if changed is not output and not isinstance(output, Tensor):
            calls = [session.root_call for session in self._counting if session.root_call is not None]
            users = {id(own) for call in calls for own in call.given}
            changed = written_into(output, changed, (args, kwargs), users)
        for container in containers((args, kwargs)) if self._copied and not failed else ():
            copy, before = self._copied.pop(id(container), (None, []))
            if copy is container and not holds(container, before):
                raise UnsupportedModelError(
                    f"This {type(module).__name__} writes to its input {type(container).__name__}, in which a tensor "
                    "is patched. The patch applies to a copy of the input, so the caller would not see the writes. "
                    "Patch the module that computes the tensor instead, or patch inside this module."
                )
        if self._hooks == 1:
            self._end(failed=failed)
        else:
            self._calls = [(session, session.call) for session in self._counting]
            places = [each.place for each in self._on_output if each.stage == "patch" and each.session.enabled]
            self._just_patched = [] if changed is output else patched_tensors(places, changed)
        return None if changed is output else changed

    def _finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if id(module) != self.module_id:
            return None
        failed, patched, self._just_patched = self._has_failed(), self._just_patched, []
        if patched and not failed:
            refuse_replaced(patched, output, [hook for hook in module._forward_hooks.values() if not is_ours(hook)])
        for session, call in self._calls:  # the user's hooks may have called other modules
            session.call = call
        changed = output if failed else self._heard(self._at_last, output)
        self._end(failed=failed)
        return None if changed is output else changed

    def _heard(self, listeners: list[Any], output: Any) -> Any:
        """Pass the output through all listeners, and return the result. If a listener fails, end the call as failed."""
        try:
            for listener in listeners:
                output = listener(output)
        except BaseException:
            self._end(failed=True)
            raise
        return output

    def _has_failed(self) -> bool:
        """Return whether the current call to the module has raised an exception."""
        error = sys.exc_info()[1]
        return error is not None and bool(self._errors_before) and error is not self._errors_before[-1]

    def _end(self, *, failed: bool) -> None:
        if self._errors_before:
            self._errors_before.pop()
        for session in self.scopes:
            session.end(self, failed=failed)

    def _refuse_copy(self, module: nn.Module) -> None:
        if self.listeners or self.scopes:
            raise ConcurrencyError(
                f"This {type(module).__name__} is a copy (deepcopy or DataParallel replica) made while the original "
                "module was being patched or recorded. Use the original module, on one device."
            )


KEYS = itertools.count(-1, -1)  # torch numbers its hooks from 0 upward
_CALL = nn.Module._call_impl.__code__  # the code that runs hooks and `forward`


class _Hook:
    """Hook that a module shares with its copies. While a context is open, calling a copy raises an error."""

    def __init__(self, station: Station, run: Callable[..., Any]) -> None:
        self.station, self._run = station, run

    def __call__(self, module: nn.Module, *passed: Any) -> Any:
        run = eager(self._run) if is_compiling() else self._run
        return run(module, *passed)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        self.station.note_copy(memo)
        return self

    def __reduce__(self) -> NoReturn:
        raise ConcurrencyError(
            "A module cannot be pickled while it is patched or recorded, because the pickled copy would run without "
            "patches. Close the context first, save the state_dict(), or pickle an entire PatchedPolicy."
        )


def is_ours(hook: object) -> bool:
    """Return whether a hook belongs to chanpatch."""
    return isinstance(hook, _Hook)


def drop_hooks(model: nn.Module) -> None:
    """Remove chanpatch's hooks that a model's modules inherited when they were copied. Keep the modules' own hooks."""
    for module in model.modules():
        own = Station.of(module)
        drop(module, keys_of(module, lambda hook, own=own: isinstance(hook, _Hook) and hook.station is not own))  # type: ignore[misc]


def keys_of(module: nn.Module, ours: Callable[[Any], bool]) -> list[Any]:
    """Return the keys of those forward hooks and pre-hooks of a module for which `ours` returns True."""
    hooks: Any = (*module._forward_hooks.items(), *module._forward_pre_hooks.items())
    return [key for key, hook in hooks if ours(hook)]


def drop(module: nn.Module, keys: Iterable[Any]) -> None:
    """Remove the forward hooks and pre-hooks with the given keys from a module."""
    # `Station.of` needs the pre-hook, so the pre-hook is removed last; an interrupted removal can then be repeated.
    for key in keys:
        module._forward_hooks.pop(key, None)
        module._forward_hooks_with_kwargs.pop(key, None)
        module._forward_hooks_always_called.pop(key, None)
    for key in keys:
        module._forward_pre_hooks_with_kwargs.pop(key, None)
        module._forward_pre_hooks.pop(key, None)


class Undoable:
    """Context that runs `_undo` on exit or when freed while open, and again if an interrupt stops `_undo` partway."""

    # Nothing that a context changes may refer to the context, because the context would then not be freed.

    _is_open = False

    def _do(self) -> object:
        """Enter the context."""

    def _undo(self) -> object:
        """Leave the context. Repeated calls to this method, and calls after an interrupted `_do`, must be safe."""

    def __enter__(self) -> None:
        self._is_open = True
        try:
            self._do()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            try:
                self._leave()
            finally:
                self._leave()

    def _leave(self) -> None:
        if self._is_open:
            self._undo()
            self._is_open = False

    __del__ = __exit__


class RunEagerly(Undoable):
    """Context in which compiled code runs eagerly, so that hooks take effect. Open contexts may close in any order."""

    def _do(self) -> None:
        _eager.add(id(self))
        _settle_stance()

    def _undo(self) -> None:
        _eager.discard(id(self))
        _settle_stance()


_eager: set[int] = set()  # ids of the open contexts
_stance: list[Any] = []  # the active stance, if any


def _settle_stance() -> None:
    if _eager and not _stance and "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        # If dynamo is not loaded, no code is compiled. Setting and storing the stance is one call, as an interrupt
        # could otherwise separate the two steps.
        _stance.extend(map(torch.compiler.set_stance, ["force_eager"]))
    elif _stance and not _eager:
        _stance[0].__exit__(None, None, None)
        _stance.clear()


is_compiling = torch.compiler.is_dynamo_compiling  # looked up once, because every hook calls it
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.6 and later


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function or, while torch compiles a model, a wrapper that runs the function without compiling it."""
    if is_compiling():
        return torch._dynamo.disable(function)  # type: ignore[no-any-return, no-untyped-call]
    return function


def refuse_checkpoint(name: str) -> None:
    """Raise UnsupportedModelError if the patch at the hook point `name` runs inside `torch.utils.checkpoint`.

    The backward pass of a checkpoint reruns modules outside the root call.
    """
    hooks = _saved_tensor_hooks(True) if _saved_tensor_hooks else None
    inside = torch._C._current_graph_task_id() != -1 or (hooks and hooks[0].__module__ == "torch.utils.checkpoint")
    # Reentrant checkpointing disables gradients. Before torch 2.6, any checkpoint is recognized by its frame.
    caller = "forward" if not torch.is_grad_enabled() else "" if _saved_tensor_hooks else "checkpoint"
    frame = sys._getframe() if caller else None
    while frame is not None and not inside:
        inside = frame.f_code.co_name == caller and frame.f_globals.get("__name__") == "torch.utils.checkpoint"
        frame = frame.f_back
    if inside:
        raise UnsupportedModelError(
            f"'{name}' is patched inside torch.utils.checkpoint, whose backward pass reruns the module outside the "
            "patched call, so gradients could be wrong. Disable checkpointing while the model is patched, or run the "
            "model under torch.no_grad()."
        )
