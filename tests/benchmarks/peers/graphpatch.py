"""graphpatch: a copy of the model as a graph of its modules, and patches by the path of a node."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

# The last release names a type that torch has renamed since.
if not hasattr(torch.serialization, "FILE_LIKE"):
    torch.serialization.FILE_LIKE = torch.serialization.FileLike

from graphpatch import CustomPatch, ExtractionOptions, PatchableGraph, ProbePatch

from peers.interface import ContextPeer, Work, Write


class Peer(ContextPeer):
    distribution = "graphpatch"
    remark = (
        "asks for torch below 2.6: here with one name put back into torch, and with `skip_compilation`, since what it "
        "compiles under this torch cannot be called"
    )

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.model = PatchableGraph(self.model, ExtractionOptions(skip_compilation=True), *work.inputs)

    def patching(self, write: Write) -> AbstractContextManager[Any]:
        return self.model.patch({_node(write.point): [CustomPatch(custom_op=write.put)]})

    @contextmanager
    def recording(self, point: str) -> Iterator[Callable[[], Tensor]]:
        probe = ProbePatch()
        with self.model.patch({_node(point): [probe]}):
            yield lambda: probe.activation


def _node(point: str) -> str:
    """Return the path of a module's output, in which the members of a list are numbered as `blocks_0`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"_\1", point) + ".output"
