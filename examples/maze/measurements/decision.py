"""On the decision square: where the mouse goes when a direction's channel is high, and what distance explains of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import ThresholdProbe
from chanpatch.statistics import Interval, bootstrap_interval, difference_interval, wilson_interval
from maze.analysis.decision_squares import (
    ACCEPTED,
    EDGES,
    POSTS_THRESHOLD,
    PRECISION,
    STRATA,
    TO_CHEESE,
    TO_CORNER,
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
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, below, verdict
from maze.environment.paths import Direction

SIZE = 25
SPLITS = ("in distribution", "out of distribution")
DIRECTIONS = (Direction.UP, Direction.RIGHT)
MOST_DRAWN = 20  # levels for each that is to be accepted
ENOUGH = 200  # accepted levels where n cannot be had: they tell a share to 7 points or better
FEWEST = 100  # that claims are judged by: 10 points or better
FOUND = 0.9  # of mice whose channel is high, in distribution: more of them go to the cheese
RESAMPLES = 1999
UNMATCHED, BOTH = "nothing", "both"  # path lengths that in and out of distribution are matched on
CHOSEN = "accepted_of_decision_squares"  # of those drawn until there were n
GOALS = ("cheese", "corner", "neither")  # to which the direction leads

Probes = dict[Direction, ThresholdProbe | None]


def measure(study: Study) -> dict[str, Table]:
    """The thresholds, the 2x2 tables, where the mouse goes, and the difference between in and out, matched or not."""
    probes = thresholds(study, DIRECTIONS)
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
    limits = threshold_rows(study, probes)
    return {"thresholds": limits, "squares": squares, "choices": choices, "matched": matched}


def _drawn(study: Study, split: str, probes: Probes) -> Decisions:
    """Levels as they are drawn, until more would not help any channel; `MOST_DRAWN` times n at most."""
    parts: list[Decisions] = []
    for number in range(MOST_DRAWN):
        levels = study.levels(f"decision {split} {number}", size=SIZE, cheese=split, mouse="decision square")
        parts.append(at_decision_squares(study.points, levels))
        seen = joined(parts)
        # A channel without threshold accepts nothing, and waiting would not help.
        known = [direction for direction in DIRECTIONS if probes[direction] is not None]
        if not any(_helps(len(_accepted(study, seen, probes, each)[0]), len(seen.chosen), study.n) for each in known):
            break
    return seen


def _helps(accepted: int, drawn: int, n: int) -> bool:
    """Whether a channel gains by more levels: one of n, `ENOUGH` and `FEWEST` is not there yet, and may still be.

    So a channel that accepts one level in 500 is not waited for. This goes by how many are accepted, never by what
    the mouse does on them.
    """
    at_best = wilson_interval(accepted, drawn).high * MOST_DRAWN * n
    return any(accepted < min(goal, n) <= at_best for goal in (n, ENOUGH, FEWEST))


def _accepted(study: Study, seen: Decisions, probes: Probes, direction: Direction) -> tuple[NDArray[np.int64], int]:
    """The first n levels on which the direction's channel is past its threshold, and how many were drawn for them."""
    probe = probes[direction]
    if probe is None:
        return np.arange(0), len(seen.chosen)
    accepted = np.flatnonzero(probe.predict(seen.sums[:, tested_channel(study, direction)]))[: study.n]
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
    row = {**named, "n": n, "drawn": drawn, **share_cells(CHOSEN, n, drawn)}
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
    """The post's table with intervals for each direction, and the difference between in and out, matched or not."""
    drawn = Figure(figsize=(15, 5.2), layout="constrained")
    panels = drawn.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for axes, threshold in zip(panels, tables["thresholds"], strict=False):
        name, limit = threshold["direction"], threshold["threshold"]
        past = "has no threshold" if limit is None else f"{threshold['accepts']} {limit:.1f}"
        axes.set_title(f"{name}: sum of channel {threshold['channel']} {past}", fontsize=10)
        _draw_squares(axes, [row for row in tables["squares"] if row["direction"] == name], name)
    _draw_matched(panels[2], tables["matched"])
    return drawn


def _draw_squares(axes: Axes, rows: Table, direction: str) -> None:
    """A shaded table: a column per kind of square, a row per cell of the post's table, each with its interval."""
    kinds = [(which, split) for which in ("accepted", "all") for split in SPLITS]
    leads = [(goal, goes) for goal in GOALS for goes in (True, False)]
    of = {(row["squares"], row["split"], row["leads_to"], row["goes"]): row for row in rows}
    shares = np.array([[of[kind + lead]["share"] or 0.0 for kind in kinds] for lead in leads])
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1.3, aspect="auto")
    for (height, place), share in np.ndenumerate(shares):
        row = of[kinds[place] + leads[height]]
        if row["share"] is not None:
            told = f"{100 * share:.1f}\n({100 * row['share_low']:.1f} to {100 * row['share_high']:.1f})"
            color = "white" if share > 0.6 else "black"
            axes.text(place, height, told, ha="center", va="center", fontsize=8, color=color)
    counts = [of[kind + leads[0]]["n"] for kind in kinds]
    names = [
        f"{'channel high' if which == 'accepted' else 'all squares'},\n{split.split()[0]}, n={n}"
        for (which, split), n in zip(kinds, counts, strict=True)
    ]
    axes.set_xticks(range(len(kinds)), names, fontsize=8)
    axes.set_yticks(
        range(len(leads)),
        [f"{goal} {direction},\n{'goes' if goes else 'does not'}" for goal, goes in leads],
        fontsize=8,
    )
    axes.set_xlabel("percent of squares, 95% interval")
    axes.tick_params(length=0)
    axes.axvline(1.5, color="white", linewidth=3)


def _draw_matched(axes: Axes, rows: Table) -> None:
    names = list(dict.fromkeys(row["matched_on"] for row in rows))
    beside = axes.get_yaxis_transform()  # x from 0 to 1 along the axes, y in data
    for number, which in enumerate(dict.fromkeys(row["squares"] for row in rows)):
        for row in (row for row in rows if row["squares"] == which and row["difference"] is not None):
            height = len(names) - names.index(row["matched_on"]) + 0.24 * (1 - number)
            if row["difference_low"] is not None:
                axes.plot([100 * row["difference_low"], 100 * row["difference_high"]], [height] * 2, color="0.5")
            axes.plot(100 * row["difference"], height, "os^"[number], color="black", markersize=5)
            count = f"{row['n_in']}, {row['n_out']}"
            axes.text(1.03, height, count, transform=beside, fontsize=8, va="center")
        axes.plot([], [], "os^"[number], color="black", markersize=5, label=which)
    axes.text(1.03, len(names) + 0.5, "n in, out", transform=beside, fontsize=8, va="center")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names), 0, -1), ["not matched" if name == UNMATCHED else name for name in names])
    axes.set_ylim(0.5, len(names) + 0.6)
    axes.set_xlabel("goes to the cheese: in minus out of distribution,\npercentage points, 95% interval")
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
        held += _claims(inside, outside, raw) if threshold["threshold"] is not None else []
        cells_in, cells_out = (_four(tables["squares"], name, split) for split in SPLITS)
        told.append(
            f"{_limit(threshold)}: on decision squares where it is so the mouse goes {name} in {said(inside, 'goes')} "
            f"in distribution (n={inside['n']}, {said(inside, CHOSEN)} of the {inside['drawn']} decision squares "
            f"drawn) and {said(outside, 'goes')} out of it (n={outside['n']}, {said(outside, CHOSEN)} of the "
            f"{outside['drawn']} drawn), and takes the way to the cheese in {said(inside, 'to_cheese')} and "
            f"{said(outside, 'to_cheese')}. "
            f"Cheese {name} goes / corner {name} goes / cheese {name} not / corner {name} not: in {cells_in}, out "
            f"{cells_out}. "
            f"Difference {said(raw, 'difference', '+.2f')}; matched on both distances "
            f"{said(both, 'difference', '+.2f')}."
            + ("" if _enough(inside, outside) else f" A side has fewer than {FEWEST}, so this is not judged.")
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


def _claims(inside: dict[str, Any], outside: dict[str, Any], raw: dict[str, Any]) -> list[bool | None]:
    """In distribution the mouse goes to the cheese; outside it goes the same way, but mostly not to the cheese.

    Each stays open where either side has too few levels.
    """
    if not _enough(inside, outside):
        return [None] * 4
    return [
        above(inside, "to_cheese", FOUND),
        above(outside, "goes", 0.5),
        below(outside, "to_cheese", 0.5),
        above(raw, "difference"),
    ]


def _enough(inside: dict[str, Any], outside: dict[str, Any]) -> bool:
    return bool(min(inside["n"], outside["n"]) >= FEWEST)


def _four(squares: Table, direction: str, split: str) -> str:
    """The four cells of the post's table in its order, in percent; where neither is there is left out, as there."""
    rows = [
        row for row in squares if (row["direction"], row["split"], row["squares"]) == (direction, split, "accepted")
    ]
    share = {(row["leads_to"], row["goes"]): row["share"] for row in rows}
    told = [share[goal, goes] for goes in (True, False) for goal in GOALS[:2]]
    return " / ".join("none" if each is None else f"{100 * each:.1f}" for each in told)


def _limit(threshold: dict[str, Any]) -> str:
    name = threshold["direction"]
    named = f"Channel {threshold['channel']} ({name})"
    if threshold["threshold"] is None:
        return f"{named} has no threshold"
    lower = f"; none has {PRECISION:g} on these mazes" if threshold["as_precise_as_asked"] is False else ""
    return (
        f"{named} {threshold['accepts']} {threshold['threshold']:.1f} ({threshold['criterion']}{lower}; held out "
        f"{said(threshold, 'precision')}, accepting {said(threshold, ACCEPTED)} of random squares where {name} is free)"
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
    f"other mazes for precision {PRECISION:g}, or {ENOUGH} where {MOST_DRAWN} n would not hold so many; the likeliest "
    f"legal move. On the post's own network: its channels, above {POSTS_THRESHOLD:g}. Differences are matched on path "
    f"lengths in bins at {', '.join(map(str, EDGES))} steps.",
    post="Channel 121 (UP) above 30, cheese UP goes / corner UP goes / cheese UP not / corner UP not: "
    "in 99.5 / 0.2 / 0 / 0.3, out 34.7 / 60.4 / 4.4 / 0.5; channel 73 (RIGHT): in 98 / 0 / 0 / 2, out 33 / 65 / 0 / 2 "
    "(n=1000 each).",
    measure=measure,
    figure=figure,
    finding=finding,
)
