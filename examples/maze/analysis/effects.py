"""Exact effects of interventions on many levels, from the policy's tables of some levels at a time.

for chains, tables in level_batches(points, levels, interventions):       # tables (intervention, state, action)
    found.append(first_hits(chains, tables, [chains.cheese])[:, chains.start, 0])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from chanpatch import HookPoints, Patch, mean_ablate, patch_in, zero_ablate
from chanpatch.controls import random_sets
from chanpatch.patching import ActivationCache
from chanpatch.patching.edits import donor_rows
from chanpatch.statistics import Interval, mean_interval
from maze.analysis.cells import Table, cells, rank_cells, shown
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import Chains, cheese_and_corner, decisions, first_hits
from maze.analysis.forwards import SITE
from maze.analysis.part import Study
from maze.analysis.tables import Intervention, action_tables

Kind: TypeAlias = Literal["zero", "mean", "resample"]
KINDS: tuple[Kind, ...] = ("zero", "mean", "resample")

DESTINATIONS = {
    "found": "P(cheese within 256 steps)",
    "corner": "P(corner before the cheese)",
    "to_cheese": "decision square: P(first to the cheese)",
    "to_corner": "decision square: P(first to the corner)",
}
SETS = 19  # random sets: as many as a p-value takes
SET_LEVELS = 200  # levels that sets are compared on, at most

_LEVELS = 200  # whose tables are in memory at once

Values: TypeAlias = NDArray[np.float64]


def level_batches(
    points: HookPoints, levels: Sequence[bytes], interventions: Mapping[str, Intervention], *, site: str = SITE
) -> Iterator[tuple[Chains, NDArray[np.float32]]]:
    """Yields the chains of some levels at a time, and the policy's tables on them: (intervention, state, action).

    Arguments are those of `action_tables`; interventions get a level's index among all levels.
    """
    with tqdm(total=len(levels), desc="levels", unit="level", delay=2, leave=False) as progress:
        for first in range(0, len(levels), _LEVELS):
            chains = Chains.of(levels[first : first + _LEVELS])
            here = {name: _counted_from(first, each) for name, each in interventions.items()}
            yield chains, np.stack(list(action_tables(points, chains, here, site=site).values()))
            progress.update(len(chains.levels))


def p_cheese(
    points: HookPoints, levels: Sequence[bytes], interventions: Mapping[str, Intervention], *, site: str = SITE
) -> Values:
    """P(cheese within 256 steps) of the original and of every intervention: (1 + intervention, level)."""
    batches = level_batches(points, levels, {ORIGINAL: (), **interventions}, site=site)
    found = [first_hits(chains, tables, [chains.cheese])[:, chains.start, 0] for chains, tables in batches]
    return np.concatenate(found, axis=1)


def ablation(
    points: HookPoints, kind: Kind, channels: Sequence[int], reference: ActivationCache, *, seed: int
) -> Intervention:
    """Ablate channels of `SITE` together: to zero, to the mean over reference levels, or to one of these.

    The draw of the last is that of `chanpatch.resample_ablate` in a forward with the levels as rows.
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


def destinations(chains: Chains, tables: NDArray[np.float32]) -> dict[str, Values]:
    """Every measure of `DESTINATIONS` under every table: (table, level), NaN if a level does not have it."""
    found, corner = cheese_and_corner(chains, tables)
    to_cheese, to_corner, _ = np.moveaxis(decisions(chains, tables), -1, 0)
    return dict(zip(DESTINATIONS, (found, corner, to_cheese, to_corner), strict=True))


def joined(batches: Sequence[Mapping[str, Values]]) -> dict[str, Values]:
    """The levels of all batches side by side: (table, level) by name."""
    return {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in batches[0]}


def measured_on(values: Mapping[str, Values]) -> Iterator[tuple[str, Values]]:
    """Yields every measure with the levels that have it, (table, level), if there are any."""
    for measure, table in values.items():
        known = table[:, np.isfinite(table[0])]
        if known.shape[1]:
            yield measure, known


def effect_rows(values: Mapping[str, Values], names: Sequence[str]) -> Table:
    """One row per measure and intervention: means over levels and the effect, with intervals.

    `values` has (1 + intervention, level) by measure, the original first; `names` are those of the interventions.
    """
    rows: Table = []
    for measure, known in measured_on(values):
        original, *modified = mean_intervals(known)
        effects = mean_intervals(known[1:] - known[0])
        for name, mean, effect in zip(names, modified, effects, strict=True):
            row = {"measure": measure, "intervention": name, "n": known.shape[1], **cells("original", original)}
            rows.append(row | cells("modified", mean) | cells("effect", effect))
    return rows


def set_rows(
    study: Study, levels: Sequence[bytes], group: Sequence[int], reference: ActivationCache, *, seed: int
) -> Table:
    """The effect of ablating a group of channels on P(cheese), ranked among random sets of live channels.

    One row per kind of ablation, over the first `SET_LEVELS` levels; none if there are no other sets.
    """
    levels = levels[:SET_LEVELS]
    sets = [group, *random_sets(study.selection.live, len(group), count=SETS, seed=seed, other_than=[group])]
    if len(sets) == 1:
        return []
    interventions = {
        f"{kind} {number}": ablation(study.points, kind, channels, reference, seed=seed)
        for kind in KINDS
        for number, channels in enumerate(sets)
    }
    found = p_cheese(study.points, levels, interventions)
    effects = mean_intervals(found[1:] - found[0])
    rows: Table = []
    for number, kind in enumerate(KINDS):
        own, *others = effects[number * len(sets) : (number + 1) * len(sets)]
        row = {"kind": kind, "ablated": f"top {len(group)}", "n": len(levels)}
        rows.append(row | ranked_cells(own, [each.estimate for each in others]))
    return rows


def ranked_cells(effect: Interval, controls: Sequence[float]) -> dict[str, Any]:
    """An effect, its rank among controls, and the range of theirs, as cells."""
    ends = {"controls_lowest": min(controls), "controls_highest": max(controls)}
    return cells("effect", effect) | rank_cells(effect.estimate, controls) | ends


def rank_text(row: Mapping[str, Any]) -> str:
    """The cells of `ranked_cells` in words."""
    p = "too few for a p-value" if row["rank_p"] is None else f"p = {row['rank_p']:.2g}"
    return (
        f"{shown(row, 'effect', '+.3f')}, rank {row['rank']} of {row['controls'] + 1} ({p}), "
        f"controls {row['controls_lowest']:+.3f} to {row['controls_highest']:+.3f}"
    )


def mean_intervals(values: Values) -> list[Interval]:
    """The mean over levels and its interval, for every row of (row, level)."""
    mean = mean_interval(values.T)
    ends = zip(mean.estimate.tolist(), mean.low.tolist(), mean.high.tolist(), mean.note.tolist(), strict=True)
    return [Interval(estimate, low, high, mean.confidence, note) for estimate, low, high, note in ends]


def _counted_from(first: int, intervention: Intervention) -> Intervention:
    """The intervention on levels that are numbered from 0 again."""
    if not callable(intervention):
        return intervention
    return lambda level: intervention(level + first)
