"""The forward in which a patch runs, as edits and `where` functions see it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Published(threading.local):
    step: int | None = None
    rows: Tensor | None = None


published = _Published()


@contextmanager
def forward_context(*, step: int | None = None, rows: Any = None) -> Iterator[None]:
    """Publish the step of a rollout, and the numbers of the rows in this forward, to the patches that ask."""
    before = published.step, published.rows
    published.step, published.rows = step, None if rows is None else torch.as_tensor(rows)
    try:
        yield
    finally:
        published.step, published.rows = before


@dataclass(frozen=True)
class Moment:
    """The forward in which a patch runs; a Session returns it from `moment()`.

    Attributes:
        inputs: Inputs of the root call.
        call: Index of the module's call within the root call.
        step: Step of the rollout, or None.
        rows: int64 `(batch,)`, the number of each row of the forward; None for 0, 1, 2, ...
        running: Method of the root call, or None.
    """

    inputs: tuple[Any, ...] = ()
    call: int = 0
    step: int | None = None
    rows: Tensor | None = None
    running: str | None = None
