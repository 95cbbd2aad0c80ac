"""TransformerLens' hook points alone: modules that are put into the model behind what is read or written."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from peers.interface import ContextPeer, Work, Write


class Hooked(HookedRootModule):
    """The model with its hook points."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.setup()

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


class Peer(ContextPeer):
    distribution = "transformer-lens"
    remark = "its hook points were put into the model behind the modules that are patched"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        for point in work.points:
            parent, _, name = point.rpartition(".")
            module = self.model.get_submodule(point)
            setattr(self.model.get_submodule(parent), name, nn.Sequential(module, HookPoint()))
        self.model = Hooked(self.model)

    def patching(self, write: Write) -> AbstractContextManager[Any]:
        return self.model.hooks(fwd_hooks=[(self._hook(write.point), lambda activation, hook: write.put(activation))])

    @contextmanager
    def recording(self, point: str) -> Iterator[Callable[[], Tensor]]:
        recorded: list[Tensor] = []

        def keep(activation: Tensor, hook: HookPoint) -> None:
            recorded[:] = [activation.detach().clone()]

        with self.model.hooks(fwd_hooks=[(self._hook(point), keep)]):
            yield lambda: recorded[0]

    def _hook(self, point: str) -> str:
        return f"model.{point}.1"
