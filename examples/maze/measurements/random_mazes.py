"""Do the channels keep their labels in mazes whose squares are more random than procgen's?

Method: Size {SIZE}: a fraction of all squares made free or a wall, with equal probability, until there is a path from
the mouse to the cheese; the label UP means that UP is among the first steps of the shortest paths. AUCs are over mazes
in which the direction is legal. The post gives no result, so there is no verdict.

The post: Asked, not measured: perhaps there would be no channel with a clear 'go up' interpretation in a more random
maze.

Limits: Such channels might still not form in training on random mazes, as the post asks: this policy has seen no such
mazes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.statistics import mean_interval
from maze.analysis.cells import Integers, Row, Table, Tables, above, below, chosen, shown
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.estimates import intervals, minus, share
from maze.analysis.part import SPLITS, Finding, Study
from maze.analysis.readings import Readings
from maze.levels import random_squares
from maze.paths import Direction, at_cells, distances
from maze.states import CHEESE, FREE, WALL, Mazes, read_mazes, write_mazes

SIZE = 25
SHARES = (0.0, 0.1, 0.25, 0.5)  # fraction of squares made free or a wall at random, with equal probability
DRAWN = (0.1, 0.5)  # the fractions for which one maze is shown
TRIES = 100  # maximum number of edits of one level until there is a path to the cheese


def measure(study: Study) -> dict[str, Table]:
    """AUC and behavior by fraction, in edited mazes and in unedited mazes with paths of equal length; two pictures."""
    areas = []
    behavior = []
    pictures = []
    for fraction in SHARES:
        levels = study.levels(f"random mazes {fraction}", size=SIZE, cheese=SPLITS[0], mouse="anywhere")
        rng = np.random.default_rng(study.seed_for(f"random squares {fraction}"))
        edited, kept = randomised(read_mazes(levels), fraction, rng)
        if not len(kept):
            continue
        levels = [levels[index] for index in kept]
        matched = _as_far(read_mazes(levels), _way(edited), rng)
        readings = {
            "edited": Readings.of(study.points, write_mazes(edited, levels)),
            "unedited, as far": Readings.of(study.points, write_mazes(matched, levels)),
        }
        for direction in Direction:
            channel = study.channel(direction)
            here, far = (each.area(channel, direction) for each in readings.values())
            row = {"share": fraction, "direction": direction.name, "channel": channel}
            row |= readings["edited"].cells(channel, direction)
            areas.append(row | intervals(matched=far, minus_matched=minus(here, far)))
        behavior += [{"share": fraction, "mazes": name, **_behaviour(here)} for name, here in readings.items()]
        if fraction in DRAWN:
            lines = edited.picture(0).split("\n")
            pictures += [{"share": fraction, "line": line, "cells": text} for line, text in enumerate(lines)]
    return {"areas": areas, "behaviour": behavior, "pictures": pictures}


def randomised(mazes: Mazes, fraction: float, rng: np.random.Generator) -> tuple[Mazes, Integers]:
    """Make a fraction of the squares free or a wall at random, until the mouse can reach the cheese.

    The squares of the mouse and the cheese stay free. Returns the edited mazes and the indices of their originals,
    without mazes that have no path after `TRIES` edits.
    """
    side = np.arange(mazes.grid.shape[-1]) < mazes.size[:, None]
    editable = side[:, :, None] & side[:, None, :] & (mazes.grid != CHEESE)
    editable[np.arange(len(mazes)), mazes.mouse[:, 0], mazes.mouse[:, 1]] = False
    grid, waiting = mazes.grid.copy(), np.arange(len(mazes))
    for _ in range(TRIES):
        random = editable[waiting] & (rng.random(editable[waiting].shape) < fraction)
        squares = np.where(rng.random(random.shape) < 0.5, np.int32(FREE), np.int32(WALL))
        grid[waiting] = np.where(random, squares, mazes.grid[waiting])
        waiting = waiting[np.isinf(_way(replace(mazes, grid=grid)[waiting]))]
        if not len(waiting):
            break
    kept = np.setdiff1d(np.arange(len(mazes)), waiting)
    return replace(mazes, grid=grid)[kept], kept


def _way(mazes: Mazes) -> NDArray[np.float32]:
    return at_cells(distances(mazes, mazes.cheese), mazes.mouse)


def _as_far(mazes: Mazes, way: NDArray[np.float32], rng: np.random.Generator) -> Mazes:
    """The mazes with the mouse on a random square whose path to the cheese has this length, or the nearest."""
    length = np.where(mazes.grid == FREE, distances(mazes, mazes.cheese), np.inf)
    apart = np.abs(length - way[:, None, None])
    return mazes.moved(mouse=random_squares(apart == apart.min(axis=(1, 2), keepdims=True), rng))


def _behaviour(readings: Readings) -> Row:
    """How often the likeliest legal move, and a random legal one, starts a shortest path."""
    greedy, n = np.where(readings.legal, readings.moves, -1).argmax(axis=1), len(readings)
    right = readings.first[np.arange(n), greedy]
    chance = mean_interval(readings.first.sum(axis=1) / readings.legal.sum(axis=1))
    return {"n": n} | intervals(right=share(right.sum(), n), chance=chance, steps=mean_interval(_way(readings.mazes)))


def figure(tables: Tables) -> Figure:
    drawn, (areas, behavior, *mazes) = panels(15, 4.6, 4, width_ratios=(1.3, 1, 1, 1))
    label = "likeliest legal move starts a shortest path"
    draw(areas, tables, Panel("areas", "share", "auc", "AUC", ("direction", "channel"), along=True, line=0.5))
    draw(behavior, tables, Panel("behaviour", "share", "right", label, "mazes", along=True, line=None))
    for axes, fraction in zip(mazes, DRAWN, strict=True):
        _draw_maze(axes, [row["cells"] for row in chosen(tables["pictures"], share=fraction)])
        axes.set_title(f"{fraction:.0%} of squares random", fontsize="medium")
    return drawn


def _draw_maze(axes: Axes, lines: Sequence[str]) -> None:
    squares = np.array([list(line) for line in lines])
    axes.imshow(squares != "#", cmap="gray", vmin=-0.6, vmax=1)
    for mark, style, color in (("C", "*", "gold"), ("M", "^", "white")):
        row, col = np.argwhere(squares == mark)[0]
        axes.plot(col, row, style, color=color, markeredgecolor="black", markersize=11, linestyle="none")
    axes.set(xticks=[], yticks=[], xlabel="star: cheese, triangle: mouse")


def finding(tables: Tables) -> Finding:
    most = max(row["share"] for row in tables["areas"])
    rows = [row for row in chosen(tables["areas"], share=most) if row["auc"] is not None]
    edited, matched = chosen(tables["behaviour"], share=most)
    lower = ", ".join(row["direction"] for row in rows if below(row, "minus_matched")) or "no direction"
    kept = ", ".join(row["direction"] for row in rows if above(row, "beyond_walls")) or "no direction"
    walls = max((row["walls"] for row in rows), default=0.5)
    areas = "; ".join(
        f"{row['direction']} (channel {row['channel']}) {shown(row, 'auc')}, n={row['n']}" for row in rows
    )
    return Finding(
        f"With {most:.0%} of the squares random, AUC: {areas or 'too few mazes'}. The likeliest legal move starts a "
        f"shortest path in {shown(edited, 'right', '.0%')} of n={edited['n']} mazes (a random move in "
        f"{edited['chance']:.0%}), and in {shown(matched, 'right', '.0%')} of unedited mazes with equal path lengths.",
        "not comparable",
        f"The AUC beats that of the walls around the mouse (at most {walls:.2f}) for {kept}. The AUC is lower than in "
        f"unedited mazes with equal path lengths for {lower}.",
    )
