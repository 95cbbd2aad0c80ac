"""nnsight: a trace per patch, as its documentation has it; a batch of invokes needs a model that can pad its inputs."""

from typing import Any

import torch
from nnsight import NNsight
from torch import Tensor

from peers.interface import BasePeer, Work, Write


class Peer(BasePeer):
    distribution = "nnsight"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.wrapped = NNsight(self.model)

    def patch(self, write: Write, *inputs: Tensor) -> Any:
        with self.wrapped.trace(*inputs):
            module = self.wrapped.get(write.point)
            module.output = write.put(module.output)
            output = self.wrapped.output.save()
        return output

    def record(self, point: str, *inputs: Tensor) -> Tensor:
        with self.wrapped.trace(*inputs):
            activation = self.wrapped.get(point).output.save()
        return activation

    def sweep(self) -> Tensor:
        values = []
        for write in self.work.writes:
            with self.wrapped.trace(*self.work.inputs):
                module = self.wrapped.get(write.point)
                module.output = write.put(module.output)
                value = self.work.metric(self.wrapped.output).save()
            values.append(value)
        return torch.stack(values)
