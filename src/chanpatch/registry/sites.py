"""A region of a hook point as plain data, and how it is read and written; nothing is written in place."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..engine.hooks import Place
from ..engine.paths import inside_vmap
from ..errors import SiteError, UnsupportedModelError, did_you_mean

Positions = Mapping[int, "slice | list[int] | Tensor"]
Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = tuple[str, ...]
Index: TypeAlias = "int | slice | Sequence[int] | Sequence[bool] | range | Tensor | np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Span:
    """A slice that can be hashed and compared."""

    start: int | None
    stop: int | None
    step: int | None

    def positions(self, length: int) -> range:
        """Return the positions it selects on an axis."""
        return range(*slice(self.start, self.stop, self.step).indices(length))


@dataclass(frozen=True)
class Flags:
    """A boolean mask over one axis."""

    values: tuple[bool, ...]


Selection: TypeAlias = "tuple[int, ...] | Span | Flags"


@dataclass(frozen=True, init=False, repr=False)
class Site:
    """A hook point and a region of it: a place that can be read or written.

    Indices are Python's, negative ones included; an axis that is not named means all of it. A region keeps all
    axes of its hook point, and index lists on several axes mean their product.

    Args:
        name: The hook point's name.
        indices: Per axis an int, a slice, a sequence of ints, or a boolean mask over the axis.

    Raises:
        SiteError: If an index is none of these, or selects nothing.

    Example:
        >>> Site("embedder.relu3", channel=[55, 121], row=slice(2, 5))
        Site('embedder.relu3', channel=[55, 121], row=2:5)
    """

    name: str
    indices: tuple[tuple[str, Selection], ...]
    point: HookPoint | None = field(default=None, compare=False)

    def __init__(self, name: str, /, **indices: Any) -> None:
        if not isinstance(name, str):
            raise SiteError(f"Site takes a hook point's name, not {type(name).__name__}.")
        selections = {axis: _selection(name, axis, index) for axis, index in indices.items()}
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "indices", tuple(sorted(selections.items())))
        object.__setattr__(self, "point", None)

    def split(self, axis: str) -> tuple[Site, ...]:
        """Return one site per index of an axis, in order.

        Raises:
            SiteError: If the axis does not exist, or its length is not known: then take the site from
                `HookPoints.site`.
        """
        chosen = dict(self.indices).get(axis)
        if isinstance(chosen, Flags):
            chosen = tuple(position for position, flag in enumerate(chosen.values) if flag)
        if chosen is None and self.point is not None and axis in self.point.axes:
            length = self.point.length(axis)
            chosen = None if length is None else tuple(range(length))
        if not isinstance(chosen, tuple):
            raise SiteError(f"{self!r} cannot be split along '{axis}': {self._unsplittable(axis)}")
        others = {name: index for name, index in self.indices if name != axis}
        parts = (Site(self.name, **others, **{axis: index}) for index in chosen)
        return tuple(part.at(self.point) for part in parts)

    def _unsplittable(self, axis: str) -> str:
        if self.point is None:
            return (
                "the length of that axis is not known. Name its indices, or take the site from points.site(...) of a "
                "traced model."
            )
        if axis not in self.point.axes:
            hint = did_you_mean(axis, self.point.axes)
            return f"there is no such axis.{hint} Hook point '{self.name}' has axes ({', '.join(self.point.axes)})."
        return "the batch is as long as each forward's. Name its indices, or choose rows with where=."

    def at(self, point: HookPoint | None) -> Site:
        """Return the same site with the trace of a hook point that it was checked against."""
        traced = object.__new__(Site)
        vars(traced).update(vars(self), point=point)
        return traced

    def positions(self, axes: Axes, lengths: Sequence[int]) -> dict[int, slice | list[int]]:
        """Return what to select, by axis number, on a tensor with these axes.

        Raises:
            SiteError: Naming every axis and index that does not exist there.
        """
        found: dict[int, slice | list[int]] = {}
        faults = []
        for axis, selection in self.indices:
            if axis not in axes:
                hint = did_you_mean(axis, axes).strip().replace("Did", "did")
                faults.append(f"there is no axis '{axis}'" + (f" ({hint})" if hint else ""))
                continue
            number = axes.index(axis)
            try:
                found[number] = _contiguous(_positions(selection, lengths[number], axis))
            except ValueError as fault:
                faults.append(str(fault))
        if faults:
            numbered = ", ".join(f"{n} {axis}s (0 to {n - 1})" for axis, n in zip(axes, lengths, strict=True)
                                 if axis in dict(self.indices))  # fmt: skip
            raise SiteError(
                f"{self!r}: {'; '.join(faults)}; hook point '{self.name}' has axes ({', '.join(axes)})"
                + (f" and {numbered}." if numbered else ".")
            )
        return found

    def __repr__(self) -> str:
        shown = "".join(f", {axis}={_shown(selection)}" for axis, selection in self.indices)
        return f"Site({self.name!r}{shown})"


def _selection(name: str, axis: str, index: Any) -> Selection:
    if isinstance(index, (Span, Flags)):
        return index
    if isinstance(index, slice):
        try:
            parts = [None if part is None else operator.index(part) for part in (index.start, index.stop, index.step)]
        except TypeError as fault:
            raise SiteError(f"Site({name!r}, {axis}={index!r}): the ends of a slice are whole numbers.") from fault
        return Span(*parts)
    if isinstance(index, (Tensor, np.ndarray)):
        index = index.tolist()
    values = [index] if isinstance(index, (int, np.integer)) and not isinstance(index, bool) else index
    if isinstance(values, Sequence) and not isinstance(values, str):
        if values and all(isinstance(value, (bool, np.bool_)) for value in values):
            if any(values):
                return Flags(tuple(map(bool, values)))
            raise SiteError(f"Site({name!r}, {axis}=...): the mask over {axis} selects nothing.")
        if values and all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in values):
            return tuple(map(int, values))
        if not values:
            raise SiteError(f"Site({name!r}, {axis}=[]) selects nothing. Leave {axis} out to mean all of it.")
    raise SiteError(
        f"Site({name!r}, {axis}={index!r}): an index is an int, a slice, a sequence of ints or a boolean mask."
    )


def _positions(selection: Selection, length: int, axis: str) -> list[int]:
    if isinstance(selection, Flags):
        if len(selection.values) != length:
            raise ValueError(f"the mask over {axis} has {len(selection.values)} flags")
        return [position for position, chosen in enumerate(selection.values) if chosen]
    if isinstance(selection, Span):
        chosen = list(selection.positions(length))
        if not chosen:
            raise ValueError(f"{axis}={_shown(selection)} selects nothing")
        return chosen
    outside = [position for position in selection if not -length <= position < length]
    if outside:
        raise ValueError(f"{axis} {', '.join(map(str, outside))} is out of range")
    chosen = [position % length for position in selection]
    if len(set(chosen)) < len(chosen):
        twice = next(position for position in chosen if chosen.count(position) > 1)
        raise ValueError(f"{axis} {twice} is named twice")
    return chosen


def _contiguous(positions: list[int]) -> slice | list[int]:
    first, last = positions[0], positions[-1]
    return slice(first, last + 1) if positions == list(range(first, last + 1)) else positions


def _shown(selection: Selection) -> str:
    if isinstance(selection, Flags):
        return repr(list(selection.values))
    if isinstance(selection, Span):
        parts = ["" if part is None else str(part) for part in (selection.start, selection.stop)]
        return ":".join(parts if selection.step is None else [*parts, str(selection.step)])
    if len(selection) == 1:
        return str(selection[0])
    if len(selection) > 2 and selection == tuple(range(selection[0], selection[-1] + 1)):
        return f"{selection[0]}:{selection[-1] + 1}"
    return repr(list(selection))


@dataclass(frozen=True)
class HookPoint(Place):
    """One tensor of one traced forward.

    Attributes:
        name: `module`, `module.out<path>` if the module returns more than one tensor, `module.in<path>` for an input;
            `#k` after the module if it is called more than once. The model itself has no name, so its own output is
            `.out`. A tap has the name it was given.
        axes: Axis names, such as `(batch, channel, row, col)`.
        shape: Lengths of all axes but the batch axis.
        batch_axis: Number of the batch axis: the one that grew when the model was run with one row more. None if that
            proved nothing.
        dtype, device: Dtype and device of the tensor.
        module_type: Class name of the module; `tap` for a tap.
        parameters: Number of parameters of the module, submodules included.
        aliases: Other names of the same hook point, if modules are shared.
        read_only: Whether the tensor is inside a distribution, so that it can be recorded but not patched.
    """

    axes: Axes
    shape: Shape
    batch_axis: int | None
    dtype: torch.dtype
    device: torch.device
    module_type: str
    parameters: int
    aliases: tuple[str, ...] = ()
    read_only: bool = field(default=False, repr=False)

    def length(self, axis: str) -> int | None:
        """Return the length of an axis; None for the batch axis."""
        position = self.axes.index(axis)
        if position == self.batch_axis:
            return None
        return self.shape[position - (self.batch_axis is not None and position > self.batch_axis)]


def no_batch(site: Site) -> str:
    """Say why a site has no rows, and what to do."""
    if site.point is None:
        return "Take the site from points.site(...) of hook_points(model, *inputs), which proves the batch axis."
    return (
        f"The trace could not prove which axis of '{site.name}' is the batch: no single axis grew when the model "
        "was run with one row more. Name it where the inputs have it: hook_points(..., axes={'.in[0]': (...)})."
    )


def read(tensor: Tensor, positions: Positions) -> Tensor:
    """Return the region at these positions, by axis number; the tensor itself where there are none.

    Raises:
        UnsupportedModelError: If the tensor is sparse, and the region not all of it.
    """
    if positions and tensor.layout != torch.strided:
        raise UnsupportedModelError(
            f"A {str(tensor.layout).removeprefix('torch.')} tensor has no regions. Use the whole hook point, or make "
            "the tensor dense in the model: tensor.to_dense()."
        )
    for axis, chosen in positions.items():
        if isinstance(chosen, slice):
            tensor = tensor.narrow(axis, chosen.start, chosen.stop - chosen.start)
        else:
            tensor = tensor.index_select(axis, torch.as_tensor(chosen, device=tensor.device))
    return tensor


def written(tensor: Tensor, positions: Positions, region: Tensor) -> Tensor:
    """Return a copy of the tensor with the region replaced; gradients flow to both.

    The copy is nobody else's: what is written into it downstream reaches neither the operand of an edit nor the
    activation that was read.
    """
    if not positions:
        return region.clone()
    (axis, chosen), *others = positions.items()
    if others:
        region = written(read(tensor, {axis: chosen}), dict(others), region)
    if isinstance(chosen, slice):
        return torch.slice_scatter(tensor, region, axis, chosen.start, chosen.stop)
    index = torch.as_tensor(chosen, device=tensor.device)
    # A copy of one tensor has no room for many regions, and vmap has no rule for writing into one of many.
    if inside_vmap(region) or inside_vmap(tensor):
        return tensor.index_copy(axis, index, region)
    return tensor.clone().index_copy_(axis, index, region)  # a clone keeps the strides, and so the last bits downstream
