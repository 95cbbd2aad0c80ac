"""On the decision square: where the mouse goes when a direction's channel is high, and what distance explains of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import ThresholdProbe
from chanpatch.statistics import Interval, bootstrap_interval, difference_interval, wilson_interval
from maze.decision_squares import (
    EDGES,
    PRECISION,
    STRATA,
    TO_CHEESE,
    TO_CORNER,
    Decisions,
    at_decision_squares,
    cells,
    joined,
    precise_threshold,
    said,
    share_cells,
    strata,
    threshold_rows,
)
from maze.part import Finding, Part, Study, Table, Tables, above, verdict
from maze.paths import Direction

SIZE = 25
SPLITS = ("in distribution", "out of distribution")
DIRECTIONS = (Direction.UP, Direction.RIGHT)
MOST_DRAWN = 20  # levels for each that is to be accepted
RESAMPLES = 1999
UNMATCHED, BOTH = "nothing", "both"  # path lengths that in and out of distribution are matched on
GOALS = ("cheese", "corner", "neither")  # to which the direction leads

Probes = dict[Direction, ThresholdProbe | None]


def measure(study: Study) -> dict[str, Table]:
    """The thresholds, the 2x2 tables, where the mouse goes, and the difference between in and out, matched or not."""
    probes = {direction: precise_threshold(study, direction) for direction in DIRECTIONS}
    squares: Table = []
    choices: Table = []
    taken: dict[str, list[Decisions]] = {}
    for split in SPLITS:
        seen = _drawn(study, split, probes)
        every = np.arange(min(study.n, len(seen.chosen)))
        for direction in DIRECTIONS:
            accepted, drawn = _accepted(study, seen, probes, direction)
            for which, rows, of in (("accepted", accepted, drawn), ("all", every, len(every))):
                named = {"direction": direction.name, "split": split, "squares": which}
                squares += _squares(named, seen.rows(rows), direction, of)
                choices.append(_choices(named, seen.rows(rows), direction, of))
            taken.setdefault(f"{direction.name} channel high", []).append(seen.rows(accepted))
        taken.setdefault("all", []).append(seen.rows(every))
    matched = [
        row for which, each in taken.items() for row in _matched(which, *each, study.seed_for("decision bootstrap"))
    ]
    thresholds = threshold_rows(study.selection, probes)
    return {"thresholds": thresholds, "squares": squares, "choices": choices, "matched": matched}


def _drawn(study: Study, split: str, probes: Probes) -> Decisions:
    """Levels as they are drawn, until n of them are accepted by every channel or `MOST_DRAWN` times n are drawn."""
    parts: list[Decisions] = []
    for number in range(MOST_DRAWN):
        levels = study.levels(f"decision {split} {number}", size=SIZE, cheese=split, mouse="decision square")
        parts.append(at_decision_squares(study.points, levels))
        seen = joined(parts)
        # A channel without threshold accepts nothing, and waiting would not help.
        known = [direction for direction in DIRECTIONS if probes[direction] is not None]
        if all(len(_accepted(study, seen, probes, direction)[0]) == study.n for direction in known):
            break
    return seen


def _accepted(study: Study, seen: Decisions, probes: Probes, direction: Direction) -> tuple[NDArray[np.int64], int]:
    """The first n levels on which the direction's channel is past its threshold, and how many were drawn for them."""
    probe = probes[direction]
    if probe is None:
        return np.arange(0), len(seen.chosen)
    accepted = np.flatnonzero(probe.predict(seen.sums[:, study.channel(direction)]))[: study.n]
    return accepted, int(accepted[-1]) + 1 if len(accepted) == study.n else len(seen.chosen)


def _squares(named: dict[str, Any], seen: Decisions, direction: Direction, drawn: int) -> Table:
    """What the direction leads to, by whether the mouse goes there: one row per cell of the post's table."""
    leads = _leads(seen, direction)
    goes = seen.chosen == direction
    rows: Table = []
    for goal in GOALS:
        for yes in (True, False):
            count = int(((leads == goal) & (goes == yes)).sum())
            of = {"n": len(goes), "drawn": drawn, "leads_to": goal, "goes": yes, "count": count}
            rows.append({**named, **of, **share_cells("share", count, len(goes))})
    return rows


def _choices(named: dict[str, Any], seen: Decisions, direction: Direction, drawn: int) -> dict[str, Any]:
    """How many were accepted, go in the direction, go to the cheese and to the corner."""
    n = len(seen.chosen)
    shares = {
        "goes": seen.chosen == direction,
        "to_cheese": seen.took_cheese,
        "to_corner": seen.chosen == seen.corner,
        "leads_to_cheese": seen.cheese == direction,
    }
    counted = {name: share_cells(name, each.sum(), n) for name, each in shares.items()}
    row = {**named, "n": n, "drawn": drawn, **share_cells("accepted", n, drawn)}
    return row | {name: cell for three in counted.values() for name, cell in three.items()}


def _leads(seen: Decisions, direction: Direction) -> NDArray[np.str_]:
    """What the direction leads to: (level,), one of `GOALS`."""
    return np.where(seen.cheese == direction, "cheese", np.where(seen.corner == direction, "corner", "neither"))


def _matched(which: str, inside: Decisions, outside: Decisions, seed: int) -> Table:
    """How much more often the mouse goes to the cheese in distribution: raw, and within strata of the distances."""
    bins = len(EDGES) + 1
    by = {
        UNMATCHED: lambda seen: np.zeros(len(seen.chosen), dtype=np.int64),
        TO_CHEESE: lambda seen: strata(seen) // bins,
        TO_CORNER: lambda seen: strata(seen) % bins,
        BOTH: strata,
    }
    rows: Table = []
    for name, stratum in by.items():
        sample = np.concatenate(
            [
                np.stack([np.full(len(seen.chosen), side), stratum(seen), seen.took_cheese], axis=1)
                for side, seen in ((1.0, inside), (0.0, outside))
            ]
        )
        shared = np.intersect1d(stratum(inside), stratum(outside))
        if name == UNMATCHED:
            interval = _raw(inside, outside)
        elif len(shared):
            interval = bootstrap_interval(sample, stratified_difference, resamples=RESAMPLES, seed=seed)
        else:
            interval = None
        rows.append(
            {
                "squares": which,
                "matched_on": name,
                "strata": len(shared),
                "n_in": int(np.isin(stratum(inside), shared).sum()),
                "n_out": int(np.isin(stratum(outside), shared).sum()),
                "of_in": len(inside.chosen),
                "of_out": len(outside.chosen),
                **cells("difference", interval),
            }
        )
    return rows


def _raw(inside: Decisions, outside: Decisions) -> Interval | None:
    """The difference of the two shares, with Newcombe's interval; None where one side has no levels."""
    counts = [(int(seen.took_cheese.sum()), len(seen.chosen)) for seen in (inside, outside)]
    return difference_interval(*(wilson_interval(*each) for each in counts)) if all(n for _, n in counts) else None


def stratified_difference(sample: NDArray[np.float64]) -> float:
    """A share in distribution minus the share out of it, within strata: NaN where no stratum has both.

    Strata are weighted as by Mantel and Haenszel: n_in * n_out / (n_in + n_out).

    Args:
        sample: (level, 3): 1 for in distribution and 0 for out of it, the number of the stratum, success.
    """
    inside, stratum = sample[:, 0].astype(np.int64), sample[:, 1].astype(np.int64)
    place = inside * STRATA + stratum
    n = np.bincount(place, minlength=2 * STRATA).reshape(2, STRATA)
    share = np.bincount(place, sample[:, 2], minlength=2 * STRATA).reshape(2, STRATA) / np.maximum(n, 1)
    weight = n.prod(axis=0) / np.maximum(n.sum(axis=0), 1)
    return float((share[1] - share[0]) @ weight / weight.sum()) if weight.any() else np.nan


def figure(tables: Tables) -> Figure:
    """The 2x2 tables as stacked bars, and the difference between in and out by what it is matched on."""
    drawn = Figure(figsize=(14, 4.8), layout="constrained")
    panels = drawn.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for axes, threshold in zip(panels, tables["thresholds"], strict=False):
        _draw_squares(axes, [row for row in tables["squares"] if row["direction"] == threshold["direction"]])
        limit = (
            "no threshold" if threshold["threshold"] is None else f"{threshold['accepts']} {threshold['threshold']:.1f}"
        )
        axes.set_title(f"{threshold['direction']}: sum of channel {threshold['channel']} {limit}", fontsize=10)
    panels[0].set_ylabel("share of decision squares")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    _draw_matched(panels[2], tables["matched"])
    return drawn


_FILL = {
    ("cheese", True): {"facecolor": "tab:orange"},
    ("cheese", False): {"facecolor": "white", "hatch": "//"},
    ("corner", True): {"facecolor": "0.35"},
    ("corner", False): {"facecolor": "white", "hatch": "xx"},
    ("neither", True): {"facecolor": "0.8", "hatch": ".."},
    ("neither", False): {"facecolor": "white", "hatch": ".."},
}


def _draw_squares(axes: Axes, rows: Table) -> None:
    bars = [(which, split) for which in ("accepted", "all") for split in SPLITS]
    names = []
    for place, (which, split) in enumerate(bars):
        bar = [row for row in rows if (row["squares"], row["split"]) == (which, split)]
        names.append(f"{'channel high' if which == 'accepted' else 'all squares'}\n{split.split()[0]}, n={bar[0]['n']}")
        bottom = 0.0
        for row in bar:
            goal, goes, share = row["leads_to"], row["goes"], row["share"] or 0.0
            label = f"{goal} is there, mouse {'goes' if goes else 'does not'}" if place == 0 else None
            axes.bar(place, share, bottom=bottom, edgecolor="black", linewidth=0.7, label=label, **_FILL[goal, goes])
            if share > 0.06:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axes.text(place, bottom + share / 2, f"{share:.0%}", ha="center", va="center", fontsize=8, bbox=box)
            bottom += share
    axes.set_xticks(range(len(bars)), names, fontsize=8)
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_matched(axes: Axes, rows: Table) -> None:
    names = list(dict.fromkeys(row["matched_on"] for row in rows))
    for number, which in enumerate(dict.fromkeys(row["squares"] for row in rows)):
        for row in (row for row in rows if row["squares"] == which and row["difference"] is not None):
            height = len(names) - names.index(row["matched_on"]) + 0.2 * (1 - number)
            if row["difference_low"] is not None:
                axes.plot([100 * row["difference_low"], 100 * row["difference_high"]], [height] * 2, color="0.5")
            axes.plot(100 * row["difference"], height, "os^"[number], color="black", markersize=5)
            axes.text(100 * row["difference"], height + 0.04, f"{row['n_in']}, {row['n_out']}", fontsize=7, va="bottom")
        axes.plot([], [], "os^"[number], color="black", markersize=5, label=which)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names), 0, -1), ["not matched" if name == UNMATCHED else name for name in names])
    axes.set_ylim(0.5, len(names) + 0.6)
    axes.set_xlabel(
        "goes to the cheese: in minus out of distribution,\npercentage points, 95% interval (numbers: n in, n out)"
    )
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)


def finding(tables: Tables) -> Finding:
    choices = {(row["direction"], row["squares"], row["split"]): row for row in tables["choices"]}
    differences = {(row["squares"], row["matched_on"]): row for row in tables["matched"]}
    told, held = [], []
    for threshold in tables["thresholds"]:
        name = threshold["direction"]
        inside, outside = (choices[name, "accepted", split] for split in SPLITS)
        raw, both = (differences[f"{name} channel high", on] for on in (UNMATCHED, BOTH))
        held += [above(raw, "difference"), above(outside, "goes", 0.5)] if inside["n"] and outside["n"] else []
        cells_in, cells_out = (_four(tables["squares"], name, split) for split in SPLITS)
        told.append(
            f"{_limit(threshold)}: the mouse goes {name} in {said(inside, 'goes')} in distribution (n={inside['n']} of "
            f"{inside['drawn']} drawn) and {said(outside, 'goes')} out of it (n={outside['n']} of {outside['drawn']}), "
            f"and takes the way to the cheese in {said(inside, 'to_cheese')} and {said(outside, 'to_cheese')}. "
            f"Cheese {name} goes / corner {name} goes / cheese {name} not / corner {name} not: in {cells_in}, out "
            f"{cells_out}. "
            f"Difference {said(raw, 'difference', '+.2f')}; matched on both distances "
            f"{said(both, 'difference', '+.2f')}."
        )
    raw, both = (differences["all", on] for on in (UNMATCHED, BOTH))
    return Finding(
        " ".join(told),
        verdict(*held),
        "On all decision squares, whatever the channels say, the mouse goes to the cheese more often in distribution "
        f"by {said(raw, 'difference', '+.2f')}; matched on the lengths of both ways (n={both['n_in']} and "
        f"{both['n_out']}) by {said(both, 'difference', '+.2f')}. {_explained(raw, both)}",
        "That the channel's sum makes the mouse go there: a sum was looked at, nothing was changed. Nor that distance "
        "is fully controlled: levels of one stratum still differ, and strata that only one side has are left out.",
    )


def _four(squares: Table, direction: str, split: str) -> str:
    """The four cells of the post's table in its order, in percent; where neither is there is left out, as there."""
    rows = [
        row for row in squares if (row["direction"], row["split"], row["squares"]) == (direction, split, "accepted")
    ]
    share = {(row["leads_to"], row["goes"]): row["share"] for row in rows}
    told = [share[goal, goes] for goes in (True, False) for goal in GOALS[:2]]
    return " / ".join("none" if each is None else f"{100 * each:.1f}" for each in told)


def _limit(threshold: dict[str, Any]) -> str:
    named = f"Channel {threshold['channel']} ({threshold['direction']})"
    if threshold["threshold"] is None:
        return f"{named} has no threshold"
    lower = "" if threshold["as_precise_as_asked"] else f"; none has {PRECISION:g} on these mazes"
    return (
        f"{named} {threshold['accepts']} {threshold['threshold']:.1f} ({threshold['criterion']}{lower}; held out "
        f"{said(threshold, 'precision')}, accepting {said(threshold, 'accepted')})"
    )


def _explained(raw: dict[str, Any], both: dict[str, Any]) -> str:
    if raw["difference_low"] is None or both["difference_low"] is None:
        return "There are too few levels to say whether distance explains it."
    if raw["difference_low"] <= 0:
        return "There is no difference beyond its interval to explain."
    if both["difference_low"] > 0:
        return "So the distances of the decision square do not explain all of it."
    return "So after matching nothing beyond its interval is left."


PART = Part(
    name="decision",
    question="On the decision square, does a high sum of a direction's channel send the mouse there, cheese or not?",
    method="Size 25, mouse on the decision square. Levels are drawn until n have a sum past the threshold chosen on "
    f"other mazes for precision {PRECISION:g}; the likeliest legal move. Differences are matched on path lengths in "
    f"bins at {', '.join(map(str, EDGES))} steps.",
    post="Channel 121 (UP) above 30, cheese UP goes / corner UP goes / cheese UP not / corner UP not: "
    "in 99.5 / 0.2 / 0 / 0.3, out 34.7 / 60.4 / 4.4 / 0.5; channel 73 (RIGHT): in 98 / 0 / 0 / 2, out 33 / 65 / 0 / 2 "
    "(n=1000 each).",
    measure=measure,
    figure=figure,
    finding=finding,
)
