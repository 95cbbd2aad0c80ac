"""The current root call and forward pass, as seen by edits and `where` functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .hooks import Station


@dataclass(slots=True, eq=False)
class Published:
    """Rows of a forward pass and, in a rollout, their episodes. An instance is created per step, so it must be cheap.

    Attributes:
        rows: Index of each row, int64 `(row,)`; None for 0, 1, 2, ...
        step: Step of the rollout, or None.
        label: Name of the policy, or label of the patches.
        environments: Sub-environment of each row, int64 `(row,)`; None outside a rollout.
        sampling_seed: Random seed for sampling.
        seeds: Seed of each episode in the rollout; None outside a rollout.
        repetitions: For each episode, the number of earlier episodes with the same seed.
        infos: Function that maps sub-environments to their infos.
        forwards: Index of the last root call in this step, by session.
    """

    rows: NDArray[np.int64] | None = None
    step: int | None = None
    label: Any = None
    environments: NDArray[np.int64] | None = None
    sampling_seed: int = 0
    seeds: NDArray[Any] | None = None
    repetitions: Sequence[int] = ()
    infos: Callable[[NDArray[np.int64]], Any] | None = None
    forwards: dict[int, int] = field(default_factory=dict)

    def cut(self, rows: slice, label: Any) -> Published:
        """Return a copy that keeps only the given rows, with another label."""
        numbers, environments = (None if each is None else each[rows] for each in (self.rows, self.environments))
        return replace(self, label=label, rows=numbers, environments=environments)


class _Current(threading.local):
    now = Published()


published = _Current()


@contextmanager
def forward_context(*, rows: Any = None, **others: Any) -> Iterator[None]:
    """Make the rows of a forward pass, and information about their episodes, available to patches."""
    before = published.now
    published.now = Published(None if rows is None else np.asarray(rows), **others)
    try:
        yield
    finally:
        published.now = before


@dataclass(frozen=True)
class Moment:
    """The forward pass in which a patch runs, as returned by `Session.moment()`.

    Attributes:
        inputs: Inputs of the root call.
        call: Index of the module's call within the root call.
        forward: Index of the root call within a step of a rollout or within a method of a twin.
        published: Rows of the forward pass, and their episodes.
        running: Method of the root call, or None.
        masks: Masks returned by stateful `where` callables in this root call, by `call_key` and `call`.
    """

    inputs: tuple[Any, ...] = ()
    call: int = 0
    forward: int = 0
    published: Published = field(default_factory=Published)
    running: str | None = None
    masks: dict[tuple[object, ...], Any] = field(default_factory=dict)


@dataclass(slots=True)
class RootCall:
    """One root call; module calls are counted within it."""

    station: Station | None  # station of the module that was called; None for a method
    method: str  # "__call__" for a module's call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_forward_of_method: bool = False  # a forward pass run by a method such as `generate`
    forward: int = 0  # index within a step of a rollout, or among the method's forward passes
    forwards: int = 0  # number of forward passes run by the method so far
    depth: int = 0  # recursion depth, if the module calls itself
    counts: dict[object, int] = field(default_factory=dict)  # number of calls so far, by station or tap
    under_way: dict[object, list[int]] = field(default_factory=dict)  # indices of the running calls
    given: list[Any] = field(default_factory=list)  # tensors and containers in the arguments
    masks: dict[tuple[object, ...], Any] = field(default_factory=dict)  # as in Moment
