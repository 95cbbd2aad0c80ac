"""What ablating channels together does to reaching the cheese, ranked among as many live channels drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chanpatch.patching import ActivationCache
from chanpatch.statistics import rank_among
from maze.analysis.effects import KINDS, ablation, level_batches, mean_intervals
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import first_hits
from maze.analysis.part import Study, Table, interval_cells, shown
from maze.analysis.tables import SITE

SETS = 19  # as many as a p-value takes
SET_LEVELS = 200  # that they are compared on, at most


def random_sets(
    study: Study, levels: Sequence[bytes], group: Sequence[int], reference: ActivationCache, *, seed: int
) -> Table:
    """One row per kind of ablation: the group's effect on P(cheese), and its rank; none where there are no other sets.

    The sets are drawn among all live channels, those of the group too: half of the channels leave only one other half.

    Args:
        study: of the policy.
        levels: of which the first `SET_LEVELS` are taken.
        group: channels that are ablated together.
        reference: activations that give means and donors.
        seed: of the sets and the donors.
    """
    levels, drawn = levels[:SET_LEVELS], different_sets(study.selection.live, [group], seed)
    if not drawn:
        return []
    interventions = {
        f"{kind} {number}": ablation(study.points, kind, channels, reference, seed=seed)
        for kind in KINDS
        for number, channels in enumerate([group, *drawn])
    }
    parts = [
        first_hits(chains, tables, [chains.cheese])[:, chains.start, 0]
        for chains, tables in level_batches(study.points, levels, {ORIGINAL: (), **interventions}, site=SITE)
    ]
    found = np.concatenate(parts, axis=1)
    effects = mean_intervals(found[1:] - found[0])
    rows: Table = []
    for number, kind in enumerate(KINDS):
        own, *others = effects[number * (1 + len(drawn)) : (number + 1) * (1 + len(drawn))]
        among = [each.estimate for each in others]
        rank = rank_among(own.estimate, among)
        cells = {"kind": kind, "ablated": f"top {len(group)}", "n": len(levels), **interval_cells("effect", own)}
        rank_cells = {"rank": rank.rank, "controls": rank.controls, "rank_p": rank.p}
        rows.append({**cells, **rank_cells, "controls_lowest": min(among), "controls_highest": max(among)})
    return rows


def different_sets(live: Sequence[int], tested: Sequence[Sequence[int]], seed: int) -> list[tuple[int, ...]]:
    """Random sets of the live channels, as large as the tested ones and none of them; fewer where there are no more."""
    rng, count = np.random.default_rng(seed), len(tested[0])
    # Where hardly more channels live than a set takes, the same sets come up again: tries are limited.
    drawn = {tuple(sorted(rng.permutation(live)[:count].tolist())): None for _ in range(10 * SETS)}
    return [each for each in drawn if each not in {tuple(sorted(other)) for other in tested}][:SETS]


def told_sets(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in words."""
    if not rows:
        return ""
    told = "; ".join(
        f"{row['kind']} {shown(row, 'effect', '+.3f')}, rank {row['rank']} of {row['controls'] + 1} "
        f"({_told_p(row)}), the sets {row['controls_lowest']:+.3f} to {row['controls_highest']:+.3f}"
        for row in rows
    )
    return (
        f"The {rows[0]['ablated']} together, among {rows[0]['controls']} random sets of as many live channels, "
        f"n={rows[0]['n']}: {told}. "
    )


def _told_p(row: Mapping[str, Any]) -> str:
    return "too few for a p-value" if row["rank_p"] is None else f"p = {row['rank_p']:.2g}"
