"""Tables of the study: their cells, and the claims that intervals in the cells support."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chanpatch.statistics import Interval

Cell: TypeAlias = bool | int | float | str | None
Row: TypeAlias = dict[str, Any]
Table: TypeAlias = list[Row]
Tables: TypeAlias = Mapping[str, Table]
Agrees: TypeAlias = Literal["yes", "in part", "undecided", "no", "not comparable"]
Values: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]
Integers: TypeAlias = NDArray[np.int64]


def cells(prefix: str, interval: Interval | None) -> Row:
    """An estimate with its interval as the cells `prefix`, `prefix_low` and `prefix_high`; None if unknown."""
    known = (None,) * 3 if interval is None else (interval.estimate, interval.low, interval.high)
    return {
        f"{prefix}{end}": None if value is None or np.isnan(value) else float(value)
        for end, value in zip(("", "_low", "_high"), known, strict=True)
    }


def shown(row: Mapping[str, Any], prefix: str, form: str = ".3f") -> str:
    """The three cells of `cells` as text, such as "0.974 (0.944 to 0.988)"."""
    estimate, low, high = (row[f"{prefix}{end}"] for end in ("", "_low", "_high"))
    if estimate is None:
        return "nothing to estimate"
    ends = "no interval" if low is None or np.isnan(low) else f"{low:{form}} to {high:{form}}"
    return f"{estimate:{form}} ({ends})"


def above(row: Mapping[str, Any], prefix: str, limit: float = 0.0) -> bool | None:
    """Whether an interval lies above a limit; None if the interval contains the limit or is unknown."""
    low, high = row[f"{prefix}_low"], row[f"{prefix}_high"]
    if low is None or high is None:
        return None
    return True if low > limit else False if high < limit else None


def below(row: Mapping[str, Any], prefix: str, limit: float = 0.0) -> bool | None:
    """Whether an interval lies below a limit; None if the interval contains the limit or is unknown."""
    over = above(row, prefix, limit)
    return None if over is None else not over


def verdict(*claims: bool | None) -> Agrees:
    """Whether a result agrees with the reference.

    Args:
        *claims: True if a claim holds, False if its opposite holds, None if the data leave the claim open.
    """
    if not claims:
        return "not comparable"
    if all(claims):
        return "yes"
    if any(claims):
        return "in part"
    return "no" if False in claims else "undecided"


def column(table: Sequence[Mapping[str, Any]], name: str) -> NDArray[Any]:
    return np.array([row[name] for row in table])


def keyed(table: Sequence[Row], *names: str) -> dict[Any, Row]:
    """Rows by the cells in one column or in several."""
    return {tuple(row[name] for name in names) if len(names) > 1 else row[names[0]]: row for row in table}


def chosen(table: Sequence[Row], **wanted: Any) -> Table:
    """The rows with these cells: values, or functions that accept values."""
    return [
        row
        for row in table
        if all(each(row.get(name)) if callable(each) else row.get(name) == each for name, each in wanted.items())
    ]


def read_table(file: Path) -> Table:
    """A CSV file as a table: numbers as numbers, empty cells as None."""
    with file.open(newline="") as stream:
        return [{name: _cell(text) for name, text in row.items()} for row in csv.DictReader(stream)]


def _cell(text: str) -> Cell:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"": None, "True": True, "False": False}.get(text, text)
