"""With an eighth of the channels zeroed, as in the post, what changes, and does the mouse still go to the cheese?

Method: Size 15, cheese outside the top right 5x5. Zeroed: the channels that differ most over our pair, the best
predictors, and random sets: an eighth of the layer, as in the post, and {TOGETHER}. Arriving within 256 steps and the
first step at the decision square are computed from the probabilities of all moves in every state. The verdict: with the
pair's eighth zeroed, the mouse keeps more than {KEPT:.0%} of P(cheese). Drawn: the first level on whose decision square
the unpatched mouse takes the path to the cheese with a probability above {KEPT:g}.

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
from maze.analysis.vector_fields import vector_field
from maze.paths import Direction

SIZE = 15
TOGETHER = 16  # an eighth of the post's 128 channels
MOST_LEVELS = 300
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
    drawn = levels[_shows_the_claim(values["to_cheese"][0])]
    field = _field(study, drawn, {ORIGINAL: (), "zeroed": next(iter(interventions.values()))})
    return {"effects": _rows(values, sets), "field": field}


def _shows_the_claim(to_cheese: Values) -> int:
    """The first level on which the unpatched mouse mostly takes the path to the cheese, or the level closest to that.

    `to_cheese` is P(first to the cheese) at the decision square, NaN for levels without such a square: (level,).
    """
    return int(np.argmax(np.where(to_cheese > KEPT, 1.0, np.nan_to_num(to_cheese, nan=-1.0))))


def _sets(study: Study) -> dict[str, tuple[str, tuple[int, ...]]]:
    """How each set was chosen and its channels, by name, first an eighth of the layer, then `TOGETHER` channels."""
    pairs = [pair for pair in drawn_pairs() if pair.number == 0]
    sums = level_sums(study.points, SITE, [level for pair in pairs for level in pair.levels])
    differences = np.abs(sums[::2] - sums[1::2]).mean(axis=0)
    live, seed = study.selection.live, study.seed_for("top16 controls")
    ordered, sets = tuple(sorted(live, key=lambda channel: -differences[channel])), {}
    for count in dict.fromkeys(min(each, len(live)) for each in (max(1, sums.shape[1] // 8), TOGETHER)):
        pair, top = ordered[:count], study.selection.ranked[:count]
        others = random_sets(live, count, count=SETS, seed=seed, other_than=(pair, top))
        sets |= {f"the pair's {count}": (PAIR, pair), f"top {count}": (TOP, top)}
        sets |= {f"control {number} of {count}": (CONTROL, each) for number, each in enumerate(others, 1)}
    return sets


def _elsewhere(chains: Chains, tables: NDArray[np.float32]) -> Values:
    """The total variation between each table's moves and the first table's, mean over states: (table, level)."""
    moves = move_probabilities(tables)
    apart = np.abs(moves - moves[0]).sum(axis=-1) / 2
    totals = np.stack([np.bincount(chains.level, weights=each, minlength=len(chains.levels)) for each in apart])
    return totals / np.bincount(chains.level, minlength=len(chains.levels))


def _rows(values: Mapping[str, Values], sets: Mapping[str, tuple[str, tuple[int, ...]]]) -> Table:
    """One row per measure and set: means over levels, the effect, and its rank among control sets of equal size."""
    rows = effect_rows(values, list(sets))
    for row in rows:
        how, channels = sets[row["intervention"]]
        row |= {"chosen": how, "channels": " ".join(map(str, channels)), "count": len(channels)}
    for row in rows:
        others = chosen(rows, measure=row["measure"], chosen=CONTROL, count=row["count"])
        controls = [other["effect"] for other in others]
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
    difference = vector_field(tables["field"], "zeroed", fields[2], minus=ORIGINAL)
    difference.set_title("zeroed minus original, half as long", fontsize="medium")
    where = {"chosen": lambda chosen: chosen != CONTROL}
    draw(effects, tables, Panel("effects", "measure", "effect", "change", "intervention", where, names=MEASURES))
    return drawn


def finding(tables: Tables) -> Finding:
    eighth, *more = dict.fromkeys(row["count"] for row in tables["effects"])
    pair = keyed(chosen(tables["effects"], chosen=PAIR, count=eighth), "measure")
    found, choice = pair["found"], pair.get("to_cheese")
    # A mouse that never finds the cheese has nothing to keep.
    still = above(found, "effect", (KEPT - 1) * found["original"]) if found["original"] > RARE else None
    squares = "" if choice is None else f"; P(first to the cheese) at the decision square {_change(choice)}"
    moved = f"{shown(pair['moves'], 'effect')} of each move goes elsewhere"
    return Finding(
        f"The pair's {eighth} channels zeroed, n={found['n']}: P(cheese) {_change(found)}; {moved}{squares}.",
        verdict(still),
        " ".join(_beside_controls(tables["effects"], count) for count in (eighth, *more)),
    )


def _change(row: Row) -> str:
    return f"{row['original']:.3f} becomes {row['modified']:.3f}, change {shown(row, 'effect', '+.3f')}"


def _beside_controls(effects: Table, count: int) -> str:
    """P(cheese) with sets of this size zeroed, in words."""
    rows = chosen(effects, measure="found", count=count)
    ((pair,), (top,), controls) = (chosen(rows, chosen=how) for how in (PAIR, TOP, CONTROL))
    changes = f"P(cheese) changes by {shown(pair, 'effect', '+.3f')} and {shown(top, 'effect', '+.3f')}"
    text = f"With the pair's {count} or the {count} best predictors zeroed, {changes}"
    if not controls:
        return f"{text}; there is no other set of as many live channels to compare with."
    p = "" if pair["rank_p"] is None else f" (p = {pair['rank_p']:.2g} and {top['rank_p']:.2g})"
    return (
        f"{text}, ranks {pair['rank']} and {top['rank']} of {pair['controls'] + 1}{p}; random sets of {count} change "
        f"P(cheese) by {min(column(controls, 'effect')):+.3f} to {max(column(controls, 'effect')):+.3f}."
    )
