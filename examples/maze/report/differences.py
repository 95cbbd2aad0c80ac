"""The headline figures of every policy, and the differences from the main policy's figures.

The figures come from the tables alone. The tables do not contain the levels, so figures of policies with the same
levels also count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from chanpatch.statistics import Interval, difference_interval
from maze.analysis.cells import Table, Tables, above, cells, shown
from maze.analysis.effects import KINDS
from maze.analysis.forwards import SITE
from maze.measurements.ablation import PLACES
from maze.policy.shipped import Measured

# Name, number of levels, row, and column.
Headline: TypeAlias = tuple[str, int, Mapping[str, Any], str]

_SPLITS = {"in distribution": "in", "out of distribution": "out of"}


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
        main = row["policy"] == policies[0]
        cells[row["policy"]] = f"{shown(row, 'value') if main else shown(row, 'difference', '+.3f')}, n={row['n']}"
    compared = [row for row in rows if row["difference"] is not None]
    beyond = sum(above(row, "difference") is not None for row in compared)
    text = (
        f"The difference of each other policy from {policies[0]}, with the 95% interval for two independent figures "
        "(Newcombe; Zou and Donner). A paired interval would be narrower, as policies with the same n have the same "
        "levels. Channels, and so the decision squares on which a channel is high, are each policy's own choice. "
        f"{beyond} of {len(compared)} intervals leave out 0, not corrected for their number. File: differences.csv."
    )
    return text, [{"part": part, "figure": figure, **cells} for (part, figure), cells in by_figure.items()]


def _figures(parts: Mapping[str, Tables]) -> dict[tuple[str, str], tuple[int, Interval]]:
    """Every headline figure of one policy by part and name: n and the interval."""
    found = {}
    for part, headlines in _HEADLINES.items():
        for figure, n, row, column in headlines(parts[part]) if part in parts else ():
            ends = [row[f"{column}{end}"] for end in ("", "_low", "_high")]
            if not any(end is None or math.isnan(end) for end in ends):
                found[part, figure] = (n, Interval(*ends, 0.95))
    return found


def _search(tables: Tables) -> Iterator[Headline]:
    for row in tables["hook_points"]:
        if row["hook_point"] == SITE:
            for column, where in (("in", "in"), ("out", "out of")):
                name = f"AUC of the best channel for {row['direction']} at relu3, cheese {where} distribution"
                yield name, row[f"n_{column}"], row, column


def _ranking(tables: Tables) -> Iterator[Headline]:
    names = {"absolute": "the post's pair", "absolute_five_pairs": "five pairs"}
    for row in tables["agreement"]:
        if row["with"] == "auc_choice":
            name = f"rank correlation over n channels: differences in {names[row['of']]}, and AUC"
            yield name, row["channels"], row, "spearman"


def _sums(tables: Tables) -> Iterator[Headline]:
    for row in tables["goals"]:
        yield f"AUC of the channel for {row['direction']}, cheese {row['split']}", row["n"], row, "cheese"
    for table, quantity, name in (
        ("transfer", "false-positive rate", "false positives of the threshold that divides best for"),
        ("precise", "precision at the base rate", "precision of the precise threshold, at one base rate, for"),
    ):
        for row in tables[table]:
            if row["direction"] == "UP" and row["quantity"].startswith(quantity):
                yield f"{name} UP, cheese in distribution", row["n_fit"], row, "fit"
                yield f"{name} UP, cheese out of distribution", row["n_shifted"], row, "shifted"


def _decision(tables: Tables) -> Iterator[Headline]:
    for row in tables["choices"]:
        where = f"cheese {_SPLITS[row['split']]} distribution"
        if row["squares"] == "accepted":
            high = f"channel for {row['direction']} high, {where}"
            yield f"{high}: the mouse goes {row['direction']}", row["n"], row, "goes"
            yield f"{high}: it takes the way to the cheese", row["n"], row, "to_cheese"
        elif row["direction"] == "UP":  # all squares are the same for every direction
            yield f"all decision squares, {where}: it takes the way to the cheese", row["n"], row, "to_cheese"
    for row in tables["matched"]:
        if row["matched_on"] in ("nothing", "both") and row["squares"] == "all":
            how = "" if row["matched_on"] == "nothing" else ", matched on both distances"
            name = f"all decision squares: to the cheese in minus out of distribution{how}"
            yield name, row["n_in"] + row["n_out"], row, "difference"


def _ablation(tables: Tables) -> Iterator[Headline]:
    places = set()
    for row in tables["effects"]:
        if row["cheese"] not in places:  # the same in all rows of a place
            places.add(row["cheese"])
            yield f"P(cheese within 256 steps), cheese {row['cheese']}", row["n"], row, "original"
        # Mean and resample ablation are left out: with one fixed reference set, their intervals are too narrow.
        if (row["role"], row["cheese"], row["kind"]) == ("UP", PLACES[0], KINDS[0]):
            yield f"effect of {row['kind']} ablation of the channel for UP, cheese {PLACES[0]}", row["n"], row, "effect"


_HEADLINES: dict[str, Callable[[Tables], Iterator[Headline]]] = {
    "search": _search,
    "ranking": _ranking,
    "sums": _sums,
    "decision": _decision,
    "ablation": _ablation,
}
