"""pyvene: an intervenable model per patch, its intervention a function."""

from types import SimpleNamespace
from typing import Any

import pyvene
from torch import Tensor

from peers.interface import BasePeer, Work, Write


class Peer(BasePeer):
    distribution = "pyvene"
    remark = "the model gets an attribute `config`, without which pyvene takes none"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.model.config = SimpleNamespace()

    def patch(self, write: Write, *inputs: Tensor) -> Any:
        def intervention(base: Tensor, source: None, subspaces: None = None) -> Tensor:
            return write.put(base)

        return self._run(write.point, intervention, inputs)[1]

    def record(self, point: str, *inputs: Tensor) -> Tensor:
        (_, collected), _ = self._run(point, pyvene.CollectIntervention(), inputs)
        return collected[0]

    def _run(self, point: str, intervention: Any, inputs: tuple[Tensor, ...]) -> Any:
        intervenable = pyvene.IntervenableModel(
            {"component": f"{point}.output", "intervention": intervention}, model=self.model
        )
        (name,) = self.argument_names(len(inputs))
        return intervenable({name: inputs[0]}, output_original_output=False)

    def argument_names(self, count: int) -> tuple[str, ...]:
        """Return the names of the forward's first arguments, by which pyvene wants them."""
        code = type(self.model).forward.__code__
        return code.co_varnames[1 : 1 + count]
