"""Do all mazes follow the rules that the post found by watching them?

Method: Levels of all sizes as procgen draws them, every statement checked square by square; a statement with a
condition is counted over the levels that meet the condition. Wilson intervals.

The post: Always: odd sizes, (even, even) squares free, (odd, odd) squares walls, one path between any two free squares,
bottom left and top right free.

Limits: Levels were counted and the generator's code was not read, so exceptions remain possible.
"""

from __future__ import annotations

import numpy as np

from maze.analysis.cells import Flags, Table, Tables, chosen, column, shown
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, share
from maze.analysis.part import Finding, Study
from maze.paths import START, Direction, distances, legal_moves
from maze.states import WORLD, Mazes, read_mazes

SIZES = range(3, WORLD + 1, 2)

Facts = dict[str, tuple[Flags, Flags]]


def measure(study: Study) -> dict[str, Table]:
    mazes = read_mazes(study.levels("generator", len(SIZES) * study.n))
    rows = []
    for size in np.unique(mazes.size).tolist():
        of_size = mazes[mazes.size == size]
        here = Mazes(of_size.grid[:, :size, :size], of_size.size, of_size.mouse, of_size.facing_right)
        for fact, (applies, holds) in facts(here).items():
            n, true = int(applies.sum()), int((applies & holds).sum())
            if n:
                rows.append({"size": size, "fact": fact, "n": n, "holds": true, **intervals(share=share(true, n))})
    overall = []
    for fact in dict.fromkeys(row["fact"] for row in rows):
        n, holds = (int(column(chosen(rows, fact=fact), name).sum()) for name in ("n", "holds"))
        overall.append({"fact": fact, "n": n, "holds": holds, **intervals(share=share(holds, n))})
    return {"facts": rows, "overall": overall}


def facts(mazes: Mazes) -> Facts:
    """Whether each of the post's statements applies to mazes of one size, without outer walls, and whether it holds."""
    free, legal = mazes.free, legal_moves(mazes)
    every = np.ones(len(mazes), dtype=np.bool_)
    squares = free.sum(axis=(1, 2))
    joints = (free[:, 1:] & free[:, :-1]).sum(axis=(1, 2)) + (free[:, :, 1:] & free[:, :, :-1]).sum(axis=(1, 2))
    reached = (np.isfinite(distances(mazes, START)) == free).all(axis=(1, 2))
    up_down = legal[:, [Direction.UP, Direction.DOWN], 1::2, ::2].all(axis=1)
    left_right = legal[:, [Direction.LEFT, Direction.RIGHT], ::2, 1::2].all(axis=1)
    holds = {
        "the side is odd": mazes.size % 2 == 1,
        "all (even, even) squares are free": free[:, ::2, ::2].all(axis=(1, 2)),
        "all (odd, odd) squares are walls": ~free[:, 1::2, 1::2].any(axis=(1, 2)),
        "a tree: connected, and one joint less than squares": reached & (joints == squares - 1),
        "bottom left and top right are free": free[:, 0, 0] & free[:, -1, -1],
        "up and down are legal on all free (odd, even) squares": (up_down | ~free[:, 1::2, ::2]).all(axis=(1, 2)),
        "left and right are legal on all free (even, odd) squares": (left_right | ~free[:, ::2, 1::2]).all(axis=(1, 2)),
    }
    known = {fact: (every, each) for fact, each in holds.items()}
    if free.shape[1] > 3:
        walls = ~free[:, 1, 0] & ~free[:, 2, 1]
        known["if (1, 0) and (2, 1) are walls, (3, 0) is free"] = (walls, free[:, 3, 0])
    return known


def finding(tables: Tables) -> Finding:
    overall = tables["overall"]
    broken = [row for row in tables["facts"] if row["holds"] < row["n"]]
    always = [row for row in overall if row["holds"] == row["n"]]
    weakest = min(overall, key=lambda row: row["share_low"])
    first = f" The first broken one: {broken[0]['fact']}, size {broken[0]['size']}." if broken else ""
    return Finding(
        f"{len(always)} of {len(overall)} statements hold in every level of {len(SIZES)} sizes; the least certain "
        f"holds in {shown(weakest, 'share', '.2%')} of n={weakest['n']}.{first}",
        "yes" if len(always) == len(overall) else "in part" if always else "no",
        f"A maze is {'not always ' if broken else ''}decided by its squares with one odd coordinate alone.",
    )


figure = chart(Panel("overall", "fact", "share", "fraction of levels of all sizes", line=None), size=(10, 4.8))
