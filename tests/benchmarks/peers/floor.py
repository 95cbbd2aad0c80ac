"""The least that a sweep has to do: what comes before the writes once, what comes after once per write."""

import torch
from torch import Tensor

from peers.interface import BasePeer, Work, Write
from peers.models import run


class Peer(BasePeer):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.steps = work.unroll(self.model)
        self.output = self.steps[-1][0]

    def patch(self, write: Write, *inputs: Tensor) -> object:
        before, after = self._split(write.point)
        activations = run({"in": inputs[0]}, before)
        activations[write.point] = write.put(activations[write.point])
        return run(activations, after)[self.output]

    def record(self, point: str, *inputs: Tensor) -> Tensor:
        return run({"in": inputs[0]}, self._split(point)[0])[point]

    def sweep(self) -> Tensor:
        last = max(self.work.points, key=[name for name, _ in self.steps].index)
        clean = run({"in": self.work.inputs[0]}, self._split(last)[0])
        values = []
        for write in self.work.writes:
            patched = {**clean, write.point: write.put(clean[write.point])}
            values.append(self.work.metric(run(patched, self._split(write.point)[1])[self.output]))
        return torch.stack(values)

    def _split(self, point: str) -> tuple[list, list]:
        position = [name for name, _ in self.steps].index(point) + 1
        return self.steps[:position], self.steps[position:]
