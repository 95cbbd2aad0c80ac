"""Reject policies, patches and environments that rollouts do not support, and suggest how to adapt them."""

from __future__ import annotations

import inspect
import io
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.state import CONTAINERS, Snapshot, may_be_written, undisturbed
from ..engine.training import depends_on_training
from ..errors import RolloutError
from ..patching.patch import Patch
from ..registry.points import no_module
from ..results import imported
from .actions import numbers_of
from .copies import (
    STATE,
    firings_inside,
    functions_of,
    held_modules,
    names_in,
    parts_of_environments,
    patches_inside,
    used_by,
)
from .decisions import Decision
from .environments import vector_env
from .results import Rollout
from .stable_baselines import as_in_predict, is_sb3_policy, observed_shape, owner_of

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


def checked_envs(envs: Any) -> VectorEnv[Any, Any, Any]:
    """Convert environments to a vector environment. Raise an error if observations are not numeric arrays."""
    vector = vector_env(envs)
    if getattr(vector, "single_observation_space", None) is None:
        raise RolloutError(
            f"{type(envs).__name__} has no single_observation_space. Set the environment's spaces in __init__, as "
            "described in the documentation for gymnasium.vector.VectorEnv."
        )
    _check_numbers(vector.single_observation_space)
    return vector


def _check_numbers(space: Any, name: str = "observation_space") -> None:
    """Raise an error if observations from a space are not numeric arrays. Check every part of a Dict or Tuple space."""
    spaces = imported("gymnasium.spaces")
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for key, part in space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces):
            _check_numbers(part, f"{name}[{key!r}]")
    elif space.shape is None or np.dtype(space.dtype).kind not in "biufc":
        raise RolloutError(
            f"{name} is a {type(space).__name__} space, which does not produce numeric arrays. Encode the values as "
            "numbers in a wrapper, or keep only the numeric parts of the observation with "
            "gymnasium.wrappers.FilterObservation(environment, names_to_keep)."
        )


def checked_policy(policy: Any, envs: Any, *, stateful: bool, masked: bool) -> Any:
    """Check that a rollout can call a policy, and return the policy unchanged.

    Raises:
        RolloutError: If the policy is not callable; if the policy requires masks or other arguments that the rollout
            does not pass; or if the policy expects observations of a different shape than the environments return.
    """
    if not callable(policy):
        raise RolloutError(
            f"policy must be a module, HookPoints or a function of observations; got {no_module(policy)}"
        )
    owner = owner_of(policy)
    if is_sb3 := is_sb3_policy(owner):
        _check_observations(owner, envs)
    own = None if stateful and not is_sb3 else getattr(policy, "get_distribution", None)
    calls_forward = isinstance(policy, nn.Module) and inspect.unwrap(type(policy).__call__) is nn.Module.__call__
    try:
        signature = inspect.signature(own or (policy.forward if calls_forward else policy))
    except (TypeError, ValueError):  # some builtins have no signature
        return policy
    name = type(owner).__name__
    masking = name if "action_masks" in signature.parameters else _masking(policy)
    if masking and not masked:
        raise RolloutError(
            f"{masking} expects action_masks. Without masks, the policy may choose actions that are not allowed. Pass "
            'masks=lambda envs, infos: np.stack(envs.call("action_masks")).'
        )
    try:
        signature.bind(*[None] * (1 if not stateful else 3 if is_sb3 else 2))
    except TypeError:
        raise RolloutError(
            f"{name} expects the arguments ({', '.join(signature.parameters)}), but a rollout passes "
            f"{'(observations, state)' if stateful else '(observations)'}. For a recurrent policy, pass initial_state. "
            "If the policy needs other arguments, wrap it in a function, such as lambda obs, state: "
            "policy.get_distribution(obs, state, obs.new_zeros(len(obs)))."
        ) from None
    return policy


def _masking(policy: Any) -> str:
    """Return the class name of the first module in the policy that expects action masks, or "" if no module does."""
    for module in held_modules(policy).modules():
        own = getattr(module, "get_distribution", None)
        with suppress(TypeError, ValueError):  # some builtins have no signature
            if callable(own) and "action_masks" in inspect.signature(own).parameters:
                return type(module).__name__
    return ""


def _check_observations(policy: Any, envs: Any) -> None:
    """Raise an error if the observations from `envs` do not have the shape that a Stable-Baselines3 policy expects."""
    space, other = policy.observation_space, envs.single_observation_space
    parts, others = getattr(space, "spaces", {"": space}), getattr(other, "spaces", {"": other})
    if isinstance(parts, Mapping) and isinstance(others, Mapping):
        given = {name: part.shape for name, part in others.items()}
        built = {
            name: observed_shape(part, others[name]) if name in others else part.shape for name, part in parts.items()
        }
        if built != given:
            built, given = (each.get("", each) for each in (built, given))
            raise RolloutError(
                f"{type(policy).__name__} was built for observations of shape {built}, but the environments return "
                f"observations of shape {given}. Wrap the environments as in training, for example to stack frames."
            )


def check_modes(policies: Mapping[str, Any]) -> None:
    """Raise RolloutError if a module such as dropout is in training mode in one policy and in eval mode in another.

    The modes in the first policy are compared with the modes in each other policy. The modes in each twin are compared
    with the modes in the twin's original policy.
    """
    held = {f"'{label}'": held_modules(policy) for label, policy in policies.items()}
    first, *others = held.items()
    for label, modules in others:
        _check_same_modes(*first, label, modules)
    for modules in held.values():
        for twin in modules.modules():
            if STATE in vars(twin):
                original = nn.ModuleList([vars(twin)[STATE].original])
                _check_same_modes("the original policy", original, "its PatchedPolicy", nn.ModuleList([twin]))


def _check_same_modes(label: str, one: nn.ModuleList, other_label: str, other: nn.ModuleList) -> None:
    """Raise RolloutError if two modules with the same name, one from each list, are in different modes.

    Only modules that behave differently in training mode, such as dropout, are compared. If all such modules are in
    training mode in one list and in eval mode in the other list, modules with different names are also compared: the
    first such module of one list with the first of the other list, and so on.
    """
    with as_in_predict(one), as_in_predict(other):
        ours, theirs = (
            {name: each for name, each in side.named_modules() if depends_on_training(each)} for side in (one, other)
        )
        pairs = [(name, name) for name in ours if name in theirs]
        if not {each.training for each in ours.values()} & {each.training for each in theirs.values()}:
            pairs += zip(ours, theirs, strict=False)
        for name, other_name in pairs:
            flags = ours[name].training, theirs[other_name].training
            if flags[0] != flags[1]:
                modes = ["in training mode" if flag else "in eval mode" for flag in flags]
                raise RolloutError(
                    f"In {label}, {_module(name, ours)} is {modes[0]}, but in {other_label}, "
                    f"{_module(other_name, theirs)} is {modes[1]}. The comparison would measure this difference in "
                    "mode. Put the two modules in the same mode with eval() or train()."
                )


def _module(name: str, modules: Mapping[str, nn.Module]) -> str:
    inside = name.partition(".")[2]  # drop the index in the ModuleList
    return f"{repr(inside) if inside else 'the module'} ({type(modules[name]).__name__})"


def refuse_environments_by_rows(patches: Iterable[Patch], envs: Any) -> None:
    """Raise an error if an edit or a `where` function seems to use episode numbers as indices of sub-environments.

    A function is rejected if it uses the environments and `context.rows`, but not `context.environments`.
    """
    for patch in patches:
        for function in filter(callable, (patch.edit, patch.where)):
            used = used_by(function)
            codes = [each.__code__ for each in used if isinstance(each, types.FunctionType)]
            names = {name for code in codes for name in names_in(code, "LOAD_ATTR", "LOAD_METHOD")}
            if "rows" not in names or "environments" in names:
                continue
            gymnasium = imported("gymnasium")
            kinds = gymnasium.Env, gymnasium.vector.VectorEnv
            own = {id(each) for each in parts_of_environments(envs) if isinstance(each, kinds)}
            if any(id(each) in own for each in used):
                raise RolloutError(
                    f"A function in {patch!r} uses the environments and context.rows, which contains episode "
                    "numbers, not indices of sub-environments. Use context.environments instead, which contains the "
                    "index of each episode's sub-environment. If the function needs anything else from the "
                    "environments, such as their spaces, read it before the rollout, outside the function."
                )


def refuse_replaced(policy: Any, masks: Any, envs: Any) -> None:
    """Raise an error if a policy, its patches or the masks use environments that were replaced by copies."""
    if getattr(envs, "plays_in_copies", False):
        used = used_by(policy, masks, *functions_of(patches_inside(policy)))
        if any(each is envs.given for each in used):
            raise RolloutError(
                f"{type(envs.given).__name__} accepts only one seed for all sub-environments, so the rollout plays in "
                "copies of it. The policy, a patch or the masks function uses the original environment, in which no "
                'episode is played. Pass gymnasium.make_vec(..., vectorization_mode="sync") instead.'
            )


def check_rows(
    run: undisturbed, again: undisturbed, decision: Decision, alone: Callable[[], Decision], *, mixed: bool
) -> None:
    """Raise RolloutError if the policy's output for unpatched rows depends on other rows or on random draws.

    If the output depends on neither, each label in a sweep gets the same results as in a separate rollout.

    Args:
        run: Open `undisturbed` context that saved the policy's state before the first step.
        again: Second `undisturbed` context, not open yet. The check runs inside this context, so that the policy's
            state after the first step is restored when the check is done.
        decision: Decision for all rows in the first step. Unpatched rows come first.
        alone: Function that runs the policy on only the first few rows, which are unpatched, and returns the decision
            for these rows.
        mixed: Whether the first step also included patched rows.
    """
    with again:
        states = again.random_states()
        after = alone() if mixed else None  # starting from the state after the step with all rows
        run.snapshot.put_back()
        first = alone()
        draws = states != again.random_states()
        if draws and (isinstance(decision.choice, Tensor) or not _close(decision, first)):
            raise RolloutError(
                "The policy draws random numbers in its forward pass. In a sweep, the numbers would differ between the "
                "labels of the patches, so even a patch that changes nothing would appear to have an effect. Use "
                "paired_rollouts with one PatchedPolicy per label instead."
            )
        if not _close(decision, first) or (after and not _close(after, alone())):
            raise RolloutError(
                "The policy's output for one observation depends on the other observations in the batch, for example "
                "through batch statistics, so patches with different labels would affect each other. Use "
                "paired_rollouts with one PatchedPolicy per label instead."
            )


def noted_logs(policy: Any) -> tuple[Snapshot, Snapshot]:
    """Return two snapshots for the containers and ledgers that a policy uses.

    The first snapshot already contains the current contents of the containers and ledgers. The second snapshot is empty
    until its `note` method is called.
    """
    logs = [each for each in used_by(policy, *functions_of(patches_inside(policy))) if _may_keep_state(each)]
    logs += [firing.counts for firing in firings_inside(policy)]
    first, second = (Snapshot((), [dict(enumerate(logs))]) for _ in range(2))
    return first.note(), second


def check_repeats(
    logs: tuple[Snapshot, Snapshot],
    run: undisturbed,
    again: undisturbed,
    decision: Decision,
    repeat: Callable[[], Decision],
    *,
    mixed: bool,
) -> None:
    """Raise RolloutError if a policy's first decision changes when the decision is repeated from the same state.

    No error is raised if the policy draws from random generators that a rollout restores. Containers and ledgers are
    restored after the repeated forward pass. `logs` is the result of a call to `noted_logs` before the first step. The
    other arguments are the same as for `check_rows`; `repeat` runs the policy on all rows, and `mixed` is not used.
    """
    before, after = logs
    after.note()
    before.put_back()
    with again:
        states = again.random_states()
        run.snapshot.put_back()
        repeated = repeat()
        draws = states != again.random_states()
    after.put_back()
    if not draws and not _close(decision, repeated):
        raise RolloutError(
            "The policy's first output changes when the same forward pass is repeated, so even a comparison of the "
            "policy with itself would show a difference. The policy creates a random generator on each call, "
            "or keeps state that a rollout cannot restore. Store the generator or state in an attribute of the policy."
        )


def _close(decision: Decision, alone: Decision) -> bool:
    """Return whether two decisions agree up to rounding in the first n rows, where n is the number of rows in `alone`.

    The function compares action values. For policies without action values, it compares actions or parameters of the
    distribution.
    """
    pairs = zip(_numbers(decision), _numbers(alone), strict=True)
    return all(_same(every[: len(own)], own) for every, own in pairs)


def _numbers(decision: Decision) -> list[Tensor]:
    return numbers_of(decision.choice) if decision.values is None else [decision.values]


def _same(one: Tensor, other: Tensor) -> bool:
    if not other.is_floating_point():
        return torch.equal(one, other)
    tolerance = min(100 * torch.finfo(other.dtype).eps, 1e-2)
    if other.is_cuda:
        tolerance = max(tolerance, 1e-3)  # CUDA kernels for a different number of rows may use TF32
    finite = other[other.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


class SharedState:
    """Check that policies, or patches with different labels, do not affect each other through containers or iterators.

    A rollout does not restore containers that functions share, because a function may use a container as a log.

    Args:
        users: Dict that maps the name of each policy or label to a list of the functions and modules that the policy or
            the label's patches use.
        envs: The environments. Containers inside the environments are ignored.
    """

    def __init__(self, users: Mapping[Any, Iterable[Any]], envs: Any) -> None:
        self._used = {name: {id(each): each for each in used_by(*roots)} for name, roots in users.items()}
        times = Counter(key for used in self._used.values() for key in used)
        found = {key: each for used in self._used.values() for key, each in used.items() if times[key] > 1}
        found = {key: each for key, each in found.items() if _may_keep_state(each)}
        if found:
            found = {key: found[key] for key in found.keys() - {id(each) for each in parts_of_environments(envs)}}
        self._shared = found
        self._snapshot = Snapshot((), [dict(enumerate(found.values()))])

    def checked(self, subject: str, run: Callable[[], Rollout], again: Callable[[], Rollout]) -> Rollout:
        """Return the rollout from `run`. If `run` changed shared state, check that `again` gives an equal rollout.

        `again` starts from the shared state that `run` left behind, and that state is restored after `again`. `subject`
        is text that the error message adds after "the episodes", such as "of the sweep".
        """
        self._snapshot.note()
        rollout = run()
        iterators = [each for each in self._shared.values() if isinstance(each, Iterator)]
        if not (changed := [*self._snapshot.rewritten(), *iterators]):
            return rollout
        self._snapshot.note()
        repeated = again()
        self._snapshot.put_back()
        if not _equal(rollout, repeated):
            kind = type(changed[0]).__name__
            users = [repr(user) for user, used in self._used.items() if id(changed[0]) in used]
            raise RolloutError(
                f"Replaying the episodes {subject} gives different results, because {', '.join(users[:4])} share a "
                f"{kind} that changes during the episodes. Create a separate function with its own {kind} for each "
                "of them. Alternatively, store the state in an object's attributes, which a rollout restores."
            )
        return rollout


def check_equal(one: str, other: str, rollouts: Mapping[str, Rollout]) -> None:
    """Raise RolloutError if the rollouts named `one` and `other`, which are of the same policy, are different."""
    if not _equal(rollouts[one], rollouts[other]):
        raise RolloutError(
            f"{one!r} and {other!r} are the same policy, but their episodes differ. The policy draws from a generator "
            "or keeps state that a rollout cannot restore. Store the generator or state in an attribute of the policy."
        )


def _may_keep_state(item: Any) -> bool:
    is_log = isinstance(item, io.IOBase)  # files are also iterators
    return not is_log and (isinstance(item, (*CONTAINERS, Iterator)) or may_be_written(item))


def _equal(one: Rollout, other: Rollout) -> bool:
    pairs = zip((*one.actions, *one.seen), (*other.actions, *other.seen), strict=True)
    return all(np.array_equal(*pair, equal_nan=pair[0].dtype.kind == "f") for pair in pairs)
