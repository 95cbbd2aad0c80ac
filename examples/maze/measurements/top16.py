"""With 16 channels zeroed, what changes, and does the mouse still go to the cheese?

Method: Size 15, cheese outside the top right 5x5. Zeroed: the 16 that differ most over the post's pair, on which the
verdict rests; the 16 best predictors; random sets. Arriving within 256 steps and the first step at the decision square
are computed from the probabilities of all moves in every state.

The post: One maze, drawn: zeroing 16 channels changes a lot, but the mouse would still go to the cheese.

Limits: The result does not show that the other channels encode the path by themselves. A set with a larger effect need
not encode more of the path, as zeroed sums are off distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import zero_ablate
from chanpatch.controls import random_sets
from maze.analysis.cells import Row, Table, Tables, Values, above, chosen, column, keyed, shown, verdict
from maze.analysis.contrasts import drawn_pairs
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.effects import DESTINATIONS, SETS, destinations, effect_rows, joined, level_batches
from maze.analysis.estimates import rank_cells
from maze.analysis.exact import ORIGINAL, Chains, move_probabilities
from maze.analysis.forwards import SITE, level_sums
from maze.analysis.part import SPLITS, Finding, Study
from maze.analysis.tables import action_tables
from maze.analysis.vector_fields import vector_field, vector_field_difference
from maze.paths import Direction, decision_squares
from maze.states import read_mazes

SIZE = 15
TOGETHER = 16
MOST_LEVELS = 300
CHANGES = 0.1  # mean change in a move's probability above which the field counts as changed
RARE = 0.01  # P(cheese) up to which there is nothing to keep
KEPT = 0.5  # fraction of P(cheese) above which the mouse still goes to the cheese
MEASURES = {"moves": "fraction of each move that goes elsewhere", **DESTINATIONS}

PAIR, TOP, CONTROL = "pair", "best predictors", "control"  # how a set was chosen


def measure(study: Study) -> dict[str, Table]:
    """The effects of each set of channels, over levels, and the vector fields of one maze."""
    sets = _sets(study)
    interventions = {
        name: [zero_ablate(study.points.site(SITE, channel=list(channels)))] for name, (_, channels) in sets.items()
    }
    levels = study.levels("top16", min(study.n, MOST_LEVELS), size=SIZE, cheese=SPLITS[1])
    batches = level_batches(study.points, levels, interventions)
    values = joined({"moves": _elsewhere(*batch), **destinations(*batch)} for batch in batches)
    shown_level = int(np.argmax(decision_squares(read_mazes(levels))[1]))  # the first with a choice
    field = _field(study, levels[shown_level], {ORIGINAL: (), "zeroed": next(iter(interventions.values()))})
    return {"effects": _rows(values, sets), "field": field}


def _sets(study: Study) -> dict[str, tuple[str, tuple[int, ...]]]:
    """How each set was chosen and its channels, by name: the post's choice, the best predictors, and the controls."""
    sums = np.stack([level_sums(study.points, SITE, pair.levels) for pair in drawn_pairs() if pair.number == 0])
    differences = np.abs(np.diff(sums, axis=1)).mean(axis=(0, 1))
    live = study.selection.live
    pair = tuple(sorted(live, key=lambda channel: -differences[channel])[:TOGETHER])
    top = study.selection.ranked[:TOGETHER]
    seed = study.seed_for("top16 controls")
    others = random_sets(live, len(pair), count=SETS, seed=seed, other_than=(pair, top))
    controls = {f"control {number}": (CONTROL, each) for number, each in enumerate(others, 1)}
    return {f"the pair's {len(pair)}": (PAIR, pair), f"top {len(top)}": (TOP, top), **controls}


def _elsewhere(chains: Chains, tables: NDArray[np.float32]) -> Values:
    """The total variation between each table's moves and the first table's, mean over states: (table, level)."""
    moves = move_probabilities(tables)
    apart = np.abs(moves - moves[0]).sum(axis=-1) / 2
    totals = np.stack([np.bincount(chains.level, weights=each, minlength=len(chains.levels)) for each in apart])
    return totals / np.bincount(chains.level, minlength=len(chains.levels))


def _rows(values: Mapping[str, Values], sets: Mapping[str, tuple[str, tuple[int, ...]]]) -> Table:
    """One row per measure and set: the means over levels, the effect, and its rank among the control sets."""
    rows = effect_rows(values, list(sets))
    for row in rows:
        how, channels = sets[row["intervention"]]
        row |= {"chosen": how, "channels": " ".join(map(str, channels)), "count": len(channels)}
    for row in rows:
        controls = [other["effect"] for other in chosen(rows, measure=row["measure"], chosen=CONTROL)]
        row |= rank_cells(row["effect"], controls, ranked=row["chosen"] != CONTROL)
    return rows


def _field(study: Study, level: bytes, interventions: Mapping[str, Any]) -> Table:
    """The probability of every move at every free square of one maze, mean over the two facings.

    None at the cheese and behind the cheese, where the episode is over.
    """
    chains = Chains.of([level])
    maze = chains.mazes
    cheese = {"cheese_row": int(maze.cheese[0, 0]), "cheese_col": int(maze.cheese[0, 1])}
    tables = action_tables(study.points, chains, interventions)
    moves = {name: move_probabilities(table) for name, table in tables.items()}
    states = {tuple(cell): state for state, cell in enumerate(chains.cell.tolist()) if not chains.facing_right[state]}
    rows = []
    for row, col in np.argwhere(maze.free[0]).tolist():
        cells = {"row": row, "col": col, "size": int(maze.size[0]), **cheese}
        state = states.get((row, col))
        for name, of in moves.items():
            both = None if state is None else of[state : state + 2].mean(axis=0)  # the facings are neighbors
            cells |= {f"{name}_{move.name.lower()}": None if both is None else float(both[move]) for move in Direction}
        rows.append(cells)
    return rows


def figure(tables: Tables) -> Figure:
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
    pair, top = (keyed(chosen(tables["effects"], chosen=how), "measure") for how in (PAIR, TOP))
    moved, found = pair["moves"], pair["found"]
    changed = above(moved, "effect", CHANGES)
    # A mouse that never finds the cheese has nothing to keep.
    still = above(found, "effect", (KEPT - 1) * found["original"]) if found["original"] > RARE else None
    choice = pair.get("to_cheese")
    squares = "" if choice is None else f"; P(first to the cheese) at the decision square {_change(choice)}"
    best, controls = top["found"], chosen(tables["effects"], chosen=CONTROL, measure="found")
    return Finding(
        f"The pair's {found['count']} channels zeroed, n={found['n']}: {shown(moved, 'effect')} of each move goes "
        f"elsewhere, and P(cheese) {_change(found)}{squares}.",
        verdict(changed, still),
        f"The {best['count']} best predictors zeroed: {shown(top['moves'], 'effect')} of each move goes elsewhere, and "
        f"P(cheese) {_change(best)}. {_beside_controls(controls, found, best)}",
    )


def _change(row: Row) -> str:
    return f"{row['original']:.3f} becomes {row['modified']:.3f}, change {shown(row, 'effect', '+.3f')}"


def _beside_controls(controls: Table, pair: Row, top: Row) -> str:
    if not controls:
        return "There is no other set of as many live channels to compare with."
    p = "" if pair["rank_p"] is None else f" (p = {pair['rank_p']:.2g} and {top['rank_p']:.2g})"
    return (
        f"Among {len(controls)} random sets of live channels, with {min(column(controls, 'effect')):+.3f} to "
        f"{max(column(controls, 'effect')):+.3f}, the pair's set ranks {pair['rank']} and the best predictors "
        f"{top['rank']} of {pair['controls'] + 1}{p}."
    )
