"""The only file that registers torch hooks: one station per module, and an observer of all of them for the trace.

A `Station` is the one hook pair of a module. It serves every open session: records of the unpatched value, then
patches in order of entry, then records.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _taps
from ._typing import STAGES
from .errors import ConcurrencyError

if TYPE_CHECKING:
    from ._sessions import Listener, Session


class Station:
    """The one hook pair of one module, and the sessions that listen there."""

    def __init__(self, module: nn.Module) -> None:
        self.listeners: list[Listener] = []
        self.scopes: list[Session] = []
        self._plans: dict[str, tuple[tuple[Session, ...], tuple[Listener, ...]]] = {}
        self.module_id = id(module)
        self.inside = frozenset(map(id, module.modules()))
        self._handles = (
            module.register_forward_pre_hook(_hook(self, self._enter), with_kwargs=True),
            module.register_forward_hook(_hook(self, self._leave), always_call=True),
        )

    @staticmethod
    def of(module: nn.Module) -> Station | None:
        """Return the module's station; the module itself holds it, by its hooks, so that both are freed together."""
        stations = (getattr(hook, _STATION, None) for hook in module._forward_pre_hooks.values())
        return next((found for found in stations if found is not None and found.module_id == id(module)), None)

    def is_inside_itself(self) -> bool:
        """Tell whether the module is called inside a call of itself, and not anew after one that was cut short."""
        calls, frame = 0, sys._getframe()
        while frame is not None and calls < 2:
            calls += frame.f_code is _CALL and id(frame.f_locals.get("self")) == self.module_id
            frame = frame.f_back  # type: ignore[assignment]
        return calls > 1

    def plan(self) -> None:
        """Order the listeners by stage, then by entry."""
        for side in ("in", "out"):
            ordered = [i for stage in STAGES for i in self.listeners if (i.stage, i.place.side) == (stage, side)]
            sessions = tuple(dict.fromkeys(listener.session for listener in ordered))
            self._plans[side] = (sessions, tuple(ordered)) if ordered else ((), ())

    def remove(self, session: Session) -> None:
        """Forget a session, and leave the module when it was the last one."""
        self.listeners = [listener for listener in self.listeners if listener.session is not session]
        self.scopes = [other for other in self.scopes if other is not session]
        self.plan()
        if not self.listeners and not self.scopes:
            for handle in self._handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if id(module) != self.module_id and (self.listeners or self.scopes):
            raise ConcurrencyError(
                f"This {type(module).__name__} is a copy (deepcopy or a DataParallel replica) of a module that is "
                "being patched or recorded, and was made meanwhile. Use the module that was patched, on one device."
            )
        for session in self.scopes:
            session.begin(self, "__call__", (*args, *kwargs.values()))
        return self._run("in", (args, kwargs))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        failed = output is None and sys.exc_info()[0] is not None  # torch calls us on the way out of an exception
        changed = None if failed else self._run("out", output)
        for session in self.scopes:
            session.end(self, failed=failed)
        return changed

    def _run(self, side: str, tree: Any) -> Any:
        sessions, listeners = self._plans.get(side, ((), ()))
        for session in sessions:
            if session.enabled:
                session.count((self, side))
        changed = tree
        for listener in listeners:
            changed = listener(changed)
        return None if changed is tree else changed


_STATION = "_chanpatch_station"
_CALL = nn.Module._call_impl.__code__  # the frame that runs a module's hooks and its forward


def _hook(station: Station, run: Callable[..., Any]) -> Callable[..., Any]:
    def chanpatch_hook(*args: Any) -> Any:
        return eagerly(run, *args)

    setattr(chanpatch_hook, _STATION, station)
    return chanpatch_hook


def eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function; a model that is being compiled calls it as it is, instead of tracing into it."""
    if torch.compiler.is_compiling():
        return torch._dynamo.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]
    return function(*args, **kwargs)


@contextmanager
def compiled_code_runs_eagerly() -> Iterator[None]:
    """Let compiled code run as it was written, since hooks that are added after compilation are ignored there."""
    dynamo = sys.modules.get("torch._dynamo")  # where nothing was compiled it is not imported, which takes a second
    if dynamo is None or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with _stance:
        yield


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


@contextmanager
def observed(
    model: nn.Module,
    on_inputs: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    on_output: Callable[[nn.Module, Any], None],
    on_tap: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Call back at every module call and tap inside the model; changes nothing."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        on_output(module, output)

    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(on_inputs, with_kwargs=True))
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
def noticing_calls(modules: Container[nn.Module], notice: Callable[[], None]) -> Iterator[None]:
    """Call back when any of these modules is called, wherever; for the one call that has to be learnt about."""

    def before(module: nn.Module, args: Any) -> None:
        if module in modules:
            notice()

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def drop_hooks(model: nn.Module) -> None:
    """Take chanpatch's own hooks off a model that was copied while they were on."""
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name in ("_forward_pre_hooks", "_forward_hooks"):
                for key in [key for key, hook in hooks.items() if hasattr(hook, _STATION)]:
                    del hooks[key]
                    for flags in ("_with_kwargs", "_always_called"):
                        vars(module).get(f"{name}{flags}", {}).pop(key, None)
