"""On the decision square: what the distance from the cheese to the corner does to the choice and to the channels."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import ThresholdProbe
from chanpatch.statistics import bootstrap_interval
from maze.analysis.decision_squares import (
    CHEESE_TO_CORNER,
    EDGES,
    Decisions,
    at_decision_squares,
    cells,
    joined,
    said,
    share_cells,
    strata,
    tested_channel,
    threshold_rows,
    thresholds,
)
from maze.analysis.part import Finding, Part, Study, Table, Tables, below, verdict
from maze.environment.paths import Direction

SIZE = 25
SPLITS = ("in distribution", "out of distribution")
DIRECTIONS = (Direction.UP, Direction.RIGHT)
WIDTH = 4  # of a bin of the distance from the cheese to the corner, in cells
MOUSE = "the mouse takes the way to the cheese"
BOTH = "in and out"  # of distribution
FEWEST = 10  # levels of a bin that is told in words
RESAMPLES = 999

Floats = NDArray[np.float64]
Probes = dict[Direction, ThresholdProbe | None]


def measure(study: Study) -> dict[str, Table]:
    """Shares by distance, rank correlations with it, and the same within strata of the square's own distances."""
    probes = thresholds(study, DIRECTIONS)
    by_split = {
        split: at_decision_squares(
            study.points,
            study.levels(f"distance {split}", size=SIZE, cheese=split, mouse="decision square"),
        )
        for split in SPLITS
    }
    populations = {BOTH: joined(by_split.values()), SPLITS[1]: by_split[SPLITS[1]]}
    shares: Table = []
    trends: Table = []
    for name, rows, values in _measures(study, populations[BOTH], probes):
        if values.dtype == np.bool_:
            shares += _shares(name, populations[BOTH].distance(CHEESE_TO_CORNER)[rows], values)
    for population, seen in populations.items():
        for name, rows, values in _measures(study, seen, probes):
            trends += _trends(name, population, seen.rows(rows), values, study.seed_for("distance bootstrap"))
    return {
        "thresholds": threshold_rows(study, probes),
        "shares": shares,
        "trends": trends,
        "strata": _by_stratum(populations[BOTH]),
    }


def _measures(study: Study, seen: Decisions, probes: Probes) -> Iterator[tuple[str, NDArray[np.bool_], NDArray[Any]]]:
    """Yields what is held against the distance: its name, the levels that have it, and its value on these."""
    yield MOUSE, np.ones(len(seen.chosen), dtype=np.bool_), seen.took_cheese
    for direction, probe in probes.items():
        sums = seen.sums[:, tested_channel(study, direction)]
        for goal, leads in (("cheese", seen.cheese == direction), ("corner", seen.corner == direction)):
            if probe is not None:
                yield _high(direction, goal), leads, probe.predict(sums[leads])
            yield _sum(direction, goal), leads, sums[leads]


def _sum(direction: Direction, goal: str) -> str:
    return f"sum of the {direction.name} channel where the {goal} is {direction.name}"


def _high(direction: Direction, goal: str) -> str:
    return f"{direction.name} channel high where the {goal} is {direction.name}"


def _shares(name: str, distance: Floats, values: NDArray[np.bool_]) -> Table:
    """The share of every bin of the distance that has levels."""
    place = (distance // WIDTH).astype(np.int64)
    rows: Table = []
    for each in np.unique(place).tolist():
        n, count = int((place == each).sum()), int(values[place == each].sum())
        edges = {"from": each * WIDTH, "below": (each + 1) * WIDTH}
        rows.append({"measure": name, **edges, "n": n, "count": count, **share_cells("share", count, n)})
    return rows


def _trends(name: str, population: str, seen: Decisions, values: NDArray[Any], seed: int) -> Table:
    """The rank correlation with the distance, over all levels and within strata of the square's distances."""
    rows: Table = []
    for within, stratum in (("no strata", np.zeros(len(values), dtype=np.int64)), ("strata", strata(seen))):
        sample = np.stack([stratum, seen.distance(CHEESE_TO_CORNER), values], axis=1)
        known = len(values) > 1 and np.ptp(values.astype(np.float64)) > 0
        interval = bootstrap_interval(sample, rank_correlation, resamples=RESAMPLES, seed=seed) if known else None
        rows.append(
            {
                "measure": name,
                "cheese": population,
                "within": within,
                "n": len(values),
                "strata": len(np.unique(stratum)),
                **cells("correlation", interval),
            }
        )
    return rows


def rank_correlation(sample: Floats) -> float:
    """Spearman's rank correlation; with strata, that of the ranks within them; 0 where one side does not vary.

    Args:
        sample: (level, 3): the number of the stratum, and two numbers.
    """
    from scipy.stats import rankdata

    stratum = sample[:, 0].astype(np.int64)
    n = np.bincount(stratum)
    ranks = []
    for values in sample.T[1:]:
        # Ranks over all levels, stratum after stratum; what a stratum begins with is in its mean.
        rank = rankdata(np.unique(values, return_inverse=True)[1] + stratum * len(values))
        ranks.append((rank - (np.bincount(stratum, rank) / np.maximum(n, 1))[stratum]) / n[stratum])
    scale = np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1] / scale) if scale > 0 else 0.0


def _by_stratum(seen: Decisions) -> Table:
    """What the mouse does in every stratum by itself, near and far cheese: less and more than the stratum's median."""
    names = [f"below {EDGES[0]}", *(f"{low} to {high - 1}" for low, high in zip(EDGES, EDGES[1:], strict=False))]
    names.append(f"from {EDGES[-1]}")
    stratum, distance = strata(seen), seen.distance(CHEESE_TO_CORNER)
    rows: Table = []
    for each in np.unique(stratum):
        here = stratum == each
        near = here & (distance <= np.median(distance[here]))
        far = here & ~near
        rows.append(
            {
                "steps_to_cheese": names[each // len(names)],
                "steps_to_corner": names[each % len(names)],
                "median_distance": float(np.median(distance[here])),
                "n_near": int(near.sum()),
                **share_cells("near", seen.took_cheese[near].sum(), int(near.sum())),
                "n_far": int(far.sum()),
                **share_cells("far", seen.took_cheese[far].sum(), int(far.sum())),
            }
        )
    return rows


def figure(tables: Tables) -> Figure:
    """Shares by distance: the mouse, the channels towards the cheese, the channels towards the corner; correlations."""
    drawn = Figure(figsize=(14, 9), layout="constrained")
    panels = drawn.subplots(2, 2).flat
    _draw_shares(panels[0], tables["shares"], {"": MOUSE})
    panels[0].set_title(MOUSE, fontsize=10)
    for axes, goal in zip(panels[1:3], ("cheese", "corner"), strict=True):
        _draw_shares(axes, tables["shares"], {each.name: _high(each, goal) for each in DIRECTIONS})
        axes.set_title(f"the channel of the {goal}'s direction is high", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)  # above all marks
    _draw_trends(panels[3], [row for row in tables["trends"] if row["cheese"] == BOTH])
    return drawn


def _draw_shares(axes: Axes, rows: Table, names: Mapping[str, str]) -> None:
    for number, (label, name) in enumerate(names.items()):
        of = [row for row in rows if row["measure"] == name]
        centre = np.array([(row["from"] + row["below"]) / 2 for row in of]) + 0.5 * (number - (len(names) - 1) / 2)
        axes.vlines(centre, [row["share_low"] for row in of], [row["share_high"] for row in of], color="0.6")
        axes.plot(centre, [row["share"] for row in of], "ox"[number] + ("-", "--")[number], color="black", label=label)
        for row in of:
            axes.text((row["from"] + row["below"]) / 2, -0.07 - 0.06 * number, row["n"], ha="center", fontsize=9)
        axes.text(-0.2, -0.07 - 0.06 * number, f"n {label}".rstrip(), ha="right", fontsize=9, clip_on=False)
    ticks = np.arange(0, 37, WIDTH)  # the edges of the bins
    axes.set(
        xlim=(0, 36),
        ylim=(-0.17, 1.05),
        xticks=ticks,
        yticks=np.linspace(0, 1, 6),
        ylabel="share of levels, 95% interval",
    )
    axes.set_xlabel("straight distance of the cheese from the corner, cells")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_trends(axes: Axes, rows: Table) -> None:
    names = list(dict.fromkeys(row["measure"] for row in rows))
    for number, (within, label) in enumerate((("no strata", "all levels"), ("strata", "within strata"))):
        for row in (row for row in rows if row["within"] == within and row["correlation"] is not None):
            height = len(names) - names.index(row["measure"]) + 0.14 * (1 - 2 * number)
            if row["correlation_low"] is not None:
                axes.plot([row["correlation_low"], row["correlation_high"]], [height] * 2, color="0.6")
            axes.plot(row["correlation"], height, "os"[number], color="black", fillstyle=("full", "none")[number])
        axes.plot([], [], "os"[number], color="black", fillstyle=("full", "none")[number], label=label)
    counts = {row["measure"]: row["n"] for row in rows}
    labels = [textwrap.fill(f"{name}, n={counts[name]}", 32) for name in names]
    axes.set_yticks(range(len(names), 0, -1), labels, fontsize=9)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="rank correlation with the distance, 95% interval", ylim=(0.4, len(names) + 0.6))
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def finding(tables: Tables) -> Finding:
    trends = {(row["measure"], row["cheese"], row["within"]): row for row in tables["trends"]}
    told = [MOUSE, *(_sum(direction, "cheese") for direction in DIRECTIONS)]
    raw, within = ([trends[name, BOTH, kind] for name in told] for kind in ("no strata", "strata"))
    shares = [row for row in tables["shares"] if row["measure"] == MOUSE]
    shares = [row for row in shares if row["n"] >= FEWEST] or shares
    outside = trends[MOUSE, SPLITS[1], "strata"]
    alone = [trends[name, SPLITS[1], "no strata"] for name in told]
    return Finding(
        f"The mouse takes the way to the cheese in {said(shares[0], 'share')} of levels with the cheese "
        f"{_bin(shares[0])}, in {said(shares[-1], 'share')} with the cheese {_bin(shares[-1])}. {_course(shares)} "
        "Rank correlation with the distance: "
        + "; ".join(f"{row['measure']} {said(row, 'correlation', '+.2f')} (n={row['n']})" for row in raw)
        + ".",
        verdict(
            *(
                below(row, "correlation")
                for row in (*raw, *alone)
                if any(each["correlation"] is not None for each in raw)
            )
        ),
        "With the cheese out of distribution alone, where it is farther, the correlations are "
        + "; ".join(f"{said(row, 'correlation', '+.2f')} for '{row['measure']}'" for row in alone)
        + ". Within strata of the lengths of both ways from the decision square it is "
        + "; ".join(f"{said(row, 'correlation', '+.2f')} for '{row['measure']}'" for row in within)
        + f"; for the mouse with the cheese out of distribution alone {said(outside, 'correlation', '+.2f')}. "
        + _explained(raw[0], within[0]),
        "That distance as such is what the policy reads: the places of cheese, corner and square are tied to each "
        "other, and whatever else changes with the distance changes too.",
    )


def _bin(row: dict[str, Any]) -> str:
    return f"{row['from']} to under {row['below']} cells from the corner (n={row['n']})"


def _course(shares: Table) -> str:
    """Whether what the mouse does falls from each bin to the next: first against last does not tell."""
    lowest = min(shares, key=lambda row: row["share"])
    rises = [later for row, later in zip(shares, shares[1:], strict=False) if later["share"] > row["share"]]
    if not rises:
        return f"It falls or stays from each of these {len(shares)} bins to the next."
    return (
        f"It does not fall steadily: the share is higher than in the bin before in {len(rises)} of {len(shares) - 1} "
        f"bins, and lowest, {said(lowest, 'share')}, with the cheese {_bin(lowest)}."
    )


def _explained(raw: dict[str, Any], within: dict[str, Any]) -> str:
    if raw["correlation_high"] is None or within["correlation_high"] is None:
        return "There are too few levels to say more."
    if raw["correlation_high"] >= 0:
        return "What the mouse does does not fall with the distance beyond its interval."
    if within["correlation_high"] < 0:
        return "So how far the decision square is from both does not explain all of the fall."
    return "So how far the decision square is from both may explain the fall."


PART = Part(
    name="distance",
    question="Do the mouse and the channels turn from the cheese as it lies farther from the top right corner?",
    method="Size 25, mouse on the decision square, n levels with the cheese in distribution and n out of it. Shares "
    "by the straight distance from cheese to corner, rank correlations; also within strata of both ways' lengths.",
    post="Both fall with the distance: whether the mouse takes the way to the cheese, and whether the channel (121 UP, "
    "73 RIGHT) points along it.",
    measure=measure,
    figure=figure,
    finding=finding,
)
