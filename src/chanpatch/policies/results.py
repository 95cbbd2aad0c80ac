"""Results from rollouts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from ..errors import RolloutError, counted
from ..plots import survival
from ..results import ROWS, Effects, Records, columns, interval_notes, largest_first, shown_effect
from ..statistics.flips import ranked_interval
from ..statistics.interval import Interval, picked
from ..statistics.means import snapped
from ..statistics.ranking import Alternative, Rank, ranked_records, ranks_among

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROUNDING = 1e-12  # relative rounding error in a sum of rewards


@dataclass(frozen=True, repr=False, eq=False)
class Rollout(Records):
    """Results of the episodes that one policy played: one episode per seed, in the order of the seeds.

    Attributes:
        seeds: Seed of each episode.
        returns: Sum of the rewards in each episode.
        lengths: Number of steps in each episode.
        terminated: Whether each episode reached a terminal state.
        truncated: Whether each episode was cut off by the environment or at `max_steps`.
        actions: One array of actions, with shape `(step, ...)`, per episode.
        seen: One array of checksums, with shape `(1 + step,)`, per episode: first a checksum of the first observation,
            then, for each step, one checksum of the step's reward and new observation.
        settings: Dict with the values of the arguments `max_steps`, `sampling_seed` and `greedy`, and with `masked`,
            which is True if action masks were used.
        rewards: One array of rewards, with shape `(step,)`, per episode.
        kept: Dict that maps each name in the argument `keep` to a tuple with one entry per episode. An entry for
            `"observations"` is an array with shape `(step, ...)`, or a dict or tuple of such arrays. An entry for
            `"final_state"` is the recurrent state after the last step, with one row. An entry for an info is an array
            with shape `(1 + step, ...)`, whose first value is the info from `reset`. Missing infos are None.

    Rollouts with different seeds and equal settings can be joined with `+`.

    Raises:
        RolloutError: If two rollouts to be joined have a seed in common or have different settings.
    """

    seeds: tuple[int, ...]
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    actions: tuple[NDArray[Any], ...]
    seen: tuple[NDArray[np.uint64], ...]
    settings: Mapping[str, Any]
    rewards: tuple[NDArray[np.float64], ...] = ()
    kept: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seeds)

    def __add__(self, other: Rollout) -> Rollout:
        if not isinstance(other, Rollout):
            return NotImplemented
        _check_parts(self, other)
        return concatenated(self, other)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per episode, with keys seed, return, length, terminated and truncated."""
        ends = {"terminated": self.terminated, "truncated": self.truncated}
        return columns(seed=self.seeds, **{"return": self.returns}, length=self.lengths, **ends)

    def _lines(self) -> list[dict[str, Any]]:
        return [{**record, "return": f"{record['return']:g}"} for record in self.to_records()]

    def _title(self) -> str:
        return f"{len(self)} episodes"


@dataclass(frozen=True, repr=False, eq=False)
class PairedRollouts(Effects, Mapping[str, Rollout]):
    """Rollouts of several policies in the same episodes. The first policy is compared with each of the others.

    Attributes:
        rollouts: Dict that maps each policy's name to the policy's Rollout.
        remarks: Notes on the intervals, shown below the table.

    Results with the same policies and different seeds can be joined with `+`.

    Raises:
        RolloutError: If two policies have different seeds or settings, or if an episode differs between two policies
            before the actions in the episode differ. Also if two results to be joined have different policies or have a
            seed in common.
    """

    rollouts: Mapping[str, Rollout]
    remarks: tuple[str, ...] = field(default=(), kw_only=True)
    _whole: PairedRollouts | None = field(default=None, kw_only=True)  # the result before `top` selected policies
    _by_row = ("labels",)

    def __post_init__(self) -> None:
        for name, other in self.rollouts.items():
            _check_pair(self._original, other, f"'{next(iter(self.rollouts))}' and {name!r}")

    def __getitem__(self, name: str) -> Rollout:
        return self.rollouts[name]

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            return NotImplemented
        if self._whole or other._whole or [*self] != [*other]:
            raise RolloutError(
                "Two results can be joined only if they have the same policies in the same order; got "
                f"[{', '.join(map(repr, self))}] and [{', '.join(map(repr, other))}]. Join them before calling top()."
            )
        return replace(self, **self._joined(other))

    def __iter__(self) -> Iterator[str]:
        return iter(self.rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of all policies except the first."""
        return tuple(self)[1:]

    def differences(self) -> NDArray[np.float64]:
        """Return each policy's return minus the first policy's return in each episode, with shape `(policy, episode)`.

        The first policy is not included.
        """
        first = self._original
        differences = [self[label].returns - first.returns for label in self.labels]
        return np.array(differences).reshape(len(self.labels), len(first))

    def effect(self) -> NDArray[np.float64]:
        """Return each policy's mean return minus the first policy's mean return, with shape `(policy,)`.

        The first policy is not included.
        """
        found: NDArray[np.float64] = self.differences().mean(axis=1)
        return found

    def interval(self, *, seed: int = 0) -> Interval[NDArray[np.float64]]:
        """Return the effects with 95% intervals over episodes. Episodes with the same seed form one cluster.

        The intervals hold jointly for all policies, so they remain valid for policies selected by `top`. If differences
        are strongly skewed, too many intervals miss the true effect (see the page on statistics): measure the selected
        policies again with new seeds. As in `chanpatch.statistics.mean_interval`, intervals from six to nine seeds are
        marked, and intervals from fewer than six seeds are withheld.
        """
        whole = self._whole or self
        if not whole.labels:
            return Interval(np.zeros(0), np.zeros(0), np.zeros(0), 0.95, np.zeros(0, dtype=np.str_))
        every = ranked_interval(whole._snapped(), clusters=whole._original.seeds, seed=seed)
        return picked(every, [whole.labels.index(label) for label in self.labels])

    def comparisons(self) -> list[dict[str, Any]]:
        """Return one record per policy except the first.

        Each record contains the policy's name (`label`), the `effect` with a 95% interval (`low`, `high`, `note`), and
        the number of episodes (`n`). It also contains the mean return of the policy (`patched`) and of the first policy
        (`original`).
        """
        interval = self.interval()
        return columns(
            label=self.labels,
            effect=self.effect(),
            low=interval.low,
            high=interval.high,
            note=interval.note,
            patched=[float(self[label].returns.mean()) for label in self.labels],
            original=[float(self._original.returns.mean())] * len(self.labels),
            n=[len(self._original)] * len(self.labels),
        )

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per policy and episode, with keys policy, seed, return, length, terminated and truncated."""
        return [{"policy": name, **record} for name in self for record in self[name].to_records()]

    @property
    def effect_label(self) -> str:
        """Label of the effect axis in figures."""
        return f"difference in mean return, n = {self._episodes}"

    def plot_curves(self, values: Literal["returns", "lengths"] = "returns", ax: Axes | None = None) -> Axes:
        """Plot survival curves: for each value, the fraction of episodes whose return or length is above that value.

        The figure shows the first policy and the five other policies with the largest absolute effects. See
        `chanpatch.plots.survival`.
        """
        labels = {"returns": "return", "lengths": "episode length (steps)"}
        if values not in labels:
            raise RolloutError(f"values must be 'returns' or 'lengths'; got {values!r}.")
        shown = {str(name): getattr(rollout, values) for name, rollout in self.top(5).rollouts.items()}
        return survival(shown, ax, label=labels[values])

    def _effects(self) -> list[dict[str, Any]]:
        return self.comparisons()

    def _rows(self, rows: NDArray[np.int64]) -> Self:
        first, *others = self
        rollouts = {name: self[name] for name in (first, *(others[row] for row in rows))}
        return replace(self, rollouts=rollouts, _whole=self._whole or self)

    def _lines(self) -> list[dict[str, Any]]:
        compared = [shown_effect("difference", each) for each in self.comparisons()]
        compared.insert(0, dict.fromkeys(compared[0], "") if compared else {})
        return [
            {
                "policy": name,
                "mean return": f"{rollout.returns.mean():.4g}",
                **difference,
                "mean length": f"{rollout.lengths.mean():.4g}",
                "terminated": f"{rollout.terminated.mean():.1%}",
            }
            for (name, rollout), difference in zip(self.rollouts.items(), compared, strict=True)
        ]

    def _title(self) -> str:
        return f"{len(self)} policies over the same {self._episodes}"

    def _notes(self) -> list[str]:
        return [*interval_notes(self.interval().note), *self.remarks]

    def _joined(self, other: Self) -> dict[str, Any]:
        """Join this result with `other`. Return a dict that maps each field of the joined result to its value."""
        remarks = tuple(dict.fromkeys((*self.remarks, *other.remarks)))
        return {"rollouts": _joined(self.rollouts, other.rollouts), "remarks": remarks}

    @property
    def _original(self) -> Rollout:
        return next(iter(self.rollouts.values()))

    @property
    def _episodes(self) -> str:
        episodes, seeds = len(self._original), len({*self._original.seeds})
        return f"{episodes} episodes" + f" ({seeds} seeds)" * (seeds < episodes)

    def _snapped(self) -> NDArray[np.float64]:
        """Return the differences without rounding error, transposed to shape `(episode, policy)`."""
        return snapped(self.differences().T, self._original.returns[:, None], _ROUNDING)


def concatenated(one: Rollout, other: Rollout) -> Rollout:
    """Join two rollouts with the settings of the first."""
    parts = [(each.name, getattr(one, each.name), getattr(other, each.name)) for each in fields(one)]
    return Rollout(**{name: one if name == "settings" else _joined(one, two) for name, one, two in parts})


def _joined(one: Any, other: Any) -> Any:
    """Join two arrays, two tuples or two rollouts. For two dicts with equal keys, join the two values of each key."""
    if isinstance(one, Mapping):
        return {name: _joined(each, other[name]) for name, each in one.items()}
    return np.concatenate([one, other]) if isinstance(one, np.ndarray) else one + other


def _check_parts(one: Rollout, other: Rollout) -> None:
    """Raise an error if two rollouts have a seed in common or have different settings."""
    if shared := {*one.seeds} & {*other.seeds}:
        raise RolloutError(
            f"Both results contain seed {min(shared)}. Episodes with this seed use the same random numbers, so they "
            "are not independent. Play all episodes that share a seed in one call."
        )
    settings, others = ({**each.settings, "keep": [*each.kept]} for each in (one, other))
    _check_settings(settings, others, "The results cannot be joined")


def _check_settings(settings: Mapping[str, Any], others: Mapping[str, Any], consequence: str) -> None:
    for name, value in settings.items():
        if others[name] != value:
            raise RolloutError(f"{consequence} because {name} differs: {value} vs. {others[name]}.")


def _check_pair(first: Rollout, other: Rollout, names: str) -> None:
    """Raise an error if two rollouts have different seeds or settings, or if an episode differs before the actions do.

    `names` is text for the error message that names both rollouts.
    """
    if first.seeds != other.seeds:
        raise RolloutError(f"{names} cannot be compared because their rollouts used different seeds.")
    _check_settings(first.settings, other.settings, f"{names} cannot be compared")
    ends = [[*zip(each.lengths, each.terminated, each.truncated, strict=True)] for each in (first, other)]
    for episode, seed in enumerate(first.seeds):
        taken, others = first.actions[episode], other.actions[episode]
        shorter = min(len(taken), len(others))
        apart = (taken[:shorter] != others[:shorter]).reshape(shorter, -1).any(axis=1)
        steps = int(apart.argmax()) if apart.any() else shorter  # number of steps before the first action that differs
        unlike = first.seen[episode][: steps + 1] != other.seen[episode][: steps + 1]
        if unlike.any() or (not apart.any() and ends[0][episode] != ends[1][episode]):
            when = int(unlike.argmax()) if unlike.any() else steps
            masks = "masks are random, or " if first.settings.get("masked") else ""
            raise RolloutError(
                f"{names} cannot be compared because episode {episode} (seed {seed}) differs at step {when}, before "
                f"the actions differ: the seed does not determine the episode. Likely reasons: {masks}the environment "
                "ignores the seed or has another source of randomness, or a wrapper carries state across episodes "
                "(EpisodicLifeEnv: lives; NormalizeObservation, NormalizeReward, VecNormalize: running statistics). "
                "Remove such a wrapper, or freeze its statistics (update_running_mean = False)."
            )


ORIGINAL = "original"  # the label of the unpatched policy in a sweep


@dataclass(frozen=True, repr=False, eq=False)
class SweptRollouts(PairedRollouts):
    """Rollouts of the unpatched policy, labeled `"original"`, and of the policy with the patches of each label.

    Attributes:
        rollouts: Dict that maps each label to a Rollout, without the controls. The rollout of the unpatched policy
            comes first.
        controls: Dict that maps the label of each control to a Rollout; None if there are no controls.
        no_p: Reason why ranks among the controls have no p-values, or an empty string if p-values are available.
    """

    controls: Mapping[str, Rollout] | None = None
    no_p: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._paired_controls  # noqa: B018  # raises an error if a control cannot be compared

    @functools.cached_property
    def _paired_controls(self) -> PairedRollouts:
        return PairedRollouts({next(iter(self)): self._original, **(self.controls or {})})

    def ranks(self, *, alternative: Alternative = "two-sided") -> list[Rank | None]:
        """Rank each effect among the control effects, as `chanpatch.statistics.rank_among` does.

        A p-value requires at least 19 controls, and is valid only for a patch that was not selected for its effect. A
        rank is None if the effect is not finite. All ranks are None if there are no controls, or if a control effect is
        not finite.
        """
        effects, controls = (each._snapped().mean(axis=0) for each in (self, self._paired_controls))
        return ranks_among(effects, controls, alternative, self.no_p)

    def comparisons(self) -> list[dict[str, Any]]:
        """Return one record per label except `"original"`, as in `PairedRollouts`, with the controls last.

        If there are controls, each record also contains `control` (True for controls), `rank`, `p`, and `no_p` (the
        reason for a missing p-value).
        """
        records = super().comparisons()
        if self.controls is None:
            return records
        return ranked_records(records, self.ranks(), self._paired_controls.comparisons())

    def _joined(self, other: Self) -> dict[str, Any]:
        if [*(self.controls or ())] != [*(other.controls or ())]:
            raise RolloutError("Two sweeps can be joined only if they have the same controls in the same order.")
        controls = None if self.controls is None else _joined(self.controls, other.controls)
        return {**super()._joined(other), "controls": controls, "no_p": self.no_p or other.no_p}

    def _lines(self) -> list[dict[str, Any]]:
        names = ("patched", "original", *(("rank", "p") if self.controls else ()))
        records = [each for each in self.comparisons() if not each.get("control")]
        if len(records) > ROWS:  # the table shows only the largest effects
            records = [records[row] for row in largest_first([each["effect"] for each in records])]
        return [
            {"label": each["label"], **shown_effect("effect", each), **{name: each[name] for name in names}}
            for each in records
        ]

    def _title(self) -> str:
        return f"{counted(len(self.labels), 'patch')}, mean return over the same {self._episodes}"

    def _notes(self) -> list[str]:
        notes = super()._notes()
        notes += [] if self.controls is None else [f"Ranks are among {len(self.controls)} controls."]
        return notes + sorted({f"No p-values: {rank.no_p}" for rank in self.ranks() if rank and rank.no_p})
