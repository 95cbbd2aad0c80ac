"""What one context, or one patched policy, wants to see or change, and the root call that it is in.

Forwards are divided into root calls: one call of the model, or of the method that was named. Call indices are
counted, and checks are made, per root call.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, NoReturn, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from . import _taps
from ._hooks import Station, compiled_code_runs_eagerly
from ._tree import Item, Path, get, replace
from ._typing import Stage
from .errors import ConcurrencyError, HookPointError, TraceMismatchError, UnsupportedModelError
from .points import HookPoints


class Place(Protocol):
    """Where a listener listens; a HookPoint is one."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def side(self) -> Literal["in", "out", "tap"]: ...
    @property
    def path(self) -> Path: ...
    @property
    def call(self) -> int | None: ...


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
        if not self.session.enabled or not self.session.is_call(self.place):
            return tree
        leaf = None
        with suppress(LookupError, AttributeError, TypeError):
            leaf = get(tree, self._path)
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
        return tree if new is leaf else replace(tree, self._path, new)


def _argument_path(path: Path) -> Path:
    """Lead from (args, kwargs) to one input: integers are positions, strings are keywords."""
    positional = isinstance(path[0], Item) and isinstance(path[0].key, int)
    return (Item(0 if positional else 1), *path)


class Session:
    """Listeners that come and go together, and the root call that they are in.

    Args:
        root: The model.
        method: The method whose call is a root call; `"__call__"` is the forward.
        calls: How often each module was called in the traced root call, by name; None without a trace.
    """

    def __init__(self, root: nn.Module, method: str = "__call__", calls: dict[str, int] | None = None) -> None:
        self.root, self.method, self.calls = root, method, calls
        self.enabled = True
        self.running: str | None = None  # the method of the root call under way
        self.inputs: tuple[Any, ...] = ()
        self.call = 0  # the index of the module call under way
        self.on_begin: Callable[[], None] = _nothing
        self.on_end: Callable[[object], None] = _ignore
        self.listeners: list[Listener] = []
        self._counts: dict[object, int] = {}
        self._stations: list[Station] = []
        self._opener: object = None
        self._depth = 0  # of calls of the opener inside itself
        self._thread: int | None = None
        self._confined = False

    def listen(self, place: Place, stage: Stage, act: Callable[[Tensor], Tensor]) -> None:
        """Add a listener, before the session is attached."""
        self.listeners.append(Listener(self, place, stage, act))

    def attach(self, scopes: Iterable[nn.Module] = ()) -> None:
        """Start to listen, all or nothing.

        Args:
            scopes: Modules whose outermost call is a root call.
        """
        modules = dict(self.root.named_modules(remove_duplicate=False))
        try:
            for listener in self.listeners:
                if listener.place.side == "tap":
                    _taps.wait(listener.place.module, self)
                else:
                    station = self._station(modules[listener.place.module])
                    station.listeners.append(listener)
                    station.plan()
            if any(listener.place.side == "tap" for listener in self.listeners):
                scopes = [*scopes, *self.root.modules()]  # a tap may run in a call of any module by itself
            for module in dict.fromkeys(scopes):
                self._station(module).scopes.append(self)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Stop to listen; the hooks of others stay as they are."""
        for station in self._stations:
            station.remove(self)
        self._stations.clear()
        _taps.forget(self)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Attached while the context is open, with each call of the session's method as a root call."""
        watched = self.method != "__call__"
        with compiled_code_runs_eagerly():
            self.attach(scopes=() if watched else (self.root,))
            try:
                if watched:
                    _watch_method(self)
                yield
            finally:
                self.detach()
                if watched:
                    _unwatch_method(self)

    def _station(self, module: nn.Module) -> Station:
        station = Station.of(module) or Station(module)
        if station not in self._stations:
            self._stations.append(station)
        return station

    def confine_to_thread(self) -> None:
        """Refuse forwards from any other thread from now on; otherwise only while a root call is under way."""
        self._thread, self._confined = threading.get_ident(), True

    def check_thread(self) -> None:
        """Raise if the forward under way is not in the session's thread."""
        if self._thread is not None and threading.get_ident() != self._thread:
            raise ConcurrencyError(
                f"{type(self.root).__name__} is patched or recorded in another thread. Open the context in the "
                "thread that runs the model, or give each thread a PatchedPolicy of its own."
            )

    def begin(self, opener: object, method: str, inputs: tuple[Any, ...]) -> None:
        """Begin a root call, unless one that something else began is under way."""
        if not self.enabled or (isinstance(opener, Station) and self._encloses(opener)):
            return
        self.check_thread()
        self.on_begin()  # may refuse: then no call has begun
        self._thread = threading.get_ident()
        self._opener, self._depth, self.running, self.inputs = opener, 0, method, inputs
        self._counts.clear()

    def _encloses(self, station: Station) -> bool:
        """Tell whether a module's call is part of the root call under way, and not the first after one cut short."""
        if self._opener is station and station.is_inside_itself():
            self._depth += 1
            return True
        if self._opener is None or self._opener is station:
            return False
        # Torch runs no hook on the way out of an interrupt, so that a module's call may have ended untold.
        return not isinstance(self._opener, Station) or station.module_id in self._opener.inside

    def end(self, opener: object, *, failed: bool = False) -> None:
        """End the root call that this opener began; it is checked only when no exception is in flight."""
        if self._opener is None or self._opener is not opener:
            return
        if self._depth:
            self._depth -= 1
            return
        try:
            if not failed:
                self.on_end(opener)
        finally:
            self._opener, self.running, self.inputs = None, None, ()
            if not self._confined:
                self._thread = None

    @property
    def in_method(self) -> bool:
        """Whether a root call of a method is under way; the calls inside it are part of it."""
        return self._opener is not None and not isinstance(self._opener, Station)

    @contextmanager
    def root_call(self, method: str, inputs: tuple[Any, ...]) -> Iterator[None]:
        """A root call that is not a module call: a method of the model's own."""
        opener = object()
        self.begin(opener, method, inputs)
        failed = True
        try:
            yield
            failed = False
        finally:
            self.end(opener, failed=failed)

    @contextmanager
    def forward_within(self, inputs: tuple[Any, ...]) -> Iterator[None]:
        """A forward of the model inside a root call of another method: its module calls are counted by themselves."""
        before = self._counts, self.inputs
        self._counts, self.inputs = {}, inputs
        try:
            yield
        finally:
            self._counts, self.inputs = before

    def stop(self, token: object) -> NoReturn:
        """End the forward under way; the root calls of every session at the model are over."""
        station = Station.of(self.root)
        for session in () if station is None else tuple(station.scopes):
            session._depth = 0
            session.end(station, failed=True)
        raise StopForward(token)

    def in_this_thread(self) -> bool:
        """Tell whether a root call is under way, in this thread."""
        return self.enabled and self.running is not None and self._thread == threading.get_ident()

    def count(self, counted: object) -> None:
        """Count a call of a module or a tap; the listeners there read its index in `call`."""
        self.check_thread()
        self.call = self._counts.get(counted, -1) + 1 if self.running is not None else 0
        self._counts[counted] = self.call

    def is_call(self, place: Place) -> bool:
        """Tell whether the call under way is the one that a place means."""
        if self.running is None:
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


def session_for(points_or_model: HookPoints | nn.Module) -> Session:
    """Return a session for a traced model, or for one of which nothing but the forward is known."""
    if isinstance(points_or_model, HookPoints):
        return Session(points_or_model.model, points_or_model.method, points_or_model.calls)
    return Session(points_or_model)


def _nothing() -> None: ...


def _ignore(opener: object) -> None: ...


_methods: WeakKeyDictionary[nn.Module, dict[str, list[Session]]] = WeakKeyDictionary()
_replaced: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def _watch_method(session: Session) -> None:
    """Make each call of the session's method on the model itself a root call."""
    root, method = session.root, session.method
    sessions = _methods.setdefault(root, {}).setdefault(method, [])
    if not sessions:
        original = getattr(root, method)
        _replaced.setdefault(root, {})[method] = vars(root).get(method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for each in tuple(sessions):
                    stack.enter_context(each.root_call(method, (*args, *kwargs.values())))
                return original(*args, **kwargs)

        vars(root)[method] = watched
    sessions.append(session)


def _unwatch_method(session: Session) -> None:
    """Undo `_watch_method`; the last session to leave takes the wrapper off."""
    sessions = _methods.get(session.root, {}).get(session.method, [])
    if session in sessions:
        sessions.remove(session)
        if not sessions:
            before = _replaced[session.root].pop(session.method)
            del vars(session.root)[session.method]
            if before is not None:  # the user had put a function of her own there
                vars(session.root)[session.method] = before
