"""captum: `LayerFeatureAblation` ablates the groups of a mask one after the other, and `LayerActivation` records."""

from typing import Any

import torch
from captum.attr import LayerActivation, LayerFeatureAblation
from torch import Tensor

from peers.interface import BasePeer, Unable, Write


class Peer(BasePeer):
    distribution = "captum"
    remark = "returns differences to the unpatched metric, which is added again"

    def patch(self, write: Write, *inputs: Tensor) -> Any:
        raise Unable("ablates every group of a mask, never one region alone; it returns attributions, no outputs")

    def record(self, point: str, *inputs: Tensor) -> Tensor:
        return LayerActivation(self.model, self.model.get_submodule(point)).attribute(inputs)

    def sweep(self) -> Tensor:
        work = self.work
        if len(work.points) > 1:
            raise Unable("one layer at a time")
        activation = self.record(work.points[0], *work.inputs)
        others = len(work.writes)  # a group of its own for what no write names
        mask = torch.full((1, *activation.shape[1:]), others)
        for group, write in enumerate(work.writes):
            mask[write.index(mask.dim())] = group
        ablation = LayerFeatureAblation(
            lambda *inputs: work.metric(self.model(*inputs)), self.model.get_submodule(work.points[0])
        )
        found = ablation.attribute(work.inputs, layer_baselines=work.writes[0].value, layer_mask=mask)
        baseline = work.metric(self.model(*work.inputs))
        effects = [found[write.index(found.dim())].reshape(len(found), -1)[:, 0] for write in work.writes]
        return baseline - torch.stack(effects)
