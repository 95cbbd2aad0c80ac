"""Play episodes in parallel in a vector environment, one batch (wave) at a time."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.moments import forward_context
from ..engine.paths import Path, get, leaves, replace
from ..engine.state import undisturbed
from ..errors import ChanpatchError, RolloutError
from ..registry.names import path_text
from ..results import imported, progress_bar
from ..statistics.interval import whole
from .actions import chosen_actions, draw_streams, repetitions
from .checks import check_envs, checked_policy
from .checksums import checksums
from .copies import held_state, patches_inside, refuse_environments_by_rows
from .decisions import Decision, Masks, Outputs, allowed_actions, check_outputs, decision_in, output_of
from .results import Rollout
from .row_checks import check_rows
from .stable_baselines import as_in_predict

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


InitialState: TypeAlias = Callable[[int], Any]
BatchAxes: TypeAlias = Mapping[Path, int]
Around: TypeAlias = Callable[[NDArray[np.int64]], AbstractContextManager[None]]

_DTYPE_REFUSED = re.compile("dtype|scalar type|Input type|must have the type|not implemented for '")
_CHANNELS_REFUSED = re.compile(r"expected input\[[^\]]*?(\d+)\] to have (\d+) channels")


class Settings(NamedTuple):
    """Arguments of `rollout`."""

    max_steps: int
    sampling_seed: int
    greedy: bool
    outputs: Outputs | None
    masks: Masks | None
    initial_state: InitialState | None
    progress: bool | None


def play(
    policy: Any,
    envs: VectorEnv[Any, Any, Any],
    seeds: Iterable[int],
    settings: Settings,
    *,
    label: str | None = None,
    times: int = 1,
    around: Around = lambda _: nullcontext(),
) -> list[Rollout]:
    """Play all episodes `times` times with the same draws, and return one rollout per repetition.

    `around` takes the repetition of each row, int64 `(row,)`, and returns a context for the forward pass.
    `label` is the policy's name.
    """
    check_envs(envs)
    check_outputs(settings.outputs)
    is_recurrent, has_masks = settings.initial_state is not None, settings.masks is not None
    policy = checked_policy(policy, envs, stateful=is_recurrent, masked=has_masks)
    refuse_environments_by_rows(patches_inside(policy), envs)
    log = _Log(seeds, settings, times, label)
    whole("max_steps", settings.max_steps, 1, RolloutError)
    waves = range(0, log.plays, envs.num_envs)
    held, *state = held_state(policy, envs)
    bar = progress_bar(settings.progress, len(waves) * settings.max_steps, "step")
    with as_in_predict(held), undisturbed(held, *state) as run, bar as advance:
        actor = _Actor(policy, settings)
        checks = functools.partial(check_rows, run, undisturbed(held, *state)) if times > 1 else None
        for start in waves:
            run.snapshot.put_back()  # an episode must not depend on earlier ones
            wave = np.arange(start, min(start + envs.num_envs, log.plays))
            _play_wave(actor, envs, wave, log, advance, settings, around, checks)
    return log.rollouts()


class _Log:
    """Results and random generators of all plays, ordered by repetition and then episode."""

    def __init__(self, seeds: Iterable[int], settings: Settings, times: int, label: str | None) -> None:
        if not isinstance(seeds, Iterable):
            raise RolloutError(f"seeds must list one seed per episode, such as range(100); got {seeds!r}.")
        checked = [whole("A seed", seed, error=RolloutError) for seed in seeds]
        if max(checked, default=0) >= 2**63:
            raise RolloutError(f"A seed must be less than 2**63, to fit into int64; got {max(checked)}.")
        if not checked:
            raise RolloutError("seeds is empty: pass one seed per episode.")
        self.episodes, self.plays = len(checked), times * len(checked)
        self.seeds = tuple(checked * times)
        self._settings = settings
        self.published = {
            "label": label,
            "sampling_seed": settings.sampling_seed,
            "seeds": np.array(checked, object),
            "repetitions": repetitions(checked),
        }
        self.streams = [stream for _ in range(times) for stream in draw_streams(settings.sampling_seed, checked)]
        self.returns = np.zeros(self.plays)
        self.terminated = np.zeros(self.plays, dtype=np.bool_)
        self.truncated = np.zeros(self.plays, dtype=np.bool_)
        self.taken: list[tuple[NDArray[np.int64], NDArray[Any]]] = []  # plays and their actions at each step
        self.checked: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []  # plays and their checksums at each step

    def add(
        self, plays: NDArray[np.int64], actions: NDArray[Any], rewards: NDArray[np.float64], seen: NDArray[np.uint64]
    ) -> None:
        """Add one step of the given plays; `seen` contains checksums of the observations after the step."""
        self.returns[plays] += rewards
        self.taken.append((plays, actions))
        self.checked.append((plays, seen ^ (rewards + 0.0).view(np.uint64)))  # -0.0 equals 0.0

    def rollouts(self) -> list[Rollout]:
        self.actions, self.seen = _of_plays(self.taken), _of_plays(self.checked)
        self.lengths = np.array([*map(len, self.actions)])
        columns = ("seeds", "returns", "lengths", "terminated", "truncated", "actions", "seen")
        shared = {name: getattr(self._settings, name) for name in ("max_steps", "sampling_seed", "greedy")}
        shared["masked"] = self._settings.masks is not None
        cuts = [slice(start, start + self.episodes) for start in range(0, self.plays, self.episodes)]
        return [Rollout(**{name: getattr(self, name)[cut] for name in columns}, settings=shared) for cut in cuts]


def _of_plays(steps: Sequence[tuple[NDArray[np.int64], NDArray[Any]]]) -> tuple[NDArray[Any], ...]:
    """Return one array `(step, ...)` per play, given the plays and values at each step."""
    plays, values = map(np.concatenate, zip(*steps, strict=True))
    order = np.argsort(plays, kind="stable")
    return tuple(np.split(values[order], np.bincount(plays).cumsum()[:-1]))


def _play_wave(
    actor: _Actor,
    envs: VectorEnv[Any, Any, Any],
    wave: NDArray[np.int64],
    log: _Log,
    advance: Callable[[int], object],
    settings: Settings,
    around: Around,
    checks: Callable[..., None] | None,
) -> None:
    """Play the episodes of one wave in parallel until all have finished, and advance the progress bar."""
    observations, infos = _reset(envs, [log.seeds[number] for number in np.resize(wave, envs.num_envs)])
    disabled = imported("gymnasium.vector").AutoresetMode.DISABLED
    resets_itself = envs.metadata.get("autoreset_mode") is not disabled
    actor.begin(len(wave))
    running = np.arange(len(wave))  # sub-environments with a running episode; in the last wave, some have none
    actions: NDArray[Any] | None = None
    allowed = allowed_actions(settings.masks, envs, infos)
    log.checked.append((wave, _seen(observations, allowed, envs.num_envs)[running]))
    for step in range(settings.max_steps):
        plays = wave[running]
        infos_of = functools.partial(_of_environments, infos, envs.num_envs)
        known = {"step": step, "infos": infos_of, **log.published}
        decide = functools.partial(_decision, observations, allowed, around, log.episodes, known)
        decision = decide(actor, plays, running)
        own = int((plays < log.episodes).sum())  # rows of the first time, which come first
        if checks and not step and own and (own < len(plays) or not plays[0]):
            mixed = own < len(plays)
            some = slice(
                min(own, max(2, own // 2)) if mixed else own
            )  # all labels see the same at first: leave rows out
            checks(decision, functools.partial(decide, copy.copy(actor), plays[some], running[some], first=True), mixed)
        streams = None if settings.greedy else [log.streams[number] for number in plays]
        chosen = chosen_actions(decision, streams, len(running), envs)
        if actions is None:
            actions = np.resize(chosen, (envs.num_envs, *chosen.shape[1:]))
        if allowed is not None:  # finished sub-environments take an allowed action, not their last one
            actions[:] = allowed.argmax(-1) + getattr(envs.single_action_space, "start", 0)
        actions[running] = chosen
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        over = terminated | truncated
        allowed = None if over[running].all() else allowed_actions(settings.masks, envs, infos)  # they may lack a mask
        seen = _seen(observations, allowed, envs.num_envs)
        seen[over] = 0  # some environments already return the next episode's observation
        log.add(plays, chosen, np.asarray(rewards[running], np.float64), seen[running])
        if over.any():
            log.terminated[plays], log.truncated[plays] = terminated[running], truncated[running]
            actor.keep(~over[running])
            running = running[~over[running]]
            if not running.size:
                advance(settings.max_steps - step)
                return
            if not resets_itself:
                observations, infos_of_reset = envs.reset(options={"reset_mask": over})
                if allowed is not None:
                    allowed[over] = allowed_actions(settings.masks, envs, infos_of_reset)[over]
        advance(1)
    log.truncated[wave[running]] = True


def _decision(
    observations: Any,
    allowed: NDArray[np.bool_] | None,
    around: Around,
    episodes: int,
    known: dict[str, Any],
    actor: _Actor,
    plays: NDArray[np.int64],
    running: NDArray[np.int64],
    *,
    first: bool = False,
) -> Decision:
    """Return the decision for the given plays, each in its sub-environment; with `first`, begin their episodes."""
    if first:
        actor.begin(len(plays))
    with forward_context(rows=plays % episodes, environments=running, **known), around(plays // episodes):
        return actor.decision(observations, running, None if allowed is None else allowed[running])


def _seen(observations: Any, allowed: Any, num_envs: int) -> NDArray[np.uint64]:
    """Return a checksum of each sub-environment's observation and mask."""
    return checksums(observations if allowed is None else (observations, allowed), num_envs)


def _of_environments(infos: Any, num_envs: int, chosen: NDArray[np.int64]) -> Any:
    """Return the infos of the given sub-environments, from arrays and lists with one entry per sub-environment."""
    if isinstance(infos, Mapping):
        return {name: _of_environments(part, num_envs, chosen) for name, part in infos.items()}
    if isinstance(infos, (list, tuple)) and len(infos) == num_envs:
        return [infos[number] for number in chosen]
    has_rows = isinstance(infos, (np.ndarray, Tensor)) and infos.shape[:1] == (num_envs,)
    return infos[chosen] if has_rows else infos


def _reset(envs: VectorEnv[Any, Any, Any], seeds: list[int]) -> tuple[Any, dict[str, Any]]:
    try:
        return envs.reset(seed=seeds)  # type: ignore[arg-type]
    except imported("gymnasium").error.Error as error:
        raise RolloutError(
            f"{type(envs.unwrapped).__name__} cannot be reset with one seed per sub-environment. Use a "
            'SyncVectorEnv or an AsyncVectorEnv, such as gymnasium.make_vec(..., vectorization_mode="sync").'
        ) from error


class _Actor:
    """A policy and the recurrent state of each running episode."""

    def __init__(self, policy: Any, settings: Settings) -> None:
        initial_state = settings.initial_state
        self._policy, self._outputs, self._initial_state = policy, settings.outputs, initial_state
        self._state_axes = {} if initial_state is None else state_batch_axes(initial_state)
        self._state: Any = None
        owner = getattr(policy, "__self__", policy)
        self._name = type(owner).__name__
        self._like = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None

    def begin(self, rows: int) -> None:
        self._rows_before = rows
        if self._initial_state is not None:
            self._state = self._initial_state(rows)
            for path, tensor in leaves(self._state):
                self._state = replace(self._state, path, self._placed(tensor))

    def keep(self, running: NDArray[np.bool_]) -> None:
        """Drop the rows of finished episodes."""
        self._rows_before = len(running)
        self._state = rows_of(self._state, self._state_axes, torch.from_numpy(running))

    def decision(self, observations: Any, rows: NDArray[np.int64], allowed: NDArray[np.bool_] | None) -> Decision:
        """Return the decision for the given rows of the observations, and update the recurrent state."""
        seen = self._tensors(observations, rows)
        try:
            if self._initial_state is None:
                output = output_of(self._policy, seen, self._outputs)
            else:
                output = self._with_state(seen)
        except RuntimeError as error:
            self._explain(error, seen, len(rows))
            raise
        return decision_in(output, self._name, self._outputs, allowed)

    def _with_state(self, observations: Any) -> Any:
        returned = self._policy(observations, self._state)
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            got = f"{len(returned)} items" if isinstance(returned, (tuple, list)) else type(returned).__name__
            raise RolloutError(
                f"With initial_state, the policy must return (output, new state); got {got}. Pass a function that "
                "accepts (observations, state) and returns that pair."
            )
        shapes, before = ({path: tuple(leaf.shape) for path, leaf in leaves(s)} for s in (returned[1], self._state))
        for path in dict.fromkeys([*before, *shapes]):
            if shapes.get(path) != before.get(path):
                raise RolloutError(
                    f"state{path_text(path)} has shape {before.get(path, 'none')} when passed to the policy, but "
                    f"{shapes.get(path, 'none')} in the state that it returns. Return a state of the same shape."
                )
        self._state = returned[1]
        return returned[0]

    def _tensors(self, observations: Any, rows: NDArray[np.int64]) -> Any:
        """Return the given rows of an array, or of each array in a dict or tuple, as tensors."""
        if isinstance(observations, Mapping):
            return {name: self._tensors(part, rows) for name, part in observations.items()}
        if isinstance(observations, tuple):
            return tuple(self._tensors(part, rows) for part in observations)
        return self._placed(torch.as_tensor(observations[rows]))

    def _placed(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the policy's device and, if it is floating point, to its dtype."""
        if self._like is None:
            return tensor
        return tensor.to(self._like.device, self._like.dtype if tensor.is_floating_point() else tensor.dtype)

    def _explain(self, error: RuntimeError, observations: Any, rows: int) -> None:
        """Raise an error with advice if torch rejected the observations' dtype, layout or number of rows."""
        if isinstance(error, ChanpatchError):
            return
        usual = torch.get_default_dtype() if self._like is None else self._like.dtype
        others = {str(tensor.dtype) for _, tensor in leaves(observations) if tensor.dtype != usual}
        if others and _DTYPE_REFUSED.search(str(error)):
            raise RolloutError(
                f"The policy failed on observations of dtype {', '.join(sorted(others))} ({error}). A rollout does "
                "not preprocess observations. Convert them the same way as in training, in the policy or in a "
                "wrapper function such as lambda observations: policy(observations.float() / 255)."
            ) from error
        found = _CHANNELS_REFUSED.search(str(error))
        if found and found[1] == found[2]:
            raise RolloutError(
                f"The policy failed on channels-last images ({error}). Its convolution expects (batch, channel, "
                "height, width): pass lambda observations: policy(observations.permute(0, 3, 1, 2))."
            ) from error
        if rows < self._rows_before and {str(rows), str(self._rows_before)} <= {*re.findall(r"\d+", str(error))}:
            raise RolloutError(
                f"The policy failed when the number of running episodes fell from {self._rows_before} to {rows} "
                f"({error}). If it stores a recurrent state with one row per environment, return the state and set "
                "initial_state=, or use a single environment."
            ) from error


def rows_of(tree: Any, batch_axes: BatchAxes, rows: slice | Tensor) -> Any:
    """Return a tree that keeps only the given rows of each tensor."""
    for path, axis in batch_axes.items():
        tree = replace(tree, path, get(tree, path)[(slice(None),) * axis + (rows,)])
    return tree


def state_batch_axes(initial_state: InitialState) -> BatchAxes:
    """Return the batch axis of each tensor in a recurrent state: the axis whose length is the number of rows."""
    if not callable(initial_state):
        raise RolloutError(
            "initial_state must be a function that maps a number of rows to their state, such as lambda rows: "
            f"torch.zeros(1, rows, 64); got {type(initial_state).__name__}."
        )
    two, three = (dict(leaves(initial_state(rows))) for rows in (2, 3))
    if not two or two.keys() != three.keys():
        raise RolloutError(
            f"initial_state(2) contains {len(two)} tensors and initial_state(3) contains {len(three)}. A state must "
            "contain the same tensors for any number of rows, and at least one."
        )
    axes = {}
    for path in two:
        lengths = enumerate(itertools.zip_longest(two[path].shape, three[path].shape))
        grown = {axis: pair for axis, pair in lengths if pair[0] != pair[1]}
        if [*grown.values()] != [(2, 3)]:
            raise RolloutError(
                f"state{path_text(path)} has shape {tuple(two[path].shape)} in initial_state(2) and "
                f"{tuple(three[path].shape)} in initial_state(3). Each tensor must have exactly one batch axis, "
                "whose length is the number of rows."
            )
        axes[path] = next(iter(grown))
    return axes
