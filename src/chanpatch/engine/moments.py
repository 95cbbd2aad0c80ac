"""The root call under way, and the forward in which a patch runs, as edits and `where` functions see it."""

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
    """The rows of a forward and, in a rollout, their episodes; one is made per step, so it is made of cheap parts.

    Attributes:
        rows: int64 `(row,)`, the number of each row; None for 0, 1, 2, ...
        step: Step of the rollout, or None.
        label: Name of the policy, or label of the patches.
        environments: int64 `(row,)`, the sub-environment of each row; None outside a rollout.
        sampling_seed: Random seed of the draws.
        seeds: Seed of each episode of the rollout, by its number; None outside a rollout.
        repetitions: Number of earlier episodes with the same seed, for each episode.
        infos: Function from sub-environments to their infos.
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

    def next_forward(self, session: object) -> int:
        """Return the number of earlier root calls of a session in this step, and count one more; 0 outside a step."""
        if self.step is None:
            return 0
        self.forwards[id(session)] = self.forwards.get(id(session), -1) + 1
        return self.forwards[id(session)]

    def cut(self, rows: slice, label: Any) -> Published:
        """Return the same for some rows, under another label."""
        numbers, environments = (None if each is None else each[rows] for each in (self.rows, self.environments))
        return replace(self, label=label, rows=numbers, environments=environments)


class _Current(threading.local):
    now = Published()


published = _Current()


@contextmanager
def forward_context(*, rows: Any = None, **others: Any) -> Iterator[None]:
    """Publish the rows of a forward, and facts about their episodes, to the patches that ask."""
    before = published.now
    published.now = Published(None if rows is None else np.asarray(rows), **others)
    try:
        yield
    finally:
        published.now = before


@dataclass(frozen=True)
class Moment:
    """The forward in which a patch runs; a Session returns it from `moment()`.

    Attributes:
        inputs: Inputs of the root call.
        call: Index of the module's call within the root call.
        forward: Index of the root call, within a step of a rollout or within a method of a twin.
        published: Rows of the forward, and their episodes.
        running: Method of the root call, or None.
        masks: Masks that callable objects returned in this root call, by object and `call`.
    """

    inputs: tuple[Any, ...] = ()
    call: int = 0
    forward: int = 0
    published: Published = field(default_factory=Published)
    running: str | None = None
    masks: dict[tuple[int, int], Any] = field(default_factory=dict)


@dataclass(slots=True)
class RootCall:
    """One root call, within which the calls of modules are counted."""

    station: Station | None  # of the module that was called; None for a method
    method: str  # "__call__" for a module's call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_forward_of_method: bool = False  # one of the forwards that a method such as `generate` runs
    forward: int = 0  # its index in the step of a rollout, or among those forwards
    forwards: int = 0  # of a method, so far
    depth: int = 0  # of calls of the module inside itself
    counts: dict[object, int] = field(default_factory=dict)  # calls so far, by station or tap
    under_way: dict[object, list[int]] = field(default_factory=dict)  # their indices, while they run
    given: list[Any] = field(default_factory=list)  # tensors and containers among the arguments
    masks: dict[tuple[int, int], Any] = field(default_factory=dict)  # as in Moment
