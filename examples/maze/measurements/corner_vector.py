"""Does the mouse go to the top right corner more often when the corner's part of the activation is added?

Method: Size 11, cheese outside the top right 5x5. Activation at block2.res1.resadd with the corner open minus
walled off, the mouse on its first square, added in every state; probabilities are computed, not sampled. The verdict:
P(corner before the cheese) is higher than with shuffled channels and with random vectors of the same norm.

The post: Not in the post. In the work it builds on, adding the vector drew the mouse to the top right corner.

Limits: The vector need not encode the corner as a goal: the vector is the effect of one wall next to the corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from maze.analysis import steering
from maze.analysis.cells import Table, Tables, above, chosen, keyed, shown, verdict
from maze.analysis.part import SPLITS, Finding, Study
from maze.analysis.steering import CONTROLS, OWN
from maze.paths import distances, shortest_paths, top_right
from maze.states import WALL, Mazes, read_mazes

# The corner is at the same place in every level, so another level's vector also points there.
TRANSFER, *JUDGES = CONTROLS
SUBTRACTED = "own vector subtracted"


def measure(study: Study) -> dict[str, Table]:
    """Every level's corner vector added and subtracted, with its controls."""
    count = min(study.n, steering.MOST_LEVELS)
    levels = _with_free_cheese(study.levels("corner-vector", 2 * count, size=steering.SIZE, cheese=SPLITS[1]))[:count]
    mazes = read_mazes(levels)
    vectors = steering.difference_vectors(study.points, levels, mazes, without_corner(mazes))
    subtracted = {SUBTRACTED: steering.added(study.points, vectors, -1.0)}
    return steering.measured(study, "corner-vector", levels, vectors, 1.0, "corner", subtracted, {})[0]


def without_corner(mazes: Mazes) -> Mazes:
    """The mazes with a wall on the last square before the top right corner."""
    grid = mazes.grid.copy()
    for index, path in enumerate(shortest_paths(mazes, top_right(mazes))):
        grid[index, path[-2][0], path[-2][1]] = WALL
    return replace(mazes, grid=grid)


def _with_free_cheese(levels: Sequence[bytes]) -> list[bytes]:
    """The levels in which the path to the cheese does not lead through the corner."""
    mazes = read_mazes(levels)
    to_cheese = distances(without_corner(mazes), mazes.cheese)[:, 0, 0]
    return [level for level, distance in zip(levels, to_cheese, strict=True) if np.isfinite(distance)]


def finding(tables: Tables) -> Finding:
    corner = keyed(chosen(tables["effects"], measure="corner"), "intervention")
    own, away = corner[OWN], corner[SUBTRACTED]
    choice = chosen(tables["effects"], measure="to_corner", intervention=OWN)
    against = [row for row in chosen(tables["against"], measure="corner") if row["control"] in JUDGES]
    higher = [above(row, "own_minus_control") for row in against]
    squares = (
        f" At the decision square (n={choice[0]['n']}), P(first to the corner) {choice[0]['original']:.1%} becomes "
        f"{choice[0]['modified']:.1%}."
        if choice
        else ""
    )
    return Finding(
        f"P(corner before the cheese) {own['original']:.3f} becomes {own['modified']:.3f} with the vector added, "
        f"effect {shown(own, 'effect', '+.3f')}, n={own['n']}; subtracted, {shown(away, 'effect', '+.3f')}.{squares}",
        verdict(above(min(against, key=lambda row: row["own_minus_control"]), "own_minus_control")),
        f"Another level's vector has {shown(corner[TRANSFER], 'effect', '+.3f')}, and the own vector does more than "
        f"{higher.count(True)} of {len(JUDGES)} controls. {steering.ranking_text(tables)}",
    )


figure = steering.figure
