"""The current root call and forward pass, for edits and `where` functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .hooks import Station


@dataclass(slots=True, eq=False)
class Published:
    """Information for patches about the rows in a forward pass and, in a rollout, about the episodes.

    A new object is created in every step of a rollout, so creation must be cheap.
    """

    rows: NDArray[np.int64] | None = None  # number of each row (in a rollout, of its episode); None means 0, 1, 2, ...
    step: int | None = None  # step of the rollout; None outside a rollout
    label: Any = None  # name of the policy, or label of the patches
    environments: NDArray[np.int64] | None = None  # sub-environment of each row; None outside a rollout
    sampling_seed: int = 0
    seeds: NDArray[Any] | None = None  # seed of each episode; None outside a rollout
    repetitions: Sequence[int] = ()  # for each episode, the number of earlier episodes with the same seed
    infos: Callable[[NDArray[np.int64]], Any] | None = None  # maps sub-environment indices to infos
    repeated: bool = False  # whether a rollout repeats a step, as a check; repeated steps are not recorded
    forwards: dict[int, int] = field(default_factory=dict)  # session id -> index of its last root call in this step

    def cut(self, rows: slice, label: Any) -> Published:
        """Return a copy with the given label and with information about only the given rows."""
        numbers, environments = (None if each is None else each[rows] for each in (self.rows, self.environments))
        return replace(self, label=label, rows=numbers, environments=environments)


class _Current(threading.local):
    now = Published()


published = _Current()


@contextmanager
def publishing(now: Published) -> Iterator[None]:
    """Context in which patches have access to the information about rows and episodes in `now`."""
    before = published.now
    published.now = now
    try:
        yield
    finally:
        published.now = before


def forward_context(*, rows: Any = None, **others: Any) -> AbstractContextManager[None]:
    """Return a `publishing` context for a new Published. `rows` and `others` are the fields of the Published."""
    return publishing(Published(None if rows is None else np.asarray(rows), **others))


@dataclass(frozen=True)
class Moment:
    """Snapshot of the forward pass in which a patch runs."""

    inputs: tuple[Any, ...] = ()  # inputs to the root call
    call: int = 0  # index of the module's call within the root call
    forward: int = 0  # index of the root call within a rollout step, or within one call to a patched policy's method
    published: Published = field(default_factory=Published)
    running: str | None = None  # method of the root call; None outside a root call
    masks: dict[tuple[object, ...], Any] = field(default_factory=dict)  # masks from `where`, by `call_key` and call
    model: Any = None  # model or its hook points, for a donor's forward pass; None if the model itself was not called
    method: str = "__call__"  # method that the donor's forward pass calls


@dataclass(slots=True)
class RootCall:
    """A call to the model or to the traced method. In each root call, calls to modules are counted from 0."""

    station: Station | None  # station of the module that was called; None for a method
    method: str  # "__call__" for a module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_forward_of_method: bool = False  # a forward pass run by a method such as `generate`
    forward: int = 0  # index within a rollout step, or among the method's forward passes
    forwards: int = 0  # number of forward passes run by the method so far
    depth: int = 0  # recursion depth, if the module calls itself
    given: Sequence[Any] = ()  # tensors and containers in `args` and `kwargs`
    calls: dict[object, list[int]] = field(default_factory=dict)  # per station or tap: [count, *indices of open calls]
    masks: dict[tuple[object, ...], Any] = field(default_factory=dict)  # as in Moment
