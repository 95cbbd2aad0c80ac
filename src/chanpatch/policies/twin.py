"""Create patched twins, which share the weights of the original policy."""

from __future__ import annotations

import copy
import functools
import types
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx import _symbolic_trace

from ..engine.calls import DisabledSessions, Observed, left_twice
from ..engine.hooks import eager, is_compiling
from ..engine.moments import RootCall
from ..engine.tree import Tree
from ..errors import UnsupportedModelError
from ..patching.contexts import Exit, Held, Patching, check_reached, checked_patches, raise_nan
from ..patching.firing import Ledger
from ..patching.patch import Patch
from ..registry.points import HookPoints, model_of, resolve
from .copies import STATE, copied, functions_of, refuse_writing_modes
from .decisions import Outputs, action_distribution
from .settings import Settings


class PatchedPolicy(ABC):  # noqa: B024  # an ABC, so that twin classes can be registered as subclasses
    """A twin of a policy that always runs with the given patches.

    The twin is a copy of the policy's module tree. The copy shares the original's parameters and buffers, but has its
    own flags, such as `training`. The patches apply in all methods and submodules of the twin, and never in the
    original. `isinstance(twin, type(policy))` is True, and the twin's `state_dict` has the same keys as the policy's.
    If an edit or a `where` is a module, `twin.parameters()` includes that module's parameters. If your code calls a
    method or a submodule of the twin, and a patch inside the called module does not run, the call raises an error.

    Args:
        policy: Any module, or the module's HookPoints. With HookPoints, every site is checked against the trace. If the
            policy is itself a twin, the new twin applies that twin's patches before the new patches.
        patches: One or more patches, applied in the given order.
        allow_unreached: Names of hook points whose patches do not have to run in every call.
        check_nan: Whether to raise an error if a patch introduces NaN.

    Raises:
        HookPointError, SiteError: If sites do not exist. One error lists all missing sites.
        UnsupportedModelError: If the policy cannot be copied, ignores hooks, or changes its weights in `train()` or
            `eval()`. A call to the twin also raises this error if the policy and the twin no longer have the same
            parameters, buffers, submodules and settings (attributes that are flags, numbers or strings).
        UnreachedError, NaNError: At the end of a call, if a patch did not run or introduced NaN.

    Example:
        >>> import torch
        >>> from chanpatch import Site, zero_ablate
        >>> policy = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> twin = PatchedPolicy(policy, zero_ablate(Site("0", feature=3)))
        >>> twin(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """

    def __new__(
        cls,
        policy: nn.Module | HookPoints,
        patches: Patch | Iterable[Patch],
        *,
        allow_unreached: Iterable[str] = (),
        check_nan: bool = True,
    ) -> Any:
        """Create a twin, whose class is a subclass of the policy's class."""
        allowed = {allow_unreached} if isinstance(allow_unreached, str) else set(allow_unreached)
        each = tuple(patches) if isinstance(patches, Iterable) else (patches,)
        given = original = model_of(policy)
        inner = vars(original).get(STATE)
        if inner is not None:
            original, each, allowed = inner.original, (*inner.patches, *each), allowed | inner.allow_unreached
        Tree(original).refuse_unhookable()
        each = checked_patches(policy, each)
        twin = _copied(given)
        refuse_writing_modes(original)
        state = _TwinState(twin, original, each, allowed, check_nan=check_nan)
        if isinstance(policy, HookPoints):
            state.method, state.calls, state.points_or_model = policy.method, policy.calls, copy.copy(policy)
            state.points_or_model.model = twin
        kind: Any = type(original)  # not the copy's: torch.fx.GraphModule creates a class for every instance
        twin.__class__ = _twin_class(kind, frozenset(name for name in _OFFERED if hasattr(original, name)))
        vars(twin)[STATE] = state
        return twin

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The twin's patches, in the order in which they are applied."""
        return _state(self).patches

    @property
    def ledger(self) -> Ledger:
        """Ledger that counts firings, written rows and written elements so far, for each patch and called method."""
        ledger: Ledger = _state(self).result
        return ledger

    def disable(self) -> Disabled:
        """Return a context manager. While the context is open, the twin runs without its patches."""
        return Disabled(_state(self))

    def distribution(self, observations: Any, *, outputs: Outputs | None = None) -> Distribution:
        """Return the twin's distribution over actions for a batch of observations; see `action_distribution`."""
        return action_distribution(self, observations, outputs=outputs)  # type: ignore[arg-type]

    def named_parameters(self, prefix: str = "", recurse: bool = True, **options: Any) -> Iterator[tuple[str, Any]]:
        """Yield pairs (name, parameter): first for the policy, then for modules used as edits or `where` in patches.

        For parameters of such modules, the name begins with `patches.`, as in `patches.0.weight`.
        """
        state = _state(self)
        yield from type(state.original).named_parameters(self, prefix, recurse, **options)  # type: ignore[arg-type]
        if recurse:
            edits = nn.ModuleList(each for each in functions_of(state.patches) if isinstance(each, nn.Module))
            yield from edits.named_parameters(f"{prefix and f'{prefix}.'}patches")

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = _state(self)
        build = functools.partial(PatchedPolicy, allow_unreached=state.allow_unreached, check_nan=state.check_nan)
        return build, (_copied(self), state.patches)  # type: ignore[arg-type]

    def __copy__(self) -> Any:  # the policy's class may define its own `__copy__` and `__deepcopy__`
        build, parts = self.__reduce_ex__(4)
        return build(*parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        build, parts = self.__reduce_ex__(4)
        memo[id(self)] = twin = build(*copy.deepcopy(parts, memo))
        return twin


class Disabled(Held):
    """Context in which a twin runs without its patches. Several open contexts of a twin may close in any order."""

    def __init__(self, state: _TwinState) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._state.settings.check()
        self.hold(self._state, DisabledSessions([self._state]))

    @Exit
    def __exit__(self, *error: object) -> None:
        _, context = self.last()
        context.__exit__(None, None, None)
        self.forget(context)


_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # torch 2.7 and later


def _is_fx_tracing() -> bool:
    """Return whether torch.fx is tracing, without the warning from torch's own function with this name."""
    of_thread = getattr(_symbolic_trace, "_get_is_fx_tracing", None)  # torch 2.14 and later
    return of_thread() if of_thread else _symbolic_trace._is_fx_tracing_flag


_OFFERED = ("patches", "ledger", "disable", "distribution")


def _copied(policy: nn.Module) -> nn.Module:
    """Copy a policy. The copy shares the policy's weights. If the policy is a twin, the copy has no patches."""
    if STATE not in vars(policy):
        return copied(policy, policy)
    kind = type(_state(policy).original)
    plain: nn.Module = kind.__new__(kind)
    vars(plain).update({name: item for name, item in vars(policy).items() if name != STATE})
    return copied(policy, plain)


class _TwinState(Patching):
    """The session that applies a twin's patches. It stays attached to the twin and refers to the original policy."""

    confined = False

    def __init__(
        self, twin: nn.Module, original: nn.Module, patches: Iterable[Patch], allowed: Iterable[str], *, check_nan: bool
    ) -> None:
        super().__init__(twin, patches, allow_unreached=allowed, check_nan=check_nan)
        self.original = original
        self._modules = set(twin.modules())
        self._running_methods: set[str] = {"__call__", "forward"}
        self._pairs = [
            (name, held, expected)
            for (name, module), other in zip(twin.named_modules(), original.modules(), strict=True)
            for held, expected in (
                (module._modules, {**module._modules}),
                (other._modules, {**other._modules}),
                (module._parameters, other._parameters),
                (module._buffers, other._buffers),
            )
        ]
        self.settings = Settings(twin, original)
        _, self._held, self._expected = zip(*self._pairs, strict=True)
        self._numbers = [
            (held, expected, key)
            for _, held, expected in self._pairs
            for key, item in held.items()
            if isinstance(item, Tensor) and not nn.parameter.is_lazy(item) and item.numel() == 1
        ]
        inside = _patches_inside(twin, self.patches)
        self._inside = {id(module): numbers for module, numbers in inside.items()}
        self.attach(scopes=[module for module in inside if module is not twin])

    def call_method(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a method of the twin as a root call, unless another root call is running.

        If the method runs modules, remember the method's name, so that `on_end` checks whether all patches have run.
        """
        if name in self._running_methods or self.in_method or not self.enabled:
            return self.run(name, method, args, kwargs)
        with left_twice(Observed(self._modules, on_inputs=lambda *_: self._running_methods.add(name))):
            return self.run(name, method, args, kwargs)

    def on_error(self, error: Exception) -> None:
        """If a patch introduced NaN before the given error occurred, raise NaNError from that error."""
        raise_nan(self.firings, error)

    def on_begin(self, call: RootCall) -> None:
        """Raise an error if the twin and the policy no longer have the same weights, submodules and settings."""
        self.forget()
        if _is_fx_tracing() or _is_exporting():
            raise UnsupportedModelError(
                "torch.export and torch.fx would drop or freeze the patches of a PatchedPolicy. Instead, export the "
                "policy inside patched(policy, patches): torch.export then keeps the patches."
            )
        # Comparing dicts is much faster than looping over items. The comparison checks identity first, and only
        # one-element tensors can be equal without being identical.
        try:
            shared = self._held == self._expected
        except RuntimeError:  # two larger tensors are compared, so they are not identical
            shared = False
        for held, expected, key in self._numbers:
            shared &= held.get(key) is expected.get(key)
        if not shared:
            raise UnsupportedModelError(
                f"'{self._replaced()}' was replaced in the policy or its PatchedPolicy, so the two no longer share all "
                "weights. Create a new PatchedPolicy(policy, patches) or, for torch.func.functional_call, use the "
                "policy inside patched(). If the policy's own code replaces the tensor, change that code to update the "
                "tensor with copy_(), or to store the tensor in a plain attribute."
            )
        self.settings.begin(_kind(call))

    def _replaced(self) -> str:
        """Return the name of the first parameter, buffer or submodule that was replaced in the policy or the twin."""
        return next(
            f"{name}.{key}" if name else key
            for name, held, expected in self._pairs
            for key in held.keys() | expected.keys()
            if held.get(key, held) is not expected.get(key, held)
        )

    def on_end(self, call: RootCall) -> None:
        """Raise an error if a patch introduced NaN, or if a patch that the call should reach did not run."""
        if self.check_nan:
            raise_nan(self.firings)
        runs_modules = call.station is not None or call.method in self._running_methods
        self.settings.end(_kind(call), runs_modules=runs_modules)
        if all(firing.reached for firing in self.firings):
            return
        inside = None if call.station is None else self._inside.get(call.station.module_id, ())
        if runs_modules and (names := self.unreached(inside)):
            advice = f" If a patch does not have to run in every call, pass allow_unreached={names!r} to PatchedPolicy."
            compiled = call.method == "__call__"  # methods are checked only if they are known to run modules
            check_reached(
                f"The patch{{es}} at {{}} never ran in {call.method}()", names, compiled=compiled, advice=advice
            )


def _kind(call: RootCall) -> object:
    return call.method if call.station is None else call.station.module_id


def _patches_inside(twin: nn.Module, patches: Sequence[Patch]) -> dict[nn.Module, set[int]]:
    """Map each module of the twin that is patched, or contains patched modules, to the indices of its patches."""
    modules = dict(twin.named_modules(remove_duplicate=False))
    patched = [modules.get(resolve(modules, patch.site).module) for patch in patches]
    inside: dict[nn.Module, set[int]] = {}
    for module in twin.modules():
        within = set(module.modules())
        numbers = {number for number, other in enumerate(patched) if other in within}
        if numbers:
            inside[module] = numbers
    return inside


def _state(twin: Any) -> _TwinState:
    state: _TwinState = vars(twin)[STATE]
    return state


_classes: WeakValueDictionary[tuple[Any, frozenset[str]], type] = WeakValueDictionary()  # dropped after the last twin


def _twin_class(kind: Any, taken: frozenset[str]) -> type:
    """Return a subclass of a policy's class in which every method starts a root call.

    PatchedPolicy's own members, such as `ledger`, are added unless their names are in `taken`.
    """
    if (known := _classes.get((kind, taken))) is not None:
        return known
    members: dict[str, Any] = {name: vars(PatchedPolicy)[name] for name in _OFFERED if name not in taken}
    for owner in reversed(kind.__mro__[:-1]):  # except object
        for name, member in vars(owner).items():
            written_by_user = owner is not nn.Module and not (name.startswith("__") and name != "__call__")
            if name == "__call__" or (written_by_user and isinstance(member, types.FunctionType)):
                members[name] = _rooted(name, member)
            elif name in members and name not in _OFFERED:
                del members[name]  # overridden by something other than a method
    replaced = ("named_parameters", "__reduce_ex__", "__copy__", "__deepcopy__")
    members |= {name: vars(PatchedPolicy)[name] for name in replaced}
    # A method that calls type(self)(...) creates an unpatched policy, which must not look like a twin.
    members |= {"__module__": kind.__module__, "__new__": lambda _, *args, **kwargs: kind(*args, **kwargs)}
    twin_class = type(f"Patched{kind.__name__}", (kind,), members)
    PatchedPolicy.register(twin_class)
    _classes[kind, taken] = twin_class
    return twin_class


def _rooted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    is_forward = name == "forward"

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        if state is None or (is_forward and state.in_call):
            return function(self, *args, **kwargs)
        call = eager(state.call_method) if is_compiling() else state.call_method
        return call(name, types.MethodType(function, self), args, kwargs)

    return method
