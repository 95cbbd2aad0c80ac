"""Episodes played side by side in a vector environment, wave after wave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .._copies import held_modules
from .._optional import imported
from .._progress import progress_bar
from .._published import forward_context
from .._undisturbed import undisturbed
from ..errors import RolloutError
from ._actions import checked_seed, chosen_actions, draw_streams
from ._actor import Actor, Around
from ._results import Rollout
from ._state import InitialState

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


class Log:
    """What has happened in each play of each episode so far, and its stream of draws.

    Plays are numbered through: first all episodes once, then all of them again.

    Args:
        seeds: One per episode.
        sampling_seed: Of the draws.
        times: How often each episode is played, each time with the same draws.

    Raises:
        RolloutError: If there are no seeds, or one of them is no whole number from 0 on.
    """

    def __init__(self, seeds: Iterable[int], sampling_seed: int, times: int = 1) -> None:
        if not isinstance(seeds, Iterable):
            raise RolloutError(f"seeds is {seeds!r}: name one seed per episode, as in range(100).")
        checked = [checked_seed("A seed", seed) for seed in seeds]
        if not checked:
            raise RolloutError("seeds is empty: name one seed per episode.")
        self.episodes, self.plays = len(checked), times * len(checked)
        self.seeds = tuple(checked * times)
        self.streams = [stream for _ in range(times) for stream in draw_streams(sampling_seed, checked)]
        self.returns = np.zeros(self.plays)
        self.lengths = np.zeros(self.plays, dtype=np.int64)
        self.terminated = np.zeros(self.plays, dtype=np.bool_)
        self.truncated = np.zeros(self.plays, dtype=np.bool_)
        self.actions: list[list[NDArray[Any]]] = [[] for _ in range(self.plays)]

    def rollouts(self) -> list[Rollout]:
        """Return one rollout for each time that the episodes were played."""
        actions = tuple(np.stack(steps) for steps in self.actions)
        columns = (self.seeds, self.returns, self.lengths, self.terminated, self.truncated, actions)
        cuts = [slice(start, start + self.episodes) for start in range(0, self.plays, self.episodes)]
        return [Rollout(*(column[cut] for column in columns)) for cut in cuts]  # type: ignore[arg-type]


def play(
    policy: Any,
    envs: VectorEnv[Any, Any, Any],
    log: Log,
    *,
    max_steps: int,
    greedy: bool,
    initial_state: InitialState | None,
    progress: bool | None,
    around: Around = lambda *_: nullcontext(),
) -> None:
    """Play everything that a log has room for; the arguments are those of rollout and of Actor."""
    if max_steps < 1:
        raise RolloutError(f"max_steps is {max_steps}, but an episode has at least one step.")
    waves = range(0, log.plays, envs.num_envs)
    held = nn.ModuleList(held_modules(policy))
    with undisturbed(held) as run, progress_bar(progress, len(waves) * max_steps, "step") as advance:
        actor = Actor(policy, initial_state, around)
        for start in waves:
            run.put_back_state()  # no episode begins with what another one left on the policy
            wave = np.arange(start, min(start + envs.num_envs, log.plays))
            left = max_steps
            for _ in _played_steps(actor, envs, wave, log, max_steps=max_steps, greedy=greedy):
                advance(1)
                left -= 1
            advance(left)  # its episodes were over before


def check_environments(envs: object) -> None:
    """Raise if these are no vector environments."""
    if not isinstance(envs, imported("gymnasium.vector").VectorEnv):
        raise RolloutError(
            f"envs is a {type(envs).__name__}, but a rollout takes a gymnasium.vector.VectorEnv. For a "
            "single environment: gymnasium.vector.SyncVectorEnv([lambda: environment])."
        )


def _played_steps(
    actor: Actor,
    envs: VectorEnv[Any, Any, Any],
    wave: NDArray[np.int64],
    log: Log,
    *,
    max_steps: int,
    greedy: bool,
) -> Iterator[int]:
    """Play the episodes of one wave side by side, until the last one is over, and yield after each step."""
    observations = _reset(envs, [log.seeds[number] for number in np.resize(wave, envs.num_envs)])
    disabled = imported("gymnasium.vector").AutoresetMode.DISABLED
    resets_itself = envs.metadata.get("autoreset_mode") is not disabled
    actor.begin(len(wave))
    # The sub-environments whose episode goes on. Those that only fill up a last wave idle from the start.
    running = np.arange(len(wave))
    actions: NDArray[Any] | None = None
    for step in range(max_steps):
        plays = wave[running]
        with forward_context(step=step, rows=plays % log.episodes):
            distribution = actor.distribution(observations, running, plays)
        streams = None if greedy else [log.streams[number] for number in plays]
        chosen = chosen_actions(distribution, streams, len(running), envs)
        if actions is None:
            actions = np.resize(chosen, (envs.num_envs, *chosen.shape[1:]))
        actions[running] = chosen  # a sub-environment that is done repeats its last action
        observations, rewards, terminated, truncated, _ = envs.step(actions)

        log.returns[plays] += rewards[running]
        log.lengths[plays] += 1
        log.terminated[plays], log.truncated[plays] = terminated[running], truncated[running]
        for number, action in zip(plays, chosen, strict=True):
            log.actions[number].append(action)

        yield step
        over = terminated | truncated
        actor.keep(~over[running])
        running = running[~over[running]]
        if not running.size:
            return
        if over.any() and not resets_itself:
            observations, _ = envs.reset(options={"reset_mask": over})
    log.truncated[wave[running]] = True


def _reset(envs: VectorEnv[Any, Any, Any], seeds: list[int]) -> Any:
    try:
        return envs.reset(seed=seeds)[0]  # type: ignore[arg-type]
    except imported("gymnasium").error.Error as error:
        raise RolloutError(
            f"{type(envs.unwrapped).__name__} cannot be reset with one seed per sub-environment. Use a "
            'SyncVectorEnv or an AsyncVectorEnv, such as gymnasium.make_vec(..., vectorization_mode="sync").'
        ) from error
