"""The torch hooks at the places that sessions listen to: a `Station` per module, and the cases that hooks cannot serve.

A station serves every open session: records of the unpatched value, then patches in order of entry, then records.
Patches are written to an output before any other hook of the module runs, and to an input after all pre-hooks. Records
are taken last, so that a record is the tensor that flows on.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ConcurrencyError, UnsupportedModelError
from .containers import containers, contents, copied_containers, holds, with_copies, written_into
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
        self._just_patched: list[tuple[Place, Tensor, int | None]] = []  # tensors and versions, in the call under way
        self._copies: list[weakref.ref[nn.Module]] = []
        self._copied: dict[int, tuple[Any, list[Any]]] = {}  # containers of the calls under way, and their contents
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
        ordered = self.listeners
        if len(ordered) > 1:
            ordered = sorted(ordered, key=lambda listener: STAGES.index(listener.stage))
        self._on_inputs = [listener for listener in ordered if listener.place.side == "in"]
        output = [listener for listener in ordered if listener.place.side == "out"]
        self._on_output = [listener for listener in output if listener.stage != "after"]
        self._at_last = [listener for listener in output if listener.stage == "after"]
        self._counting = list(dict.fromkeys([listener.session for listener in self.listeners]))

    def remove(self, session: Any) -> None:
        """Forget a session, and leave the module, and copies of it, if it was the last one."""
        self._copied.clear()  # of calls that an interrupt cut short
        self._errors_before.clear()
        self.listeners = [listener for listener in self.listeners if listener.session is not session]
        self.scopes = [other for other in self.scopes if other is not session]
        self.plan()
        for each in () if self.is_open else (self._module, *self._copies):
            if (module := each()) is not None:
                drop(module, lambda hook: isinstance(hook, _Hook) and hook.station is self)

    def note_copy(self, memo: dict[int, Any]) -> None:
        """Remember the copy that is being made of the module, or of a copy, to take the hooks off it too."""
        originals = [self.module_id, *(id(copy()) for copy in self._copies)]
        self._copies += [weakref.ref(memo[original]) for original in originals if original in memo]

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
        listening = bool(self._on_inputs) and any(listener.session.enabled for listener in self._on_inputs)
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
                    f"This {type(module).__name__} writes into the {type(container).__name__} that it is given while "
                    "an entry of it is patched, which is done in a copy: its caller would miss the rest. Patch the "
                    "module that computes the entry, or a module inside this one."
                )
        if self._hooks == 1:
            self._end(failed=failed)
        else:
            self._calls = [(session, session.call) for session in self._counting]
            self._just_patched = [] if changed is output else self._patched_in(changed)
        return None if changed is output else changed

    def _leave_last(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if id(module) != self.module_id:
            return None
        failed, patched, self._just_patched = self._has_failed(), self._just_patched, []
        if patched and not failed:
            self._refuse_replaced(module, patched, output)
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

    def _patched_in(self, output: Any) -> list[tuple[Place, Tensor, int | None]]:
        """Return the tensors in an output that are patched, with their places and versions."""
        places = [each.place for each in self._on_output if each.stage == "patch" and each.session.enabled]
        return [
            (place, tensor, _version(tensor)) for place in places if (tensor := get(output, place.path)) is not None
        ]

    def _refuse_replaced(self, module: nn.Module, patched: list[tuple[Place, Tensor, int | None]], output: Any) -> None:
        """Raise if a hook of the user's replaced a tensor that was just patched, or wrote into it."""
        for place, tensor, version in patched:
            with suppress(LookupError, AttributeError, TypeError):
                if get(output, place.path) is tensor and _version(tensor) == version:
                    continue
            others = [hook for hook in module._forward_hooks.values() if not is_ours(hook)]
            names = ", ".join(str(getattr(hook, "__qualname__", hook)) for hook in others)
            raise UnsupportedModelError(
                f"A forward hook of '{place.name}' replaced the tensor that was just patched there, or wrote into it. "
                f"Remove that hook while the patch is in place, or patch the input of the next module: {names}."
            )

    def _refuse_copy(self, module: nn.Module) -> None:
        if self.is_open:
            raise ConcurrencyError(
                f"This {type(module).__name__} is a copy (deepcopy or a DataParallel replica) of a module that is "
                "being patched or recorded, and was made meanwhile. Use the module that was patched, on one device."
            )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # torch counts no writes in inference mode


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
        drop(module, functools.partial(_is_of_another, Station.of(module)))


def _is_of_another(station: Station | None, hook: object) -> bool:
    return isinstance(hook, _Hook) and hook.station is not station


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


is_compiling = torch.compiler.is_dynamo_compiling  # looked up once: asked at every hook


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function; a model that is being compiled calls it as it is, instead of tracing into it."""
    if is_compiling():
        return torch._dynamo.disable(function)  # type: ignore[no-any-return, no-untyped-call]
    return function


def refuse_checkpoint(name: str) -> None:
    """Raise inside `torch.utils.checkpoint`: its backward pass runs modules again, outside of their root call."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    inside = torch._C._current_graph_task_id() != -1 or (hooks and hooks[0].__module__ == "torch.utils.checkpoint")
    frame = None if torch.is_grad_enabled() else sys._getframe()  # its re-entrant form switches gradients off
    while frame is not None and not inside:
        inside = frame.f_code.co_name == "forward" and frame.f_globals.get("__name__") == "torch.utils.checkpoint"
        frame = frame.f_back
    if inside:
        raise UnsupportedModelError(
            f"'{name}' is patched inside torch.utils.checkpoint, whose backward pass runs the module again outside of "
            "the patched call, so gradients could be wrong. Switch checkpointing off while the model is patched, or "
            "run it under torch.no_grad()."
        )


def read_only(name: str) -> str:
    """Return why a tensor inside a distribution is not patched."""
    return (
        f"The tensor at '{name}' is inside a distribution, so it can be recorded but not patched. Patch the module "
        "that computes it, or name it in the forward: tap('name', tensor)."
    )
