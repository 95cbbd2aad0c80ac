"""The headline figures of every policy, and the differences from the main policy's figures.

The figures come from the tables alone. The tables do not contain the levels, so figures of policies with the same
levels also count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from chanpatch.statistics import Interval, difference_interval
from maze.analysis.cells import Table, Tables, above, cells, chosen, shown
from maze.analysis.forwards import SITE
from maze.policy.shipped import Measured

_BEST, _AUC = {"hook_point": SITE}, "AUC of the best channel for {direction} at relu3, cheese"
_CORRELATION = "rank correlation over n channels: differences in {}, and AUC"
_FALSE = {"direction": "UP", "quantity": "false-positive rate"}
_PRECISE = {"direction": "UP", "quantity": "precision at the base rate of the fit"}
_FALSE_RATE = "false positives of the threshold that divides best for UP, cheese"
_PRECISION = "precision of the precise threshold, at one base rate, for UP, cheese"
_HIGH, _HIGH_CHANNEL = {"squares": "accepted"}, "channel for {direction} high, cheese {split}"
_EVERY = {"squares": "all", "direction": "UP"}  # the same for every direction
_MATCHED = "all decision squares: to the cheese in minus out of distribution"
_BOTH = f"{_MATCHED}, matched on both distances"
_UP = {"role": "UP", "cheese": "bottom right", "kind": "zero"}

# By part: table, cells of its rows, name of the figure, columns with n, and column with the estimate. Mean and resample
# ablation are left out: with one fixed reference set, their intervals are too narrow.
_HEADLINES = {
    "search": [
        ("hook_points", _BEST, f"{_AUC} in distribution", ["n_in"], "in"),
        ("hook_points", _BEST, f"{_AUC} out of distribution", ["n_out"], "out"),
    ],
    "ranking": [
        ("agreement", {"with": "auc_choice", "of": of}, _CORRELATION.format(pairs), ["channels"], "spearman")
        for of, pairs in (("absolute", "the post's pair"), ("absolute_five_pairs", "five pairs"))
    ],
    "sums": [
        ("goals", {}, "AUC of the channel for {direction}, cheese {split}", ["n"], "cheese"),
        ("transfer", _FALSE, f"{_FALSE_RATE} in distribution", ["n_fit"], "fit"),
        ("transfer", _FALSE, f"{_FALSE_RATE} out of distribution", ["n_shifted"], "shifted"),
        ("precise", _PRECISE, f"{_PRECISION} in distribution", ["n_fit"], "fit"),
        ("precise", _PRECISE, f"{_PRECISION} out of distribution", ["n_shifted"], "shifted"),
    ],
    "decision": [
        ("choices", _HIGH, f"{_HIGH_CHANNEL}: the mouse goes {{direction}}", ["n"], "goes"),
        ("choices", _HIGH, f"{_HIGH_CHANNEL}: it takes the way to the cheese", ["n"], "to_cheese"),
        ("choices", _EVERY, "all decision squares, cheese {split}: it takes the way to the cheese", ["n"], "to_cheese"),
        ("matched", {"squares": "all", "matched_on": "nothing"}, _MATCHED, ["n_in", "n_out"], "difference"),
        ("matched", {"squares": "all", "matched_on": "both"}, _BOTH, ["n_in", "n_out"], "difference"),
    ],
    "ablation": [
        ("effects", {}, "P(cheese within 256 steps), cheese {cheese}", ["n"], "original"),
        ("effects", _UP, "effect of zero ablation of the channel for UP, cheese bottom right", ["n"], "effect"),
    ],
}


def differences(measured: Measured) -> Table:
    """One row per part, figure and policy, with the difference from the first policy."""
    main, *others = measured
    of = {policy: _figures(parts) for policy, parts in measured.items()}
    rows = []
    for (part, figure), (n_main, interval_main) in of[main].items():
        having = [policy for policy in others if (part, figure) in of[policy]]
        for policy in [main, *having] if having else ():
            n, interval = of[policy][part, figure]
            minus = difference_interval(interval, interval_main) if policy != main else None
            known = {"part": part, "figure": figure, "policy": policy, "n": n, "n_main": n_main}
            rows.append({**known, **cells("value", interval), **cells("difference", minus)})
    return rows


def side_by_side(rows: Table) -> tuple[str, Sequence[Mapping[str, str]]]:
    """A text, and a table with one row per figure and one column per policy."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    by_figure = {}
    for row in rows:
        cells = by_figure.setdefault((row["part"], row["figure"]), dict.fromkeys(policies, "not measured"))
        other = f"{row['value']:.3f}, difference {shown(row, 'difference', '+.3f')}"
        cells[row["policy"]] = f"{shown(row, 'value') if row['policy'] == policies[0] else other}, n={row['n']}"
    compared = [row for row in rows if row["difference"] is not None]
    beyond = sum(above(row, "difference") is not None for row in compared)
    text = (
        f"Each figure, and its difference from {policies[0]}'s, with the 95% interval for two independent figures "
        "(Newcombe; Zou and Donner). A paired interval would be narrower, as policies with the same n have the same "
        "levels. Channels, and so the decision squares on which a channel is high, are each policy's own choice. "
        f"{beyond} of {len(compared)} intervals leave out 0, not corrected for their number. File: differences.csv."
    )
    return text, [{"part": part, "figure": figure, **cells} for (part, figure), cells in by_figure.items()]


def _figures(parts: Mapping[str, Tables]) -> dict[tuple[str, str], tuple[int, Interval]]:
    """The headline figures of one policy by part and name: n and the interval."""
    return {
        (part, name.format(**row)): (sum(row[each] for each in counts), Interval(*ends, 0.95))
        for part, headlines in _HEADLINES.items()
        if part in parts
        for table, where, name, counts, column in headlines
        for row in chosen(parts[part][table], **where)
        for ends in [[row[f"{column}{end}"] for end in ("", "_low", "_high")]]
        if not any(end is None or math.isnan(end) for end in ends)
    }
