"""Whether a direction's channel, chosen at size 25, tells the direction in mazes of other sizes."""

from __future__ import annotations

from matplotlib.figure import Figure

from chanpatch.statistics import difference_interval
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, column, verdict
from maze.analysis.readings import Readings, optional_cells
from maze.environment.paths import Direction
from maze.environment.states import WORLD

SIZES = range(7, WORLD + 1, 2)
DRAWN = range(3, WORLD + 1, 2)  # the sizes that procgen draws, all equally often
SPLITS = ("in distribution", "out of distribution")


def measure(study: Study) -> dict[str, Table]:
    """The AUC of each direction's channel by size and split, and its difference from that at the largest size."""
    rows: Table = []
    for split in SPLITS:
        # Levels of all sizes at once, n of each on average: drawing one size throws the others away.
        levels = study.levels(f"sizes {split}", len(DRAWN) * study.n, cheese=split, mouse="anywhere")
        readings = Readings.of(study.points, levels)
        by_size = {size: readings[readings.mazes.size == size] for size in SIZES}
        for direction in Direction:
            channel = study.channel(direction)
            largest = by_size[WORLD].area(channel, direction)
            for size, here in by_size.items():
                area = here.area(channel, direction)
                change = None if area is None or largest is None else difference_interval(area, largest)
                rows.append(
                    {
                        "direction": direction.name,
                        "channel": channel,
                        "split": split,
                        "size": size,
                        **here.cells(channel, direction),
                        **optional_cells("minus_largest", None if size == WORLD else change),
                    }
                )
    return {"sizes": rows}


def figure(tables: Tables) -> Figure:
    """AUC against size, one panel per direction."""
    drawn = Figure(figsize=(14, 4.4), layout="constrained")
    for axes, direction in zip(drawn.subplots(1, len(Direction), sharey=True), Direction, strict=True):
        here = [row for row in tables["sizes"] if row["direction"] == direction.name]
        for split, line, shift in zip(SPLITS, ("o-", "s--"), (-0.2, 0.2), strict=True):
            rows = [row for row in here if row["split"] == split and row["auc"] is not None]
            if not rows:
                continue
            size, counts = column(rows, "size") + shift, column(rows, "n")
            axes.vlines(size, column(rows, "auc_low"), column(rows, "auc_high"), color="0.6")
            label = f"cheese {split}\n(n={counts.min()} to {counts.max()} per size)"
            axes.plot(size, column(rows, "auc"), line, color="black", markersize=5, linewidth=1, label=label)
        axes.axhline(0.5, color="0.7", linewidth=0.8)
        axes.set(
            title=f"{direction.name}: channel {here[0]['channel']}", xticks=SIZES, xlabel="side of the maze, squares"
        )
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        axes.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].set_ylabel("AUC of the channel's sum, 95% interval")
    return drawn


def finding(tables: Tables) -> Finding:
    measured = [row for row in tables["sizes"] if row["auc"] is not None]
    inside = [row for row in measured if row["split"] == SPLITS[0]]
    if not inside:
        return Finding("Too few mazes of each size.", "not comparable", "Nothing.", "Raise --n.")
    outside = [row for row in measured if row["split"] == SPLITS[1]]
    told, told_outside = ([row for row in rows if above(row, "beyond_walls")] for rows in (inside, outside))
    compared = [row for row in measured if row["minus_largest"] is not None]
    lower = [row for row in compared if row["minus_largest_high"] < 0]
    higher = [row for row in compared if row["minus_largest_low"] > 0]
    counts = column(inside, "n")
    walls = [row["walls"] for row in measured if row["walls"] is not None]
    ranges = []
    for direction in Direction:
        areas = column([row for row in inside if row["direction"] == direction.name], "auc")
        if areas.size:
            ranges.append(f"{direction.name} {areas.min():.3f} to {areas.max():.3f}")
    return Finding(
        f"In distribution, AUC over the sizes {inside[0]['size']} to {inside[-1]['size']}: {'; '.join(ranges)} "
        f"(n={counts.min()} to {counts.max()} per size and direction).",
        verdict(*(above(row, "beyond_walls") for row in measured)),
        f"In {len(told)} of {len(inside)} cells in distribution the channel tells its direction better than the number "
        f"of walls around the mouse does, and in {len(told_outside)} of {len(outside)} out of it, interval of the "
        f"difference above 0; the walls alone have an AUC of up to {max(walls, default=0.5):.2f}. "
        f"Compared with size {WORLD}, over both places of the cheese, the AUC is lower in {len(lower)} cells and "
        f"higher in {len(higher)} of {len(compared)}, interval apart from 0 (not corrected for their number).",
        "That a threshold carries over: an AUC compares sums within one size. Nor that size itself makes the "
        "difference, as ways are longer in larger mazes.",
    )


PART = Part(
    name="sizes",
    question="Do the channels tell the same directions in mazes of every size?",
    method="Mouse on a random square, cheese in and out of the top right 5x5; AUC of the sum of the channel chosen at "
    "size 25, over mazes in which its direction is legal, by the side of the inner maze.",
    post="Channels in relu3 have the same interpretation for mazes of different sizes (footnote 8), no figure given.",
    measure=measure,
    figure=figure,
    finding=finding,
)
