"""Copies of policies that share the weights, and the modules that functions refer to."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..engine.hooks import drop_hooks, is_ours
from ..errors import UnsupportedModelError

STATE = "_chanpatch"  # the attribute in which a twin keeps its patches


def copied(policy: nn.Module, plain: nn.Module) -> nn.Module:
    """Return a copy of a module tree, without our hooks, that shares the parameters and buffers.

    `plain` is the same tree without patches; the policy itself if it has none.
    """
    kept = [*_reachable([policy], _kept_by)]
    _refuse_functions_that_refer_to(policy, kept)
    try:
        twin = copy.deepcopy(plain, _memo(policy, kept))
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(plain).__name__} cannot be copied, so it can have no twin ({type(error).__name__}: {error}). "
            "Keep what cannot be copied (environments, files, locks) out of the module, or use patched()."
        ) from error
    drop_hooks(twin)
    if any(own is not weight for own, weight in zip(twin.parameters(), policy.parameters(), strict=True)):
        raise UnsupportedModelError(
            f"A module in {type(plain).__name__} copies its parameters by itself (TorchRL's TensorDictParams does), so "
            "a twin would not share the weights. Use patched()."
        )
    return twin


def held_modules(policy: Any) -> list[nn.Module]:
    """Return the modules that a policy is or refers to: in closures, defaults, attributes, or by names of globals."""
    if isinstance(policy, nn.Module):
        return [policy]
    held = _referred_to([policy, *getattr(policy, "__dict__", {}).values()])
    return [item for item in held if isinstance(item, nn.Module)]


def _memo(policy: nn.Module, kept: list[Any]) -> dict[int, Any]:
    """Return the copies of tensors by id: weights are shared, results of forwards (with a graph) are cloned."""
    tensors = [item for item in kept if isinstance(item, Tensor)]
    clones = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    weights = [*policy.parameters(), *policy.buffers(), *(item for item in tensors if isinstance(item, nn.Parameter))]
    return clones | {id(tensor): tensor for tensor in weights}


def _refuse_functions_that_refer_to(policy: nn.Module, kept: list[Any]) -> None:
    """Raise if a function or hook that a policy keeps refers to the policy.

    The copy's function would run the modules of the original, or fill a container that only the original reads.
    UnreachedError detects it only if no other call reaches the patch.
    """
    own = {id(item) for item in kept if isinstance(item, (nn.Module, list, set, deque, dict))}
    for function in kept:
        if isinstance(function, types.FunctionType) and any(id(item) in own for item in _referred_to([function])):
            raise UnsupportedModelError(
                f"{type(policy).__name__} keeps the function {function.__qualname__} (in an attribute or as a hook), "
                "which refers to the policy itself, or to a container in it. From a twin it would reach the unpatched "
                "original. Make it a method, or use patched()."
            )


def _referred_to(roots: Iterable[Any]) -> list[Any]:
    """Return the objects that functions refer to: in closures and defaults, or by names of globals."""
    held = [*_reachable(roots, _held_by)]
    functions = [item for item in held if isinstance(item, types.FunctionType)]
    return held + [each.__globals__.get(name) for each in functions for name in each.__code__.co_names]


def _reachable(roots: Iterable[Any], parts: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    seen, waiting = set[int](), [*roots]
    while waiting:
        if id(item := waiting.pop()) not in seen:
            seen.add(id(item))
            yield item
            waiting += parts(item)


def _kept_by(item: Any) -> Iterable[Any]:
    if isinstance(item, (type, types.ModuleType, types.FunctionType)) or is_ours(item):
        return ()
    own = getattr(item, "__dict__", {})
    run = [part for name, part in own.items() if name != STATE and "state_dict" not in name]  # its hooks run in no call
    return _inside(item) or run


def _held_by(item: Any) -> Iterable[Any]:
    if not isinstance(item, types.FunctionType):
        return _inside(item)
    held = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values(), *vars(item).values()]
    for cell in item.__closure__ or ():
        with suppress(ValueError):  # the variable was deleted, or has no value yet
            held.append(cell.cell_contents)
    return held


def _inside(item: Any) -> Iterable[Any]:
    if isinstance(item, functools.partial):
        return item.func, item.args, item.keywords
    if isinstance(item, types.MethodType):
        return item.__func__, item.__self__
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, (list, tuple, set, deque)) else ()
