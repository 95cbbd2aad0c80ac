"""Play episodes in parallel in a vector environment, one batch of episodes (a wave) at a time."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.moments import forward_context
from ..engine.paths import Path, get, leaves, replace, with_rows
from ..engine.state import undisturbed
from ..errors import ChanpatchError, RolloutError
from ..registry.names import path_text
from ..registry.points import HookPoints
from ..results import imported, progress_bar
from ..statistics.interval import whole
from .actions import chosen_actions
from .checks import check_repeats, check_rows, checked_policy, noted_logs, refuse_replaced
from .checksums import checksums
from .copies import held_state
from .decisions import Decision, allowed_actions, check_outputs, decision_in, method_of, output_of
from .log import Log, Options, mapped, rows_of_observations
from .results import Rollout
from .stable_baselines import as_in_predict, is_sb3_policy, lstm_state, owner_of, to_tensors, with_state

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


BatchAxes: TypeAlias = Mapping[Path, int]
Around: TypeAlias = Callable[[NDArray[np.int64]], AbstractContextManager[object]]

_DTYPE_REJECTED = re.compile("dtype|scalar type|Input type|must have the type|not implemented for '")
_CHANNELS_REJECTED = re.compile(r"expected input\[[^\]]*?(\d+)\] to have (\d+) channels")


def play(
    policy: Any,
    envs: VectorEnv[Any, Any, Any],
    options: Options,
    part: range,
    *,
    label: str | None = None,
    times: int = 1,
    around: Around = nullcontext,
) -> Rollout:
    """Run a range of plays, and return one rollout that contains these plays; see `Log`.

    All episodes are repeated `times` times with the same random numbers. Before each forward pass, `around` receives
    the repetition number of each row, as int64 with shape `(row,)`. The forward pass runs inside the context manager
    that `around` returns. `label` is the policy's name in paired rollouts, and None in other rollouts.
    """
    check_outputs(options.outputs)
    refuse_replaced(policy, options.masks, envs)
    if isinstance(policy, HookPoints):
        policy = method_of(policy.model, policy)
    if options.initial_state is None:
        options = options._replace(initial_state=lstm_state(policy))
    is_recurrent, has_masks = options.initial_state is not None, options.masks is not None
    policy = checked_policy(policy, envs, stateful=is_recurrent, masked=has_masks)
    log = Log(options, part, times, label)
    whole("max_steps", options.max_steps, 1, RolloutError)
    waves = part[:: envs.num_envs]
    held, *state = held_state(policy, envs)
    bar = progress_bar(options.progress, len(waves) * options.max_steps, "step")
    with as_in_predict(held), undisturbed(held, *state) as run, bar as advance:
        player = _Player(policy, envs, log, options, around)
        again = undisturbed(held, *state)
        check: Any = functools.partial(check_rows, run, again) if times > 1 else None
        if times == 1 and label is not None:  # paired rollouts
            check = functools.partial(check_repeats, noted_logs(policy), run, again)
        for start in waves:
            run.snapshot.put_back()  # an episode must not depend on earlier episodes
            player.play(np.arange(start, min(start + envs.num_envs, part.stop)), advance, check)
    return log.played()


class _Player:
    """A policy that plays in a vector environment, together with the recurrent states of the running episodes."""

    _allowed: NDArray[np.bool_] | None
    _is_repeated = False
    _observations: Any

    def __init__(self, policy: Any, envs: Any, log: Log, options: Options, around: Around) -> None:
        self._policy, self._envs, self._log, self._options, self._around = policy, envs, log, options, around
        self._state_axes = {} if options.initial_state is None else state_batch_axes(options.initial_state)
        self._owner = owner = owner_of(policy)
        self._name = type(owner).__name__
        weights = owner.parameters() if isinstance(owner, nn.Module) else ()
        self._like = next((each for each in weights if each.is_floating_point()), None)

    def play(
        self, wave: NDArray[np.int64], advance: Callable[[int], object], check: Callable[..., None] | None
    ) -> None:
        """Play the episodes in one wave in parallel until all have finished, and advance the progress bar.

        `wave` contains the index in the log of each episode to play. If `check` is not None, call `check` after the
        first decision, with the last three arguments of `check_rows`.
        """
        envs, log, options = self._envs, self._log, self._options
        self._reset(wave)
        actions: NDArray[Any] | None = None
        for self._step in range(options.max_steps):
            plays = wave[self._running]
            decision = self._decision()
            if check and not self._step:
                self._check_rows(decision, check)
            streams = None if options.greedy else [log.streams[number] for number in plays]
            chosen = chosen_actions(decision, streams, len(plays), envs)
            log.keep_observations(plays, rows_of_observations(self._observations, self._running))
            if actions is None:
                actions = np.resize(chosen, (envs.num_envs, *chosen.shape[1:]))
            if self._allowed is not None:  # give finished sub-environments an allowed action, not their last action
                actions[:] = self._allowed.argmax(-1) + getattr(envs.single_action_space, "start", 0)
            actions[self._running] = chosen
            self._observations, *each, self._infos = envs.step(actions)
            rewards, terminated, truncated = (torch.as_tensor(one).numpy(force=True) for one in each)
            over = terminated | truncated
            continues = ~over[self._running]
            # The infos may lack a mask after the last episode.
            self._allowed = allowed_actions(options.masks, envs, self._infos) if continues.any() else None
            seen = self._seen()
            seen[over] = 0  # at the end of an episode, some environments return the next episode's observation
            log.add(plays, chosen, np.asarray(rewards[self._running], np.float64), seen[self._running])
            log.keep_infos(plays, self._infos, self._running, over)
            if over.any():
                log.terminated[plays], log.truncated[plays] = terminated[self._running], truncated[self._running]
                self._keep_state(plays, ~continues)
                self._keep(continues)
                if not self._running.size:
                    advance(options.max_steps - self._step)
                    return
                self._restart(over)
            advance(1)
        log.truncated[wave[self._running]] = True
        self._keep_state(wave[self._running], np.ones(len(self._running), np.bool_))

    def _reset(self, wave: NDArray[np.int64]) -> None:
        """Reset the environments for a new wave. If a wave has fewer episodes than environments, repeat seeds."""
        self._wave, self._running = wave, np.arange(len(wave))  # the sub-environments whose episodes have not finished
        try:
            seeds = [self._log.seeds[number] for number in np.resize(wave, self._envs.num_envs)]
            self._observations, self._infos = self._envs.reset(seed=seeds)
        except imported("gymnasium").error.Error as error:
            raise RolloutError(
                f"{type(self._envs.unwrapped).__name__} cannot be reset with one seed per sub-environment. Use a "
                'SyncVectorEnv or an AsyncVectorEnv, for example gymnasium.make_vec(..., vectorization_mode="sync").'
            ) from error
        self._begin()
        self._allowed = allowed_actions(self._options.masks, self._envs, self._infos)
        self._log.checked.append((wave, self._seen()[self._running]))
        self._log.keep_infos(wave, self._infos, self._running, np.zeros(self._envs.num_envs, np.bool_))

    def _restart(self, over: NDArray[np.bool_]) -> None:
        """Reset the sub-environments marked in `over`, if the vector environment does not reset them automatically."""
        if self._envs.metadata.get("autoreset_mode") is imported("gymnasium.vector").AutoresetMode.DISABLED:
            self._observations, infos = self._envs.reset(options={"reset_mask": over})
            if self._allowed is not None:
                self._allowed[over] = allowed_actions(self._options.masks, self._envs, infos)[over]

    def _seen(self) -> NDArray[np.uint64]:
        """Return one checksum per sub-environment: of the current observation and, if masks are used, of the mask."""
        both = self._observations if self._allowed is None else (self._observations, self._allowed)
        return checksums(both, self._envs.num_envs)

    def _begin(self) -> None:
        """If the policy is recurrent, set the state in the row of each running episode to the initial state."""
        self._rows_before, self._state = len(self._running), None
        if self._options.initial_state is not None:
            self._state = self._options.initial_state(len(self._running))
            for path, tensor in leaves(self._state):
                self._state = replace(self._state, path, self._placed(tensor))

    def _keep(self, continues: NDArray[np.bool_]) -> None:
        """Drop the rows of finished episodes, in which `continues` is False, from the batch and the recurrent state."""
        self._rows_before, self._running = len(self._running), self._running[continues]
        self._state = rows_of(self._state, self._state_axes, torch.from_numpy(continues))

    def _keep_state(self, plays: NDArray[np.int64], ended: NDArray[np.bool_]) -> None:
        """For rows in which `ended` is True, add the recurrent state after the episode's last step to the log."""
        for row in np.flatnonzero(ended):
            self._log.keep_state(plays[row], rows_of(self._state, self._state_axes, torch.tensor([row])))

    def _check_rows(self, decision: Decision, check: Callable[..., None]) -> None:
        """Run `check` on the first decision in a wave if the wave contains unpatched rows.

        If several waves contain only unpatched rows, only the first of these waves is checked. In a wave that also
        contains patched rows, the unpatched rows come first.
        """
        plays = self._wave[self._running]
        own = int((plays < self._log.episodes).sum())
        mixed = own < len(plays)
        if own and (mixed or not plays[0]):
            # Patched and unpatched rows may have equal first observations, so leave some unpatched rows out as well.
            count = min(own, max(2, own // 2)) if mixed else own
            check(decision, functools.partial(self._first_decision, count), mixed=mixed)

    def _first_decision(self, count: int) -> Decision:
        """Repeat the first decision with only the first `count` rows in the batch, and return the new decision."""
        other = copy.copy(self)
        other._running, other._is_repeated = self._running[:count], True
        other._begin()
        return other._decision()

    def _decision(self) -> Decision:
        """Run the policy on the running episodes, update the recurrent state, and return the policy's decision."""
        plays, episodes = self._wave[self._running], self._log.episodes
        infos = functools.partial(_infos_of, self._infos, self._envs.num_envs)
        known = {"step": self._step, "infos": infos, "repeated": self._is_repeated, **self._log.published}
        with (
            forward_context(rows=plays % episodes, environments=self._running, **known),
            self._around(plays // episodes),
        ):
            rows = rows_of_observations(self._observations, self._running)
            observations, outputs = self._tensors(rows), self._options.outputs
            try:
                if self._options.initial_state is None:
                    output = output_of(self._policy, observations, outputs)
                else:
                    output = self._with_state(observations)
            except RuntimeError as error:
                advice = "" if isinstance(error, ChanpatchError) else self._advice(error, observations)
                if not advice:
                    raise
                raise RolloutError(f"The policy failed {advice}") from error
            allowed = None if self._allowed is None else self._allowed[self._running]
            return decision_in(output, self._name, outputs, allowed)

    def _with_state(self, observations: Any) -> Any:
        returned = with_state(self._policy, observations, self._state, self._placed(torch.zeros(len(self._running))))
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            got = f"{len(returned)} items" if isinstance(returned, (tuple, list)) else type(returned).__name__
            raise RolloutError(
                f"With initial_state, the policy must return (output, new state); got {got}. Pass a function that "
                "accepts (observations, state) and returns such a pair."
            )
        shapes, before = ({path: tuple(leaf.shape) for path, leaf in leaves(s)} for s in (returned[1], self._state))
        for path in dict.fromkeys([*before, *shapes]):
            if shapes.get(path) != before.get(path):
                raise RolloutError(
                    f"state{path_text(path)} has shape {before.get(path, 'none')} when passed to the policy, but "
                    f"{shapes.get(path, 'none')} in the state that the policy returns. Return a state with the "
                    "same tensors and shapes."
                )
        self._state = returned[1]
        return returned[0]

    def _tensors(self, observations: Any) -> Any:
        """Convert an array, or dicts and tuples that contain arrays, to tensors in the same structure."""
        if is_sb3_policy(self._owner):
            return to_tensors(self._owner, observations)
        return mapped(lambda array: self._placed(torch.as_tensor(array)), observations)

    def _placed(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the policy's device. Convert a floating-point tensor to the policy's dtype."""
        if self._like is None:
            return tensor
        return tensor.to(self._like.device, self._like.dtype if tensor.is_floating_point() else tensor.dtype)

    def _advice(self, error: RuntimeError, observations: Any) -> str:
        """Return advice for the user if an error was caused by the observations' dtype, layout or number of rows.

        For other errors, return an empty string. The advice begins in the middle of a sentence.
        """
        text, rows, before = str(error), len(self._running), self._rows_before
        usual = torch.get_default_dtype() if self._like is None else self._like.dtype
        others = {str(tensor.dtype) for _, tensor in leaves(observations) if tensor.dtype != usual}
        if others and _DTYPE_REJECTED.search(text):
            scale = " / 255" if "torch.uint8" in others else ""
            return (
                f"on observations of dtype {', '.join(sorted(others))} ({text}). A rollout does not preprocess "
                "observations. Convert the observations as in training, inside the policy or in a wrapper function "
                f"such as lambda observations: policy(observations.float(){scale})."
            )
        found = _CHANNELS_REJECTED.search(text)
        if found and found[1] == found[2]:
            return (
                f"on channels-last images ({text}). The convolution expects shape (batch, channel, height, width). "
                "Pass lambda observations: policy(observations.permute(0, 3, 1, 2))."
            )
        if rows < before and {str(rows), str(before)} <= {*re.findall(r"\d+", text)}:
            return (
                f"when the number of running episodes fell from {before} to {rows} ({text}). If the policy stores a "
                "recurrent state with one row per environment, return that state from the policy and pass "
                "initial_state, or use a single environment."
            )
        return ""


def _infos_of(infos: Any, num_envs: int, chosen: NDArray[np.int64]) -> Any:
    """Select the entries for the chosen sub-environments from the infos that a vector environment returned.

    Lists and arrays are indexed if they have one entry per sub-environment. Other values are returned unchanged.
    """
    if isinstance(infos, Mapping):
        return {name: _infos_of(part, num_envs, chosen) for name, part in infos.items()}
    if isinstance(infos, (list, tuple)) and len(infos) == num_envs:
        return [infos[number] for number in chosen]
    has_rows = isinstance(infos, (np.ndarray, Tensor)) and infos.shape[:1] == (num_envs,)
    return infos[chosen] if has_rows else infos


def rows_of(tree: Any, batch_axes: BatchAxes, rows: slice | Tensor) -> Any:
    """Select rows from the tensors in nested containers. `batch_axes` maps each tensor's path to its batch axis."""
    for path, axis in batch_axes.items():
        tree = replace(tree, path, get(tree, path)[(slice(None),) * axis + (rows,)])
    return tree


def state_batch_axes(initial_state: Callable[[int], Any]) -> BatchAxes:
    """Map the path of each tensor in a recurrent state to the tensor's batch axis, whose length is the number of rows.

    `initial_state` returns the initial state for a given number of rows.
    """
    if not callable(initial_state):
        raise RolloutError(
            "initial_state must be a function that receives the number of rows in the batch and returns the initial "
            f"state, such as lambda rows: torch.zeros(1, rows, 64); got {type(initial_state).__name__}."
        )
    states = map(initial_state, (2, 3))
    two, three = (
        dict(with_rows(each)) | {path: leaf for path, leaf in leaves(each) if not leaf.dim()} for each in states
    )
    if not two or two.keys() != three.keys():
        raise RolloutError(
            "initial_state must return at least one tensor, and the same structure for any number of rows in the "
            f"batch. Number of tensors in initial_state(2): {len(two)}; in initial_state(3): {len(three)}."
        )
    axes = {}
    for path in two:
        lengths = enumerate(itertools.zip_longest(two[path].shape, three[path].shape))
        grown = {axis: pair for axis, pair in lengths if pair[0] != pair[1]}
        if [*grown.values()] != [(2, 3)]:
            raise RolloutError(
                f"state{path_text(path)} has shape {tuple(two[path].shape)} in initial_state(2) and "
                f"{tuple(three[path].shape)} in initial_state(3). Each tensor must have exactly one batch axis, "
                "whose length is the number of rows in the batch."
            )
        axes[path] = next(iter(grown))
    return axes
