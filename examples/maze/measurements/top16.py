"""16 channels zeroed at once: the change of the vector field, and whether the mouse still arrives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.controls import random_sets
from maze.analysis.cells import Row, Table, Tables, above, chosen, column, keyed, rank_cells, shown, verdict
from maze.analysis.channels import pair_sums
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.effects import (
    DESTINATIONS,
    KINDS,
    SETS,
    Kind,
    Values,
    ablation,
    destinations,
    effect_rows,
    joined,
    level_batches,
)
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import Chains, move_probabilities
from maze.analysis.forwards import SITE, activations
from maze.analysis.off_distribution import METERED, absolute_z, background, mouse_anywhere
from maze.analysis.part import SPLITS, Finding, Part, Study
from maze.analysis.tables import action_tables
from maze.analysis.vector_fields import vector_field, vector_field_difference
from maze.paths import Direction, decision_squares
from maze.states import read_mazes

SIZE = 15
TOGETHER = 16
MOST_LEVELS = 300
REFERENCE = 200  # levels for means and donors
REFERENCE_PLACES = {"cheese": "in distribution", "mouse": "anywhere"}
CHANGES = 0.1  # of a move's probability, on average over the squares: the field is another one
RARE = 0.01  # P(cheese) up to which there is nothing to keep
KEPT = 0.5  # of P(cheese): with more than that left the mouse still goes to the cheese
INSTEAD = {"mean": "the mean", "resample": "another level's activation"}
MEASURES = {"moves": "share of each move that goes elsewhere", **DESTINATIONS}

PAIR, TELLING, CONTROL = "pair", "telling", "control"  # how a set was chosen


class Ablated(NamedTuple):
    """Channels that are ablated together, how they were chosen, and the kind of ablation."""

    chosen: str
    kind: Kind
    channels: tuple[int, ...]


def measure(study: Study) -> dict[str, Table]:
    """The effects of each set of channels, over levels, and the vector fields of one maze."""
    places: dict[str, Any] = {"size": SIZE, **REFERENCE_PLACES}
    reference = activations(study.points, study.levels("top16 reference", REFERENCE, **places), SITE)
    sets, seed = _sets(study), study.seed_for("top16 donors")
    interventions = {
        name: ablation(study.points, kind, channels, reference, seed=seed) for name, (_, kind, channels) in sets.items()
    }
    levels = study.levels("top16", min(study.n, MOST_LEVELS), size=SIZE, cheese=SPLITS[1])
    values = _measured(study, levels, {ORIGINAL: (), **interventions})
    some = mouse_anywhere(levels[:METERED], study.seed_for("top16 mouse"))
    usual = study.levels("top16 usual", METERED, **places)
    live = study.selection.live
    far = {
        kind: absolute_z(study.points, ablation(study.points, kind, live, reference, seed=seed), some, usual)
        for kind in KINDS
        if kind != "mean"  # near 0 by construction
    }
    shown_level = int(np.argmax(decision_squares(read_mazes(levels))[1]))  # the first with a choice
    field = _field(study, levels[shown_level], {ORIGINAL: (), "zeroed": next(iter(interventions.values()))})
    return {"effects": _rows(values, sets, far), "field": field}


def _sets(study: Study) -> dict[str, Ablated]:
    """The sets by name: the post's choice, the best predictors, and the controls."""
    differences = np.abs(np.diff(pair_sums(study.points, SITE)[1], axis=1)).mean(axis=(0, 1))
    live = study.selection.live
    pair = tuple(sorted(live, key=lambda channel: -differences[channel])[:TOGETHER])
    top = study.selection.ranked[:TOGETHER]
    sets = {f"the pair's {len(pair)} {KINDS[0]}": Ablated(PAIR, KINDS[0], pair)}
    sets |= {f"top {len(top)} {kind}": Ablated(TELLING, kind, top) for kind in KINDS}
    seed = study.seed_for("top16 controls")
    others = random_sets(live, len(pair), count=SETS, seed=seed, other_than=(pair, top))
    controls = {f"control {number}": Ablated(CONTROL, KINDS[0], each) for number, each in enumerate(others, 1)}
    return sets | controls


def _measured(study: Study, levels: Sequence[bytes], interventions: Mapping[str, Any]) -> dict[str, Values]:
    """Every measure of every intervention on every level, (intervention, level); NaN if a level does not have it."""
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
    rows: Table = []
    for row in effect_rows(values, list(sets)):
        how, kind, channels = sets[row["intervention"]]
        row |= {"chosen": how, "kind": kind, "channels": " ".join(map(str, channels)), "count": len(channels)}
        rows.append(row)
    for row in rows:
        controls = [other["effect"] for other in chosen(rows, measure=row["measure"], chosen=CONTROL)]
        row |= rank_cells(row["effect"], controls, ranked=row["chosen"] != CONTROL and row["kind"] == KINDS[0])
        z = far.get(row["kind"])
        channels = sets[row["intervention"]].channels
        row["absolute_z"] = float(np.nanmean([z[channel] for channel in channels])) if z else None
        row["absolute_z_against"] = background(SIZE) if z else None
    return rows


def _field(study: Study, level: bytes, interventions: Mapping[str, Any]) -> Table:
    """The probability of every move at every free square of one maze, mean of the two facings.

    None if the episode is over: at the cheese and behind it.
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
        cells: Row = {"row": row, "col": col, "size": int(maze.size[0]), **cheese}
        state = states.get((row, col))
        for name, of in shares.items():
            both = None if state is None else of[state : state + 2].mean(axis=0)  # the facings lie side by side
            cells |= {f"{name}_{move.name.lower()}": None if both is None else float(both[move]) for move in Direction}
        rows.append(cells)
    return rows


def figure(tables: Tables) -> Figure:
    """The two vector fields and their difference, and the effects over levels."""
    drawn, (*fields, effects) = panels(17, 4.8, 4, width_ratios=(1, 1, 1, 1.25))
    count = tables["effects"][0]["count"]
    vector_field(tables["field"], ORIGINAL, fields[0]).set_title(ORIGINAL, fontsize="medium")
    vector_field(tables["field"], "zeroed", fields[1]).set_title(f"the pair's {count} zeroed", fontsize="medium")
    difference = vector_field_difference(tables["field"], "zeroed", ORIGINAL, fields[2])
    difference.set_title("zeroed minus original, half as long", fontsize="medium")
    where = {"chosen": lambda chosen: chosen != CONTROL}
    draw(effects, tables, Panel("effects", "measure", "effect", "change", "intervention", where, names=MEASURES))
    return drawn


def finding(tables: Tables) -> Finding:
    zeroed = chosen(tables["effects"], kind=KINDS[0])
    pair, top = (keyed(chosen(zeroed, chosen=how), "measure") for how in (PAIR, TELLING))
    moved, found = pair["moves"], pair["found"]
    changed = above(moved, "effect", CHANGES)
    # A mouse that never finds the cheese has nothing to keep.
    still = above(found, "effect", (KEPT - 1) * found["original"]) if found["original"] > RARE else None
    choice = pair.get("to_cheese")
    squares = (
        "No level has a decision square."
        if choice is None
        else f"At the decision square P(first to the cheese) {choice['original']:.3f} becomes "
        f"{choice['modified']:.3f}, change {shown(choice, 'effect', '+.3f')}, n={choice['n']}."
    )
    instead = " and ".join(
        f"{INSTEAD[row['kind']]} in place of zero {shown(row, 'effect', '+.3f')}"
        for row in chosen(tables["effects"], chosen=TELLING, measure="found")
        if row["kind"] in INSTEAD
    )
    return Finding(
        f"The pair's {found['count']} channels zeroed, n={found['n']}: {shown(moved, 'effect')} of each move goes "
        f"elsewhere; P(cheese) {found['original']:.3f} becomes {found['modified']:.3f}, change "
        f"{shown(found, 'effect', '+.3f')}. {squares} The {top['found']['count']} best predictors on the selection "
        f"mazes: {shown(top['moves'], 'effect')} of each move, P(cheese) {shown(top['found'], 'effect', '+.3f')}.",
        verdict(changed, still),
        f"{_beside_controls(zeroed, found, top['found'])} For the best predictors, {instead}.",
        "It does not follow that the other channels encode the path by themselves. A set with a larger effect need not "
        "encode more of it, as zeroed sums are off distribution.",
    )


def _beside_controls(zeroed: Table, pair: Row, top: Row) -> str:
    controls = chosen(zeroed, chosen=CONTROL, measure="found")
    far = f"{pair['absolute_z']:.1f} for the pair's channels, {top['absolute_z']:.1f} for the best predictors"
    if not controls:
        return f"There is no other set of as many live channels to compare with. The mean absolute z is {far}."
    p = "" if pair["rank_p"] is None else f" (p = {pair['rank_p']:.2g} and {top['rank_p']:.2g})"
    return (
        f"{len(controls)} random sets of as many live channels, which overlap with these, change P(cheese) by "
        f"{min(column(controls, 'effect')):+.3f} to {max(column(controls, 'effect')):+.3f}; by the size of the change "
        f"the pair's set ranks {pair['rank']} and the best predictors {top['rank']} of {pair['controls'] + 1}{p}. The "
        f"mean absolute z is {far}, and {column(controls, 'absolute_z').mean():.1f} for the random sets (0.8 is "
        f"usual), against {pair['absolute_z_against']}."
    )


PART = Part(
    name="top16",
    question="With 16 channels zeroed, what changes, and does the mouse still go to the cheese?",
    method="Size 15, cheese outside the top right 5x5. Zeroed: the 16 that differ most over the post's pair, on which "
    "the verdict rests; the 16 best predictors; random sets. Arriving within 256 steps and the first step at the "
    "decision square are computed from the probabilities of all moves in every state.",
    post="One maze, drawn: zeroing 16 channels changes a lot, but the mouse would still go to the cheese.",
    measure=measure,
    figure=figure,
    finding=finding,
)
