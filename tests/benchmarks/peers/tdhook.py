"""tdhook: a session of hooks, its targets one axis of one module's output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tdhook.session import HookSession
from tdhook.targets import Target
from torch import Tensor

from peers.interface import ContextPeer, Unable, Work, Write
from peers.models import run


class Peer(ContextPeer):
    distribution = "tdhook"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        activations = run({"in": work.inputs[0]}, work.unroll(self.model))
        # A target of a whole activation has to list the indices of one of its axes.
        self.channels = {
            point: tuple(range(activations[point].shape[1])) for point in work.points if point in activations
        }

    @contextmanager
    def patching(self, write: Write) -> Iterator[None]:
        if len(write.region) > 1:
            raise Unable("a target selects along one axis, not along several")
        ((axis, index),) = write.region.items()
        value = write.value.narrow(axis, index, 1) if isinstance(write.value, Tensor) else write.value
        with HookSession(self.model) as session:
            session.replace(Target(write.point, "activation", axis, (index,)), value)
            yield

    @contextmanager
    def recording(self, point: str) -> Iterator[Callable[[], Tensor]]:
        with HookSession(self.model) as session:
            captured = session.capture(Target(point, "activation", 1, self.channels[point]))
            yield lambda: captured.values[-1]

    def sweep(self) -> Tensor:
        if all(len(write.region) == 1 for write in self.work.writes):
            return super().sweep()
        # Along several axes: all of the first is replaced, by what was recorded there with the region written.
        (point,) = self.work.points
        recorded = self.record(point, *self.work.inputs)
        values = []
        for write in self.work.writes:
            axis, index = next(iter(write.region.items()))
            output = self.patch(Write(point, {axis: index}, write.put(recorded)), *self.work.inputs)
            values.append(self.work.metric(output))
        return torch.stack(values)
