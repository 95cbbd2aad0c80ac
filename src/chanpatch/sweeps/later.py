"""What patches do after the hook point at which they begin, for many of them in one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.regions import read, written
from ..patching.edits import Set
from ..patching.patch import Patch
from ..registry.sites import HookPoint, Site

Operands = tuple[Tensor, Tensor]  # where, and what is put there: each as an activation


def kind(patch: Patch) -> Any:
    """Return what patches have in common that can go into one forward at a later hook point.

    They do the same, or what they put there is known before and can be stacked: it need not be at one region.
    """
    data = type(patch.edit) is Set and not callable(patch.where) and isinstance(patch.site.point, HookPoint)
    return patch.site.name if data else identity(patch)


def identity(patch: Patch) -> Any:
    """Return what two patches have in common if they are sure to do the same."""
    edit: Any = patch.edit
    known = is_dataclass(edit) and type(edit).__module__ == Set.__module__
    content = [_memory(getattr(edit, item.name)) for item in fields(edit)] if known else [id(edit)]
    return patch.site, type(edit), *content, _memory(patch.where)


def _memory(operand: Any) -> Any:
    if isinstance(operand, Tensor):
        return operand.data_ptr(), operand.shape, operand.stride(), operand.dtype
    return id(operand) if callable(operand) else operand


class Later:
    """The later patches of entries that have one kind each.

    Attributes:
        patches: What stands in the forward: what all have in common, or a patch that puts what is stacked.
    """

    def __init__(self, entries: Sequence[Sequence[Patch]], blank: Mapping[str, Tensor]) -> None:
        """Tell those that all have in common from those that have to be stacked.

        Args:
            entries: The later patches of each.
            blank: By hook point, zeros like the activation there.
        """
        self._blank = blank
        self._put: dict[int, _Put] = {}  # by the place among an entry's later patches
        self.patches = list(entries[0])
        for place, patch in enumerate(self.patches):
            if len({identity(each[place]) for each in entries}) > 1:
                self._put[place] = _Put()
                self.patches[place] = Patch(Site(patch.site.name).at(patch.site.point), self._put[place])

    @property
    def bytes_each(self) -> int:
        """Return how much is stacked for one entry."""
        blanks = [self._blank[self.patches[place].site.name] for place in self._put]
        return sum(blank.numel() * (blank.element_size() + 1) for blank in blanks)

    def operands(self, entries: Sequence[Sequence[Patch]]) -> list[Operands]:
        """Return what is stacked, for each place: a row for each entry."""
        stacked = []
        for place in self._put:
            where, value = zip(*(self._operands(each[place]) for each in entries), strict=True)
            stacked.append((torch.stack(where), torch.stack(value)))
        return stacked

    def use(self, operands: Sequence[Operands]) -> None:
        """Let the patches put this, in the forward under way."""
        for put, each in zip(self._put.values(), operands, strict=True):
            put.operands = each

    def _operands(self, patch: Patch) -> Operands:
        assert patch.site.point is not None  # as `kind` saw to
        blank = self._blank[patch.site.name]
        positions = patch.site.positions(patch.site.point.axes, blank.shape)
        region = read(blank, positions)
        everywhere = torch.ones((), dtype=torch.bool)
        where = (patch.where if isinstance(patch.where, Tensor) else everywhere).to(blank.device).expand_as(region)
        return written(blank.bool(), positions, where), written(blank, positions, patch.edit(region))


class _Put:
    """Puts what is there for the entry at hand; equal to no other."""

    def __init__(self) -> None:
        self.operands = torch.empty(0), torch.empty(0)

    def __call__(self, activation: Tensor) -> Tensor:
        where, value = self.operands
        return torch.where(where, value, activation)
