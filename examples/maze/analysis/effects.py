"""What interventions do on many levels, exactly: tables of some levels at a time, and the effects that follow.

for chains, tables in level_batches(points, levels, interventions):       # tables (intervention, state, action)
    found.append(first_hits(chains, tables, [chains.cheese])[:, chains.start, 0])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from tqdm import tqdm

from chanpatch import HookPoints, Patch, mean_ablate, patch_in, recording, zero_ablate
from chanpatch.patching import ActivationCache
from chanpatch.patching.edits import donor_rows
from chanpatch.statistics import Interval, mean_interval
from maze.analysis.exact import Chains, cheese_and_corner, decisions
from maze.analysis.part import Table, interval_cells
from maze.analysis.tables import SITE, Intervention, action_tables
from maze.environment.levels import observe, policy_input

Kind: TypeAlias = Literal["zero", "mean", "resample"]
KINDS: tuple[Kind, ...] = ("zero", "mean", "resample")

DESTINATIONS = {
    "found": "P(cheese within 256 steps)",
    "corner": "P(corner before the cheese)",
    "to_cheese": "decision square: P(first to the cheese)",
    "to_corner": "decision square: P(first to the corner)",
}

_STYLES = [
    {"color": color, "marker": marker}
    for color, marker in zip(("black", "tab:orange", "tab:blue", "tab:green", "tab:purple"), "os^Dv", strict=True)
]
_GREY = {"color": "0.5", "marker": "|"}

_LEVELS = 200  # whose tables are in memory at once
_BATCH = 64  # observations in one forward


def level_batches(
    points: HookPoints, levels: Sequence[bytes], interventions: Mapping[str, Intervention], *, site: str = SITE
) -> Iterator[tuple[Chains, NDArray[np.float32]]]:
    """Yields the chains of some levels at a time, and the policy's tables on them: (intervention, state, action).

    Args:
        points: of the policy.
        levels: procgen states.
        interventions: as in `action_tables`; functions get the level's index among all `levels`.
        site: as in `action_tables`.
    """
    with tqdm(total=len(levels), desc="levels", unit="level", delay=2, leave=False) as progress:
        for first in range(0, len(levels), _LEVELS):
            chains = Chains.of(levels[first : first + _LEVELS])
            here = {name: _counted_from(first, each) for name, each in interventions.items()}
            yield chains, np.stack(list(action_tables(points, chains, here, site=site).values()))
            progress.update(len(chains.levels))


def activations(points: HookPoints, levels: Sequence[bytes], site: str) -> ActivationCache:
    """The activation at a hook point on every level: (level, channel, row, col)."""
    inputs = torch.from_numpy(policy_input(observe(levels))).to(next(points.model.parameters()).device)
    with recording(points, site) as cache, torch.no_grad():
        for batch in inputs.split(_BATCH):
            points.model(batch)
    return cache


def ablation(
    points: HookPoints, kind: Kind, channels: Sequence[int], reference: ActivationCache, *, seed: int
) -> Intervention:
    """The intervention that ablates channels of `SITE`.

    Args:
        points: of the policy.
        kind: to zero, to the mean over the reference levels (of every cell its own), or to the activation of one
            reference level, drawn for each level and kept for its whole episode. The draw is that of
            `chanpatch.resample_ablate` in a forward whose rows are the levels, outside a rollout.
        channels: all of them together.
        reference: activations at `SITE`.
        seed: of the draw.
    """
    site = points.site(SITE, channel=list(channels))
    if kind == "zero":
        return [zero_ablate(site)]
    if kind == "mean":
        return [mean_ablate(site, reference)]
    donors = reference[SITE][:, list(channels)]

    def resampled(level: NDArray[np.int64]) -> Sequence[Patch]:
        return [patch_in(site, donors[donor_rows(seed, 0, torch.from_numpy(level), len(donors))])]

    return resampled


def destinations(chains: Chains, tables: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Where the mouse gets to under every table, as `DESTINATIONS` names it: (table, level), NaN where undefined."""
    found, corner = cheese_and_corner(chains, tables)
    to_cheese, to_corner, _ = np.moveaxis(decisions(chains, tables), -1, 0)
    return dict(zip(DESTINATIONS, (found, corner, to_cheese, to_corner), strict=True))


def joined(batches: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """The levels of all batches side by side: (table, level) by name."""
    return {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in batches[0]}


def effect_rows(values: Mapping[str, NDArray[np.float64]], names: Sequence[str]) -> Table:
    """One row per measure and intervention: means over levels and the effect, with 95% intervals.

    A measure that no level has gives no rows.

    Args:
        values: by measure, (1 + intervention, level), the original first.
        names: of the interventions.
    """
    rows: Table = []
    for measure, of in values.items():
        known = of[:, np.isfinite(of[0])]
        if not known.shape[1]:
            continue
        original, *modified = mean_intervals(known)
        effects = mean_intervals(known[1:] - known[0])
        for name, mean, effect in zip(names, modified, effects, strict=True):
            rows.append(
                {
                    "measure": measure,
                    "intervention": name,
                    "n": known.shape[1],
                    **interval_cells("original", original),
                    **interval_cells("modified", mean),
                    **interval_cells("effect", effect),
                }
            )
    return rows


def draw_effects(axes: Axes, rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    """All effects by measure, each intervention with a mark of its own and its interval; controls in grey.

    Args:
        axes: to draw into.
        rows: as of `effect_rows`; interventions whose names begin with "control" are drawn alike.
        labels: of the measures.
    """
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    names = list(dict.fromkeys(_kind(row) for row in rows))
    for row in rows:
        number = names.index(_kind(row))
        height = len(measures) - measures.index(row["measure"]) + 0.7 * (0.5 - (number + 0.5) / len(names))
        style = _GREY if _kind(row) == "controls" else _STYLES[number]
        if style is not _GREY:
            axes.plot([row["effect_low"], row["effect_high"]], [height] * 2, color=style["color"])
        axes.plot(row["effect"], height, linestyle="none", markersize=6, **style)
    for number, name in enumerate(names):
        axes.plot([], [], linestyle="none", label=name, **(_GREY if name == "controls" else _STYLES[number]))
    counts = {row["measure"]: row["n"] for row in rows}
    axes.set_yticks(
        range(len(measures), 0, -1), [f"{labels[measure]}\n(n={counts[measure]})" for measure in measures], fontsize=8
    )
    axes.set_ylim(0.4, len(measures) + 0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of the probability, 95% interval over levels")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def mean_intervals(values: NDArray[np.float64]) -> list[Interval]:
    """The mean over levels and its 95% interval, of every row of (row, level)."""
    mean = mean_interval(values.T)
    ends = zip(mean.estimate.tolist(), mean.low.tolist(), mean.high.tolist(), mean.note.tolist(), strict=True)
    return [Interval(estimate, low, high, mean.confidence, note) for estimate, low, high, note in ends]


def _kind(row: Mapping[str, Any]) -> str:
    return "controls" if row["intervention"].startswith("control") else row["intervention"]


def _counted_from(first: int, intervention: Intervention) -> Intervention:
    """The intervention on levels that are numbered from 0 again."""
    if not callable(intervention):
        return intervention
    function: Callable[[NDArray[np.int64]], Sequence[Patch]] = intervention
    return lambda level: function(level + first)
