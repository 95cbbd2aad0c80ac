"""The root call under way, and the forward in which a patch runs, as edits and `where` functions see it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .hooks import Station


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


@dataclass(slots=True)
class RootCall:
    """One root call, within which the calls of modules are counted."""

    station: Station | None  # of the module that was called; None for a method
    method: str  # "__call__" for a module's call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_forward_of_method: bool = False  # one of the forwards that a method such as `generate` runs
    depth: int = 0  # of calls of the module inside itself
    counts: dict[object, int] = field(default_factory=dict)  # calls so far, by station or tap
    under_way: dict[object, list[int]] = field(default_factory=dict)  # their indices, while they run
    given: list[Any] = field(default_factory=list)  # tensors and containers among the arguments
