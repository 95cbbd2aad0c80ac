"""What every peer can be asked to do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Unable(Exception):
    """The peer has no way to do this work; the message says why."""


@dataclass(frozen=True)
class Write:
    """A region of a hook point, and what is put there.

    Attributes:
        point: Name of a module; its output is meant.
        region: Index by axis, counted from the batch, which is 0.
        value: A number, or an activation of the whole hook point from which the region is taken.
    """

    point: str
    region: Mapping[int, int]
    value: float | Tensor = 0.0

    def index(self, dims: int) -> tuple[slice | int, ...]:
        """Return what indexes the region in an activation with so many axes."""
        return tuple(self.region.get(axis, slice(None)) for axis in range(dims))

    def put(self, activation: Tensor) -> Tensor:
        """Return a copy of the activation with the region written."""
        written = activation.clone()
        index = self.index(activation.dim())
        written[index] = self.value[index] if isinstance(self.value, Tensor) else self.value
        return written


@dataclass
class Work:
    """A model and what is asked about it.

    Attributes:
        model: In eval mode.
        inputs: What it takes.
        metric: A function of its output, `(batch,)`.
        writes: What is patched, one at a time.
        unroll: Returns the forward as steps in execution order, written by hand: `(name, function of the activations
            by name)`, the last of which is the output. The inputs are activations named `in`.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    metric: Callable[[Any], Tensor]
    writes: Sequence[Write]
    unroll: Callable[[nn.Module], Sequence[tuple[str, Callable[[dict[str, Any]], Any]]]] = field(repr=False)

    @property
    def points(self) -> tuple[str, ...]:
        """Return the names of the hook points that are written, in the order given."""
        return tuple(dict.fromkeys(write.point for write in self.writes))


class BasePeer:
    """A peer that has `patch` and `record` has the rest too, as loops over them.

    Attributes:
        distribution: Name in the package registry; None for what is written here.
        remark: What had to be done so that it runs here, for the table; empty if nothing.
    """

    distribution: str | None = None
    remark = ""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.model = copy.deepcopy(work.model)

    def patch(self, write: Write, *inputs: Tensor) -> Any:
        """Return the output of the model with one write."""
        raise NotImplementedError

    def record(self, point: str, *inputs: Tensor) -> Tensor:
        """Return the activation at a hook point."""
        raise NotImplementedError

    def sweep(self) -> Tensor:
        """Return the metric under each write of the work, `(write, batch)`."""
        work = self.work
        return torch.stack([work.metric(self.patch(write, *work.inputs)) for write in work.writes])

    def channel_sums(self, point: str, batches: Iterator[Tensor]) -> Tensor:
        """Return the sum of each channel over its rows and columns, `(observation, channel)`."""
        return torch.cat([self.record(point, batch).sum((2, 3)) for batch in batches])


class ContextPeer(BasePeer):
    """A peer whose patches and records are contexts, in which the model itself is called."""

    def patching(self, write: Write) -> AbstractContextManager[Any]:
        """Return a context in which calls of the model run with one write."""
        raise NotImplementedError

    def recording(self, point: str) -> AbstractContextManager[Callable[[], Tensor]]:
        """Return a context that yields a function: what was recorded."""
        raise NotImplementedError

    def patch(self, write: Write, *inputs: Tensor) -> Any:
        with self.patching(write):
            return self.model(*inputs)

    def record(self, point: str, *inputs: Tensor) -> Tensor:
        with self.recording(point) as recorded:
            self.model(*inputs)
        return recorded()
