"""The corner vector: the effect of an open path to the top right corner on the activation, added once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from maze.analysis.cells import Table, Tables, above, chosen, keyed, shown, verdict
from maze.analysis.part import SPLITS, Finding, Part, Study
from maze.analysis.steering import (
    CONTROLS,
    MOST_LEVELS,
    OWN,
    SIZE,
    added,
    difference_vectors,
    measured,
    ranking_text,
    vector_figure,
)
from maze.paths import distances, shortest_paths, top_right
from maze.states import WALL, Mazes, read_mazes

# The corner is at the same place in every level, so another level's vector points there, too.
TRANSFER, *JUDGES = CONTROLS
SUBTRACTED = "own vector subtracted"


def measure(study: Study) -> dict[str, Table]:
    """Every level's corner vector added and subtracted, with its controls."""
    count = min(study.n, MOST_LEVELS)
    levels = _with_free_cheese(study.levels("corner-vector", 2 * count, size=SIZE, cheese=SPLITS[1]))[:count]
    mazes = read_mazes(levels)
    vectors = difference_vectors(study.points, levels, mazes, without_corner(mazes))
    others = {SUBTRACTED: added(study.points, vectors, -1.0)}
    return measured(study, "corner-vector", levels, vectors, 1.0, "corner", others=others)[0]


def without_corner(mazes: Mazes) -> Mazes:
    """The mazes with a wall on the last square before the top right corner."""
    grid = mazes.grid.copy()
    for index, path in enumerate(shortest_paths(mazes, top_right(mazes))):
        grid[index, path[-2][0], path[-2][1]] = WALL
    return replace(mazes, grid=grid)


def _with_free_cheese(levels: Sequence[bytes]) -> list[bytes]:
    """The levels in which the path to the cheese does not lead through the corner."""
    mazes = read_mazes(levels)
    to_cheese: NDArray[np.float32] = distances(without_corner(mazes), mazes.cheese)[:, 0, 0]
    return [level for level, distance in zip(levels, to_cheese, strict=True) if np.isfinite(distance)]


def finding(tables: Tables) -> Finding:
    corner = keyed(chosen(tables["effects"], measure="corner"), "intervention")
    own, away = corner[OWN], corner[SUBTRACTED]
    choice = chosen(tables["effects"], measure="to_corner", intervention=OWN)
    against = [row for row in chosen(tables["against"], measure="corner") if row["control"] in JUDGES]
    higher = [above(row, "own_minus_control") for row in against]
    more = above(own, "effect")
    squares = (
        f"At the decision square (n={choice[0]['n']}), P(first to the corner) is {choice[0]['original']:.1%} before "
        f"and {choice[0]['modified']:.1%} after."
        if choice
        else "No level has a decision square."
    )
    controls = "; ".join(f"{name} {shown(corner[name], 'effect', '+.3f')}" for name in JUDGES)
    return Finding(
        f"P(corner before the cheese) {own['original']:.3f} becomes {own['modified']:.3f} with the vector added, "
        f"effect {shown(own, 'effect', '+.3f')}, n={own['n']}; subtracted, {shown(away, 'effect', '+.3f')}. {squares}",
        verdict(more, *(higher if more else ())),
        f"Another level's vector, which points to the same corner, has {shown(corner[TRANSFER], 'effect', '+.3f')}. "
        f"Controls: {controls}. The own vector raises it by more than {higher.count(True)} of these {len(JUDGES)}, "
        f"interval of the paired difference above 0. {ranking_text(tables)}",
        "It does not follow that the vector encodes the corner as a goal: it is the effect of one wall next to the "
        "corner.",
    )


PART = Part(
    name="corner-vector",
    question="Does the mouse go to the top right corner more often when the corner's part of the activation is added?",
    method=f"Size {SIZE}, cheese outside the top right 5x5. Activation at block2.res1.resadd with the corner open "
    "minus walled off, the mouse on its first square, added in every state; probabilities are computed, not sampled.",
    post="Not in the post. In the work it builds on, adding the vector drew the mouse to the top right corner.",
    measure=measure,
    figure=vector_figure,
    finding=finding,
)
