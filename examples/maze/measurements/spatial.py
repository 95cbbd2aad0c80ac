"""Do the channels' high values occur only around the mouse?

Method: Size {SIZE}, mouse on a random square: the fraction of a channel's sum, over all mazes, within a distance of the
mouse on the 8x8 map of relu3, whose cells are {SQUARES:.1f} squares wide. The comparison is the mean fraction around
all other free squares. A direction's channel is ranked by the difference, the largest first, among the other channels.
The verdict: the lowest of the directions' fractions within {NEAR} cells is above {MOST:.0%}.

The post: The only pattern found: high values happen only around the mouse location (footnote 4), no figure given.

Limits: A channel with high values around the mouse may detect the mouse and not encode the path. Each cell of the map
depends on most of the observation.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.plots import channel_map
from chanpatch.statistics import Interval, share_interval
from maze.analysis.cells import Table, Tables, Values, above, chosen, shown, verdict
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.estimates import intervals, rank_cells
from maze.analysis.forwards import SITE, activations
from maze.analysis.part import SPLITS, Finding, Study
from maze.levels import observe
from maze.paths import Direction
from maze.states import FREE, WORLD, read_mazes

SIZE = WORLD  # so the maze fills the observation
DISTANCES = (0.5, 1, 1.5, 2, 3, 4, 6)  # from the mouse, in cells of the map
NEAR, MOST = 2, 0.9  # "only around the mouse": at least this fraction of the sum within this distance
CELLS = 8  # of relu3's map, along a side
SQUARES = WORLD / CELLS  # of the maze, along a cell of the map
SHARES = ("share", "elsewhere", "difference")


def measure(study: Study) -> dict[str, Table]:
    """The fraction of every live channel's sum around the mouse and around other free squares; one channel's map."""
    levels = study.levels("spatial", size=SIZE, cheese=SPLITS[0], mouse="anywhere")
    mazes, live = read_mazes(levels), list(study.selection.live)
    maps = activations(study.points, levels, SITE)[SITE][:, live].cpu().double().numpy()
    mouse = (np.arange(len(mazes)), mazes.mouse[:, 0], mazes.mouse[:, 1])
    others = mazes.grid == FREE
    others[mouse] = False
    total = maps.sum(axis=(2, 3))
    active = total.any(axis=0)
    rows = []
    for distance in DISTANCES:
        within = _within(maps.shape[-1], distance)
        elsewhere = np.einsum("lrc,rcij->lij", others, within) / others.sum(axis=(1, 2))[:, None, None]
        near, far = (np.einsum("lkij,lij->lk", maps, each) for each in (within[mouse[1:]], elsewhere))
        parts = np.stack([near, far, near - far], axis=-1)[:, active]
        whole = np.repeat(total[:, active, None], len(SHARES), axis=-1)
        found = share_interval(parts, whole)
        channels = np.array(live)[active].tolist()
        rows += _rows(found, channels, {each: study.channel(each) for each in Direction}, distance, len(levels))
    strongest = int(total[:, live.index(study.channel(Direction.UP))].argmax())
    return {"shares": rows, **_one_map(study, levels[strongest])}


def _within(cells_along: int, distance: float) -> Values:
    """Whether the cells of a map lie within a distance of each square: 0 or 1, (row, col, map row, map col).

    Row 0 of the world is at the bottom, and row 0 of a map is at the top. Distances are between centers, in map cells.
    """
    center = (np.arange(WORLD) + 0.5) * cells_along / WORLD
    middle = np.arange(cells_along) + 0.5
    row = (cells_along - center)[:, None] - middle
    col = center[:, None] - middle
    squared = row[:, None, :, None] ** 2 + col[None, :, None, :] ** 2
    return (squared <= distance**2).astype(np.float64)


def _rows(found: Interval[Values], channels: list[int], best: dict[Direction, int], distance: float, n: int) -> Table:
    """One row per active channel; the directions' channels are ranked among the others."""
    controls = [found.estimate[row, 2] for row, channel in enumerate(channels) if channel not in best.values()]
    rows = []
    for number, channel in enumerate(channels):
        directions = [direction.name for direction, each in best.items() if each == channel]
        row = {"channel": channel, "role": " and ".join(directions) or "control", "distance": distance, "n": n}
        ends = zip(*(each[number] for each in (found.estimate, found.low, found.high)), strict=True)
        row |= intervals(**{name: Interval(*each, 0.95) for name, each in zip(SHARES, ends, strict=True)})
        rank = rank_cells(found.estimate[number, 2], controls, ranked=directions, increase=True)
        rows.append(row | {"rank": rank["rank"], "controls": rank["controls"]})
    return rows


def _one_map(study: Study, level: bytes) -> dict[str, Table]:
    """The map of the UP channel on one level, and the observation in gray, row by row."""
    channel = study.channel(Direction.UP)
    (squares,) = activations(study.points, [level], SITE)[SITE][:, channel].cpu().numpy()
    gray = observe([level])[0].mean(axis=-1).round().astype(np.uint8)
    activation = [
        {"channel": channel, "row": row, **{f"col_{col}": float(each) for col, each in enumerate(line)}}
        for row, line in enumerate(squares)
    ]
    # Hexadecimal with a leading mark, so that no line can be read as a number.
    pixels = [{"row": row, "grey": f"x{line.tobytes().hex()}"} for row, line in enumerate(gray)]
    return {"map": activation, "pixels": pixels}


def pictures(tables: Tables) -> tuple[NDArray[np.uint8], Values]:
    """The observation in gray, (row=64, col=64), and the UP channel's map of it, (row=8, col=8)."""
    gray = np.array([[*bytes.fromhex(row["grey"][1:])] for row in tables["pixels"]], dtype=np.uint8)
    return gray, np.array([[row[f"col_{col}"] for col in range(CELLS)] for row in tables["map"]])


def figure(tables: Tables) -> Figure:
    drawn, (left, right) = panels(14, 6, 2)
    gray, squares = pictures(tables)
    channel_map(torch.from_numpy(gray[None]), torch.from_numpy(squares), left)
    left.set_xlabel(
        f"channel {tables['map'][0]['channel']} (UP) in the maze of all with the highest sum,\n"
        f"{squares.sum():.1f}; column (pixel)"
    )
    around = {"around the mouse": "share", "around other free squares": "elsewhere"}
    style = {"where": {"role": lambda role: role != "control"}, "along": True, "line": None}
    draw(right, tables, Panel("shares", "distance", around, "fraction of the sum", "role", **style))
    return drawn


def finding(tables: Tables) -> Finding:
    main = [row for row in tables["shares"] if row["role"] != "control"]
    if not main:
        return Finding("No direction's channel was ever active.", "not comparable", "Raise --n.")
    near = chosen(main, distance=NEAR)
    more = sum(above(row, "difference") is True for row in near)
    others = [row["share"] for row in chosen(tables["shares"], role="control", distance=NEAR)]
    beside = f"The other {len(others)} live channels have {np.median(others):.0%} there (median)" if others else ""
    shares = "; ".join(
        f"{row['role']} (channel {row['channel']}) {shown(row, 'share')} and {row['elsewhere']:.3f}, n={row['n']}"
        + ("" if row["rank"] is None else f", rank {row['rank']} of {row['controls'] + 1}")
        for row in near
    )
    return Finding(
        f"Fraction of the sum within {NEAR} map cells ({NEAR * SQUARES:.1f} squares) of the mouse, and of other free "
        f"squares: {shares}.",
        verdict(above(min(near, key=lambda row: row["share"]), "share", MOST)),
        f"For {more} of {len(near)} channels, more of the sum lies around the mouse than around other free squares. "
        + (f"{beside}, {max(others):.0%} at most." if others else "There are no other channels to compare with."),
    )
