"""On the decision square, does a high sum of a direction's channel send the mouse there, cheese or not?

Method: Size 25, mouse on the decision square. Levels are drawn until n have a sum past the threshold chosen on other
mazes for precision {PRECISION:g}, or {ENOUGH} if {MOST_DRAWN} n would not contain n; the likeliest legal move. On the
post's own network: its channels, above 30. Differences are matched on path lengths in bins at 8, 16 and 32 steps. If
the corner is on the way to the cheese, the level has a decision square in the post's sample, one past the corner, and
none in ours; such levels are counted. The verdict: out of distribution with a high UP channel, more than {MOST:.0%} of
the mice go UP to the corner and not to the cheese, judged from {FEWEST} levels on.

The post: Channel 121 (UP) above 30, cheese UP goes / corner UP goes / cheese UP not / corner UP not: in 99.5 / 0.2 / 0
/ 0.3, out 34.7 / 60.4 / 4.4 / 0.5; channel 73 (RIGHT): in 98 / 0 / 0 / 2, out 33 / 65 / 0 / 2 (n=1000 each).

Limits: The result does not show that the channel makes the mouse go there: nothing was changed. Distance is not fully
controlled, as levels of one stratum still differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from chanpatch.statistics import stratified_difference_interval, wilson_interval
from maze.analysis import decision_squares as squares
from maze.analysis.cells import Integers, Row, Table, Tables, above, chosen, keyed, shown, verdict
from maze.analysis.decision_squares import DIRECTIONS, PRECISION, Decisions, Probes
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, minus, share
from maze.analysis.part import SPLITS, Finding, Study
from maze.paths import Direction, decision_squares, top_right
from maze.states import read_mazes

SIZE = 25
MOST_DRAWN = 20  # levels drawn per level to accept
ENOUGH = 200  # accepted levels if n cannot be reached: fractions are then known to 7 points
FEWEST = 100  # levels that the claim is judged by: fractions are then known to 10 points
MOST = 0.5
RESAMPLES = 1999
UNMATCHED, BOTH = "nothing", "both"  # path lengths to match
CHOSEN = "accepted_of_decision_squares"  # fraction of the decision squares drawn
GOALS = ("cheese", "corner", "neither")  # at the end of the path in the direction


def measure(study: Study) -> dict[str, Table]:
    """Thresholds, the post's 2x2 tables, choices, and the difference between in and out of distribution."""
    probes = squares.thresholds(study, DIRECTIONS)
    tables = {"thresholds": squares.threshold_rows(study, probes), "squares": [], "choices": []}
    taken = {}
    for split in SPLITS:
        seen = _drawn(study, split, probes)
        every = np.arange(min(study.n, len(seen.chosen)))
        for direction in DIRECTIONS:
            accepted, drawn = _accepted(study, seen, probes, direction)
            for which, rows, of in (("accepted", accepted, drawn), ("all", every, len(every))):
                named = {"direction": direction.name, "split": split, "squares": which}
                tables["squares"] += _squares(named, seen.rows(rows), direction, of)
                tables["choices"].append(_choices(named, seen.rows(rows), direction, of))
            taken.setdefault(f"{direction.name} channel high", []).append(seen.rows(accepted))
        taken.setdefault("all", []).append(seen.rows(every))
    tables["left_out"] = [_left_out(study, split) for split in SPLITS]
    seed = study.seed_for("decision bootstrap")
    return tables | {"matched": [row for which, each in taken.items() for row in _matched(which, *each, seed)]}


def _left_out(study: Study, split: str) -> Row:
    """The number of levels, among n, whose corner is on the path to the cheese."""
    mazes = read_mazes(study.levels(f"decision left out {split}", size=SIZE, cheese=split))
    corner = top_right(mazes)
    there = (decision_squares(mazes)[0] == corner).all(axis=1) & (mazes.cheese != corner).any(axis=1)
    count = int(there.sum())
    return {"split": split, "n": len(there), "count": count, **intervals(share=share(count, len(there)))}


def _drawn(study: Study, split: str, probes: Probes) -> Decisions:
    """Levels until more would not help any channel that has a threshold; at most `MOST_DRAWN` times n."""
    parts = []
    known = [direction for direction in DIRECTIONS if probes[direction] is not None]
    for number in range(MOST_DRAWN):
        levels = study.levels(f"decision {split} {number}", size=SIZE, cheese=split, mouse="decision square")
        parts.append(squares.at_decision_squares(study.points, levels))
        seen = squares.joined(parts)
        if not any(_helps(len(_accepted(study, seen, probes, each)[0]), len(seen.chosen), study.n) for each in known):
            break
    return seen


def _helps(accepted: int, drawn: int, n: int) -> bool:
    """Whether n, `ENOUGH` or `FEWEST` accepted levels are not reached yet but may still be.

    The answer depends on the number of accepted levels only, never on the choices.
    """
    at_best = wilson_interval(accepted, drawn).high * MOST_DRAWN * n
    return any(accepted < min(goal, n) <= at_best for goal in (n, ENOUGH, FEWEST))


def _accepted(study: Study, seen: Decisions, probes: Probes, direction: Direction) -> tuple[Integers, int]:
    """The first n levels past the direction's threshold, and the number of levels drawn for them."""
    probe = probes[direction]
    if probe is None:
        return np.arange(0), len(seen.chosen)
    accepted = np.flatnonzero(probe.predict(seen.sums[:, study.channel(direction)]))[: study.n]
    return accepted, int(accepted[-1]) + 1 if len(accepted) == study.n else len(seen.chosen)


def _squares(named: dict[str, Any], seen: Decisions, direction: Direction, drawn: int) -> Table:
    """One row per cell of the post's table: the goal in the direction, and whether the mouse goes there."""
    leads = np.where(seen.cheese == direction, "cheese", np.where(seen.corner == direction, "corner", "neither"))
    goes = seen.chosen == direction
    rows = []
    for goal in GOALS:
        for yes in (True, False):
            count = int(((leads == goal) & (goes == yes)).sum())
            row = {"n": len(goes), "drawn": drawn, "leads_to": goal, "goes": yes, "count": count}
            rows.append({**named, **row, **intervals(share=share(count, len(goes)))})
    return rows


def _choices(named: dict[str, Any], seen: Decisions, direction: Direction, drawn: int) -> Row:
    """The fractions of levels that are accepted, go in the direction, and go to the cheese."""
    n = len(seen.chosen)
    goes, to_cheese = (share(each.sum(), n) for each in (seen.chosen == direction, seen.took_cheese))
    row = {**named, "n": n, "drawn": drawn, **intervals(**{CHOSEN: share(n, drawn)})}
    return row | intervals(goes=goes, to_cheese=to_cheese)


def _matched(which: str, inside: Decisions, outside: Decisions, seed: int) -> Table:
    """The difference in the fraction that goes to the cheese, in minus out of distribution, raw and matched."""
    both = squares.joined([inside, outside])
    first, strata = np.arange(len(both.chosen)) < len(inside.chosen), squares.strata(both)
    shared = np.intersect1d(strata[first], strata[~first])
    raw, matched = minus(*(share(seen.took_cheese.sum(), len(seen.chosen)) for seen in (inside, outside))), None
    if len(shared):
        matched = stratified_difference_interval(both.took_cheese, first, strata, resamples=RESAMPLES, seed=seed)
    rows = []
    for name, interval, used in ((UNMATCHED, raw, strata), (BOTH, matched, shared)):
        row = {"squares": which, "matched_on": name, "n_in": int(np.isin(strata[first], used).sum())}
        row |= {"n_out": int(np.isin(strata[~first], used).sum()), **intervals(difference=interval)}
        rows.append(row)
    return rows


def finding(tables: Tables) -> Finding:
    choices = keyed(tables["choices"], "direction", "squares", "split")
    differences = keyed(tables["matched"], "squares", "matched_on")
    texts = []
    for threshold in tables["thresholds"]:
        name = threshold["direction"]
        inside, outside = (choices[name, "accepted", split] for split in SPLITS)
        judged = "" if min(inside["n"], outside["n"]) >= FEWEST else f", fewer than {FEWEST}, so this is not judged"
        texts.append(
            f"{_limit(threshold)}: the mouse goes {name} in {shown(inside, 'goes', '.0%')} in distribution and "
            f"{shown(outside, 'goes', '.0%')} out of it, to the cheese in {shown(inside, 'to_cheese', '.0%')} and "
            f"{shown(outside, 'to_cheese', '.0%')} (n={inside['n']}, {outside['n']}{judged}). In the post's order: in "
            f"{_four(tables['squares'], name, SPLITS[0])}, out {_four(tables['squares'], name, SPLITS[1])}."
        )
    raw, both = (differences["all", on] for on in (UNMATCHED, BOTH))
    left_out = " and ".join(f"{row['count']} of {row['n']} levels {row['split']}" for row in tables["left_out"])
    cells = keyed(chosen(tables["squares"], direction="UP", squares="accepted"), "split", "leads_to", "goes")
    corner = cells[SPLITS[1], "corner", True]
    return Finding(
        " ".join(texts),
        verdict(above(corner, "share", MOST) if corner["n"] >= FEWEST else None),
        "On all decision squares, the fraction that goes to the cheese is higher in distribution by "
        f"{shown(raw, 'difference', '+.2f')}. With both path lengths matched (n={both['n_in']}, {both['n_out']}), the "
        f"difference is {shown(both, 'difference', '+.2f')}. The corner is on the way to the cheese in {left_out}.",
    )


def _four(squares: Table, direction: str, split: str) -> str:
    cells = keyed(chosen(squares, direction=direction, split=split, squares="accepted"), "leads_to", "goes")
    four = [cells[goal, goes]["share"] for goes in (True, False) for goal in GOALS[:2]]
    return " / ".join("none" if each is None else f"{100 * each:.1f}" for each in four)


def _limit(threshold: Row) -> str:
    name = threshold["direction"]
    if threshold["threshold"] is None:
        return f"Channel {threshold['channel']} ({name}) has no threshold"
    lower = f"; none has {PRECISION:g}" if threshold["as_precise_as_asked"] is False else ""
    return (
        f"Channel {threshold['channel']} ({name}) {threshold['accepts']} {threshold['threshold']:.1f} "
        f"({threshold['criterion']}{lower})"
    )


_SQUARES = Panel("squares", ("leads_to", "goes"), "share", "percent of squares", ("squares", "split"), scale=100)
figure = chart(
    *(replace(_SQUARES, where={"direction": each.name}, title=f"mouse goes {each.name}") for each in DIRECTIONS),
    Panel("matched", "matched_on", "difference", "to the cheese: in minus out, points", "squares", scale=100),
)
