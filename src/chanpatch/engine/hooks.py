"""The only file that registers torch hooks: one station per module, and an observer of all of them for the trace.

A `Station` is the one hook pair of a module. It serves every open session: records of the unpatched value, then
patches in order of entry, then records.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConcurrencyError, UnsupportedModelError
from . import taps as _taps
from .containers import CopiedContainer, containers, copied_containers, with_copies, written_into
from .taps import STAGES, Listener, Scope


class Station:
    """The one hook pair of one module, and the sessions that listen there."""

    def __init__(self, module: nn.Module) -> None:
        self.listeners: list[Listener] = []
        self.scopes: list[Scope] = []
        self.module_id = id(module)
        self._module = weakref.ref(module)
        self._in, self._out = _Side("in"), _Side("out")
        self._copies: list[weakref.ref[nn.Module]] = []
        self._copied_containers: dict[int, CopiedContainer] = {}  # by the id of the copy, in the calls under way
        module.register_forward_pre_hook(_Hook(self, self._enter, _CopiedPreHook), with_kwargs=True)
        module.register_forward_hook(_Hook(self, self._leave, _CopiedHook), with_kwargs=True, always_call=True)

    @staticmethod
    def of(module: nn.Module) -> Station | None:
        """Return the module's station; the module itself holds it, by its hooks, so that both are freed together."""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Hook) and hook.station.module_id == id(module):
                return hook.station
        return None

    @cached_property
    def inside(self) -> frozenset[int]:
        """The ids of the modules inside."""
        module = self._module()
        return frozenset() if module is None else frozenset(map(id, module.modules()))

    @property
    def is_open(self) -> bool:
        """Whether anybody listens."""
        return bool(self.listeners or self.scopes)

    def is_inside_itself(self) -> bool:
        """Tell whether the module is called inside a call of itself, and not anew after one that was cut short."""
        calls, frame = 0, sys._getframe()
        while frame is not None and calls < 2:
            calls += frame.f_code is _CALL and id(frame.f_locals.get("self")) == self.module_id
            frame = frame.f_back  # type: ignore[assignment]
        return calls > 1

    def plan(self) -> None:
        """Order the listeners by stage, then by entry."""
        for side in (self._in, self._out):
            here = [listener for listener in self.listeners if listener.place.side == side.name]
            side.listeners = sorted(here, key=lambda listener: STAGES.index(listener.stage))
            side.sessions = list(dict.fromkeys([listener.session for listener in here]))

    def remove(self, session: Scope) -> None:
        """Forget a session, and leave the module, and copies of it, when it was the last one."""
        self._copied_containers.clear()  # of calls that an interrupt cut short
        self.listeners = [listener for listener in self.listeners if listener.session is not session]
        self.scopes = [other for other in self.scopes if other is not session]
        self.plan()
        module = self._module()
        if not self.is_open and module is not None:
            # By the hooks themselves: an interrupt may have come before the handles of all were at hand.
            _drop(module, lambda hook: isinstance(hook, _Hook) and hook.station is self)
            for copied in self._copies_alive():
                _drop(copied, _is_copied)

    def note_copy(self, copy: nn.Module | None) -> None:
        """Remember a copy of the module, to leave it too in the end."""
        if copy is not None:
            self._copies = [weakref.ref(alive) for alive in (*self._copies_alive(), copy)]

    def _copies_alive(self) -> list[nn.Module]:
        return [copy for reference in self._copies if (copy := reference()) is not None]

    def refuse_copy(self, module: nn.Module) -> None:
        """Raise while the module that this is a copy of is patched or recorded, which the copy is not."""
        if self.is_open:
            raise ConcurrencyError(
                f"This {type(module).__name__} is a copy (deepcopy or a DataParallel replica) of a module that is "
                "being patched or recorded, and was made meanwhile. Use the module that was patched, on one device."
            )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if id(module) != self.module_id:
            self.refuse_copy(module)
        for session in self.scopes:
            session.begin(self, args, kwargs)
        changed = self._in.run((args, kwargs)) if self._in.listeners else None
        if changed is not None:
            copies = [*copied_containers((args, kwargs), changed)]
            changed = with_copies(changed, copies)
            self._copied_containers |= {id(each.copy): each for each in copies}
        return changed

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        failed = output is None and sys.exc_info()[0] is not None  # torch calls us on the way out of an exception
        changed = self._out.run(output) if self._out.listeners and not failed else None
        if changed is not None and not isinstance(output, Tensor):
            users = {id(own) for session in self._out.sessions for own in session.users_own}
            changed = written_into(output, changed, (args, kwargs), users)
        if self._copied_containers:
            for container in containers((args, kwargs)):
                if each := self._copied_containers.pop(id(container), None):
                    each.write_back()
        for session in self.scopes:
            session.end(self, failed=failed)
        return changed


class _Side:
    """What listens to the inputs of a module, or to its outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sessions: list[Scope] = []
        self.listeners: list[Listener] = []

    def run(self, tree: Any) -> Any:
        """Return the tree that the listeners leave, or None if they left the very same."""
        for session in self.sessions:
            session.count(self)
        changed = tree
        for listener in self.listeners:
            changed = listener(changed)
        return None if changed is tree else changed


_CALL = nn.Module._call_impl.__code__  # the frame that runs a module's hooks and its forward


class _CopiedHook:
    """What a copy of a module has in place of a hook of ours; closing the last context takes it off the copy."""

    def __init__(self, station: Station | None) -> None:
        self._station = station

    def __call__(self, module: nn.Module, *passed: Any) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> _CopiedHook:
        return self

    def __reduce__(self) -> Any:
        return type(self), (None,)


class _CopiedPreHook(_CopiedHook):
    """Refuses calls of the copy while the module is patched; then goes by itself where closing did not know of it."""

    def __call__(self, module: nn.Module, *passed: Any) -> None:
        if self._station is not None:
            self._station.refuse_copy(module)
        _drop(module, _is_copied)


def _is_copied(hook: object) -> bool:
    return isinstance(hook, _CopiedHook)


class _Hook:
    """What torch calls; a copy and a pickle of the module get another in its place."""

    def __init__(self, station: Station, run: Callable[..., Any], copied: type[_CopiedHook]) -> None:
        self.station, self._run, self._copied = station, run, copied

    def __call__(self, module: nn.Module, *passed: Any) -> Any:
        run = eager(self._run) if is_compiling() else self._run
        return run(module, *passed)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CopiedHook:
        self.station.note_copy(memo.get(self.station.module_id))
        return self._copied(self.station)

    def __reduce__(self) -> Any:
        if any(not session.confined for session in self.station.scopes):
            raise UnsupportedModelError(
                "This module is part of a PatchedPolicy, and without it would lose its patches. Pickle the twin as a "
                "whole, or the same part of the policy that it was made from."
            )
        return self._copied, (None,)


def is_ours(hook: object) -> bool:
    """Tell whether a hook is chanpatch's own."""
    return isinstance(hook, (_Hook, _CopiedHook))


def drop_hooks(model: nn.Module) -> None:
    """Take chanpatch's own hooks off a model that was copied while they were on; a twin inside it keeps its own."""
    for module in model.modules():
        _drop(module, partial(_is_of_another, Station.of(module)))


def _is_of_another(station: Station | None, hook: object) -> bool:
    return is_ours(hook) and not (isinstance(hook, _Hook) and hook.station is station)


def _drop(module: nn.Module, ours: Callable[[object], bool]) -> None:
    # The pre-hook goes last, by which a station is found, so that what was interrupted can be done again.
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = vars(module).get(name, {})
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            for flags in ("_with_kwargs", "_always_called"):
                vars(module).get(f"{name}{flags}", {}).pop(key, None)
            del hooks[key]


is_compiling = torch.compiler.is_dynamo_compiling  # looked up once: asked at every hook


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which a model that is being compiled calls as it is, instead of tracing into it."""
    if is_compiling():
        return torch._dynamo.disable(function)  # type: ignore[no-any-return, no-untyped-call]
    return function


def compiled_code_runs_eagerly() -> AbstractContextManager[None]:
    """Let compiled code run as it was written, since hooks that are added after compilation are ignored there."""
    # Where nothing was compiled, dynamo is not imported, which takes a second.
    compiles = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return _stance if compiles else nullcontext()


class _SharedStance:
    """One eager stance for all open contexts, whatever the order in which they close."""

    def __init__(self) -> None:
        self._open = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        if self._open == 0:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        self._open += 1

    def __exit__(self, *error: object) -> None:
        self._open -= 1
        if self._open == 0:
            self._stance.__exit__(None, None, None)


_stance = _SharedStance()


class _Observer:
    """Calls back for the modules of the model, and not for copies of them that a forward makes and calls."""

    def __init__(self, known: Container[nn.Module], call_back: Callable[..., None]) -> None:
        self._known, self._call_back = known, call_back

    def __call__(self, module: nn.Module, *passed: Any) -> None:
        if module in self._known:
            self._call_back(module, *passed)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Observer:
        return self


@contextmanager
def observed(
    model: nn.Module,
    on_inputs: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    on_output: Callable[[nn.Module, Any], None],
    on_tap: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Call back at every module call and tap inside the model; changes nothing."""
    known = set(model.modules())
    handles = []
    try:
        for module in known:
            before = _Observer(known, on_inputs)
            after = _Observer(known, lambda module, args, output: on_output(module, output))
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        _taps.observers.append(on_tap)
        with compiled_code_runs_eagerly():
            yield
    finally:
        if on_tap in _taps.observers:
            _taps.observers.remove(on_tap)
        for handle in handles:
            handle.remove()


@contextmanager
def noticing_calls(modules: Container[nn.Module], notice: Callable[[nn.Module], object]) -> Iterator[None]:
    """Call back when any of these modules is called, wherever; for the one call that has to be learnt about."""

    def before(module: nn.Module, args: Any) -> None:
        if module in modules:
            notice(module)

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


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
