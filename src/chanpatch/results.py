"""Records as lines of text: how every result prints."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import MissingPackageError


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


def imported(name: str, *, package: str | None = None) -> Any:
    """Return a module.

    Args:
        name: Such as `"sklearn.linear_model"`.
        package: What pip calls it; the first part of the name if None.

    Raises:
        MissingPackageError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = package or name.partition(".")[0]
        raise MissingPackageError(f"{package} is not installed: pip install {package}") from error


@contextmanager
def progress_bar(progress: bool | None, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Yield what advances a bar.

    Args:
        progress: Whether to show it; None for one on a terminal, after two seconds, where tqdm is installed.
        total: How many units there are.
        unit: Of what.

    Raises:
        MissingPackageError: If a bar is asked for and tqdm is not installed.
    """
    if progress is False:
        yield lambda count: None
        return
    try:
        tqdm = imported("tqdm").tqdm
    except MissingPackageError:
        if progress:
            raise
        yield lambda count: None
        return
    with tqdm(total=total, unit=unit, delay=2, disable=None if progress is None else False) as bar:
        yield bar.update
