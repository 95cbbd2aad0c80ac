"""Whether the channels keep their labels in mazes that do not follow the rules of procgen's generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.statistics import Interval, difference_interval, mean_interval, wilson_interval
from maze.analysis.part import Cell, Finding, Part, Study, Table, Tables, above, column, interval_cells, shown
from maze.analysis.readings import Readings, optional_cells
from maze.environment.levels import random_squares
from maze.environment.paths import Direction, distances
from maze.environment.states import CHEESE, FREE, WALL, Mazes, read_mazes, write_mazes

SIZE = 25
SHARES = (0.0, 0.1, 0.25, 0.5)  # of the squares that are made free or a wall at random, with equal chances
DRAWN = (0.1, 0.5)  # the shares of which one maze is shown
TRIES = 100  # edits of one level until there is a way to the cheese


def measure(study: Study) -> dict[str, Table]:
    """AUC and behaviour by share, in edited mazes and in unedited ones with an equally long way; two pictures."""
    areas: Table = []
    behaviour: Table = []
    pictures: Table = []
    unedited: dict[Direction, Interval | None] = {}
    for share in SHARES:
        levels = study.levels(f"random mazes {share}", size=SIZE, cheese="in distribution", mouse="anywhere")
        rng = np.random.default_rng(study.seed_for(f"random squares {share}"))
        edited, kept, edits = randomised(read_mazes(levels), share, rng)
        if not len(kept):
            continue
        levels = [levels[index] for index in kept]
        matched = _as_far(read_mazes(levels), _way(edited), rng)
        readings = {
            "edited": Readings.of(study.points, write_mazes(edited, levels)),
            "unedited, as far": Readings.of(study.points, write_mazes(matched, levels)),
        }
        areas += [
            _areas(share, each, study.channel(each), [*readings.values()], unedited.get(each)) for each in Direction
        ]
        if share == 0:
            unedited = {each: readings["edited"].area(study.channel(each), each) for each in Direction}
        counts: dict[str, Cell] = {"share": share, "edits": edits, "levels": study.n}
        behaviour += [counts | {"mazes": name, **_behaviour(here)} for name, here in readings.items()]
        if share in DRAWN:
            lines = edited.picture(0).split("\n")
            pictures += [{"share": share, "line": line, "cells": cells} for line, cells in enumerate(lines)]
    return {"areas": areas, "behaviour": behaviour, "pictures": pictures}


def randomised(mazes: Mazes, share: float, rng: np.random.Generator) -> tuple[Mazes, NDArray[np.int64], int]:
    """Mazes in which some squares are free or a wall at random, and the mouse can still come to the cheese.

    The squares of the mouse and the cheese stay free. A maze is edited afresh until there is a way.

    Args:
        mazes: with mouse and cheese.
        share: the probability with which a square is made random.
        rng: where the draws come from.

    Returns:
        The edited mazes, the indices of their originals (those without a way after `TRIES` edits are left out), and
        how many edits there were.
    """
    side = np.arange(mazes.grid.shape[-1]) < mazes.size[:, None]
    editable = side[:, :, None] & side[:, None, :] & (mazes.grid != CHEESE)
    editable[np.arange(len(mazes)), mazes.mouse[:, 0], mazes.mouse[:, 1]] = False
    grid, waiting, edits = mazes.grid.copy(), np.arange(len(mazes)), 0
    for _ in range(TRIES):
        chosen = editable[waiting] & (rng.random(editable[waiting].shape) < share)
        squares = np.where(rng.random(chosen.shape) < 0.5, np.int32(FREE), np.int32(WALL))
        grid[waiting] = np.where(chosen, squares, mazes.grid[waiting])
        edits += len(waiting)
        waiting = waiting[np.isinf(_way(replace(mazes, grid=grid)[waiting]))]
        if not len(waiting):
            break
    kept = np.setdiff1d(np.arange(len(mazes)), waiting)
    return replace(mazes, grid=grid)[kept], kept, edits


def _way(mazes: Mazes) -> NDArray[np.float32]:
    """The length of the shortest way from the mouse to the cheese: (batch,)."""
    return distances(mazes, mazes.cheese)[np.arange(len(mazes)), mazes.mouse[:, 0], mazes.mouse[:, 1]]


def _as_far(mazes: Mazes, way: NDArray[np.float32], rng: np.random.Generator) -> Mazes:
    """The mazes with the mouse on a random square whose way to the cheese is as long, or as near to it as there is."""
    length = np.where(mazes.grid == FREE, distances(mazes, mazes.cheese), np.inf)
    apart = np.abs(length - way[:, None, None])
    return mazes.moved(mouse=random_squares(apart == apart.min(axis=(1, 2), keepdims=True), rng))


def _areas(
    share: float, direction: Direction, channel: int, readings: Sequence[Readings], unedited: Interval | None
) -> dict[str, Cell]:
    edited, matched = (here.area(channel, direction) for here in readings)
    return {
        "share": share,
        "direction": direction.name,
        "channel": channel,
        **readings[0].cells(channel, direction),
        **optional_cells("matched", matched),
        **optional_cells("minus_unedited", _difference(edited, unedited)),
        **optional_cells("minus_matched", _difference(edited, matched)),
    }


def _difference(one: Interval | None, other: Interval | None) -> Interval | None:
    return None if one is None or other is None else difference_interval(one, other)


def _behaviour(readings: Readings) -> dict[str, Cell]:
    """How often the likeliest legal move is the start of a shortest way, and how often a random legal one would be."""
    greedy = np.where(readings.legal, readings.moves, -1).argmax(axis=1)
    right, ways = readings.first[np.arange(len(readings)), greedy], readings.first.sum(axis=1)
    return {
        "n": len(readings),
        **interval_cells("right", wilson_interval(int(right.sum()), len(readings))),
        **interval_cells("chance", mean_interval(ways / readings.legal.sum(axis=1))),
        **interval_cells("several_first_steps", wilson_interval(int((ways > 1).sum()), len(readings))),
        **interval_cells("steps", mean_interval(_way(readings.mazes))),
    }


def figure(tables: Tables) -> Figure:
    """AUC and behaviour against the share of random squares, and two of the mazes."""
    drawn = Figure(figsize=(15, 4.6), layout="constrained")
    areas, behaviour, *mazes = drawn.subplots(1, 4, width_ratios=(1.3, 1, 1, 1))
    for number, (direction, marker) in enumerate(zip(Direction, "<v^>", strict=True)):
        rows = [row for row in tables["areas"] if row["direction"] == direction.name and row["auc"] is not None]
        if rows:
            _draw_line(
                areas, rows, "auc", marker + "-", 0.008 * (number - 1.5), f"{direction.name}: {rows[0]['channel']}"
            )
    counts = column(tables["areas"], "n")
    areas.set_title(f"mazes in which the direction is legal, n={counts.min()} to {counts.max()}", fontsize="medium")
    areas.set_ylabel("AUC of the channel's sum, 95% interval")
    areas.axhline(0.5, color="0.7", linewidth=0.8)
    for shift, (name, line) in zip((-0.004, 0.004), (("edited", "o-"), ("unedited, as far", "s--")), strict=True):
        _draw_line(behaviour, [row for row in tables["behaviour"] if row["mazes"] == name], "right", line, shift, name)
    rows = [row for row in tables["behaviour"] if row["mazes"] == "edited"]
    behaviour.set_title(f"n={column(rows, 'n').min()} to {column(rows, 'n').max()}", fontsize="medium")
    behaviour.plot(column(rows, "share"), column(rows, "chance"), ":", color="0.4", label="a random legal move")
    behaviour.set(ylabel="likeliest legal move starts a shortest way", ylim=(0, 1.03))
    for axes in (areas, behaviour):
        axes.set(xlabel="share of squares made random", xticks=SHARES)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    for axes, share in zip(mazes, DRAWN, strict=True):
        _draw_maze(axes, [row["cells"] for row in tables["pictures"] if row["share"] == share])
        axes.set_title(f"{share:.0%} of squares random", fontsize="medium")
    return drawn


def _draw_line(axes: Axes, rows: Table, name: str, line: str, shift: float, label: str) -> None:
    share = column(rows, "share") + shift
    axes.vlines(share, column(rows, f"{name}_low"), column(rows, f"{name}_high"), color="0.6")
    axes.plot(share, column(rows, name), line, color="black", markersize=5, linewidth=1, label=label)


def _draw_maze(axes: Axes, lines: Sequence[str]) -> None:
    cells = np.array([list(line) for line in lines])
    axes.imshow(cells != "#", cmap="gray", vmin=-0.6, vmax=1)
    for mark, style in (("C", "*"), ("M", "^")):
        row, col = np.argwhere(cells == mark)[0]
        color = "gold" if mark == "C" else "white"
        axes.plot(col, row, style, color=color, markeredgecolor="black", markersize=11, linestyle="none")
    axes.set(xticks=[], yticks=[], xlabel="star: cheese, triangle: mouse")


def finding(tables: Tables) -> Finding:
    most = max(row["share"] for row in tables["areas"])
    rows = [row for row in tables["areas"] if row["share"] == most and row["auc"] is not None]
    edited, matched = (row for row in tables["behaviour"] if row["share"] == most)
    lower = {
        name: [
            row["direction"] for row in rows if row[f"minus_{name}_high"] is not None and row[f"minus_{name}_high"] < 0
        ]
        for name in ("unedited", "matched")
    }
    kept = [row["direction"] for row in rows if above(row, "beyond_walls")]
    areas = "; ".join(
        f"{row['direction']} (channel {row['channel']}) {shown(row, 'auc')}, n={row['n']}" for row in rows
    )
    return Finding(
        f"With {most:.0%} of the squares random, AUC: {areas or 'too few mazes'}. The likeliest legal move starts a "
        f"shortest way in {shown(edited, 'right', '.0%')} of n={edited['n']} mazes (a random legal move in "
        f"{edited['chance']:.0%}), and in {shown(matched, 'right', '.0%')} of unedited mazes with as long a way.",
        "not comparable",
        f"The labels {', '.join(kept) or 'of no direction'} hold there: the AUC is above that "
        f"of the walls around the mouse alone (at most {max((row['walls'] for row in rows), default=0.5):.2f}), "
        "interval of the difference above 0. The AUC is lower than "
        f"without random squares for {', '.join(lower['unedited']) or 'no direction'}, and lower than in unedited "
        f"mazes with as long a way for {', '.join(lower['matched']) or 'no direction'}. The mean way is "
        f"{edited['steps']:.0f} steps, and {edited['several_first_steps']:.0%} of the mazes have several shortest "
        f"first steps; {edited['n']} of {edited['levels']} levels were kept, after {edited['edits']} edits.",
        "That no such channels would form in training on random mazes, which is what the post asks: this policy has "
        "seen none, so what is lost here is how far it generalises.",
    )


PART = Part(
    name="random-mazes",
    question="Do the channels keep their labels in mazes whose squares are more random than procgen's?",
    method=f"Size {SIZE}: a share of all squares made free or a wall with equal chances, edited until there is a way "
    "from the mouse to the cheese; the label UP means that UP is among the first steps of the shortest ways. "
    "AUCs are over mazes in which the direction is legal.",
    post="Asked, not measured: perhaps there would be no channel with a clear 'go up' interpretation in a more random "
    "maze.",
    measure=measure,
    figure=figure,
    finding=finding,
)
