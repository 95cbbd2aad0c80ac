"""The corner vector: what an open way to the top right corner adds to the activation, added once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from maze.analysis.effects import destinations, effect_rows, joined, level_batches
from maze.analysis.episodes import ORIGINAL
from maze.analysis.off_distribution import background
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, shown, verdict
from maze.analysis.steering import (
    BLOCK,
    CONTROLS,
    OWN,
    added,
    against_controls,
    difference_vectors,
    far_from_usual,
    ranked,
    steered,
    told_far,
    told_rank,
    vector_figure,
)
from maze.environment.paths import distances, shortest_paths, top_right
from maze.environment.states import WALL, Mazes, read_mazes

SIZE = 11
MOST_LEVELS = 500
TRANSFER, *JUDGES = (
    CONTROLS  # the corner is at the same place in every level, so another level's vector points there too
)
SUBTRACTED = "own vector subtracted"


def measure(study: Study) -> dict[str, Table]:
    """Where the mouse gets to with every level's corner vector added and subtracted, and with the controls added."""
    count = min(study.n, MOST_LEVELS)
    drawn = study.levels("corner-vector", 2 * count, size=SIZE, cheese="out of distribution")
    levels = _with_free_cheese(drawn)[:count]
    mazes = read_mazes(levels)
    vectors = difference_vectors(study.points, levels, mazes, without_corner(mazes))
    interventions = {
        **steered(study.points, vectors, 1.0, seed=study.seed_for("corner-vector controls")),
        SUBTRACTED: added(study.points, vectors, -1.0),
    }
    batches = level_batches(study.points, levels, {ORIGINAL: (), **interventions}, site=BLOCK)
    values, names = joined([destinations(*batch) for batch in batches]), list(interventions)
    far = far_from_usual(study, interventions, levels)
    usual = background(SIZE, "as drawn")
    effects = [
        row | {"absolute_z": far.get(row["intervention"]), "absolute_z_against": usual}
        for row in effect_rows(values, names)
    ]
    return {
        "effects": effects,
        "against": against_controls(values, names),
        "ranked": ranked(study, levels, vectors, 1.0, "corner", seed=study.seed_for("corner-vector random")),
    }


def without_corner(mazes: Mazes) -> Mazes:
    """The same mazes with a wall on the last square before the top right corner."""
    grid = mazes.grid.copy()
    for index, path in enumerate(shortest_paths(mazes, top_right(mazes))):
        grid[index, path[-2][0], path[-2][1]] = WALL
    return replace(mazes, grid=grid)


def _with_free_cheese(levels: Sequence[bytes]) -> list[bytes]:
    """The levels in which the way to the cheese does not lead through the corner."""
    mazes = read_mazes(levels)
    to_cheese: NDArray[np.float32] = distances(without_corner(mazes), mazes.cheese)[:, 0, 0]
    return [level for level, distance in zip(levels, to_cheese, strict=True) if np.isfinite(distance)]


def figure(tables: Tables) -> Figure:
    """Where the mouse gets to under every vector."""
    return vector_figure(tables, f"vectors added with coefficient 1 in every state (or -1: subtracted); size {SIZE}")


def finding(tables: Tables) -> Finding:
    corner = {row["intervention"]: row for row in tables["effects"] if row["measure"] == "corner"}
    own, away = corner[OWN], corner[SUBTRACTED]
    choice = next(
        (row for row in tables["effects"] if row["measure"] == "to_corner" and row["intervention"] == OWN), None
    )
    against = [row for row in tables["against"] if row["measure"] == "corner" and row["control"] in JUDGES]
    beyond = [row["control"] for row in against if above(row, "own_minus_control")]
    more = above(own, "effect")
    squares = (
        "No level has a decision square."
        if choice is None
        else f"At the decision square (n={choice['n']}) the first way taken is that to the corner in "
        f"{choice['original']:.1%} before and {choice['modified']:.1%} after."
    )
    controls = "; ".join(f"{name} {shown(corner[name], 'effect', '+.3f')}" for name in JUDGES)
    return Finding(
        f"P(corner before the cheese) {own['original']:.3f} becomes {own['modified']:.3f} with the vector added, "
        f"effect {shown(own, 'effect', '+.3f')}, n={own['n']}; subtracted, {shown(away, 'effect', '+.3f')}. {squares}",
        verdict(more, *(above(row, "own_minus_control") for row in against if more)),
        f"Another level's vector, which points to the same corner, has {shown(corner[TRANSFER], 'effect', '+.3f')}. "
        f"Controls: {controls}. The own vector raises it by more than {len(beyond)} of these {len(JUDGES)} do, "
        f"interval of the paired difference above 0. {told_rank(tables['ranked'][0])} "
        f"{told_far([corner[name] for name in (OWN, *CONTROLS)])}",
        "That the vector stands for the corner as a goal: it is the difference that one wall next to the corner makes, "
        "wherever the mouse wants to go.",
    )


PART = Part(
    name="corner-vector",
    question="Does the mouse go to the top right corner more often when the corner's part of the activation is added?",
    method=f"Size {SIZE}, cheese outside the top right 5x5. Activation at block2.res1.resadd with the corner open "
    "minus walled off, the mouse on its first square, added in every state; probabilities are computed, not sampled.",
    post="Not in the post. In the work it builds on, adding the vector drew the mouse to the top right corner.",
    measure=measure,
    figure=figure,
    finding=finding,
)
