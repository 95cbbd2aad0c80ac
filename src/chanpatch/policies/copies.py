"""Copies of policies that share the weights, what stands in the way of one, and what functions hold."""

from __future__ import annotations

import copy
import dis
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..engine.hooks import drop_hooks
from ..errors import UnsupportedModelError

STATE = "_chanpatch"  # the attribute in which a twin keeps its patches


_CONTAINERS = (list, tuple, set, deque, dict)


def copied(policy: nn.Module, plain: nn.Module) -> nn.Module:
    """Return a copy of a module tree, without hooks of ours, that holds the very parameters and buffers.

    Args:
        policy: What is copied.
        plain: The same without patches; the policy itself where it has none.

    Raises:
        UnsupportedModelError: If it cannot be copied, or keeps functions by which a copy would reach it.
    """
    _refuse_held_functions(policy)
    try:
        twin = copy.deepcopy(plain, _memo(policy))
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


def quoted(*names: str) -> str:
    """Return names joined by dots, in quotation marks."""
    return f"'{'.'.join(filter(None, names))}'"


def held_modules(policy: Any) -> list[nn.Module]:
    """Return the modules that a policy is or holds: in a closure, a default, an attribute, or by the name of a global.

    Args:
        policy: A module, or a function or object that calls some.
    """
    if isinstance(policy, nn.Module):
        return [policy]
    held = [*_reachable([policy, *getattr(policy, "__dict__", {}).values()], _held_by)]
    called = [item for function in held if isinstance(function, types.FunctionType) for item in _globals_of(function)]
    return [item for item in (*held, *called) if isinstance(item, nn.Module)]


def _memo(policy: nn.Module) -> dict[int, Any]:
    """Return what a copy holds in place of tensors: the very weights; results of forwards have a graph, so clones."""
    tensors = [item for item in _reachable([policy], _kept_by) if isinstance(item, Tensor)]
    clones = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    weights = [*policy.parameters(), *policy.buffers(), *(item for item in tensors if isinstance(item, nn.Parameter))]
    return clones | {id(tensor): tensor for tensor in weights}


def _refuse_held_functions(policy: nn.Module) -> None:
    """Raise for a function or hook kept on a policy that holds it: from a twin it would run the original's modules."""
    modules = set(policy.modules())
    own = {id(item) for module in modules for item in vars(module).values() if isinstance(item, _CONTAINERS)}

    def parts(item: Any) -> Iterable[Any]:
        if hasattr(type(item), "__deepcopy__"):  # it knows what its copies hold, as hooks of ours do
            return [item.__wrapped__] if hasattr(item, "__wrapped__") else ()  # but a cache keeps its function
        return () if isinstance(item, nn.Module) and item in modules else _kept_by(item)

    for name, module in policy.named_modules():
        for attribute, item in vars(module).items():
            if attribute == STATE or "state_dict" in attribute:  # hooks of state dicts run in no call
                continue
            hook = attribute.startswith(("_forward", "_backward")) and attribute.endswith("hooks")
            for function in _reachable([item], parts):
                compiled = function is item and hasattr(item, "_torchdynamo_orig_callable")
                if compiled or (isinstance(function, types.FunctionType) and _holds(function, modules, own, hook)):
                    where = quoted(name, attribute) if not hook else f"A hook of '{name}'" if name else "A hook"
                    verb = "is" if hook or function is item else "has"
                    what = "compiled function" if compiled else "function"
                    raise UnsupportedModelError(
                        f"{where} of {type(policy).__name__} {verb} a {what} that holds the policy itself, or what it "
                        "fills, so from a twin it would reach the unpatched original. Make it a method, or use "
                        "patched()."
                    )


def _holds(function: types.FunctionType, modules: set[nn.Module], own: set[int], hook: bool) -> bool:
    held = [*_reachable([function], _held_by), *_globals_of(function)]
    return any((hook and id(item) in own) or (isinstance(item, nn.Module) and item in modules) for item in held)


def _globals_of(function: types.FunctionType) -> Iterable[Any]:
    names = {each.argval for each in dis.get_instructions(function) if each.opname == "LOAD_GLOBAL"}
    return map(function.__globals__.get, names)


def _reachable(roots: Iterable[Any], parts: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    seen, waiting = set[int](), [*roots]
    while waiting:
        if id(item := waiting.pop()) not in seen:
            seen.add(id(item))
            yield item
            waiting += parts(item)


def _kept_by(item: Any) -> Iterable[Any]:
    plain = isinstance(item, (type, types.ModuleType, types.FunctionType))
    return () if plain else _inside(item) or getattr(item, "__dict__", {}).values()


def _held_by(item: Any) -> Iterable[Any]:
    if not isinstance(item, types.FunctionType):
        return _inside(item)
    cells = map(_content, item.__closure__ or ())
    return [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values(), *vars(item).values()]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable was deleted, or has no value yet
        return None


def _inside(item: Any) -> Iterable[Any]:
    if isinstance(item, functools.partial):
        return item.func, item.args, item.keywords
    if isinstance(item, types.MethodType):
        return item.__func__, item.__self__
    if isinstance(item, Mapping):
        # One that computes its values, as those of offloaded weights do from a disk, is asked for what it is made of.
        computes = type(item).values is Mapping.values
        return vars(item).values() if computes and hasattr(item, "__dict__") else item.values()
    return item if isinstance(item, _CONTAINERS) else ()
