"""circrl: a manager of torch hooks by module name. Its own patches are of whole modules, so a hook function patches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from circrl.hooks import HookManager
from torch import Tensor

from peers.interface import ContextPeer, Write


class Peer(ContextPeer):
    distribution = "circrl"

    def patching(self, write: Write) -> AbstractContextManager[Any]:
        return HookManager(self.model, hook={write.point: lambda inputs, output: write.put(output)})

    @contextmanager
    def recording(self, point: str) -> Iterator[Callable[[], Tensor]]:
        with HookManager(self.model, cache=[point]) as cache:
            yield lambda: cache[point]
