"""A progress bar, where one is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ._optional import imported
from .errors import MissingPackageError


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
