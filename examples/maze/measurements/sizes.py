"""Do the channels predict the same directions in mazes of every size?

Method: Mouse on a random square, cheese in and out of the top right 5x5; AUC of the sum of the channel chosen at size
25, over mazes in which its direction is legal, by the side of the inner maze. The verdict: in distribution, the lowest
difference between this AUC and that of the number of walls around the mouse, over sizes and directions, is above 0.

The post: Channels in relu3 have the same interpretation for mazes of different sizes (footnote 8), no figure given.

Limits: The result does not show that a threshold carries over, as an AUC compares sums within one size. Nor does size
itself have to make the difference, as paths are longer in larger mazes.
"""

from __future__ import annotations

from dataclasses import replace

from maze.analysis.cells import Table, Tables, above, below, chosen, column, verdict
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, minus
from maze.analysis.part import SPLITS, TOO_FEW, Finding, Study
from maze.analysis.readings import Readings
from maze.paths import Direction
from maze.states import WORLD

SIZES = range(7, WORLD + 1, 2)
DRAWN = range(3, WORLD + 1, 2)  # the sizes that procgen draws, with equal probability


def measure(study: Study) -> dict[str, Table]:
    """The AUC of each direction's channel by size and split, and its difference from that at the largest size."""
    rows = []
    for split in SPLITS:
        # Levels of all sizes at once, n per size on average: drawing one size would discard the others.
        levels = study.levels(f"sizes {split}", len(DRAWN) * study.n, cheese=split, mouse="anywhere")
        readings = Readings.of(study.points, levels)
        by_size = {size: readings[readings.mazes.size == size] for size in SIZES}
        for direction in Direction:
            channel = study.channel(direction)
            largest = by_size[WORLD].area(channel, direction)
            for size, here in by_size.items():
                change = None if size == WORLD else minus(here.area(channel, direction), largest)
                row = {"direction": direction.name, "channel": channel, "split": split, "size": size}
                rows.append(row | here.cells(channel, direction) | intervals(minus_largest=change))
    return {"sizes": rows}


def finding(tables: Tables) -> Finding:
    measured = [row for row in tables["sizes"] if row["auc"] is not None]
    inside, outside = (chosen(measured, split=split) for split in SPLITS)
    if not inside:
        return TOO_FEW
    beyond = [sum(above(row, "beyond_walls") is True for row in rows) for rows in (inside, outside)]
    compared = [row for row in measured if row["minus_largest"] is not None]
    lower, higher = (sum(test(row, "minus_largest") is True for row in compared) for test in (below, above))
    counts = column(inside, "n")
    walls = max((row["walls"] for row in measured if row["walls"] is not None), default=0.5)
    areas = {direction.name: column(chosen(inside, direction=direction.name), "auc") for direction in Direction}
    ranges = "; ".join(f"{name} {each.min():.3f} to {each.max():.3f}" for name, each in areas.items() if each.size)
    return Finding(
        f"In distribution, AUC over the sizes {inside[0]['size']} to {inside[-1]['size']}: {ranges} "
        f"(n={counts.min()} to {counts.max()} per size and direction).",
        verdict(above(min(inside, key=lambda row: row["beyond_walls"]), "beyond_walls")),
        f"The channel beats the number of walls around the mouse (AUC up to {walls:.2f}) in {beyond[0]} of "
        f"{len(inside)} cells in distribution and {beyond[1]} of {len(outside)} out of it. Compared with size {WORLD}, "
        f"the AUC is lower in {lower} cells and higher in {higher} of {len(compared)} (not corrected).",
    )


_AREAS = Panel("sizes", "size", "auc", "AUC", "split", along=True, line=0.5)
figure = chart(
    *(replace(_AREAS, where={"direction": each.name}, title=each.name) for each in Direction), size=(3.6, 4.4)
)
