"""Where a channel's activation lies: around the mouse, or anywhere in the maze."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import run_with_cache
from chanpatch.plots import channel_map
from chanpatch.statistics import Interval, bootstrap_interval, rank_among
from maze.analysis.effects import activations
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, interval_cells, shown, verdict
from maze.analysis.tables import SITE
from maze.environment.levels import observe, policy_input
from maze.environment.paths import Direction
from maze.environment.states import FREE, WORLD, read_mazes

SIZE = WORLD  # so the maze fills the observation
DISTANCES = (1, 2, 3)  # from the mouse, in cells of the map
NEAR, MOST = 1, 0.9  # "only around the mouse": at least this share of the sum within this distance
CELLS = 8  # of relu3's map, along a side
SQUARES = WORLD / CELLS  # of the maze, along a cell of the map

Values = NDArray[np.float64]


def measure(study: Study) -> dict[str, Table]:
    """The share of every live channel's sum around the mouse and around other free squares; one channel's map."""
    levels = study.levels("spatial", size=SIZE, cheese="in distribution", mouse="anywhere")
    mazes, live = read_mazes(levels), list(study.selection.live)
    maps = activations(study.points, levels, SITE)[SITE][:, live].double().numpy()
    mouse = (np.arange(len(mazes)), mazes.mouse[:, 0], mazes.mouse[:, 1])
    others = mazes.grid == FREE
    others[mouse] = False
    total = maps.sum(axis=(2, 3))
    active = total.any(axis=0)
    rows: Table = []
    for distance in DISTANCES:
        within = _within(maps.shape[-1], distance)
        elsewhere = np.einsum("lrc,rcij->lij", others, within) / others.sum(axis=(1, 2))[:, None, None]
        near, far = (np.einsum("lkij,lij->lk", maps, cells) for cells in (within[mouse[1:]], elsewhere))
        sums = np.stack([near, far, total], axis=-1)[:, active]
        interval = bootstrap_interval(sums, _shares, seed=study.seed_for("spatial bootstrap"), resamples=1999)
        ends = np.stack([interval.estimate, interval.low, interval.high], axis=-1)
        shares = dict(zip(np.array(live)[active].tolist(), ends.tolist(), strict=True))
        rows += _rows(shares, study.selection.best, distance, len(levels))
    strongest = int(total[:, live.index(study.channel(Direction.UP))].argmax())
    return {"shares": rows, **_one_map(study, levels[strongest])}


def _shares(sums: Values) -> Values:
    """The share of all mazes' sum around the mouse, around the mean other free square, and the difference.

    Args:
        sums: (level, channel, place=3): around the mouse, around the mean other square, everywhere.

    Returns:
        (channel, share=3), NaN for a channel that is zero in all of the mazes.
    """
    near, far, total = sums.sum(axis=0).T
    known = np.where(total > 0, total, np.nan)
    return np.stack([near / known, far / known, (near - far) / known], axis=-1)


def _within(cells: int, distance: int) -> Values:
    """Which cells of a map lie within a distance of each square of the world: 0 or 1, (row, col, map row, map col).

    Row 0 of the world is at the bottom and row 0 of a map at the top. A square's centre and the centres of the map's
    cells are compared, in map cells.
    """
    centre = (np.arange(WORLD) + 0.5) * cells / WORLD
    middle = np.arange(cells) + 0.5
    row = (cells - centre)[:, None] - middle
    col = centre[:, None] - middle
    squared = row[:, None, :, None] ** 2 + col[None, :, None, :] ** 2
    return (squared <= distance**2).astype(np.float64)


def _rows(shares: dict[int, list[Any]], best: dict[Direction, int], distance: int, n: int) -> Table:
    """One row per channel that is ever active; those of the directions are ranked among the others."""
    controls = [difference[0] for channel, (*_, difference) in shares.items() if channel not in best.values()]
    rows: Table = []
    for channel, (share, elsewhere, difference) in shares.items():
        told = [direction.name for direction, chosen in best.items() if chosen == channel]
        rank = rank_among(difference[0], controls) if told and controls else None
        rows.append(
            {
                "channel": channel,
                "role": " and ".join(told) or "control",
                "distance": distance,
                "n": n,
                **interval_cells("share", Interval(*share, 0.95)),
                **interval_cells("elsewhere", Interval(*elsewhere, 0.95)),
                **interval_cells("difference", Interval(*difference, 0.95)),
                "rank": rank and rank.rank,
                "controls": rank and rank.controls,
            }
        )
    return rows


def _one_map(study: Study, level: bytes) -> dict[str, Table]:
    """The map of the channel for UP on one level and the observation, in grey, a row of either per row."""
    frame = observe([level])
    channel = study.channel(Direction.UP)
    site = study.points.site(SITE, channel=channel)
    inputs = torch.from_numpy(policy_input(frame)).to(next(study.points.model.parameters()).device)
    with torch.no_grad():
        cells = run_with_cache(study.points, inputs, sites=site, stop=True)[site][0, 0].cpu().numpy()
    grey = frame[0].mean(axis=-1).round().astype(np.uint8)
    activation: Table = [
        {"channel": channel, "row": row, **{f"col_{col}": float(each) for col, each in enumerate(line)}}
        for row, line in enumerate(cells)
    ]
    # Hexadecimal with a mark before it, so that no line can be read as a number.
    pixels: Table = [{"row": row, "grey": f"x{line.tobytes().hex()}"} for row, line in enumerate(grey)]
    return {"map": activation, "pixels": pixels}


def figure(tables: Tables) -> Figure:
    """One map over its observation, and the shares by distance, of the directions' channels and of the others."""
    drawn = Figure(figsize=(14, 4.4), layout="constrained")
    left, *panels = drawn.subplots(1, 1 + len(DISTANCES), width_ratios=(1.5, 1, 1, 1))
    grey = np.stack([np.frombuffer(bytes.fromhex(row["grey"][1:]), np.uint8) for row in tables["pixels"]])
    cells = np.array([[value for name, value in row.items() if name.startswith("col_")] for row in tables["map"]])
    channel_map(torch.from_numpy(grey[None].copy()), torch.from_numpy(cells), left)
    left.set_xlabel(
        f"channel {tables['map'][0]['channel']} (UP) in the maze of all with the highest sum,\n"
        f"{cells.sum():.1f}; column (pixel)"
    )
    for axes, distance in zip(panels, DISTANCES, strict=True):
        _draw_shares(axes, [row for row in tables["shares"] if row["distance"] == distance])
        axes.set_title(f"within {_radius(distance)}", fontsize="medium")
    return drawn


def _radius(distance: int) -> str:
    return f"{distance} map {'cell' if distance == 1 else 'cells'} ({distance * SQUARES:.1f} squares)"


def _draw_shares(axes: Axes, rows: Table) -> None:
    """The share around the mouse against that around other squares, a mark per channel."""
    chosen = [row for row in rows if row["role"] != "control"]
    for height, row in enumerate(reversed(chosen)):
        axes.plot([row["share_low"], row["share_high"]], [height, height], color="black")
        axes.plot(row["share"], height, "o", color="black", label="around the mouse" if not height else None)
        axes.plot([row["elsewhere_low"], row["elsewhere_high"]], [height, height], color="0.5")
        axes.plot(row["elsewhere"], height, "s", color="0.5", markerfacecolor="white",
                  label="around other free squares" if not height else None)  # fmt: skip
    others = [row for row in rows if row["role"] == "control"]
    axes.plot([row["share"] for row in others], [-1.0] * len(others), "o", color="black", alpha=0.3)
    axes.plot([row["elsewhere"] for row in others], [-1.3] * len(others), "s", color="0.5", markerfacecolor="none")
    labels = [f"{row['role']} ({row['channel']})\nn={row['n']}" for row in reversed(chosen)]
    axes.set_yticks([-1.15, *range(len(chosen))], [f"{len(others)} other\nlive channels", *labels], fontsize=8)
    axes.set(xlim=(0, 1.02), ylim=(-1.7, len(chosen) + 0.4), xlabel="share of the sum, 95% interval")
    if chosen:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def finding(tables: Tables) -> Finding:
    chosen = [row for row in tables["shares"] if row["role"] != "control"]
    if not chosen:
        return Finding("No direction's channel was ever active.", "not comparable", "Nothing.", "Raise --n.")
    near = [row for row in chosen if row["distance"] == NEAR]
    more = [row for row in near if above(row, "difference")]
    others = [row["share"] for row in tables["shares"] if row["role"] == "control" and row["distance"] == NEAR]
    beside = (
        f"the {len(others)} other live channels hold {np.median(others):.0%} there (median), {max(others):.0%} at most"
        if others
        else "there are no others"
    )
    return Finding(
        f"Share of the sum within {_radius(NEAR)} of the mouse, and of other free squares: "
        + "; ".join(
            f"{row['role']} (channel {row['channel']}) {shown(row, 'share')} and {row['elsewhere']:.3f}, n={row['n']}"
            f"{_rank(row)}"
            for row in near
        )
        + ".",
        verdict(*(above(row, "share", MOST) for row in near)),
        f"In {len(more)} of {len(near)} channels more of the sum lies around the mouse than around other free squares "
        f"of the same maze, interval above 0; {beside}. A wider circle is not judged: one of {_radius(DISTANCES[-1])} "
        f"is {_within(CELLS, DISTANCES[-1]).mean():.0%} of the map.",
        "That a channel which is high around the mouse knows the way: a detector of the mouse would be too. The "
        "controls say how special it is; and each cell of the map sees most of the observation.",
    )


def _rank(row: dict[str, Any]) -> str:
    """Where its difference stands, by size, among itself and the channels that stand for no direction."""
    return "" if row["rank"] is None else f", rank {row['rank']} of {row['controls'] + 1}"


PART = Part(
    name="spatial",
    question="Do the channels' high values occur only around the mouse?",
    method=f"Size {SIZE}, mouse on a random square: the share of a channel's sum, over all mazes, that lies within "
    f"1, 2 and 3 cells of the mouse on the 8x8 map of relu3, a cell being {SQUARES:.1f} squares wide, against the mean "
    f"share around all other free squares. It is judged at {NEAR}: at least {MOST:.0%} of the sum.",
    post="The only pattern found: high values happen only around the mouse location (footnote 4), no figure given.",
    measure=measure,
    figure=figure,
    finding=finding,
)
