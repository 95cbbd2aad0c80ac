"""16 channels zeroed at once: what changes in the vector field, and does the mouse still arrive?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.statistics import rank_among
from maze.analysis.channels import pair_sums
from maze.analysis.effects import (
    DESTINATIONS,
    KINDS,
    Kind,
    ablation,
    activations,
    destinations,
    draw_effects,
    effect_rows,
    joined,
    level_batches,
)
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import Chains, move_probabilities
from maze.analysis.off_distribution import METERED, absolute_z, background, mouse_anywhere
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, column, shown, verdict
from maze.analysis.random_sets import different_sets
from maze.analysis.tables import SITE, action_tables
from maze.analysis.vector_fields import vector_field, vector_field_difference
from maze.environment.paths import Direction, decision_squares
from maze.environment.states import read_mazes

SIZE = 15
TOGETHER = 16
MOST_LEVELS = 300
REFERENCE = 200  # levels that give the means and the donors
REFERENCE_PLACES = {"cheese": "in distribution", "mouse": "anywhere"}
CHANGES = 0.1  # of the probability of a move, on average over the squares, from which on a field is another one
RARE = 0.01  # P(cheese) up to which there is nothing to keep
KEPT = 0.5  # of P(cheese): with more than that left the mouse still goes to the cheese
INSTEAD = {"mean": "the mean", "resample": "another level's activation"}
MEASURES = {"moves": "share of each move that goes elsewhere", **DESTINATIONS}

PAIR, TELLING, CONTROL = "pair", "telling", "control"  # what a set was chosen by

Values = NDArray[np.float64]


class Ablated(NamedTuple):
    """Channels that are ablated together, what they were chosen by, and how."""

    chosen: str
    kind: Kind
    channels: tuple[int, ...]


def measure(study: Study) -> dict[str, Table]:
    """What each set of channels changes, over levels; and the vector fields of one maze."""
    reference = activations(
        study.points, study.levels("top16 reference", REFERENCE, size=SIZE, **REFERENCE_PLACES), SITE
    )
    sets, seed = _sets(study), study.seed_for("top16 donors")
    interventions = {
        name: ablation(study.points, kind, channels, reference, seed=seed) for name, (_, kind, channels) in sets.items()
    }
    levels = study.levels("top16", min(study.n, MOST_LEVELS), size=SIZE, cheese="out of distribution")
    values = _measured(study, levels, {ORIGINAL: (), **interventions})
    some = mouse_anywhere(levels[:METERED], study.seed_for("top16 mouse"))
    # Other levels than those of the donors, which would be near themselves.
    usual = study.levels("top16 usual", METERED, size=SIZE, **REFERENCE_PLACES)
    live = study.selection.live
    far = {
        kind: absolute_z(study.points, ablation(study.points, kind, live, reference, seed=seed), some, usual)
        for kind in KINDS
        if kind != "mean"  # near 0 by construction
    }
    shown_level = int(np.argmax(decision_squares(read_mazes(levels))[1]))  # the first in which there is a choice
    field = _field(study, levels[shown_level], {ORIGINAL: (), "zeroed": next(iter(interventions.values()))})
    return {"effects": _rows(values, sets, far), "field": field}


def _sets(study: Study) -> dict[str, Ablated]:
    """The sets by name: the post's choice first, then the most telling channels, then the controls."""
    differences = np.abs(np.diff(pair_sums(study.points, SITE)[1], axis=1)).mean(axis=(0, 1))
    live = study.selection.live
    pair = tuple(sorted(live, key=lambda channel: -differences[channel])[:TOGETHER])
    top = study.selection.ranked[:TOGETHER]
    sets = {f"the pair's {len(pair)} {KINDS[0]}": Ablated(PAIR, KINDS[0], pair)}
    sets |= {f"top {len(top)} {kind}": Ablated(TELLING, kind, top) for kind in KINDS}
    others = different_sets(live, (pair, top), study.seed_for("top16 controls"))
    controls = {f"control {number}": Ablated(CONTROL, KINDS[0], each) for number, each in enumerate(others, 1)}
    return sets | controls


def _measured(study: Study, levels: Sequence[bytes], interventions: Mapping[str, Any]) -> dict[str, Values]:
    """Every measure of every intervention on every level, (intervention, level); NaN where a level does not have it."""
    batches = level_batches(study.points, levels, interventions)
    return joined([{"moves": _elsewhere(*batch), **destinations(*batch)} for batch in batches])


def _elsewhere(chains: Chains, tables: NDArray[np.float32]) -> Values:
    """The total variation between the moves of each table and the first one's, mean over states: (table, level)."""
    shares = move_probabilities(tables)
    apart = np.abs(shares - shares[0]).sum(axis=-1) / 2
    totals = np.stack([np.bincount(chains.level, weights=each, minlength=len(chains.levels)) for each in apart])
    return totals / np.bincount(chains.level, minlength=len(chains.levels))


def _rows(values: Mapping[str, Values], sets: Mapping[str, Ablated], far: Mapping[str, Mapping[int, float]]) -> Table:
    """One row per measure and set: the means over levels, the effect, its rank among the control sets, absolute z."""
    effects = effect_rows(values, list(sets))
    rows: Table = []
    for row in effects:
        chosen, kind, channels = sets[row["intervention"]]
        controls = [
            other["effect"]
            for other in effects
            if other["measure"] == row["measure"] and sets[other["intervention"]].chosen == CONTROL
        ]
        ranked = chosen != CONTROL and kind == KINDS[0] and controls
        rank = rank_among(row["effect"], controls) if ranked else None
        rows.append(
            {
                **row,
                "chosen": chosen,
                "kind": kind,
                "channels": " ".join(map(str, channels)),
                "count": len(channels),
                "rank": rank and rank.rank,
                "controls": rank and rank.controls,
                "rank_p": rank and rank.p,
                "absolute_z": float(np.nanmean([far[kind][channel] for channel in channels])) if kind in far else None,
                "absolute_z_against": background(SIZE) if kind in far else None,
            }
        )
    return rows


def _field(study: Study, level: bytes, interventions: Mapping[str, Any]) -> Table:
    """The probability of every move at every free square of one maze, mean of the two facings.

    None where the episode is over: at the cheese and behind it.
    """
    chains = Chains.of([level])
    maze = chains.mazes
    cheese = {"cheese_row": int(maze.cheese[0, 0]), "cheese_col": int(maze.cheese[0, 1])}
    shares = {
        name: move_probabilities(table) for name, table in action_tables(study.points, chains, interventions).items()
    }
    states = {tuple(cell): state for state, cell in enumerate(chains.cell.tolist()) if not chains.facing_right[state]}
    rows: Table = []
    for row, col in np.argwhere(maze.free[0]).tolist():
        cells: dict[str, Any] = {"row": row, "col": col, "size": int(maze.size[0]), **cheese}
        state = states.get((row, col))
        for name, of in shares.items():
            both = None if state is None else of[state : state + 2].mean(axis=0)  # its facings lie side by side
            cells |= {f"{name}_{move.name.lower()}": None if both is None else float(both[move]) for move in Direction}
        rows.append(cells)
    return rows


def figure(tables: Tables) -> Figure:
    """The two vector fields and their difference, and the effects over levels."""
    drawn = Figure(figsize=(17, 4.8), layout="constrained")
    *fields, effects = drawn.subplots(1, 4, width_ratios=(1, 1, 1, 1.25))
    count = tables["effects"][0]["count"]
    vector_field(tables["field"], ORIGINAL, fields[0]).set_title(ORIGINAL, fontsize="medium")
    vector_field(tables["field"], "zeroed", fields[1]).set_title(f"the pair's {count} zeroed", fontsize="medium")
    difference = vector_field_difference(tables["field"], "zeroed", ORIGINAL, fields[2])
    difference.set_title("zeroed minus original, half as long", fontsize="medium")
    draw_effects(effects, tables["effects"], MEASURES)
    return drawn


def finding(tables: Tables) -> Finding:
    pair, top = ({row["measure"]: row for row in _of(tables, chosen, KINDS[0])} for chosen in (PAIR, TELLING))
    moved, found = pair["moves"], pair["found"]
    changed = above(moved, "effect", CHANGES)
    # A mouse that finds no cheese as it is has none to keep.
    still = above(found, "effect", (KEPT - 1) * found["original"]) if found["original"] > RARE else None
    choice = pair.get("to_cheese")
    squares = (
        "No level has a decision square."
        if choice is None
        else f"At the decision square P(first to the cheese) {choice['original']:.3f} becomes "
        f"{choice['modified']:.3f}, change {shown(choice, 'effect', '+.3f')}, n={choice['n']}."
    )
    instead = (
        f"{INSTEAD[kind]} in place of zero {shown(row, 'effect', '+.3f')}"
        for kind in KINDS[1:]
        for row in _of(tables, TELLING, kind)
        if row["measure"] == "found"
    )
    return Finding(
        f"The pair's {found['count']} channels zeroed, n={found['n']}: {shown(moved, 'effect')} of each move goes "
        f"elsewhere; P(cheese) {found['original']:.3f} becomes {found['modified']:.3f}, change "
        f"{shown(found, 'effect', '+.3f')}. {squares} The {top['found']['count']} that tell most on the selection "
        f"mazes: {shown(top['moves'], 'effect')} of each move, P(cheese) {shown(top['found'], 'effect', '+.3f')}.",
        verdict(changed, still),
        f"{_beside_controls(tables, found, top['found'])} Of those that tell most, {' and '.join(instead)}.",
        "That what is left knows the way by itself: one maze, the post's or the one drawn here, shows a field and not "
        "how often it leads anywhere, which is why the levels are counted. Nor that a set which changes more is about "
        "the way: zeroed sums lie off those that occur.",
    )


def _beside_controls(tables: Tables, pair: Mapping[str, Any], top: Mapping[str, Any]) -> str:
    controls = [row for row in _of(tables, CONTROL, KINDS[0]) if row["measure"] == "found"]
    far = f"{pair['absolute_z']:.1f} standard deviations off for the pair's, {top['absolute_z']:.1f} for the telling"
    if not controls:
        return f"No other set of as many live channels is there to compare with; zeroed sums lie {far}."
    p = "" if pair["rank_p"] is None else f" (p = {pair['rank_p']:.2g} and {top['rank_p']:.2g})"
    return (
        f"{len(controls)} random sets of as many live channels, which overlap with these, change P(cheese) by "
        f"{min(column(controls, 'effect')):+.3f} to {max(column(controls, 'effect')):+.3f}; by the size of the change "
        f"the pair's set ranks {pair['rank']} and the telling one {top['rank']} of {pair['controls'] + 1}{p}. Zeroed "
        f"sums lie {far} and {column(controls, 'absolute_z').mean():.1f} for the random sets (0.8 is usual), from "
        f"those of {pair['absolute_z_against']}."
    )


def _of(tables: Tables, chosen: str, kind: str) -> list[Mapping[str, Any]]:
    return [row for row in tables["effects"] if row["chosen"] == chosen and row["kind"] == kind]


PART = Part(
    name="top16",
    question="With 16 channels zeroed, what changes, and does the mouse still go to the cheese?",
    method="Size 15, cheese outside the top right 5x5. Zeroed: the 16 that differ most over the post's pair, as the "
    "post's did, on which the verdict rests; the 16 that tell most; random sets. Arriving within 256 steps and the way "
    "taken at the decision square are computed from the probabilities of all moves in every state.",
    post="One maze, drawn: zeroing 16 channels changes a lot, but the mouse would still go to the cheese.",
    measure=measure,
    figure=figure,
    finding=finding,
)
