"""Options for the episodes in a rollout, and a log of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import RolloutError
from ..statistics.interval import whole
from .actions import draw_streams, repetitions
from .decisions import Masks, Outputs
from .results import Rollout, concatenated

InitialState: TypeAlias = Callable[[int], Any]
_OBSERVATIONS, _STATE = "observations", "final_state"  # names in `keep` that do not refer to infos
_COLUMNS = ("seeds", "returns", "lengths", "terminated", "truncated", "actions", "seen", "rewards")
_INFOS = "infos"  # in the settings of `Log.played`: names of the infos from the environments


class Options(NamedTuple):
    """Options for `rollout`, `paired_rollouts` and `rollout_sweep`."""

    seeds: Sequence[int]
    max_steps: int
    sampling_seed: int
    greedy: bool
    outputs: Outputs | None
    masks: Masks | None
    initial_state: InitialState | None
    progress: bool | None
    keep: Sequence[str]


def checked_seeds(seeds: Iterable[int]) -> list[int]:
    """Return the seeds as a list of ints; raise RolloutError unless there is at least one seed and all are valid."""
    if not isinstance(seeds, Iterable):
        raise RolloutError(f"seeds must contain one seed per episode, such as range(100); got {seeds!r}.")
    checked = [whole("A seed", seed, error=RolloutError) for seed in seeds]
    if max(checked, default=0) >= 2**63:
        raise RolloutError(f"A seed must be less than 2**63, to fit in int64; got {max(checked)}.")
    if not checked:
        raise RolloutError("seeds is empty: pass one seed per episode.")
    return checked


class Log:
    """The results and random generators of all plays.

    A play is one repetition of an episode. Plays are numbered by repetition and then by episode. `part` is the range of
    plays to run in this process.
    """

    def __init__(self, options: Options, part: range, times: int, label: str | None) -> None:
        self.episodes, plays = len(options.seeds), times * len(options.seeds)
        self.seeds = tuple(options.seeds) * times
        self._options, self._part = options, part
        self.published = {
            "label": label,
            "sampling_seed": options.sampling_seed,
            "seeds": np.array(options.seeds, object),
            "repetitions": repetitions(options.seeds),
        }
        self.streams = [stream for _ in range(times) for stream in draw_streams(options.sampling_seed, options.seeds)]
        self.returns = np.zeros(plays)
        self.terminated, self.truncated = np.zeros((2, plays), dtype=np.bool_)
        self.taken: list[tuple[NDArray[np.int64], NDArray[Any]]] = []  # per step: numbers of plays, actions
        self.checked: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []  # per step: numbers of plays, checksums
        self.gained: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []  # per step: numbers of plays, rewards
        names = [options.keep] if isinstance(options.keep, str) else options.keep
        self._kept: dict[str, list[list[Any]]] = {name: [[] for _ in range(plays)] for name in names}
        self._infos = self._kept.keys() - {_OBSERVATIONS, _STATE}
        self._known_infos: set[str] = set()
        if _STATE in self._kept and options.initial_state is None:
            raise RolloutError(
                f"keep contains '{_STATE}', but the policy is not recurrent. Pass initial_state, or omit '{_STATE}'."
            )

    def add(
        self, plays: NDArray[np.int64], actions: NDArray[Any], rewards: NDArray[np.float64], seen: NDArray[np.uint64]
    ) -> None:
        """Add one step to the results of the plays with the given numbers.

        `seen` contains checksums of the new observations. All arrays contain one value per play, in the same order.
        """
        self.returns[plays] += rewards
        self.gained.append((plays, rewards))
        self.taken.append((plays, actions))
        self.checked.append((plays, seen ^ (rewards + 0.0).view(np.uint64)))  # -0.0 equals 0.0

    def keep_observations(self, plays: NDArray[np.int64], observations: Any) -> None:
        """If `keep` contains "observations", store one observation for each of the plays with the given numbers."""
        if _OBSERVATIONS in self._kept:
            for row, play in enumerate(plays):
                self._kept[_OBSERVATIONS][play].append(rows_of_observations(observations, row))

    def keep_infos(
        self, plays: NDArray[np.int64], infos: dict[str, Any], rows: NDArray[np.int64], over: NDArray[np.bool_]
    ) -> None:
        """Store the infos named in `keep` for the plays with the given numbers.

        `rows` contains the sub-environment of each play. `over` is True for sub-environments whose episode just ended.
        """
        if not self._infos:
            return
        if not isinstance(infos, Mapping):
            raise RolloutError(
                f"keep contains {min(self._infos)!r}, which requires a dict of infos from the environments; got "
                f"{type(infos).__name__}. Remove the wrapper that converts the infos, such as DictInfoToList."
            )
        final = infos.get("final_info", infos)  # after a reset in the same step, infos describe the next episode
        self._known_infos |= {each for each in (*infos, *final) if not each.startswith("_")}
        for name in self._infos:
            for play, row in zip(plays, rows, strict=True):
                # A vector wrapper (RecordEpisodeStatistics) adds infos of the finished episode after the reset.
                is_next = name in final or self._kept[name][play][:1] != [None]
                source = final if over[row] and is_next else infos
                is_known = name in source and source.get(f"_{name}", over | True)[row]
                self._kept[name][play].append(rows_of_observations(source[name], row) if is_known else None)

    def keep_state(self, play: int, state: Any) -> None:
        """If `keep` contains "final_state", store `state`, the recurrent state after the last step of a play."""
        if _STATE in self._kept:
            self._kept[_STATE][play] = state

    def played(self) -> Rollout:
        """Return this process's plays as one rollout, whose settings include the names of the environments' infos."""
        self.actions, self.seen, self.rewards = map(_by_play, (self.taken, self.checked, self.gained))
        self.lengths = np.array([*map(len, self.actions)])
        settings = {name: getattr(self._options, name) for name in ("max_steps", "sampling_seed", "greedy")}
        settings |= {"masked": self._options.masks is not None, _INFOS: self._known_infos}
        cut = slice(self._part.start, self._part.stop)
        kept = {name: each[cut] for name, each in self._kept.items()}
        return Rollout(
            **{name: getattr(self, name)[cut] for name in _COLUMNS},
            settings=settings,
            kept={name: tuple(each if name == _STATE else map(_stacked, each)) for name, each in kept.items()},
        )


def by_repetition(parts: Mapping[range, Rollout], episodes: int, *, complete: bool = True) -> dict[int, Rollout]:
    """Join rollouts, and return a dict that maps the number of each repetition to the rollout of that repetition.

    `parts` maps ranges of plays to rollouts. `episodes` is the number of episodes in a complete repetition. If
    `complete` is True, incomplete repetitions are left out.
    """
    for name in sorted(next(iter(parts.values())).kept.keys() - {_OBSERVATIONS, _STATE}):
        if all(each is None for played in parts.values() for values in played.kept[name] for each in values):
            known = sorted(set[str]().union(*(played.settings[_INFOS] for played in parts.values())))
            raise RolloutError(
                f"keep contains {name!r}, but the infos from the environments contain {', '.join(known) or 'nothing'}. "
                f"Pass names of infos, '{_OBSERVATIONS}' or '{_STATE}'."
            )
    found: dict[int, Rollout] = {}
    for plays, played in parts.items():
        settings = {name: value for name, value in played.settings.items() if name != _INFOS}
        for number in range(plays.start // episodes, (plays.stop - 1) // episodes + 1):
            first = number * episodes - plays.start
            cut = slice(max(first, 0), first + episodes)
            piece = Rollout(
                **{name: getattr(played, name)[cut] for name in _COLUMNS},
                settings=settings,
                kept={name: each[cut] for name, each in played.kept.items()},
            )
            found[number] = concatenated(found[number], piece) if number in found else piece
    return {number: each for number, each in found.items() if len(each) == episodes or not complete}


def _by_play(steps: Sequence[tuple[NDArray[np.int64], NDArray[Any]]]) -> tuple[NDArray[Any], ...]:
    """Split the values from all steps by play, and return one array with shape `(step, ...)` per play.

    Each step is a pair: the numbers of the plays that took this step, and an array with one value per such play.
    """
    plays, values = map(np.concatenate, zip(*steps, strict=True))
    order = np.argsort(plays, kind="stable")
    return tuple(np.split(values[order], np.bincount(plays).cumsum()[:-1]))


def _stacked(values: list[Any]) -> Any:
    """Stack the values from all steps of an episode, one value per step.

    Numbers, and arrays with equal shapes, become a numeric array. Other values become an array of objects. Values
    inside dicts and tuples are stacked separately.
    """
    first = values[0]
    if isinstance(first, Mapping) and all(isinstance(each, Mapping) and each.keys() == first.keys() for each in values):
        return {name: _stacked([each[name] for each in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(_stacked([*part]) for part in zip(*values, strict=True))
    if (
        all(each is not None for each in values)
        and len({*map(np.shape, values)}) == 1
        and not isinstance(first, Mapping)
    ):
        return np.array(values)
    found = np.empty(len(values), object)
    for step, each in enumerate(values):
        found[step] = each
    return found


def mapped(function: Callable[[Any], Any], observations: Any) -> Any:
    """Apply a function to each array in observations, which may be nested in dicts and tuples."""
    if isinstance(observations, Mapping):
        return {name: mapped(function, part) for name, part in observations.items()}
    if isinstance(observations, tuple):
        return tuple(mapped(function, part) for part in observations)
    return function(observations)


def rows_of_observations(observations: Any, rows: Any) -> Any:
    """Select the given rows from observations, which may be nested in dicts and tuples."""
    return mapped(lambda array: array[rows], observations)
