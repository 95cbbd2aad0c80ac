"""Copy policies without copying their weights, and find the objects that a policy, function or environment uses."""

from __future__ import annotations

import copy
import dis
import functools
import itertools
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..engine.calls import Observed
from ..engine.hooks import drop, drop_hooks, is_ours, keys_of
from ..engine.state import GENERATORS, GlobalVariable
from ..errors import UnsupportedModelError
from ..patching.patch import Patch

STATE = "_chanpatch"  # the attribute of a twin that stores its patches


def copied(policy: nn.Module, plain: nn.Module) -> nn.Module:
    """Copy the module tree `plain` without chanpatch's hooks. The copy shares its parameters and buffers with `plain`.

    For a policy that is not a twin, `plain` is the policy itself. For a twin, `plain` is a module with the same
    submodules and weights as the twin, but without patches.
    """
    stored = [*_reachable([policy], _stored_in)]
    _refuse_references_to(policy, stored)
    try:
        twin = copy.deepcopy(plain, _memo(policy, stored))
    except Exception as error:
        raise UnsupportedModelError(
            f"PatchedPolicy cannot copy {type(plain).__name__} ({type(error).__name__}: {error}). Remove objects that "
            "cannot be copied (environments, files, locks) from the module, or use patched() instead."
        ) from error
    drop_hooks(twin)
    for module in twin.modules():
        drop(module, keys_of(module, _is_observer))
    if any(own is not weight for own, weight in zip(twin.parameters(), plain.parameters(), strict=True)):
        raise UnsupportedModelError(
            f"A module in {type(plain).__name__} copies its own parameters (as TorchRL's TensorDictParams does), so a "
            "PatchedPolicy would not share the policy's weights. Use patched() instead."
        )
    return twin


def refuse_writing_modes(policy: nn.Module) -> None:
    """Raise an error if a module overrides `train` or `eval` with code that changes parameters, as adapters may do.

    The two methods are tried on a copy that has its own parameters, so an override that only sets flags is accepted.
    """
    for name, module in policy.named_modules():
        modes = {each: getattr(type(module), each) for each in ("train", "eval")}
        own = [each for each, mode in modes.items() if not str(getattr(mode, "__module__", "")).startswith("torch.")]
        if own and next(module.parameters(), None) is not None and _writes_weights(module):
            raise UnsupportedModelError(
                f"{repr(name) if name else 'The policy'} ({type(module).__name__}) changes its parameters in "
                f"{' and '.join(f'{each}()' for each in own)}. A PatchedPolicy shares the policy's parameters but has "
                "its own training flags, so one of the two would run with the wrong parameters. Make the change "
                "permanent (for example, merge and remove an adapter) before creating the PatchedPolicy, or use "
                "patched()."
            )


def _writes_weights(module: nn.Module) -> bool:
    """Copy a module, call `eval` and `train` on the copy, and return whether either call changes the copy's parameters.

    Return False if the module cannot be copied, or if one of the two calls fails.
    """
    with suppress(Exception):
        trials = {
            id(weight): nn.Parameter(torch.full_like(weight, _TRIAL), requires_grad=weight.requires_grad)
            for weight in module.parameters()
            if type(weight) is nn.Parameter and not weight.is_meta
        }
        trial = copy.deepcopy(module, _memo(module, _reachable([module], _stored_in)) | trials)
        for mode in (trial.eval, trial.train):
            mode()
            if any((weight != _TRIAL).any() for weight in trials.values()):
                return True
    return False


_TRIAL = 2  # the sum, difference, product and quotient of two parameters with this value differ from the value


def _memo(policy: nn.Module, stored: Iterable[Any]) -> dict[int, Any]:
    """Return a memo for deepcopy, which maps the id of a tensor to the tensor to use in the copy.

    Parameters and buffers map to themselves. Other non-leaf tensors, which deepcopy cannot copy, map to clones.
    """
    tensors = [item for item in stored if isinstance(item, Tensor)]
    clones = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    weights = [*policy.parameters(), *policy.buffers(), *(item for item in tensors if isinstance(item, nn.Parameter))]
    return clones | {id(tensor): tensor for tensor in weights}


def _refuse_references_to(policy: nn.Module, stored: list[Any]) -> None:
    """Raise an error if a function, hook or weak reference stored on a policy refers back to the policy.

    In a copy, such a function would run the original's modules, or fill a container that only the original reads. The
    copy's patches would not apply inside the function. No UnreachedError would be raised for a patch that also runs
    outside the function. `stored` contains all objects stored on the policy.
    """
    own = {id(item) for item in stored if isinstance(item, (nn.Module, list, set, deque, dict))}
    for item in stored:
        is_weak = isinstance(item, weakref.ref) or type(item) in weakref.ProxyTypes
        refers = (isinstance(item, types.FunctionType) and not _is_observer(item)) or is_weak
        if refers and any(id(each) in own for each in _reachable([item], _referenced_by)):
            name = "a weak reference" if is_weak else f"the function {item.__qualname__}"
            raise UnsupportedModelError(
                f"{type(policy).__name__} stores {name} (in an attribute or as a hook), which refers to the policy "
                "itself or to a container in the policy. In a PatchedPolicy, that reference would still point to the "
                "unpatched original. Remove the reference (for example, turn the function into a method of the "
                "policy), or use patched()."
            )


def _is_observer(hook: Any) -> bool:
    """Return whether a function is a hook of `Observed`, which is on a twin if a method of the twin copies the twin."""
    return getattr(hook, "__module__", None) == Observed.__module__


def held_modules(policy: Any) -> nn.ModuleList:
    """Return the modules that a policy uses, including the policy itself if it is a module. Omit their submodules."""
    return nn.ModuleList(item for item in used_by(policy) if isinstance(item, nn.Module))


def patches_inside(policy: Any) -> list[Patch]:
    """Return the patches of all twins that a policy contains or uses."""
    return [firing.patch for firing in firings_inside(policy)]


def firings_inside(policy: Any) -> list[Any]:
    """Return one Firing for each patch of each twin that a policy contains or uses."""
    states = [vars(module)[STATE] for module in held_modules(policy).modules() if STATE in vars(module)]
    return [firing for state in states for firing in state.firings]


def functions_of(patches: Iterable[Patch]) -> list[Any]:
    """Return a flat list with the edit and the `where` argument of each patch."""
    return [function for patch in patches for function in (patch.edit, patch.where)]


def held_state(policy: Any, envs: Any) -> tuple[nn.Module, list[dict[Any, Any]], list[int]]:
    """Return the modules and dicts that a rollout restores, and the ids of objects that a rollout does not restore.

    Each dict except the last contains the attributes of one object. The last dict contains random generators, and the
    nonlocal and global variables that functions assign to. The ids belong to the objects inside the environments.
    """
    held = used_by(policy, *functions_of(patches_inside(policy)))
    modules = nn.ModuleList(item for item in held if isinstance(item, nn.Module))
    written: list[Any] = [item for item in held if isinstance(item, GENERATORS)]
    written += [variable for item in held if isinstance(item, types.FunctionType) for variable in _written_by(item)]
    plain = [item for item in held if _is_plain(item) and vars(item)]
    apart = [id(item) for item in parts_of_environments(envs)] if plain or written else []
    known = {*apart}
    return modules, [*(vars(item) for item in plain if id(item) not in known), dict(enumerate(written))], apart


def used_by(*roots: Any) -> list[Any]:
    """Return the given objects and all objects that may be used when one of the given objects is called."""
    return [*_reachable(roots, _parts_that_act)]


def parts_of_environments(envs: Any) -> Iterator[Any]:
    """Yield the environments and all objects inside them. Yield modules, but not their contents."""
    return _reachable([envs], lambda item: () if isinstance(item, nn.Module) else _stored_in(item))


def _reachable(roots: Iterable[Any], parts: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    seen, waiting = set[int](), [*roots]
    while waiting:
        if id(item := waiting.pop()) not in seen:
            seen.add(id(item))
            yield item
            waiting += parts(item)


def _stored_in(item: Any) -> Iterable[Any]:
    """Return the items and the attribute values of an object, which deepcopy would copy together with the object."""
    # A copied RemovableHandle refers to the copied dict of hooks.
    if isinstance(item, (type, types.ModuleType, types.FunctionType, RemovableHandle)) or is_ours(item):
        return ()
    own = getattr(item, "__dict__", {})
    # Hooks for state_dict never run during a forward pass.
    return [*_items(item), *(part for name, part in own.items() if name != STATE and "state_dict" not in name)]


def _parts_that_act(item: Any) -> Iterable[Any]:
    """Return the objects that `item` may use directly when `item` is called."""
    if isinstance(item, nn.Module):
        owns = [vars(module).items() for module in item.modules()]
        return [part for own in owns for name, part in own if name not in _TORCHS_OWN and name != STATE]
    is_object = _is_plain(item) or type(item).__module__.startswith("chanpatch.")
    if is_object and not isinstance(item, types.FunctionType):
        return [*getattr(item, "__dict__", {}).values(), type(item).__call__]
    return _referenced_by(item)


def _referenced_by(item: Any) -> Iterable[Any]:
    """Return the items of a container, or the objects that a function or a weak reference refers to.

    A function refers to its default arguments and its attributes, and to those variables in its closure and its module
    that the function's code reads. For functions from a library, variables in the module are skipped.
    """
    if isinstance(item, weakref.ref):
        return (item(),)
    if not isinstance(item, types.FunctionType):
        return _items(item)
    found = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values(), *vars(item).values()]
    for cell in item.__closure__ or ():
        with suppress(ValueError):  # the variable was deleted, or has no value yet
            found.append(cell.cell_contents)
    if not _is_from_library(item.__globals__.get("__name__")):  # a decorator may have set `__module__`
        found += [item.__globals__.get(name) for name in names_in(item.__code__, "LOAD_GLOBAL", "LOAD_NAME")]
    return found


def _items(item: Any) -> Iterable[Any]:
    if isinstance(item, functools.partial):
        return item.func, item.args, item.keywords
    if isinstance(item, types.MethodType):
        return item.__func__, item.__self__
    if isinstance(item, dict):
        return [*item, *item.values()]
    return item if isinstance(item, (list, tuple, set, deque)) else ()


def _written_by(function: types.FunctionType) -> list[types.CellType | GlobalVariable]:
    """Return the nonlocal and global variables that a function assigns to."""
    code, known = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    nonlocals = [cell for name, cell in cells if name in names_in(code, "STORE_DEREF") and cell != types.CellType()]
    return [*nonlocals, *(GlobalVariable(known, name) for name in names_in(code, "STORE_GLOBAL") if name in known)]


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType, *operations: str) -> list[str]:
    """Return the names that the given bytecode operations act on, in a function and in its nested functions."""
    own = [each.argval for each in dis.get_instructions(code) if each.opname in operations]
    inside = [names_in(each, *operations) for each in code.co_consts if isinstance(each, types.CodeType)]
    return [*dict.fromkeys(itertools.chain(own, *inside))]


def _is_plain(item: Any) -> bool:
    """Return whether an object keeps its state in attributes and is defined in the user's own code.

    Return True for any SimpleNamespace. Return False for modules, classes, environments, replay buffers, and other
    objects from libraries.
    """
    if isinstance(item, types.FunctionType):
        return not _is_from_library(item.__module__)
    apart = [getattr(sys.modules.get(module), name, ()) for module, name in _APART]
    known = isinstance(item, (nn.Module, type, types.ModuleType, *apart)) or _is_from_library(type(item).__module__)
    return isinstance(item, types.SimpleNamespace) or (hasattr(item, "__dict__") and not known)


def _is_from_library(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


_LIBRARIES = {"chanpatch", "gymnasium", "numpy", "torch", *sys.stdlib_module_names}
_TORCHS_OWN = vars(nn.Module()).keys()
_APART = (  # classes whose objects are not restored: environments, and replay buffers, which may be large
    ("gym", "Env"),
    ("gymnasium", "Env"),
    ("gymnasium.vector", "VectorEnv"),
    ("stable_baselines3.common.vec_env", "VecEnv"),
    ("gym3", "Env"),
    ("pettingzoo", "AECEnv"),
    ("pettingzoo", "ParallelEnv"),
    ("stable_baselines3.common.buffers", "BaseBuffer"),
)
