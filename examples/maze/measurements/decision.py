"""On the decision square: the mouse's choice when a direction's channel is high, in and out of distribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanpatch.statistics import Interval, difference_interval, stratified_difference_interval, wilson_interval
from maze.analysis.cells import Row, Table, Tables, above, below, cells, chosen, keyed, share_cells, shown, verdict
from maze.analysis.decision_squares import (
    ACCEPTED,
    BINS,
    EDGES,
    POSTS_THRESHOLD,
    PRECISION,
    TO_CHEESE,
    TO_CORNER,
    Decisions,
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
MOST_DRAWN = 20  # levels for each one that is to be accepted
ENOUGH = 200  # accepted levels if n cannot be reached: their shares are known to 7 points
FEWEST = 100  # levels that claims are judged by: their shares are known to 10 points
FOUND = 0.9  # in distribution, more mice than this go to the cheese
RESAMPLES = 1999
UNMATCHED, BOTH = "nothing", "both"  # path lengths to match
CHOSEN = "accepted_of_decision_squares"  # share of the decision squares drawn
GOALS = ("cheese", "corner", "neither")  # at the end of the path in the direction


def measure(study: Study) -> dict[str, Table]:
    """Thresholds, the post's 2x2 tables, choices, and the difference between in and out of distribution."""
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
    seed = study.seed_for("decision bootstrap")
    matched = [row for which, each in taken.items() for row in _matched(which, *each, seed)]
    return {"thresholds": threshold_rows(study, probes), "squares": squares, "choices": choices, "matched": matched}


def _drawn(study: Study, split: str, probes: Probes) -> Decisions:
    """Levels until more would not help any channel that has a threshold; at most `MOST_DRAWN` times n."""
    parts: list[Decisions] = []
    known = [direction for direction in DIRECTIONS if probes[direction] is not None]
    for number in range(MOST_DRAWN):
        levels = study.levels(f"decision {split} {number}", size=SIZE, cheese=split, mouse="decision square")
        parts.append(at_decision_squares(study.points, levels))
        seen = joined(parts)
        if not any(_helps(len(_accepted(study, seen, probes, each)[0]), len(seen.chosen), study.n) for each in known):
            break
    return seen


def _helps(accepted: int, drawn: int, n: int) -> bool:
    """Whether one of n, `ENOUGH` and `FEWEST` accepted levels is not reached yet, but may still be.

    This depends on the number of accepted levels only, never on the choices.
    """
    at_best = wilson_interval(accepted, drawn).high * MOST_DRAWN * n
    return any(accepted < min(goal, n) <= at_best for goal in (n, ENOUGH, FEWEST))


def _accepted(study: Study, seen: Decisions, probes: Probes, direction: Direction) -> tuple[NDArray[np.int64], int]:
    """The first n levels past the direction's threshold, and the number of levels drawn for them."""
    probe = probes[direction]
    if probe is None:
        return np.arange(0), len(seen.chosen)
    accepted = np.flatnonzero(probe.predict(seen.sums[:, tested_channel(study, direction)]))[: study.n]
    return accepted, int(accepted[-1]) + 1 if len(accepted) == study.n else len(seen.chosen)


def _squares(named: dict[str, Any], seen: Decisions, direction: Direction, drawn: int) -> Table:
    """One row per cell of the post's table: the goal in the direction, and whether the mouse goes there."""
    leads = np.where(seen.cheese == direction, "cheese", np.where(seen.corner == direction, "corner", "neither"))
    goes = seen.chosen == direction
    rows: Table = []
    for goal in GOALS:
        for yes in (True, False):
            count = int(((leads == goal) & (goes == yes)).sum())
            row = {"n": len(goes), "drawn": drawn, "leads_to": goal, "goes": yes, "count": count}
            rows.append({**named, **row, **share_cells("share", count, len(goes))})
    return rows


def _choices(named: dict[str, Any], seen: Decisions, direction: Direction, drawn: int) -> Row:
    """The shares of levels that are accepted, go in the direction, to the cheese, and to the corner."""
    n = len(seen.chosen)
    row = {**named, "n": n, "drawn": drawn, **share_cells(CHOSEN, n, drawn)}
    for name, each in (
        ("goes", seen.chosen == direction),
        ("to_cheese", seen.took_cheese),
        ("to_corner", seen.chosen == seen.corner),
        ("leads_to_cheese", seen.cheese == direction),
    ):
        row |= share_cells(name, each.sum(), n)
    return row


def _matched(which: str, inside: Decisions, outside: Decisions, seed: int) -> Table:
    """The share of mice that go to the cheese, in minus out of distribution: raw, and within strata of path lengths."""
    both, first = joined([inside, outside]), np.arange(len(inside.chosen) + len(outside.chosen)) < len(inside.chosen)
    by = {
        UNMATCHED: np.zeros(len(first), dtype=np.int64),
        TO_CHEESE: strata(both) // len(BINS),
        TO_CORNER: strata(both) % len(BINS),
        BOTH: strata(both),
    }
    rows: Table = []
    for name, stratum in by.items():
        shared = np.intersect1d(stratum[first], stratum[~first])
        interval = _raw(inside, outside) if name == UNMATCHED else None
        if name != UNMATCHED and len(shared):
            interval = stratified_difference_interval(both.took_cheese, first, stratum, resamples=RESAMPLES, seed=seed)
        rows.append(
            {
                "squares": which,
                "matched_on": name,
                "strata": len(shared),
                "n_in": int(np.isin(stratum[first], shared).sum()),
                "n_out": int(np.isin(stratum[~first], shared).sum()),
                "of_in": len(inside.chosen),
                "of_out": len(outside.chosen),
                **cells("difference", interval),
            }
        )
    return rows


def _raw(inside: Decisions, outside: Decisions) -> Interval | None:
    counts = [(int(seen.took_cheese.sum()), len(seen.chosen)) for seen in (inside, outside)]
    return difference_interval(*(wilson_interval(*each) for each in counts)) if all(n for _, n in counts) else None


def finding(tables: Tables) -> Finding:
    choices = keyed(tables["choices"], "direction", "squares", "split")
    differences = keyed(tables["matched"], "squares", "matched_on")
    texts, claims = [], []
    for threshold in tables["thresholds"]:
        name = threshold["direction"]
        inside, outside = (choices[name, "accepted", split] for split in SPLITS)
        raw, both = (differences[f"{name} channel high", on] for on in (UNMATCHED, BOTH))
        claims += _claims(inside, outside, raw) if threshold["threshold"] is not None else []
        cells_in, cells_out = (_four(tables["squares"], name, split) for split in SPLITS)
        texts.append(
            f"{_limit(threshold)}. On such decision squares the mouse goes {name} in {shown(inside, 'goes', '.0%')} "
            f"in distribution (n={inside['n']}, {shown(inside, CHOSEN, '.0%')} of the {inside['drawn']} decision "
            f"squares drawn) and {shown(outside, 'goes', '.0%')} out of it (n={outside['n']}, "
            f"{shown(outside, CHOSEN, '.0%')} of the {outside['drawn']} decision squares drawn). It goes to the cheese "
            f"in {shown(inside, 'to_cheese', '.0%')} and {shown(outside, 'to_cheese', '.0%')}. Cheese {name} goes / "
            f"corner {name} goes / cheese {name} not / corner {name} not: in {cells_in}, out {cells_out}. Difference "
            f"{shown(raw, 'difference', '+.2f')}; matched on both distances {shown(both, 'difference', '+.2f')}."
            + ("" if _enough(inside, outside) else f" A side has fewer than {FEWEST}, so this is not judged.")
        )
    raw, both = (differences["all", on] for on in (UNMATCHED, BOTH))
    return Finding(
        " ".join(texts),
        verdict(*claims),
        f"On all decision squares, the share of mice that go to the cheese is higher in distribution by "
        f"{shown(raw, 'difference', '+.2f')}; matched on the lengths of both paths (n={both['n_in']} and "
        f"{both['n_out']}) by {shown(both, 'difference', '+.2f')}. {_explained(raw, both)}",
        "It does not follow that the channel makes the mouse go there: nothing was changed. Nor is distance fully "
        "controlled: levels of one stratum still differ, and strata that only one side has are left out.",
    )


def _claims(inside: Row, outside: Row, raw: Row) -> list[bool | None]:
    """In distribution the mouse goes to the cheese; outside it goes the same way, but mostly not to the cheese."""
    if not _enough(inside, outside):
        return [None] * 4
    return [
        above(inside, "to_cheese", FOUND),
        above(outside, "goes", 0.5),
        below(outside, "to_cheese", 0.5),
        above(raw, "difference"),
    ]


def _enough(inside: Row, outside: Row) -> bool:
    return bool(min(inside["n"], outside["n"]) >= FEWEST)


def _four(squares: Table, direction: str, split: str) -> str:
    """The four cells of the post's table in its order, in percent."""
    share = keyed(chosen(squares, direction=direction, split=split, squares="accepted"), "leads_to", "goes")
    four = [share[goal, goes]["share"] for goes in (True, False) for goal in GOALS[:2]]
    return " / ".join("none" if each is None else f"{100 * each:.1f}" for each in four)


def _limit(threshold: Row) -> str:
    name = threshold["direction"]
    if threshold["threshold"] is None:
        return f"Channel {threshold['channel']} ({name}) has no threshold"
    lower = f"; none has {PRECISION:g} on these mazes" if threshold["as_precise_as_asked"] is False else ""
    return (
        f"Channel {threshold['channel']} ({name}) {threshold['accepts']} {threshold['threshold']:.1f} "
        f"({threshold['criterion']}{lower}; held out {shown(threshold, 'precision', '.0%')}, accepting "
        f"{shown(threshold, ACCEPTED, '.0%')} of random squares with {name} free)"
    )


def _explained(raw: Row, both: Row) -> str:
    if raw["difference_low"] is None or both["difference_low"] is None:
        return "There are too few levels to say whether distance explains it."
    if raw["difference_low"] <= 0:
        return "The interval of the difference contains 0."
    if both["difference_low"] > 0:
        return "So the distances of the decision square do not explain all of it."
    return "After matching, the interval contains 0."


_SQUARES = Panel("squares", ("leads_to", "goes"), "share", "percent of squares", ("squares", "split"), scale=100)

PART = Part(
    name="decision",
    question="On the decision square, does a high sum of a direction's channel send the mouse there, cheese or not?",
    method="Size 25, mouse on the decision square. Levels are drawn until n have a sum past the threshold chosen on "
    f"other mazes for precision {PRECISION:g}, or {ENOUGH} if {MOST_DRAWN} n would not hold n; the likeliest "
    f"legal move. On the post's own network: its channels, above {POSTS_THRESHOLD:g}. Differences are matched on path "
    f"lengths in bins at {', '.join(map(str, EDGES))} steps.",
    post="Channel 121 (UP) above 30, cheese UP goes / corner UP goes / cheese UP not / corner UP not: "
    "in 99.5 / 0.2 / 0 / 0.3, out 34.7 / 60.4 / 4.4 / 0.5; channel 73 (RIGHT): in 98 / 0 / 0 / 2, out 33 / 65 / 0 / 2 "
    "(n=1000 each).",
    measure=measure,
    figure=chart(
        *(replace(_SQUARES, where={"direction": each.name}, title=f"mouse goes {each.name}") for each in DIRECTIONS),
        Panel("matched", "matched_on", "difference", "to the cheese: in minus out, points", "squares", scale=100),
    ),
    finding=finding,
)
