"""Vector fields: the mean move of a policy from each square of one maze, and the difference of two policies."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from maze.analysis.cells import Table, Values
from maze.paths import MOVES, Direction


def vector_field(table: Table, policy: str, axes: Axes, *, minus: str | None = None) -> Axes:
    """A maze with one arrow in each square, almost a cell long for a certain move.

    Args:
        table: one row per free square: `row`, `col`, `size`, the cheese's cell, and for each policy the probability of
            each move, such as `original_left`; None if the mouse cannot be there before the cheese.
        policy: name of the policy.
        axes: axes to draw into.
        minus: name of another policy, whose arrows are subtracted. The differences are drawn at half their length.
    """
    reached = [row for row in table if row[f"{policy}_left"] is not None]
    vectors = _arrows(reached, policy)
    if minus is not None:
        vectors = (vectors - _arrows(reached, minus)) / 2
    size, cheese = int(table[0]["size"]), (table[0]["cheese_row"], table[0]["cheese_col"])
    maze = np.zeros((size, size))
    maze[[row["row"] for row in table], [row["col"] for row in table]] = 1
    axes.imshow(maze, origin="lower", cmap="gray", vmin=-1.5, vmax=1)
    col, row = [each["col"] for each in reached], [each["row"] for each in reached]
    style = {"angles": "xy", "scale_units": "xy", "scale": 1.2, "width": 0.006, "pivot": "mid"}
    axes.quiver(col, row, vectors[:, 1], vectors[:, 0], **style)
    axes.plot(cheese[1], cheese[0], "*", color="gold", markeredgecolor="black", markersize=15)
    axes.plot(size - 1, size - 1, "s", color="none", markeredgecolor="black", markersize=11)
    axes.set(xticks=[], yticks=[], xlabel="star: cheese, square: top right corner")
    return axes


def _arrows(reached: Table, policy: str) -> Values:
    return np.array([[row[f"{policy}_{move.name.lower()}"] for move in Direction] for row in reached]) @ MOVES
