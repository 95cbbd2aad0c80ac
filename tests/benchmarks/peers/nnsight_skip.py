"""nnsight for experts: every module before the patch is skipped, by a list of names that is written for the model."""

import torch
from torch import Tensor

from peers import nnsight
from peers.interface import Unable
from peers.models import LAST_CONVOLUTIONAL

SKIPPED = ("embedder.block1", "embedder.block2", "embedder.block3")


class Peer(nnsight.Peer):
    remark = "with a list of the modules to skip, written by hand for this hook point of this model"

    def sweep(self) -> Tensor:
        if self.work.points != (LAST_CONVOLUTIONAL,):
            raise Unable(f"its list of modules to skip is written for '{LAST_CONVOLUTIONAL}' of the maze policy")
        clean = self.record(LAST_CONVOLUTIONAL, *self.work.inputs)
        values = []
        for write in self.work.writes:
            patched = write.put(clean)
            with self.wrapped.trace(*self.work.inputs):
                for name in SKIPPED:
                    self.wrapped.get(name).skip(clean)
                self.wrapped.get(write.point).skip(patched)
                value = self.work.metric(self.wrapped.output).save()
            values.append(value)
        return torch.stack(values)
