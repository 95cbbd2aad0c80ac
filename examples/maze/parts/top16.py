"""The 16 most telling channels zeroed at once: what changes in the vector field, and does the mouse still arrive?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.statistics import rank_among
from maze.effects import (
    DESTINATIONS,
    KINDS,
    ablation,
    activations,
    destinations,
    draw_effects,
    effect_rows,
    joined,
    level_batches,
)
from maze.episodes import ORIGINAL
from maze.exact import Chains, move_probabilities
from maze.part import Finding, Part, Study, Table, Tables, above, shown, verdict
from maze.paths import MOVES, Direction, decision_squares
from maze.selection import Selection
from maze.states import read_mazes
from maze.tables import SITE, action_tables

SIZE = 15
TOGETHER = 16
MOST_LEVELS = 400
REFERENCE = 200  # levels that give the means and the donors
CONTROLS = 19  # random sets of other live channels, where there are so many
CHANGES = 0.1  # of the probability of a move, on average over the squares, from which on a field is another one
RARE = 0.01  # P(cheese) up to which there is nothing to keep
KEPT = 0.5  # of P(cheese): with more than that left the mouse still goes to the cheese
MEASURES = {"moves": "share of each move that goes elsewhere", **DESTINATIONS}

Values = NDArray[np.float64]


def measure(study: Study) -> dict[str, Table]:
    """What each set of channels changes, over levels; and the vector fields of one maze."""
    reference_levels = study.levels("top16 reference", REFERENCE, size=SIZE, cheese="in distribution", mouse="anywhere")
    reference = activations(study.points, reference_levels, SITE)
    top = study.selection.ranked[:TOGETHER]
    seed = study.seed_for("top16 donors")
    sets = {f"top {len(top)} {kind}": (kind, top) for kind in KINDS}
    others = _control_sets(study.selection, study.seed_for("top16 controls"))
    sets |= {f"control {number}": (KINDS[0], channels) for number, channels in enumerate(others, 1)}
    interventions = {
        name: ablation(study.points, kind, channels, reference, seed=seed) for name, (kind, channels) in sets.items()
    }
    levels = study.levels("top16", min(study.n, MOST_LEVELS), size=SIZE, cheese="out of distribution")
    values = _measured(study, levels, {ORIGINAL: (), **interventions})
    shown_level = int(np.argmax(decision_squares(read_mazes(levels))[1]))  # the first in which there is a choice
    field = _field(study, levels[shown_level], {ORIGINAL: (), "zeroed": interventions[f"top {len(top)} {KINDS[0]}"]})
    return {"effects": _rows(values, sets, study.seed_for("top16 bootstrap")), "field": field}


def _control_sets(selection: Selection, seed: int) -> list[tuple[int, ...]]:
    """Different sets of live channels that are not among the most telling ones, as many as these or all there are."""
    rest, rng = selection.ranked[TOGETHER:], np.random.default_rng(seed)
    # Where hardly more channels are left than a set takes, the same sets come up again: tries are limited.
    drawn = {tuple(sorted(rng.permutation(rest)[:TOGETHER].tolist())): None for _ in range(10 * CONTROLS) if rest}
    return list(drawn)[:CONTROLS]


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


def _rows(values: Mapping[str, Values], sets: Mapping[str, tuple[str, Sequence[int]]], seed: int) -> Table:
    """One row per measure and set: the means over levels, the effect, and its rank among the control sets."""
    effects = effect_rows(values, list(sets), seed)
    rows: Table = []
    for row in effects:
        kind, channels = sets[row["intervention"]]
        controls = [
            other["effect"]
            for other in effects
            if other["measure"] == row["measure"] and other["intervention"].startswith("control")
        ]
        ranked = kind == KINDS[0] and channels == sets[effects[0]["intervention"]][1] and controls
        rank = rank_among(row["effect"], controls) if ranked else None
        rows.append(
            {
                **row,
                "kind": kind,
                "channels": " ".join(map(str, channels)),
                "count": len(channels),
                "rank": rank and rank.rank,
                "controls": rank and rank.controls,
                "rank_p": rank and rank.p,
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
    reached = [row for row in tables["field"] if row[f"{ORIGINAL}_left"] is not None]
    arrows = {name: _arrows(reached, name) for name in (ORIGINAL, "zeroed")}
    arrows["zeroed minus original"] = arrows["zeroed"] - arrows[ORIGINAL]
    for axes, (title, vectors) in zip(fields, arrows.items(), strict=True):
        _draw_field(axes, tables["field"], reached, vectors)
        axes.set_title(title)
    draw_effects(effects, tables["effects"], MEASURES)
    return drawn


def _draw_field(
    axes: Axes, free: Sequence[Mapping[str, Any]], reached: Sequence[Mapping[str, Any]], vectors: Values
) -> None:
    """One arrow per square, one cell long for a move that is certain: the mean of where the moves lead."""
    size, cheese = free[0]["size"], (free[0]["cheese_row"], free[0]["cheese_col"])
    maze = np.zeros((size, size))
    maze[[row["row"] for row in free], [row["col"] for row in free]] = 1
    axes.imshow(maze, origin="lower", cmap="gray", vmin=-1.5, vmax=1)
    col, row = [each["col"] for each in reached], [each["row"] for each in reached]
    axes.quiver(col, row, vectors[:, 1], vectors[:, 0], angles="xy", scale_units="xy", scale=1, width=0.006)
    axes.plot(cheese[1], cheese[0], "*", color="gold", markeredgecolor="black", markersize=15)
    axes.plot(size - 1, size - 1, "s", color="none", markeredgecolor="black", markersize=11)
    axes.set(xticks=[], yticks=[], xlabel="star: cheese, square: top right corner")


def _arrows(reached: Sequence[Mapping[str, Any]], name: str) -> Values:
    """The mean of where the moves lead from each square: (square, row and col)."""
    shares = np.array([[row[f"{name}_{move.name.lower()}"] for move in Direction] for row in reached])
    arrows: Values = shares @ MOVES
    return arrows


def finding(tables: Tables) -> Finding:
    first = tables["effects"][0]["intervention"]
    top = {row["measure"]: row for row in tables["effects"] if row["intervention"] == first}
    moved, found = top["moves"], top["found"]
    control = next((r for r in tables["effects"] if r["intervention"] == "control 1" and r["measure"] == "found"), None)
    changed = above(moved, "effect", CHANGES)
    # A mouse that finds no cheese as it is has none to keep.
    still = above(found, "effect", (KEPT - 1) * found["original"]) if found["original"] > RARE else None
    choice = top.get("to_cheese")
    squares = (
        "No level has a decision square."
        if choice is None
        else f"At the decision square P(first to the cheese) {choice['original']:.3f} becomes "
        f"{choice['modified']:.3f}, change {shown(choice, 'effect', '+.3f')}, n={choice['n']}."
    )
    beside = (
        "There are no other live channels to compare with."
        if control is None
        else f"Other live channels zeroed instead ({control['count']} of them) change P(cheese) by "
        f"{shown(control, 'effect', '+.3f')}; of {found['controls'] + 1} sets the top {found['count']} rank "
        f"{found['rank']} by the size of the change."
    )
    return Finding(
        f"{first.capitalize()}, n={found['n']}: {shown(moved, 'effect')} of each move goes elsewhere. P(cheese) "
        f"{found['original']:.3f} becomes {found['modified']:.3f}, change {shown(found, 'effect', '+.3f')}. {squares}",
        verdict(changed, still),
        f"{beside} The mean of the channels in place of zero changes P(cheese) by "
        f"{shown(_of(tables, 'mean'), 'effect', '+.3f')}, another level's activation by "
        f"{shown(_of(tables, 'resample'), 'effect', '+.3f')}.",
        "That what is left knows the way by itself: one maze, the post's or the one drawn here, shows a field and not "
        "how often it leads anywhere, which is why the levels are counted.",
    )


def _of(tables: Tables, kind: str) -> Mapping[str, Any]:
    return next(row for row in tables["effects"] if row["measure"] == "found" and row["kind"] == kind)


PART = Part(
    name="top16",
    question="With the 16 most telling channels zeroed, what changes, and does the mouse still go to the cheese?",
    method="Size 15, cheese outside the top right 5x5: from the probabilities of all moves in every state, arriving "
    "within 256 steps and the way taken at the decision square are computed; controls are other live channels.",
    post="One maze, drawn: zeroing 16 channels changes a lot, but the mouse would still go to the cheese.",
    measure=measure,
    figure=figure,
    finding=finding,
)
