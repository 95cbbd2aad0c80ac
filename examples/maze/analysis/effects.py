"""Exact effects of interventions on many levels, from the policy's tables of some levels at a time.

for chains, tables in level_batches(points, levels, interventions):       # tables (intervention, state, action)
    found.append(first_hits(chains, tables, [chains.cheese])[:, chains.start, 0])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from chanpatch import HookPoints, Patch, patch_in, zero_ablate
from chanpatch.controls import random_sets
from chanpatch.patching.edits import donor_rows
from chanpatch.statistics import Interval, mean_interval
from maze.analysis.cells import Integers, Row, Table, Values, shown
from maze.analysis.estimates import intervals, one_by_one, rank_cells
from maze.analysis.exact import ORIGINAL, Chains, cheese_and_corner, decisions, first_hits
from maze.analysis.forwards import SITE, activations
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
SETS = 19  # random sets: as many as a p-value requires
SET_LEVELS = 200  # maximum number of levels that sets are compared on
REFERENCES, REFERENCE_LEVELS = 20, 100  # reference sets for means and donors, and the levels in each set

_LEVELS = 200  # levels whose tables are in memory at once


def level_batches(
    points: HookPoints, levels: Sequence[bytes], interventions: Mapping[str, Intervention], *, site: str = SITE
) -> Iterator[tuple[Chains, NDArray[np.float32]]]:
    """Yields the chains of some levels at a time, and the policy's tables on them: (1 + intervention, state, action).

    The first table is the original policy's. Arguments as in `action_tables`, but an intervention gets a level's index
    among all levels.
    """
    with tqdm(total=len(levels), desc="levels", unit="level", delay=2, leave=False) as progress:
        for first in range(0, len(levels), _LEVELS):
            chains = Chains.of(levels[first : first + _LEVELS])
            here = {ORIGINAL: ()} | {name: _counted_from(first, each) for name, each in interventions.items()}
            yield chains, np.stack(list(action_tables(points, chains, here, site=site).values()))
            progress.update(len(chains.levels))


def p_reached(
    points: HookPoints,
    levels: Sequence[bytes],
    interventions: Mapping[str, Intervention],
    targets: Integers | None = None,
    site: str = SITE,
) -> Values:
    """P(target within 256 steps), the cheese unless cells (level, 2) are given: (1 + intervention, level)."""
    parts = []
    first = 0
    for chains, tables in level_batches(points, levels, interventions, site=site):
        goal = chains.cheese if targets is None else chains.at(targets[first : first + len(chains.levels)])
        parts.append(first_hits(chains, tables, [goal])[:, chains.start, 0])
        first += len(chains.levels)
    return np.concatenate(parts, axis=1)


def references(study: Study, purpose: str, **places: Any) -> Tensor:
    """Activations at `SITE` on sets of levels with seeds of their own: (reference, level, channel, row, col)."""
    drawn = (study.levels(f"{purpose} {number}", REFERENCE_LEVELS, **places) for number in range(REFERENCES))
    return torch.stack([activations(study.points, levels, SITE)[SITE] for levels in drawn])


def reference_of(kind: str, n: int) -> Integers | None:
    """The reference set for each of n levels, as clusters for intervals; None for zero ablation.

    Levels take turns, so that each reference set is used on levels of its own.
    """
    return None if kind == "zero" else np.arange(n) % REFERENCES


def ablation(points: HookPoints, kind: Kind, channels: Sequence[int], sets: Tensor, *, seed: int) -> Intervention:
    """Ablate channels of `SITE` together: to zero, or to the mean or a random row of the level's reference set.

    `sets` are the activations from `references`. Random rows are drawn as by `chanpatch.resample_ablate` in a forward
    pass with the levels as rows.
    """
    site = points.site(SITE, channel=list(channels))
    if kind == "zero":
        return [zero_ablate(site)]
    if kind == "mean":
        means = sets[:, :, list(channels)].mean(dim=1)
        return lambda level: [patch_in(site, means[torch.from_numpy(level) % len(means)])]

    def resampled(level: Integers) -> Sequence[Patch]:
        rows = torch.from_numpy(level)
        donors = donor_rows(seed, 0, rows, sets.shape[1])
        return [patch_in(site, sets[rows[:, None] % len(sets), donors[:, None], torch.tensor(channels)])]

    return resampled


def destinations(chains: Chains, tables: NDArray[np.float32]) -> dict[str, Values]:
    """Every measure of `DESTINATIONS` under every table: (table, level), NaN if a level does not have the measure."""
    found, corner = cheese_and_corner(chains, tables)
    to_cheese, to_corner, _ = np.moveaxis(decisions(chains, tables), -1, 0)
    return dict(zip(DESTINATIONS, (found, corner, to_cheese, to_corner), strict=True))


def joined(batches: Iterable[Mapping[str, Values]]) -> dict[str, Values]:
    """The levels of all batches side by side: (table, level) by name."""
    every = list(batches)
    return {name: np.concatenate([batch[name] for batch in every], axis=1) for name in every[0]}


def measured_on(values: Mapping[str, Values]) -> Iterator[tuple[str, Values]]:
    """Yields every measure that at least one level has, on the levels that have the measure: (table, level)."""
    for measure, table in values.items():
        known = table[:, np.isfinite(table[0])]
        if known.shape[1]:
            yield measure, known


def effect_rows(values: Mapping[str, Values], names: Sequence[str]) -> Table:
    """One row per measure and intervention: means over levels and the effect, with intervals.

    `values` has (1 + intervention, level) by measure, the original first; `names` are the interventions' names.
    """
    rows = []
    for measure, known in measured_on(values):
        original, *modified = mean_intervals(known)
        effects = mean_intervals(known[1:] - known[0])
        for name, mean, effect in zip(names, modified, effects, strict=True):
            row = {"measure": measure, "intervention": name, "n": known.shape[1]}
            rows.append(row | intervals(original=original, modified=mean, effect=effect))
    return rows


def set_rows(study: Study, levels: Sequence[bytes], group: Sequence[int], sets: Tensor, *, seed: int) -> Table:
    """The effect of ablating a group of channels on P(cheese), ranked among random sets of live channels.

    One row per kind of ablation, over the first `SET_LEVELS` levels; no rows if there are no other sets of channels.
    """
    levels = levels[:SET_LEVELS]
    groups = [group, *random_sets(study.selection.live, len(group), count=SETS, seed=seed, other_than=[group])]
    if len(groups) == 1:
        return []
    interventions = {
        f"{kind} {number}": ablation(study.points, kind, channels, sets, seed=seed)
        for kind in KINDS
        for number, channels in enumerate(groups)
    }
    found = p_reached(study.points, levels, interventions)
    named, rows = {"ablated": f"top {len(group)}", "n": len(levels)}, []
    for kind, changes in zip(KINDS, np.split(found[1:] - found[0], len(KINDS)), strict=True):
        rows.append({"kind": kind, **named, **ranked_cells(changes, reference_of(kind, len(levels)))})
    return rows


def ranked_cells(changes: Values, clusters: Integers | None = None) -> Row:
    """The first effect of (effect, level), its rank among the others, and the range of the others, as cells."""
    own, *others = mean_intervals(changes, clusters)
    controls = [each.estimate for each in others]
    ends = {"controls_lowest": min(controls), "controls_highest": max(controls)}
    return intervals(effect=own) | rank_cells(own.estimate, controls) | ends


def rank_text(row: Mapping[str, Any]) -> str:
    p = "too few for a p-value" if row["rank_p"] is None else f"p = {row['rank_p']:.2g}"
    return f"{shown(row, 'effect', '+.3f')}, rank {row['rank']} of {row['controls'] + 1} ({p})"


def mean_intervals(values: Values, clusters: Integers | None = None) -> list[Interval]:
    """The mean over levels and its interval, for every row of (row, level), with the cluster of each level if given."""
    return one_by_one(mean_interval(values.T, clusters=clusters))


def _counted_from(first: int, intervention: Intervention) -> Intervention:
    """The intervention on levels that are numbered from 0 again."""
    if not callable(intervention):
        return intervention
    return lambda level: intervention(level + first)
