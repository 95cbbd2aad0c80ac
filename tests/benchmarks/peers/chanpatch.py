"""chanpatch itself."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from chanpatch import HookPoints, Patch, Site, hook_points, patch_in, patched, recording, zero_ablate
from chanpatch.probes import channel_sums
from chanpatch.sweeps import sweep
from peers.interface import ContextPeer, Work, Write


class Peer(ContextPeer):
    distribution = "chanpatch"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        example = tuple(torch.cat([tensor[:1], tensor[:1]]) for tensor in work.inputs)  # two rows are enough
        self.points: HookPoints = hook_points(self.model, *example)

    def patching(self, write: Write) -> AbstractContextManager[Any]:
        return patched(self.points, self._patch(write))

    @contextmanager
    def recording(self, point: str) -> Iterator[Callable[[], Tensor]]:
        with recording(self.points, point) as cache:
            yield lambda: cache[point]

    def sweep(self) -> Tensor:
        patches = [self._patch(write) for write in self.work.writes]
        metrics = {"metric": self.work.metric}
        result = sweep(self.points, *self.work.inputs, patches=patches, metric=metrics, progress=False)
        return torch.as_tensor(result.values["metric"])

    def channel_sums(self, point: str, batches: Iterator[Tensor]) -> Tensor:
        return torch.as_tensor(channel_sums(self.points, batches, point))

    def _patch(self, write: Write) -> Patch:
        axes = self.points[write.point].axes
        site: Site = self.points.site(write.point, **{axes[axis]: index for axis, index in write.region.items()})
        if not isinstance(write.value, Tensor):
            return zero_ablate(site)
        region = write.value
        for axis, index in write.region.items():
            region = region.narrow(axis, index, 1)
        return patch_in(site, region)
