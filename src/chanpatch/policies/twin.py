"""Patches that travel with a policy: a twin that shares its weights and has the patches inside.

twin = PatchedPolicy(policy, zero_ablate(points.site("embedder.relu3", channel=55)))
twin(observations)             # patched; policy(observations) is not
"""

from __future__ import annotations

import copy
import functools
import types
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributions import Distribution

from ..engine.hooks import eager, is_compiling, observed, refuse_unhookable
from ..engine.sessions import RootCall
from ..errors import DistributionError, UnsupportedModelError
from ..metrics.outputs import described, distribution_in
from ..patching.contexts import Patching
from ..patching.ledger import Ledger
from ..patching.patch import Patch, checked_patches
from ..registry.points import HookPoints, model_of, resolve
from .copies import STATE, copied, quoted


class PatchedPolicy(ABC):  # noqa: B024  # abstract so that every twin class can be registered as one of its kind
    """A twin of a policy: it shares the weights and has the patches inside.

    The twin is a copy of the module tree that holds the very parameters and buffers of the original. Every method
    and every submodule of the twin is patched, the original never is. `isinstance(twin, type(policy))` holds, and
    `state_dict` keys are equal. A root call is the outermost call of a method of the twin, or of one of its
    submodules from outside; a patch that should have run in it and did not is an error. Flags such as `training`
    are the twin's own.

    Args:
        policy: The policy, any module; or its HookPoints, then every site is checked against the trace.
        patches: One or more, applied in the order given. A twin of a twin has the patches of both.
        allow_unreached: Names of hook points whose patches need not run in every root call.
        check_nan: Raise when a patch brings NaN into a region that had none.

    Raises:
        HookPointError, SiteError: If a site does not exist; all faults at once.
        UnsupportedModelError: If the policy cannot be copied, or ignores hooks; in a call, if a parameter, a
            buffer or a submodule was replaced on one side since.
        UnreachedError, NaNError: In a call, at its end.

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
        """Return the twin, an instance of a subclass of the policy's own class."""
        allowed = {allow_unreached} if isinstance(allow_unreached, str) else set(allow_unreached)
        each = tuple(patches) if isinstance(patches, Iterable) else (patches,)
        given = original = model_of(policy)
        inner = vars(original).get(STATE)
        if inner is not None:
            original, each, allowed = inner.original, (*inner.patches, *each), allowed | inner.allowed
        refuse_unhookable(original)
        twin = _copied(given)
        if isinstance(policy, HookPoints):
            each = checked_patches(policy, each)
        state = _TwinState(twin, original, each, allowed, check_nan=check_nan)
        if isinstance(policy, HookPoints):
            state.method, state.calls = policy.method, policy.calls
        kind: Any = type(original)  # not the copy's own: a torch.fx.GraphModule makes a class for every instance
        twin.__class__ = _twin_class(kind, frozenset(name for name in _OFFERED if hasattr(original, name)))
        vars(twin)[STATE] = state
        return twin

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches inside, in the order of application."""
        return _state(self).patches

    @property
    def ledger(self) -> Ledger:
        """What each patch has done so far, by method."""
        return _state(self).ledger

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Run the twin without its patches while the context is open."""
        session = _state(self)
        before, session.enabled = session.enabled, False
        try:
            yield
        finally:
            session.enabled = before

    def distribution(self, observations: Any) -> Distribution:
        """Return the distribution over actions, patched; see `action_distribution`."""
        return action_distribution(self, observations)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the policy without hooks, and the patches to put into it again."""
        state = _state(self)
        build = functools.partial(PatchedPolicy, allow_unreached=tuple(state.allowed), check_nan=state.check_nan)
        return build, (_copied(self), state.patches)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy as above, also where the policy's class copies itself in a way of its own."""
        build, parts = self.__reduce_ex__(4)
        memo[id(self)] = twin = build(*copy.deepcopy(parts, memo))
        return twin


_OFFERED = ("patches", "ledger", "disable", "distribution")


def action_distribution(policy: Callable[..., Any], observations: Any) -> Distribution:
    """Return a policy's distribution over actions.

    Understood are distributions, logits, `(distribution or logits, ...)`, dicts and objects that have `logits` or
    a distribution, and policies with a `get_distribution` method (Stable-Baselines3).

    Args:
        policy: A module or function of the observations.
        observations: What it takes.

    Returns:
        A `torch.distributions` object, over the batch of observations.

    Raises:
        DistributionError: If nothing of this kind came back.
    """
    own = getattr(policy, "get_distribution", None)
    try:
        output = own(observations) if callable(own) else policy(observations)
    except NotImplementedError as error:
        if 'missing the required "forward"' not in str(error):
            raise
        raise DistributionError(
            f"{type(policy).__name__} has no forward. Give rollout() or action_distribution() the function that "
            "gives its logits or distribution, such as lambda observations: agent.actor(observations); give "
            "rollout_sweep() a module whose forward does that."
        ) from error
    found = distribution_in(output)
    if found is None:
        raise DistributionError(
            f"{type(policy).__name__} returned {described(output)}, which holds no action distribution: expected a "
            "torch.distributions object, logits (batch, action), a tuple that begins with one of them, or a dict "
            "with 'logits'. Pass a function that picks it out."
        )
    return found


def _without_patches(twin: nn.Module) -> nn.Module:
    """Return the policy that a twin would be without patches: of the policy's class, with all that the twin holds."""
    kind = type(_state(twin).original)
    plain: nn.Module = kind.__new__(kind)
    vars(plain).update({name: item for name, item in vars(twin).items() if name != STATE})
    return plain


def _copied(policy: nn.Module) -> nn.Module:
    return copied(policy, _without_patches(policy) if STATE in vars(policy) else policy)


class _TwinState(Patching):
    """The session of a twin, always attached, and the policy that the twin was made from."""

    def __init__(
        self, twin: nn.Module, original: nn.Module, patches: Iterable[Patch], allowed: set[str], *, check_nan: bool
    ) -> None:
        super().__init__(twin, patches, allow_unreached=allowed, check_nan=check_nan)
        self.original, self.allowed = original, allowed
        self._modules = set(twin.modules())
        self._running_methods: set[str] = {"__call__", "forward"}
        self._pairs = [
            (name, module, other, {**module._modules}, {**other._modules})
            for (name, module), other in zip(twin.named_modules(), original.modules(), strict=True)
        ]
        self._held, self._expected = zip(*(held for pair in self._pairs for held in _to_be_equal(*pair)), strict=True)
        self._numbers = [number for _, module, other, *_ in self._pairs for number in _of_one_element(module, other)]
        self._buffers = [(pair[0], pair[1]._buffers, pair[2]._buffers) for pair in self._pairs if pair[2]._buffers]
        self._inside = _patches_by_module(twin, self.patches)
        self.attach(scopes=[module for module in self._inside if module is not twin])

    def call_method(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a method of the twin as a root call, unless it is part of one."""
        if name in self._running_methods or self.in_method or not self.enabled:
            return self.run(name, method, args, kwargs)
        with observed(self._modules, on_inputs=lambda *_: self._running_methods.add(name)):
            return self.run(name, method, args, kwargs)

    def on_error(self, error: Exception) -> None:
        """Raise NaNError if a distribution refused NaN that a patch introduced."""
        self.raise_nan(error)

    def on_begin(self) -> None:
        """Refuse a call if a weight was replaced on one side."""
        self.forget()
        try:
            shared = self._held == self._expected
        except RuntimeError:  # two tensors are neither equal nor unequal; one and the same is not even compared
            shared = False
        if not shared or (self._numbers and self._is_number_replaced()):
            self._refuse_replaced()

    def _is_number_replaced(self) -> bool:
        return any(held.get(name) is not others.get(name) for name, held, others in self._numbers)

    def _refuse_replaced(self) -> None:
        for name, module, other, children, other_children in self._pairs:
            if module._modules != children or other._modules != other_children:
                raise UnsupportedModelError(_replaced(f"A submodule of '{name}'" if name else "A submodule"))
            for held, originally in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
                for key in held.keys() | originally.keys():
                    if key not in held or held[key] is not originally.get(key, held):
                        raise UnsupportedModelError(_replaced(quoted(name, key), tensor=True))

    def _refuse_replaced_in(self, method: str) -> None:
        names = []
        for name, held, shared in self._buffers:
            for key in [key for key in shared if held.get(key) is not shared[key]]:
                names.append(quoted(name, key))
                held[key] = shared[key]  # so that the next call is told the same, and not that a new twin would help
        if names:
            raise UnsupportedModelError(
                f"{method}() of the policy itself replaced the buffer {names[0]}, which the policy and its twin share. "
                "Write into it with copy_(), or make it a plain attribute."
            )

    def on_end(self, call: RootCall) -> None:
        """Check that every patch ran that should have run in this call."""
        self.raise_nan()
        if self._buffers:
            self._refuse_replaced_in(call.method)
        names: list[str] = []
        if call.station is not None:
            inside = [numbers for module, numbers in self._inside.items() if id(module) == call.station.module_id]
            names = self.unreached(set().union(*inside))
        elif call.method in self._running_methods:
            names = self.unreached()
        if names:
            advice = f" If it need not run there: allow_unreached={names!r}."
            compiled = call.method == "__call__"  # a method is only checked once its modules were seen to run
            self.raise_unreached(names, f"in {call.method}()", compiled=compiled, advice=advice)


def _to_be_equal(_: str, module: nn.Module, other: nn.Module, *children: Any) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of dicts that are equal as long as nothing was replaced in a module or in the twin's."""
    yield from zip((module._modules, other._modules), children, strict=True)
    yield from ((module._parameters, other._parameters), (module._buffers, other._buffers))


def _of_one_element(module: nn.Module, other: nn.Module) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the names of tensors of one element, with the dicts that hold them: two such may be equal but not one."""
    for held, others in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
        for name, tensor in held.items():
            if tensor is not None and not nn.parameter.is_lazy(tensor) and tensor.numel() == 1:
                yield name, held, others


def _replaced(what: str, *, tensor: bool = False) -> str:
    for_a_call = " If torch.func.functional_call replaced it for a call, give that the policy, inside patched()."
    return (
        f"{what} of the policy, or of its twin, was replaced since the twin was made, so the two no longer share all "
        f"weights. Make the twin anew: PatchedPolicy(policy, patches).{for_a_call if tensor else ''}"
    )


def _patches_by_module(twin: nn.Module, patches: Sequence[Patch]) -> dict[nn.Module, set[int]]:
    """Return, for every module that has patched sites inside, the numbers of those patches."""
    named = list(twin.named_modules(remove_duplicate=False))
    by_name = dict(named)
    inside: dict[nn.Module, set[int]] = {}
    for number, patch in enumerate(patches):
        point = resolve(by_name, patch.site)
        for name in [name for name, module in named if module is by_name.get(point.module)]:
            parts = name.split(".") if name else []
            for depth in range(len(parts) + 1):
                inside.setdefault(by_name[".".join(parts[:depth])], set()).add(number)
    return inside


def _state(twin: Any) -> _TwinState:
    state: _TwinState = vars(twin)[STATE]
    return state


@functools.cache
def _twin_class(kind: Any, taken: frozenset[str]) -> type:
    """Return the subclass of a policy's class in which every method begins a root call.

    Names that the policy has itself stay its own: its `distribution` is not replaced by ours.
    """
    members: dict[str, Any] = {name: vars(PatchedPolicy)[name] for name in _OFFERED if name not in taken}
    for owner in reversed(kind.__mro__[:-1]):  # but object
        for name, member in vars(owner).items():
            written_by_user = owner is not nn.Module and not (name.startswith("__") and name != "__call__")
            if name == "__call__" or (written_by_user and isinstance(member, types.FunctionType)):
                members[name] = _rooted(name, member)
            elif name in members and name not in _OFFERED:
                del members[name]  # overridden by something that is no method
    members |= {name: vars(PatchedPolicy)[name] for name in ("__reduce_ex__", "__deepcopy__")}
    members["__module__"] = kind.__module__
    twin_class = type(f"Patched{kind.__name__}", (kind,), members)
    PatchedPolicy.register(twin_class)
    return twin_class


def _rooted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        if state is None:
            return function(self, *args, **kwargs)
        call = eager(state.call_method) if is_compiling() else state.call_method
        return call(name, types.MethodType(function, self), args, kwargs)

    return method
