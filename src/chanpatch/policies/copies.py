"""Copy policies with shared weights, and find the modules and objects that a policy reaches."""

from __future__ import annotations

import copy
import dis
import functools
import io
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

from ..engine.hooks import drop_hooks, is_ours
from ..engine.state import CONTAINERS, GENERATORS, GlobalVariable, may_be_written
from ..errors import RolloutError, UnsupportedModelError
from ..patching.edit_context import state_of
from ..patching.patch import Patch

STATE = "_chanpatch"  # the attribute that stores a twin's patches


def copied(policy: nn.Module, plain: nn.Module) -> nn.Module:
    """Copy a module tree without chanpatch's hooks; the copy shares the parameters and buffers.

    `plain` is the same tree without patches, or the policy itself if it has no patches.
    """
    kept = [*_reachable([policy], _kept_by)]
    _refuse_functions_that_refer_to(policy, kept)
    try:
        twin = copy.deepcopy(plain, _memo(policy, kept))
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(plain).__name__} cannot be copied, so it cannot have a twin ({type(error).__name__}: {error}). "
            "Remove objects that cannot be copied (environments, files, locks) from the module, or use patched()."
        ) from error
    drop_hooks(twin)
    if any(own is not weight for own, weight in zip(twin.parameters(), policy.parameters(), strict=True)):
        raise UnsupportedModelError(
            f"A module in {type(plain).__name__} copies its own parameters (as TorchRL's TensorDictParams does), so a "
            "twin would not share the weights. Use patched()."
        )
    return twin


def refuse_writing_modes(policy: nn.Module) -> None:
    """Raise an error if a module's own `train` or `eval` changes its parameters, as when it merges an adapter.

    The methods are tested on a copy with other parameters, so overrides that only set flags are accepted.
    """
    for name, module in policy.named_modules():
        modes = {each: getattr(type(module), each) for each in ("train", "eval")}
        own = [each for each, mode in modes.items() if not str(getattr(mode, "__module__", "")).startswith("torch.")]
        if own and next(module.parameters(), None) is not None and _writes_weights(module):
            raise UnsupportedModelError(
                f"{repr(name) if name else 'The policy'} ({type(module).__name__}) changes its parameters in "
                f"{' and '.join(f'{each}()' for each in own)}. A twin shares its parameters but not its flags, so "
                "one of the two would be wrong. Make the change permanent before creating a twin, or use patched()."
            )


def _writes_weights(module: nn.Module) -> bool:
    """Return whether `train` or `eval` changes the parameters of a copy; False if copying or either call fails."""
    with suppress(Exception):
        kept = [*_reachable([module], _kept_by)]
        trials = {
            id(weight): nn.Parameter(torch.full_like(weight, _TRIAL), requires_grad=weight.requires_grad)
            for weight in module.parameters()
            if type(weight) is nn.Parameter and not weight.is_meta
        }
        trial = copy.deepcopy(module, _memo(module, kept) | trials)
        for mode in (trial.eval, trial.train):
            mode()
            if any((weight != _TRIAL).any() for weight in trials.values()):
                return True
    return False


_TRIAL = 2  # adding, subtracting, multiplying or dividing parameters with this value changes them


def held_modules(policy: Any) -> list[nn.Module]:
    """Return the modules that a policy is or reaches, apart from its own submodules."""
    return [item for item in _reachable([policy], _parts_that_act) if isinstance(item, nn.Module)]


def patches_inside(policy: Any) -> list[Patch]:
    """Return the patches of the twins that a policy is or reaches."""
    modules = {module: None for held in held_modules(policy) for module in held.modules()}
    return [patch for module in modules if STATE in vars(module) for patch in vars(module)[STATE].patches]


def functions_of(patches: Iterable[Patch]) -> list[Any]:
    """Return the edits of patches and their `where` functions."""
    return [function for patch in patches for function in (patch.edit, patch.where)]


def held_state(policy: Any, envs: Any) -> tuple[nn.Module, list[dict[Any, Any]], list[int]]:
    """Return the modules and attributes that a rollout restores, with generators and nonlocal variables.

    The policy and the functions of its patches reach them. Last come the ids of objects that the environments reach,
    which are not restored.
    """
    held = [*_reachable([policy, *functions_of(patches_inside(policy))], _parts_that_act)]
    modules = nn.ModuleList(item for item in held if isinstance(item, nn.Module))
    written: list[Any] = [item for item in held if isinstance(item, GENERATORS)]
    written += [cell for item in held if isinstance(item, types.FunctionType) for cell in _written_by(item)]
    plain = [item for item in held if _is_plain(item) and vars(item)]
    apart = [id(item) for item in parts_of_environments(envs)] if plain or written else []
    known = {*apart}
    return modules, [*(vars(item) for item in plain if id(item) not in known), dict(enumerate(written))], apart


def containers_in(roots: Iterable[Any]) -> list[Any]:
    """Return the lists, dicts, sets, arrays, tensors and iterators that policies or functions reach."""
    kinds = (*CONTAINERS, Iterator)
    found = [item for item in _reachable(roots, _parts_that_act) if isinstance(item, kinds) or may_be_written(item)]
    return [item for item in found if not isinstance(item, io.IOBase)]  # a file that is written is a log


def parts_of_environments(envs: Any) -> Iterator[Any]:
    """Yield the objects that environments reach."""
    return _reachable([envs], _parts_of_environments)


def generators_of(functions: Iterable[Any]) -> list[Any]:
    """Return the random number generators that functions reach."""
    return [item for item in _reachable(functions, _parts_that_act) if isinstance(item, GENERATORS)]


def refuse_environments_by_rows(patches: Iterable[Patch], envs: Any) -> None:
    """Raise an error if a patch function reads the environments and `context.rows`, but not `context.environments`.

    It may read their number, spec and spaces. A list of sub-environments counts as the environments.
    """
    inside = {id(each) for one in getattr(envs.unwrapped, "envs", ()) for each in (one, one.unwrapped)}
    for patch in patches:
        for function in filter(callable, (patch.edit, patch.where)):
            owner = function if (holder := state_of(function)) is None else holder
            own = getattr(owner, "__dict__", {})
            known = _referred_to([function, *own.values(), type(owner).__call__])
            functions = [each for each in known if isinstance(each, types.FunctionType)]
            names = {name for each in functions for name in each.__code__.co_names}
            if "rows" not in names or "environments" in names:
                continue
            steps = [step for each in functions for step in itertools.pairwise(dis.get_instructions(each))]
            read = {one.argval for one, after in steps if "LOAD" in one.opname and after.argval not in _OF_SPACES}
            variables = [*own.items(), *itertools.chain(*map(_variables, functions))]
            spared = {id(each) for name, each in variables if name not in read}
            read_ones = [each for each in known if id(each) not in spared]
            read_ones += [each for name, each in variables if name in read]
            lists = [
                each for each in read_ones if isinstance(each, (list, tuple)) and inside.intersection(map(id, each))
            ]
            if lists or any(each is envs or each is envs.unwrapped for each in read_ones):
                raise RolloutError(
                    f"A function in {patch!r} reads the environments and context.rows, which contains episode numbers. "
                    "To index the environments, use context.environments, which contains the sub-environment of each "
                    "row. If the function does not index them, read them outside of it."
                )


_OF_SPACES = {
    "num_envs",
    "spec",
    *(f"{one}{kind}_space" for one in ("", "single_") for kind in ("action", "observation")),
}


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables that a function takes from around it, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):
            yield name, cell.cell_contents
    yield from ((name, function.__globals__.get(name)) for name in function.__code__.co_names)


def _memo(policy: nn.Module, kept: list[Any]) -> dict[int, Any]:
    """Return a deepcopy memo that shares weights and clones non-leaf tensors, which a forward pass computed."""
    tensors = [item for item in kept if isinstance(item, Tensor)]
    clones = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    weights = [*policy.parameters(), *policy.buffers(), *(item for item in tensors if isinstance(item, nn.Parameter))]
    return clones | {id(tensor): tensor for tensor in weights}


def _refuse_functions_that_refer_to(policy: nn.Module, kept: list[Any]) -> None:
    """Raise an error if a function, hook or weak reference stored on a policy refers back to the policy.

    In a copy, the function would run the original's modules, or fill a container that only the original reads.
    UnreachedError detects this only if no other call reaches the patch.
    """
    own = {id(item) for item in kept if isinstance(item, (nn.Module, list, set, deque, dict))}
    for item in kept:
        is_weak = isinstance(item, weakref.ref) or type(item) in weakref.ProxyTypes
        refers = isinstance(item, types.FunctionType) or is_weak
        if refers and any(id(each) in own for each in _referred_to([item])):
            kept_one = "a weak reference" if is_weak else f"the function {item.__qualname__}"
            raise UnsupportedModelError(
                f"{type(policy).__name__} stores {kept_one} (in an attribute or as a hook), which refers to the policy "
                "itself or to a container in it. In a twin, it would still refer to the unpatched original. Make it a "
                "method, or use patched()."
            )


def _referred_to(roots: Iterable[Any]) -> list[Any]:
    """Return the objects that functions (in closures, defaults and globals) and weak references refer to."""
    held = [*_reachable(roots, _held_by)]
    functions = [item for item in held if isinstance(item, types.FunctionType)]
    return held + [item for each in functions for item in _globals_of(each)]


def _globals_of(function: types.FunctionType) -> list[Any]:
    return [function.__globals__.get(name) for name in _global_names(function.__code__)]


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> list[str]:
    """Return the names that some code, or a function or comprehension in it, loads as globals; no attributes."""
    own = [each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inside = [_global_names(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return [*dict.fromkeys(itertools.chain(own, *inside))]


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
    run = [part for name, part in own.items() if name != STATE and "state_dict" not in name]  # never run in a call
    return _inside(item) or run


def _parts_that_act(item: Any) -> Iterable[Any]:
    """Return the objects that an object may use when it acts: of functions and modules, those that they refer to."""
    if isinstance(item, types.FunctionType):
        return () if _of_a_library(item.__module__) else [*_held_by(item), *_globals_of(item)]
    if isinstance(item, nn.Module):
        owns = [vars(module).items() for module in item.modules()]
        return [part for own in owns for name, part in own if name not in _TORCHS_OWN and name != STATE]
    if _is_plain(item) or type(item).__module__.startswith("chanpatch."):
        return [*getattr(item, "__dict__", {}).values(), type(item).__call__]
    return _held_by(item)


def _written_by(function: types.FunctionType) -> list[types.CellType | GlobalVariable]:
    """Return the variables that a function declares nonlocal or global, and sets."""
    names = {kind: {each.argval for each in dis.get_instructions(function) if each.opname == kind} for kind in _STORES}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    nonlocals = [cell for name, cell in cells if name in names["STORE_DEREF"] and cell != types.CellType()]
    known = names["STORE_GLOBAL"] & function.__globals__.keys()
    return [*nonlocals, *(GlobalVariable(function.__globals__, name) for name in sorted(known))]


_STORES = ("STORE_DEREF", "STORE_GLOBAL")


def _parts_of_environments(item: Any) -> Iterable[Any]:
    is_code = isinstance(item, (type, types.ModuleType, types.FunctionType, nn.Module))
    return () if is_code else [*_inside(item), *getattr(item, "__dict__", {}).values()]


def _is_plain(item: Any) -> bool:
    """Return whether an object may keep state in attributes: no module, environment, or object of torch or Python."""
    if isinstance(item, types.FunctionType):
        return not _of_a_library(item.__module__)
    apart = [getattr(sys.modules.get(module), name, ()) for module, name in _APART]
    known = isinstance(item, (nn.Module, type, types.ModuleType, *apart)) or _of_a_library(type(item).__module__)
    return isinstance(item, types.SimpleNamespace) or (hasattr(item, "__dict__") and not known)


def _of_a_library(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


_LIBRARIES = {"chanpatch", "gymnasium", "numpy", "torch", *sys.stdlib_module_names}
_TORCHS_OWN = vars(nn.Module()).keys()
_APART = (  # environments, and the memory of an algorithm, which may be large
    ("gym", "Env"),
    ("gymnasium", "Env"),
    ("gymnasium.vector", "VectorEnv"),
    ("stable_baselines3.common.vec_env", "VecEnv"),
    ("stable_baselines3.common.buffers", "BaseBuffer"),
)


def _held_by(item: Any) -> Iterable[Any]:
    if isinstance(item, weakref.ref):
        return (item(),)
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
        return [*item, *item.values()]
    return item if isinstance(item, (list, tuple, set, deque)) else ()
