"""What is true of every maze that procgen makes."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.statistics import wilson_interval
from maze.analysis.part import Finding, Part, Study, Table, Tables, column, interval_cells, shown
from maze.environment.paths import START, Direction, distances, legal_moves
from maze.environment.states import WORLD, Mazes, read_mazes

SIZES = range(3, WORLD + 1, 2)
SHOWN = 15  # the size whose frequencies are drawn

Facts = dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]


def measure(study: Study) -> dict[str, Table]:
    """In how many levels of each size each fact holds, and how often each square is free at one size."""
    mazes = read_mazes(study.levels("generator", len(SIZES) * study.n))
    rows: Table = []
    frequencies: Table = []
    for size in np.unique(mazes.size).tolist():
        here = _cut(mazes[mazes.size == size], size)
        for fact, (applies, holds) in facts(here).items():
            n, true = int(applies.sum()), int((applies & holds).sum())
            if n:
                rows.append({"size": size, "fact": fact, "n": n, "holds": true, **_share(true, n)})
        if size == SHOWN:
            frequencies = [
                {"row": row, "col": col, "n": len(here), "free": int(count), **_share(int(count), len(here))}
                for (row, col), count in np.ndenumerate(here.free.sum(axis=0))
            ]
    return {"facts": rows, "overall": _overall(rows), "frequencies": frequencies}


def facts(mazes: Mazes) -> Facts:
    """What the post says of the generator: to which mazes it applies, and in which of them it is so.

    Args:
        mazes: of one size, without room beyond it.
    """
    free, legal = mazes.free, legal_moves(mazes)
    every = np.ones(len(mazes), dtype=np.bool_)
    side = free.shape[1]
    squares = free.sum(axis=(1, 2))
    joints = (free[:, 1:] & free[:, :-1]).sum(axis=(1, 2)) + (free[:, :, 1:] & free[:, :, :-1]).sum(axis=(1, 2))
    reached = (np.isfinite(distances(mazes, START)) == free).all(axis=(1, 2))
    between_rows, between_cols = free[:, 1::2, ::2], free[:, ::2, 1::2]
    up_down = legal[:, [Direction.UP, Direction.DOWN], 1::2, ::2].all(axis=1)
    left_right = legal[:, [Direction.LEFT, Direction.RIGHT], ::2, 1::2].all(axis=1)
    known: Facts = {
        "the side is odd": (every, mazes.size % 2 == 1),
        "all (even, even) squares are free": (every, free[:, ::2, ::2].all(axis=(1, 2))),
        "all (odd, odd) squares are walls": (every, ~free[:, 1::2, 1::2].any(axis=(1, 2))),
        "a tree: connected, and one joint less than squares": (every, reached & (joints == squares - 1)),
        "bottom left and top right are free": (every, free[:, 0, 0] & free[:, -1, -1]),
        "up and down are legal on all free (odd, even) squares": (
            every,
            (up_down | ~between_rows).all(axis=(1, 2)),
        ),
        "left and right are legal on all free (even, odd) squares": (
            every,
            (left_right | ~between_cols).all(axis=(1, 2)),
        ),
    }
    if side > 3:
        walls = ~free[:, 1, 0] & ~free[:, 2, 1]
        known["if (1, 0) and (2, 1) are walls, (3, 0) is free"] = (walls, free[:, 3, 0])
    return known


def _cut(mazes: Mazes, size: int) -> Mazes:
    """Mazes of one size without the walls beyond it."""
    return Mazes(mazes.grid[:, :size, :size], mazes.size, mazes.mouse, mazes.facing_right)


def _overall(rows: Table) -> Table:
    """Every fact over all sizes."""
    overall: Table = []
    for fact in dict.fromkeys(row["fact"] for row in rows):
        of = [row for row in rows if row["fact"] == fact]
        n, holds = int(column(of, "n").sum()), int(column(of, "holds").sum())
        overall.append({"fact": fact, "n": n, "holds": holds, **_share(holds, n)})
    return overall


def _share(count: int, n: int) -> dict[str, object]:
    return interval_cells("share", wilson_interval(count, n))


def figure(tables: Tables) -> Figure:
    """How often each square of one size is free, and every fact over all sizes."""
    drawn = Figure(figsize=(14, 4.8), layout="constrained")
    squares, facts_axes = drawn.subplots(1, 2, width_ratios=(1, 1.3))
    rows = tables["frequencies"]
    if rows:
        size = int(column(rows, "row").max()) + 1
        shares = column(rows, "share").reshape(size, size)
        image = squares.imshow(shares, origin="lower", cmap="gray", vmin=0, vmax=1)
        drawn.colorbar(image, ax=squares, label="share of levels in which it is free")
        squares.set(xlabel="column", ylabel="row", title=f"size {size}, n={rows[0]['n']} levels")
        squares.set(xticks=range(0, size, 2), yticks=range(0, size, 2))
    overall = tables["overall"][::-1]
    for height, row in enumerate(overall):
        facts_axes.plot([row["share_low"], row["share_high"]], [height, height], color="black")
        facts_axes.plot(row["share"], height, "o", color="black")
    facts_axes.set_yticks(range(len(overall)), [f"{row['fact']}\n{row['holds']} of {row['n']}" for row in overall])
    facts_axes.set_xlabel("share of levels of all sizes, 95% interval")
    facts_axes.locator_params(axis="x", nbins=4)  # shares close to 1 have long labels
    facts_axes.spines[["top", "right"]].set_visible(False)
    return drawn


def finding(tables: Tables) -> Finding:
    overall = tables["overall"]
    broken = [row for row in tables["facts"] if row["holds"] < row["n"]]
    always = [row for row in overall if row["holds"] == row["n"]]
    weakest = min(overall, key=lambda row: row["share_low"])
    free = [row for row in tables["frequencies"] if (row["row"] + row["col"]) % 2]
    varies = (
        f" At size {SHOWN}, the squares with one odd coordinate are free in {min(column(free, 'share')):.0%} to "
        f"{max(column(free, 'share')):.0%} of n={free[0]['n']} levels."
        if free
        else ""
    )
    first = f" The first that does not: {broken[0]['fact']}, size {broken[0]['size']}." if broken else ""
    return Finding(
        f"{len(always)} of {len(overall)} statements hold in every level of {len(SIZES)} sizes; the least certain one "
        f"in {shown(weakest, 'share', '.2%')} of n={weakest['n']}.{first}",
        "yes" if len(always) == len(overall) else "in part" if always else "no",
        f"A maze is {'not always ' if broken else ''}decided by its squares with one odd coordinate alone.{varies}",
        "That the generator cannot do otherwise: levels were counted, its code was not read. The lower end of an "
        "interval is what the count excludes.",
    )


PART = Part(
    name="generator",
    question="Do all mazes follow the rules that the post found by watching them?",
    method="Levels of all sizes as procgen draws them, every statement checked square by square; a statement with a "
    "condition is counted over the levels that meet it. Wilson intervals.",
    post="Always: odd sizes, (even, even) squares free, (odd, odd) squares walls, one path between any two free "
    "squares, bottom left and top right free.",
    measure=measure,
    figure=figure,
    finding=finding,
)
