"""What one context, or one patched policy, wants to see or change, and the root call that it is in.

Forwards are divided into root calls: one call of the model, or of the method that was named. Call indices are
counted, and checks are made, per root call.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import ConcurrencyError, HookPointError, TraceMismatchError, UnsupportedModelError
from . import taps as _taps
from .containers import containers
from .hooks import Station, compiled_code_runs_eagerly
from .methods import unwatch_method, watch_method
from .paths import Item, Path, get, leaves, replace
from .taps import Place, Stage


class _Published(threading.local):
    step: int | None = None
    rows: Tensor | None = None


published = _Published()


@contextmanager
def forward_context(*, step: int | None = None, rows: Any = None) -> Iterator[None]:
    """Publish the step of a rollout, and the numbers of the rows in this forward, to the patches that ask."""
    before = published.step, published.rows
    published.step, published.rows = step, None if rows is None else torch.as_tensor(rows)
    try:
        yield
    finally:
        published.step, published.rows = before


class StopForward(BaseException):
    """Ends a forward that chanpatch itself started; no `except Exception` on the way catches it."""


class Listener:
    """One place that a session listens to.

    Args:
        session: Whose.
        place: Where.
        stage: Before the patches, as a patch, or after them.
        act: Takes the tensor found there; returns the tensor to put in its place, or the very same one.
    """

    __slots__ = ("_path", "act", "place", "session", "stage")

    def __init__(self, session: Session, place: Place, stage: Stage, act: Callable[[Tensor], Tensor]) -> None:
        self.session, self.place, self.stage, self.act = session, place, stage, act
        self._path = _argument_path(place.path) if place.side == "in" else place.path

    def __call__(self, tree: Any) -> Any:
        """Return the tree that the listener leaves."""
        if not self.session.enabled or not self.session.is_call(self.place):
            return tree
        leaf = tree
        if self._path:
            try:
                leaf = get(tree, self._path)
            except (LookupError, AttributeError, TypeError):
                leaf = None
        if not isinstance(leaf, Tensor):
            raise TraceMismatchError(
                f"There is no tensor at hook point '{self.place.name}' in this forward, but {type(leaf).__name__} in "
                f"{type(tree).__name__}. Trace inputs like these with hook_points() and use the names it lists."
            )
        if leaf.is_nested:
            raise UnsupportedModelError(
                f"The tensor at hook point '{self.place.name}' is a nested one, which has no shape. Where a "
                "TransformerEncoder makes it of padded inputs, build that with enable_nested_tensor=False."
            )
        new = self.act(leaf)
        return new if not self._path else tree if new is leaf else replace(tree, self._path, new)


def _argument_path(path: Path) -> Path:
    """Lead from (args, kwargs) to one input: integers are positions, strings are keywords."""
    positional = isinstance(path[0], Item) and isinstance(path[0].key, int)
    return (Item(0 if positional else 1), *path)


class RootCall:
    """One call of the model, or of the method that was named, within which calls are counted.

    Args:
        station: Of the module whose call it is; None for a method.
        method: The method; `"__call__"` for a module's call.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """

    __slots__ = ("args", "counts", "depth", "given", "kwargs", "method", "station")

    def __init__(self, station: Station | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.station, self.method, self.args, self.kwargs = station, method, args, kwargs
        self.counts: dict[object, int] = {}
        self.depth = 0  # of calls of the module inside itself, or of its forward inside a method
        self.given: list[Any] = []  # tensors and containers in the arguments as they were given


class Session:
    """Listeners that come and go together, and the root call that they are in.

    As a context it is attached, and each call of its method is a root call.

    Args:
        root: The model.
        method: The method whose call is a root call; `"__call__"` is the forward.
        calls: How often each module was called in the traced root call, by name; None without a trace.
    """

    def __init__(self, root: nn.Module, method: str = "__call__", calls: dict[str, int] | None = None) -> None:
        self.root, self.method, self.calls = root, method, calls
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.enabled = True
        self.confined = False  # to the thread that opened it; otherwise to that of the root call under way
        self.call = 0  # the index of the module call under way
        self.on_begin: Callable[[], None] = _nothing
        self.on_end: Callable[[RootCall], None] = _ignore
        self.on_error: Callable[[Exception], None] = _ignore  # of a method; may raise another in its place
        self.listeners: list[Listener] = []
        self._in_containers = False  # whether what modules return in containers is listened to
        self._running: RootCall | None = None
        self._stations: list[Station] = []
        self._stance: AbstractContextManager[None] = nullcontext()
        self._thread: int | None = None

    def listen(self, place: Place, stage: Stage, act: Callable[[Tensor], Tensor]) -> None:
        """Add a listener, before the session is attached."""
        self.listeners.append(Listener(self, place, stage, act))

    def attach(self, scopes: Iterable[nn.Module] = ()) -> None:
        """Start to listen, all or nothing.

        Args:
            scopes: Modules whose outermost call is a root call.
        """
        try:
            for listener in self.listeners:
                if listener.place.side == "tap":
                    _taps.wait(listener.place.module, self)
                else:
                    self._station(self.modules[listener.place.module]).listeners.append(listener)
            for station in self._stations:
                station.plan()
            self._in_containers = any(each.place.side == "out" and each.place.path for each in self.listeners)
            if any(listener.place.side == "tap" for listener in self.listeners):
                scopes = [*scopes, *self.root.modules()]  # a tap may run in a call of any module by itself
            for module in dict.fromkeys(scopes):
                self._station(module).scopes.append(self)
        except BaseException:
            self._abandon()
            raise

    def detach(self) -> None:
        """Stop to listen; the hooks of others stay as they are."""
        for station in self._stations:
            station.remove(self)
        self._stations.clear()
        _taps.forget(self)

    def let_go(self) -> None:
        """Forget for good what was listened for: in cycles, its tensors would stay until the garbage collector runs."""
        self.listeners.clear()
        self.on_begin, self.on_end, self.on_error = _nothing, _ignore, _ignore

    def _abandon(self) -> None:
        """Undo what was cut short; an interrupt may have come between a hook and the note of it."""
        self._stations = [station for module in self.modules.values() if (station := Station.of(module)) is not None]
        self.detach()

    def __enter__(self) -> None:
        if self.confined:
            self._thread = threading.get_ident()
        self._stance = compiled_code_runs_eagerly()
        self._stance.__enter__()
        try:
            self.attach(scopes=() if self._watches else (self.root,))
            if self._watches:
                watch_method(self)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self.detach()
        except BaseException:
            self._abandon()
            raise
        finally:
            if self._watches:
                unwatch_method(self)
            stance, self._stance = self._stance, nullcontext()
            stance.__exit__(None, None, None)

    @property
    def _watches(self) -> bool:
        return self.method != "__call__"

    def _station(self, module: nn.Module) -> Station:
        station = Station.of(module) or Station(module)
        if station not in self._stations:
            self._stations.append(station)
        return station

    def confine_to_thread(self) -> None:
        """Refuse forwards from any thread but the one that opens it; otherwise only while a root call is under way."""
        self.confined = True

    def check_thread(self) -> None:
        """Raise if the forward under way is not in the session's thread."""
        if self._thread is not None and threading.get_ident() != self._thread:
            raise ConcurrencyError(
                f"{type(self.root).__name__} is patched or recorded in another thread. Open the context in the "
                "thread that runs the model, or give each thread a PatchedPolicy of its own."
            )

    @property
    def running(self) -> str | None:
        """The method of the root call under way."""
        return None if self._running is None else self._running.method

    @property
    def in_method(self) -> bool:
        """Whether a root call of a method is under way; the calls inside it are part of it."""
        return self._running is not None and self._running.station is None

    @property
    def users_own(self) -> list[Any]:
        """What the root call under way was given, where what a module returns in containers is patched."""
        return [] if self._running is None else self._running.given

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The inputs of the root call under way."""
        return () if self._running is None else (*self._running.args, *self._running.kwargs.values())

    def begin(self, station: Station, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a root call with a module's call, unless that is part of the one under way."""
        if self.enabled and (self._running is None or not self._encloses(self._running, station)):
            self._begin(RootCall(station, "__call__", args, kwargs))

    def end(self, station: Station, *, failed: bool) -> None:
        """End the root call that a module's call began."""
        running = self._running
        if running is None or running.station is not station:
            return
        if running.depth:
            running.depth -= 1
        else:
            self._end(running, failed=failed)

    def run(self, method: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a method of the model's own returns, called as a root call, or as a part of one."""
        if not self.enabled:
            return function(*args, **kwargs)
        outer = self._running
        if outer is not None and outer.station is None:
            self.check_thread()
            if not method == self.method == "__call__" or outer.method == "__call__" or outer.depth:
                return function(*args, **kwargs)  # a forward inside a forward is a part of it
            self._running = RootCall(None, outer.method, args, kwargs)  # `generate` runs one per token
            self._running.depth = 1
            try:
                return function(*args, **kwargs)
            finally:
                self._running = outer
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
        """End the forward under way; the root calls of every session at the model are over."""
        station = Station.of(self.root)
        for session in () if station is None else tuple(station.scopes):
            running = session._running if isinstance(session, Session) else None
            if isinstance(session, Session) and running is not None and running.station is station:
                session._end(running, failed=True)
        raise StopForward(token)

    def _begin(self, call: RootCall) -> None:
        self.check_thread()
        self.on_begin()  # may refuse: then no call has begun
        self._thread, self._running = threading.get_ident(), call
        if self._in_containers:
            given = call.args, call.kwargs
            call.given = [*containers(given), *(tensor for _, tensor in leaves(given))]

    def _end(self, call: RootCall, *, failed: bool) -> None:
        """End a root call; it is checked only when no exception is in flight."""
        try:
            if not failed:
                self.on_end(call)
        finally:
            self._running = None
            if not self.confined:
                self._thread = None

    def _encloses(self, running: RootCall, station: Station) -> bool:
        """Tell whether a module's call is part of the root call under way, and not the first after one cut short."""
        if running.station is None:
            return True
        if running.station is station:
            inside = station.is_inside_itself()
            running.depth += inside
            return inside
        # Torch runs no hook on the way out of an interrupt, so that a module's call may have ended untold.
        return station.module_id in running.station.inside

    def in_this_thread(self) -> bool:
        """Tell whether a root call is under way, in this thread."""
        return self.enabled and self._running is not None and self._thread == threading.get_ident()

    def count(self, counted: object) -> None:
        """Count a call of a module or a tap; the listeners there read its index in `call`."""
        if not self.enabled:
            return
        self.check_thread()
        running = self._running
        if running is None:
            self.call = 0
        else:
            self.call = running.counts[counted] = running.counts.get(counted, -1) + 1

    def is_call(self, place: Place) -> bool:
        """Tell whether the call under way is the one that a place means."""
        if self._running is None:
            if place.call is not None:
                raise HookPointError(
                    f"'{place.name}' names a call index, but {type(self.root).__name__} was not entered by "
                    f"'{self.method}', so its calls cannot be counted. Trace the method that you use: "
                    'hook_points(model, *inputs, method="name").'
                )
            return True
        if self.calls is not None and self.call >= self.calls.get(place.module, sys.maxsize):
            known = self.calls[place.module]
            raise TraceMismatchError(
                f"Hook point '{place.name}': '{place.module}' was called {self.call + 1} times in one root call, but "
                f"{known} time{'s' * (known != 1)} in the traced one. Trace inputs like these with hook_points()."
            )
        if place.call is None and self.call > 0:
            raise HookPointError(
                f"'{place.name}' names no call, but '{place.module}' was called more than once in one root call. "
                f"Name the call, as in '{place.module}#0', or trace the model with hook_points()."
            )
        return place.call is None or place.call == self.call


def _nothing() -> None: ...


def _ignore(what: object) -> None: ...
