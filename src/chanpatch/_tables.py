"""Records as lines of text: how every result prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a header and one line per record; the columns are the keys of the first record.

    Fractions are shown with four significant digits, None as an empty cell.

    Example:
        >>> table([{"channel": 121, "auc": 0.98765}, {"channel": 7, "auc": None}])
        ['channel  auc', '121      0.9877', '7']
    """
    if not records:
        return []
    rows = [list(records[0]), *([_cell(value) for value in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
