"""Sessions: groups of listeners that are attached together, and the root call in which the listeners run.

A root call is one call to the model or to the traced method. Calls to modules are counted separately in each root call.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import ConcurrencyError, HookPointError, TraceMismatchError, UnsupportedModelError
from .calls import WrappedMethod, forget_taps, hear_tap
from .containers import containers
from .hooks import RunEagerly, Stage, Station, refuse_checkpoint
from .moments import Moment, RootCall, published
from .paths import Item, Place, get, in_distribution, leaves, nested, read_only, replace
from .tree import Tree

_CHANGES = threading.RLock()  # held while hooks are added or removed


class StopForward(BaseException):
    """Raised to stop a forward pass that chanpatch started. `except Exception` does not catch a StopForward."""


class Listener:
    """A session's callback for the tensor at one place.

    `act` receives the tensor and the session. `act` returns a new tensor, or the same object to change nothing.
    """

    __slots__ = ("_path", "act", "place", "session", "stage")

    def __init__(self, session: Session, place: Place, stage: Stage, act: Callable[[Tensor, Session], Tensor]) -> None:
        self.session, self.place, self.stage, self.act = session, place, stage, act
        self._path = place.path
        if place.side == "in":  # the path starts from (args, kwargs)
            positional = isinstance(place.path[0], Item) and isinstance(place.path[0].key, int)
            self._path = (Item(0 if positional else 1), *place.path)

    def __call__(self, tree: Any) -> Any:
        """Run `act` on the listener's tensor in a module's inputs or output. Return the inputs or output to use."""
        session = self.session
        if not session.enabled:
            return tree
        try:
            if not session.is_call(self.place):
                return tree
            if self.stage == "patch" and (session.had_gradients or torch.is_grad_enabled()):
                refuse_checkpoint(self.place.name)
            leaf = self._leaf(tree) if self._path or not isinstance(tree, Tensor) or tree.is_nested else tree
            new = self.act(leaf, session)
            if not self._path:
                return new
            if new is leaf:
                return tree
            if in_distribution(tree, self._path):
                raise UnsupportedModelError(read_only(self.place.name))
            return replace(tree, self._path, new)
        except BaseException as error:
            if not isinstance(error, (StopForward, KeyboardInterrupt)):  # neither is an error in the listener
                session.failure = session.failure or error
            raise

    def _leaf(self, tree: Any) -> Tensor:
        """Return the tensor at the listener's path. Raise an error if the value is not a tensor, or is nested."""
        try:
            leaf = get(tree, self._path)
        except (LookupError, AttributeError, TypeError):
            leaf = None
        if not isinstance(leaf, Tensor):
            raise TraceMismatchError(
                f"Expected a tensor at '{self.place.name}' in this forward pass; got {type(leaf).__name__} in "
                f"{type(tree).__name__}. Call hook_points() with inputs like the ones in this forward pass, and use "
                "the names that it lists."
            )
        if leaf.is_nested:
            raise UnsupportedModelError(nested(self.place.name))
        return leaf


class Session:
    """A group of listeners that are attached together, and the root call in which the listeners run.

    `calls` maps the name of each module or tap to the number of calls to it in the trace. If the model was not traced,
    `calls` is None.
    """

    confined = False  # whether only the thread that opened the session may call the model
    enabled = True
    had_gradients = False  # whether gradients were enabled when the root call began
    call = 0  # index of the current module call
    root_call: RootCall | None = None  # the current root call
    running: str | None = None  # method of the current root call
    failure: BaseException | None = None  # error from a listener, raised even if the model catches the error
    dropped: AbstractContextManager[None] | None = None  # a context that was freed while open
    has_begun = False  # whether a root call has begun
    _in_containers = False  # whether any listener's tensor is in a container that a module returns
    _thread: int | None = None
    _task: Any = None  # the asyncio task that opened the session

    def __init__(self, tree: Tree, method: str = "__call__", calls: dict[str, int] | None = None) -> None:
        self.tree, self.modules, self.root = tree, tree.modules, tree.modules[""]
        self.method, self.calls = method, calls
        self.points_or_model: Any = self.root
        self.disabled_by: set[object] = set()  # open contexts that disable the session
        self.listeners: list[Listener] = []
        self._stations: dict[nn.Module, Station | None] = {}  # by module; None for a module whose hooks are being added
        self._with_inputs: list[Station] = []

    def on_begin(self, call: RootCall) -> None:
        """Prepare for a root call. If this method raises an error, the root call does not begin."""

    def on_end(self, call: RootCall) -> None:
        """Check a root call that completed without an error."""

    def on_error(self, error: Exception) -> None:
        """Handle an exception from the root call: do nothing, add a note, or raise another exception instead."""

    def listen(self, place: Place, stage: Stage, act: Callable[[Tensor, Session], Tensor]) -> None:
        """Add a listener at a place. The listener takes effect the next time the session is attached."""
        self.listeners.append(Listener(self, place, stage, act))

    def attach(self, scopes: Iterable[nn.Module] = ()) -> None:
        """Attach all listeners. If one listener cannot be attached, attach none.

        A call to a module in `scopes` is a root call if it is not inside another call to one of these modules.
        """
        try:
            with _CHANGES:
                self._attach(scopes)  # a method, because an interrupt after a loop here would leave the lock held
        except BaseException:
            self.detach()
            raise

    def _attach(self, scopes: Iterable[nn.Module]) -> None:
        for listener in self.listeners:
            place = listener.place
            if place.side == "tap":
                hear_tap(place.module, self)
                scopes = [*scopes, *self.root.modules()]  # a tap may run when any module is called directly
            else:
                station = self._station(self.modules[place.module])
                station.listeners.append(listener)
                self._with_inputs += [station] if place.side == "in" else []
                self._in_containers |= place.side == "out" and bool(place.path)
        for module in dict.fromkeys(scopes):
            self._station(module).scopes.append(self)
        for station in filter(None, self._stations.values()):
            station.plan()

    def detach(self) -> None:
        """Detach all listeners. Hooks that other code registered stay in place."""
        if any([listener.place.side == "tap" for listener in self.listeners]):
            forget_taps(self)
        while self._stations:
            module = next(iter(self._stations))
            with _CHANGES:
                if station := self._stations[module] or Station.of(module):
                    station.remove(self)
                self._stations.pop(module, None)
        self._with_inputs.clear()

    def let_go(self) -> None:
        """Free the listeners' tensors now, without waiting for the garbage collector to find the reference cycle."""
        self.listeners.clear()

    def _station(self, module: nn.Module) -> Station:
        if (station := self._stations.get(module)) is None:
            self._stations[module] = None  # stored first, so that an interrupt leaves no hook behind
            self._stations[module] = station = Station.on(module)
        return station

    @property
    def in_method(self) -> bool:
        """Whether a method is running as the root call. Module calls inside this method belong to the root call."""
        return self.root_call is not None and self.root_call.station is None

    @property
    def in_call(self) -> bool:
        """Whether the method `__call__` is running as the root call."""
        call = self.root_call
        return call is not None and call.station is None and call.method == "__call__"

    def moment(self) -> Moment:
        """Return a snapshot of the current forward pass."""
        if (call := self.root_call) is None:
            return Moment(call=self.call, published=published.now)
        inputs = (*call.args, *call.kwargs.values())
        model = self.points_or_model if call.station is None or call.station.module_id == id(self.root) else None
        method = self.method if self.calls is not None or call.is_forward_of_method else call.method
        return Moment(inputs, self.call, call.forward, published.now, call.method, call.masks, model, method)

    def begin(self, station: Station, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """When a module is called, begin a root call, unless the module's call belongs to the current root call."""
        running = self.root_call
        if not self.enabled or (running is not None and running.station is None):
            return
        home = None if running is None else running.station
        # After an interrupt, torch does not run hooks, so the current root call may already be over.
        if running is not None and home is station and station.is_inside_itself():
            running.depth += 1  # the model calls itself
        elif home is None or home is station or station.module_id not in home.inside:
            self._begin(RootCall(station, "__call__", args, kwargs))

    def end(self, station: Station, *, failed: bool) -> None:
        """When a call to a module ends, end the current root call if it began with that call."""
        running = self.root_call
        if not self.enabled or running is None or running.station is not station:
            return
        if running.depth:
            running.depth -= 1
        else:
            self._end(running, failed=failed)

    def run_method(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `function`, which is the traced method, and return the output; see `run`."""
        return self.run(self.method, function, args, kwargs)

    def run(self, method: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `function`, a method of the model, as a root call or within the current root call. Return the output."""
        if not self.enabled:
            return function(*args, **kwargs)
        outer = self.root_call
        if outer is not None and outer.station is None:
            self.check_owner()
            if not method == self.method == "__call__" or outer.method == "__call__" or outer.is_forward_of_method:
                return function(*args, **kwargs)  # a nested call belongs to the outer root call
            self.root_call = RootCall(None, outer.method, args, kwargs, True, outer.forwards)  # one token in `generate`
            outer.forwards += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.root_call = outer
        call = RootCall(None, method, args, kwargs)
        self._begin(call)
        failed = True
        try:
            output = function(*args, **kwargs)
            failed = False
            return output
        except Exception as error:
            self.on_error(error)
            raise
        finally:
            self._end(call, failed=failed)

    def stop(self, token: object) -> NoReturn:
        """Stop the forward pass by raising StopForward(token), after ending all root calls to the model."""
        station = Station.of(self.root)
        for session in () if station is None else tuple(station.scopes):
            if session.enabled and session.root_call is not None and session.root_call.station is station:
                session._end(session.root_call, failed=True)
        raise StopForward(token)

    def _begin(self, call: RootCall) -> None:
        if self._thread is not None:
            self.check_owner()
        if self.dropped is not None:
            dropped, self.dropped = self.dropped, None
            dropped.__exit__(None, None, None)
            raise ConcurrencyError(
                f"A context for {type(self.root).__name__} was garbage-collected while open, and is now closed. "
                "Use `with`, or keep the context in a variable: context = patched(model, patches); context.__enter__()."
            )
        self.on_begin(call)  # if this raises, no root call has begun
        self.failure, self.has_begun = None, True
        for station in self._with_inputs:
            station.order()
        self._thread, self.had_gradients = threading.get_ident(), torch.is_grad_enabled()
        self.root_call, self.running = call, call.method
        if (now := published.now).step is not None:
            call.forward = now.forwards[id(self)] = now.forwards.get(id(self), -1) + 1
        if self._in_containers:
            given = call.args, call.kwargs
            call.given = [*containers(given), *(tensor for _, tensor in leaves(given))]

    def _end(self, call: RootCall, *, failed: bool) -> None:
        try:
            if not failed:
                if self.failure is not None:
                    raise self.failure
                self.on_end(call)
        finally:
            self.failure = self.root_call = self.running = None
            if not self.confined:
                self._thread = None

    def own(self) -> None:
        """Allow calls to the model only from the current thread and asyncio task."""
        self._thread, self._task = threading.get_ident(), _current_task()

    def check_owner(self) -> None:
        """Raise ConcurrencyError if the model may not be called from the current thread or the current asyncio task."""
        if self._is_elsewhere():
            where = "thread" if threading.get_ident() != self._thread else "asyncio task"
            raise ConcurrencyError(
                f"{type(self.root).__name__} is patched or recorded in another {where}. Open the context in the "
                f"{where} that runs the model, or use a separate PatchedPolicy for each {where}."
            )

    def _is_elsewhere(self) -> bool:
        if self._thread != threading.get_ident():
            return self._thread is not None
        # A context from a finished task, such as an earlier notebook cell, may be used by later tasks.
        return self._task is not None and _current_task() is not self._task and not self._task.done()

    def in_this_thread(self) -> bool:
        """Return whether a root call of the session is running in the current thread and asyncio task."""
        return self.enabled and self.root_call is not None and not self._is_elsewhere()

    def enter_call(self, counted: object) -> None:
        """Count a call to a module or tap, and set `self.call` to the index of that call."""
        if not self.enabled:
            return
        if self._thread != threading.get_ident() or self._task is not None:
            self.check_owner()
        running = self.root_call
        if running is None:
            self.call = 0
        else:
            calls = running.calls.setdefault(counted, [0])
            self.call = calls[0]
            calls[0] += 1
            calls.append(self.call)

    def leave_call(self, counted: object) -> None:
        """Set `self.call` to the index of the ending call. Nested calls to the same module end in reverse order."""
        if not self.enabled or ((self._thread != threading.get_ident() or self._task) and self._is_elsewhere()):
            return  # `enter_call` already rejected this call
        calls = None if self.root_call is None else self.root_call.calls.get(counted)
        self.call = calls.pop() if calls and len(calls) > 1 else 0

    def is_call(self, place: Place) -> bool:
        """Return whether a place refers to the current call to the place's module or tap.

        Raises:
            HookPointError: If the place needs a call index but has none, or has one although calls cannot be counted.
            TraceMismatchError: If the module or tap was called more often than in the trace.
        """
        if self.root_call is None:
            if place.call is not None:
                raise HookPointError(
                    f"'{place.name}' is call {place.call} of '{place.module}', but {type(self.root).__name__} was not "
                    f"called through '{self.method}', so calls cannot be counted. Trace the method that you call: "
                    'hook_points(model, *inputs, method="name").'
                )
            return True
        if self.calls is not None and self.call >= self.calls.get(place.module, sys.maxsize):
            known = self.calls[place.module]
            raise TraceMismatchError(
                f"Hook point '{place.name}': '{place.module}' was called {self.call + 1} times in this model call, but "
                f"{known} time{'s' * (known != 1)} when the model was traced. Call hook_points() with inputs like the "
                "ones in this call."
            )
        if place.call is None and self.call > 0:
            raise HookPointError(
                f"'{place.name}' has no call index, but '{place.module}' was called more than once in one model call. "
                f"Add the call index, as in '{place.module}#0', or trace the model with hook_points()."
            )
        return place.call is None or place.call == self.call


class Attached(RunEagerly):
    """Context in which a session is attached. Each outermost call to the session's method is then a root call."""

    def __init__(self, session: Session) -> None:
        self._session = session
        is_call = session.method == "__call__"
        self._around = None if is_call else WrappedMethod(session.root, session.method, session.run_method)

    def _do(self) -> None:
        session = self._session
        if session.confined:
            session.own()
        super()._do()
        if self._around is not None:
            self._around.__enter__()
        session.attach([session.root] if self._around is None else [])

    def _undo(self) -> None:
        self._session.detach()
        super()._undo()
        if self._around is not None:
            self._around.__exit__()


def _current_task() -> Any:
    asyncio = sys.modules.get("asyncio")
    loop = None if asyncio is None else asyncio._get_running_loop()
    return None if asyncio is None or loop is None else asyncio.current_task(loop)
