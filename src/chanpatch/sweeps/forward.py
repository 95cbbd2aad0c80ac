"""The forward that a sweep runs again and again, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..engine.inputs import copied_inputs
from ..engine.paths import Item, fresh, get, leaves, replace, with_rows
from ..engine.sessions import forward_context, published
from ..engine.state import undisturbed
from ..registry.points import HookPoints, model_of

_FEWEST_TO_CUT = 8  # inputs; of fewer, one is no saving


class Forward:
    """One forward after another on the same inputs, of which nothing is left.

    Args:
        points_or_model: What is run.
        inputs: What the model takes; it gets copies.
        keywords: Keyword inputs.
        check_nan: Whether to look for NaN that a patch brings in.
        row: The number of the one row that the inputs have; None for those that the patches are asked about anyway.

    Attributes:
        undisturbed: The context in which it runs; not to be entered inside itself.
        rebound: The attributes of modules that the first forward set.
    """

    def __init__(
        self,
        points_or_model: HookPoints | nn.Module,
        inputs: tuple[Any, ...],
        keywords: Mapping[str, Any],
        *,
        check_nan: bool = True,
        row: int | None = None,
    ) -> None:
        self.points_or_model, self.model = points_or_model, model_of(points_or_model)
        self.method = points_or_model.method if isinstance(points_or_model, HookPoints) else "__call__"
        self.inputs, self.check_nan, self.row = (inputs, dict(keywords)), check_nan, row
        self.undisturbed = undisturbed(self.model)
        self.rebound: list[tuple[dict[str, Any], str]] | None = None
        each = (*inputs, *keywords.values())
        self._reusable = all(isinstance(one, (Tensor, str, int, float, type(None))) for one in each)
        self._copies: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._versions: list[int] = []

    def __call__(self) -> Any:
        """Return the model's output, with everything as it was before."""
        rows = published.rows if self.row is None else [self.row]
        with self.undisturbed, forward_context(step=published.step, rows=rows):
            output = self.undisturbed.kept(self.disturbing())
            if self.rebound is None:
                self.rebound = self.undisturbed.snapshot.rebound()
            return output

    def disturbing(self) -> Any:
        """Return the model's output; the caller puts back what the forward changes."""
        args, kwargs = self.copies()
        with usual_attention():
            output = getattr(self.model, self.method)(*args, **kwargs)
        return fresh(output)  # a model may return the very dict again that it returned before

    def of_row(self, end: Literal[0, -1]) -> Forward | None:
        """Return the same forward of the first or the last row alone.

        None where that is no saving, or where it cannot be told what the rows are.
        """
        tensors = [*with_rows(self.inputs)]
        count = len(tensors[0][1]) if tensors else 0
        if count < _FEWEST_TO_CUT or published.rows is not None:
            return None
        row = range(count)[end]
        cut: Any = self.inputs
        for path, tensor in tensors:
            if len(tensor) == count:
                cut = replace(cut, path, tensor[row : row + 1])
        inputs, keywords = cut
        return Forward(self.points_or_model, inputs, keywords, check_nan=self.check_nan, row=row)

    def count(self) -> int | None:
        """Return how many inputs there are, where the trace tells which axis of them, and of outputs, is the batch."""
        if not isinstance(self.points_or_model, HookPoints):
            return None
        outputs = [point for point in self.points_or_model.values() if not point.module and point.side == "out"]
        if outputs and all(point.batch_axis is None for point in outputs):
            return None  # of many nodes, say, the output tells one number per graph
        args, keywords = self.inputs
        for point in self.points_or_model.values():
            if not point.module and point.side == "in" and point.batch_axis is not None:
                with suppress(LookupError, AttributeError, TypeError):  # given in another way than in the trace
                    positional = isinstance(point.path[0], Item) and isinstance(point.path[0].key, int)
                    return int(get(args if positional else keywords, point.path).shape[point.batch_axis])
        return None

    def copies(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the inputs that no forward has written into, the same ones for as long as none does."""
        copies = self._copies
        if copies is None or self._versions != [tensor._version for _, tensor in leaves(copies)]:
            copies = copied_inputs(*self.inputs)
            self._copies = copies if self._reusable else None
            self._versions = [tensor._version for _, tensor in leaves(copies)]
        return copies


@contextmanager
def usual_attention() -> Iterator[None]:
    """Do without the fused attention of torch: vmap has no rule for it, and which modules it calls depends on hooks."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
