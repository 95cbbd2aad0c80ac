"""On the decision square: the choice and the channels against the distance of the cheese from the corner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanpatch.statistics import bootstrap_interval, rank_correlation
from maze.analysis.cells import Row, Table, Tables, below, cells, chosen, keyed, share_cells, shown, verdict
from maze.analysis.decision_squares import (
    BINS,
    CHEESE_TO_CORNER,
    Decisions,
    Floats,
    Probes,
    at_decision_squares,
    joined,
    strata,
    tested_channel,
    threshold_rows,
    thresholds,
)
from maze.analysis.drawing import Panel, chart
from maze.analysis.part import SPLITS, Finding, Part, Study
from maze.paths import Direction

SIZE = 25
DIRECTIONS = (Direction.UP, Direction.RIGHT)
WIDTH = 4  # of a bin of the distance from the cheese to the corner, in cells
MOUSE = "the mouse takes the way to the cheese"
BOTH = "in and out"  # of distribution
FEWEST = 10  # levels of a bin that the finding mentions
RESAMPLES = 999


def measure(study: Study) -> dict[str, Table]:
    """Shares by distance, and rank correlations with it, also within strata of the square's own distances."""
    probes = thresholds(study, DIRECTIONS)
    by_split = [
        at_decision_squares(
            study.points, study.levels(f"distance {split}", size=SIZE, cheese=split, mouse="decision square")
        )
        for split in SPLITS
    ]
    both = joined(by_split)
    shares: Table = []
    trends: Table = []
    for name, rows, values in _measures(study, both, probes):
        if values.dtype == np.bool_:
            shares += _shares(name, both.distance(CHEESE_TO_CORNER)[rows], values)
    for population, seen in ((BOTH, both), (SPLITS[1], by_split[1])):
        for name, rows, values in _measures(study, seen, probes):
            trends += _trends(name, population, seen.rows(rows), values, study.seed_for("distance bootstrap"))
    limits = threshold_rows(study, probes)
    return {"thresholds": limits, "shares": shares, "trends": trends, "strata": _by_stratum(both)}


def _measures(study: Study, seen: Decisions, probes: Probes) -> Iterator[tuple[str, NDArray[np.bool_], NDArray[Any]]]:
    """Yields a quantity's name, the levels that have it, and its values on these."""
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
    """The share of each bin of the distance."""
    place = (distance // WIDTH).astype(np.int64)
    rows: Table = []
    for each in np.unique(place).tolist():
        n, count = int((place == each).sum()), int(values[place == each].sum())
        edges = {"from": each * WIDTH, "below": (each + 1) * WIDTH}
        rows.append({"measure": name, **edges, "n": n, "count": count, **share_cells("share", count, n)})
    return rows


def _trends(name: str, population: str, seen: Decisions, values: NDArray[Any], seed: int) -> Table:
    """The rank correlation with the distance, over all levels and within strata of the square's distances."""

    def statistic(sample: Floats) -> float:
        return float(np.nan_to_num(rank_correlation(sample[:, 1], sample[:, 2], sample[:, 0])))

    rows: Table = []
    for within, stratum in (("no strata", np.zeros(len(values), dtype=np.int64)), ("strata", strata(seen))):
        sample = np.stack([stratum, seen.distance(CHEESE_TO_CORNER), values], axis=1)
        known = len(values) > 1 and np.ptp(values.astype(np.float64)) > 0
        interval = bootstrap_interval(sample, statistic, resamples=RESAMPLES, seed=seed) if known else None
        row = {"measure": name, "cheese": population, "within": within, "n": len(values)}
        rows.append({**row, "strata": len(np.unique(stratum)), **cells("correlation", interval)})
    return rows


def _by_stratum(seen: Decisions) -> Table:
    """The mouse's choices in each stratum, with the cheese nearer and farther than the stratum's median."""
    stratum, distance = strata(seen), seen.distance(CHEESE_TO_CORNER)
    rows: Table = []
    for each in np.unique(stratum):
        here = stratum == each
        median = np.median(distance[here])
        row: Row = {
            "steps_to_cheese": BINS[each // len(BINS)],
            "steps_to_corner": BINS[each % len(BINS)],
            "median_distance": float(median),
        }
        for name, half in (("near", here & (distance <= median)), ("far", here & (distance > median))):
            n = int(half.sum())
            row |= {f"n_{name}": n, **share_cells(name, seen.took_cheese[half].sum(), n)}
        rows.append(row)
    return rows


def finding(tables: Tables) -> Finding:
    trends = keyed(tables["trends"], "measure", "cheese", "within")
    names = [MOUSE, *(_sum(direction, "cheese") for direction in DIRECTIONS)]
    raw, within = ([trends[name, BOTH, kind] for name in names] for kind in ("no strata", "strata"))
    alone = [trends[name, SPLITS[1], "no strata"] for name in names]
    shares = chosen(tables["shares"], measure=MOUSE)
    shares = [row for row in shares if row["n"] >= FEWEST] or shares
    known = any(row["correlation"] is not None for row in raw)
    return Finding(
        f"The mouse takes the path to the cheese in {shown(shares[0], 'share', '.0%')} of levels with the cheese "
        f"{_bin(shares[0])}, in {shown(shares[-1], 'share', '.0%')} with the cheese {_bin(shares[-1])}. "
        f"{_course(shares)} Rank correlation with the distance: "
        + "; ".join(f"{row['measure']} {shown(row, 'correlation', '+.2f')} (n={row['n']})" for row in raw)
        + ".",
        verdict(*(below(row, "correlation") for row in (*raw, *alone) if known)),
        f"Out of distribution alone, with the cheese farther, the correlations are {_each(alone)}. Within strata of "
        f"the lengths of both paths they are {_each(within)}. {_explained(raw[0], within[0])}",
        "It does not follow that the policy reads the distance: the places of cheese, corner and square are tied to "
        "each other.",
    )


def _each(rows: Table) -> str:
    return "; ".join(f"{shown(row, 'correlation', '+.2f')} for '{row['measure']}'" for row in rows)


def _bin(row: Row) -> str:
    return f"{row['from']} to under {row['below']} cells from the corner (n={row['n']})"


def _course(shares: Table) -> str:
    """Whether the share falls from each bin to the next."""
    lowest = min(shares, key=lambda row: row["share"])
    rises = sum(later["share"] > row["share"] for row, later in zip(shares, shares[1:], strict=False))
    if not rises:
        return f"It falls or stays from each of these {len(shares)} bins to the next."
    return (
        f"It does not fall steadily: the share is higher than in the bin before in {rises} of {len(shares) - 1} "
        f"bins, and lowest, {shown(lowest, 'share', '.0%')}, with the cheese {_bin(lowest)}."
    )


def _explained(raw: Row, within: Row) -> str:
    if raw["correlation_high"] is None or within["correlation_high"] is None:
        return "There are too few levels to say more."
    if raw["correlation_high"] >= 0:
        return "The mouse's choice does not fall with the distance beyond its interval."
    explains = "does not explain all of" if within["correlation_high"] < 0 else "may explain"
    return f"So the distance of the decision square from both goals {explains} the fall."


PART = Part(
    name="distance",
    question="Do the mouse and the channels turn from the cheese as it lies farther from the top right corner?",
    method="Size 25, mouse on the decision square, n levels with the cheese in distribution and n out of it. Shares "
    "by the straight distance from cheese to corner, rank correlations; also within strata of both paths' lengths.",
    post="Both fall with the distance: whether the mouse takes the path to the cheese, and whether the channel (121 "
    "UP, 73 RIGHT) points along it.",
    measure=measure,
    figure=chart(
        Panel("shares", "from", "share", "share of levels", "measure", along=True, line=None),
        Panel("trends", "measure", "correlation", "rank correlation with the distance", "within", {"cheese": BOTH}),
        size=(7, 6),
    ),
    finding=finding,
)
