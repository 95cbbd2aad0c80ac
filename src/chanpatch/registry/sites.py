"""Sites: regions of activations, and functions that read and replace regions without in-place writes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..engine.paths import Place, inside_vmap
from ..errors import SiteError, UnsupportedModelError, did_you_mean

Positions = Mapping[int, "slice | list[int] | Tensor"]
Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = tuple[str, ...]
Index: TypeAlias = "int | slice | Sequence[int] | Sequence[bool] | range | Tensor | np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Span:
    """A hashable slice."""

    start: int | None
    stop: int | None
    step: int | None


@dataclass(frozen=True)
class Flags:
    """A boolean mask over one axis."""

    values: tuple[bool, ...]


Selection: TypeAlias = "tuple[int, ...] | Span | Flags"


@dataclass(frozen=True, init=False, repr=False)
class Site:
    """A region of the activation at a hook point, which can be read or written.

    Indices work as in Python and may be negative. An axis without an index is selected in full. A region keeps all axes
    of the hook point. Several index lists select their Cartesian product.

    Args:
        name: Name of the hook point.
        indices: For each restricted axis, an int, a slice, a sequence of ints, or a boolean mask over the axis.

    Raises:
        SiteError: If an index has another type or selects nothing.

    Example:
        >>> Site("embedder.relu3", channel=[55, 121], row=slice(2, 5))
        Site('embedder.relu3', channel=[55, 121], row=2:5)
    """

    name: str
    indices: tuple[tuple[str, Selection], ...]
    point: HookPoint | None = field(default=None, compare=False)
    no_p: str = field(default="", compare=False)  # for matched controls: why ranks do not have a p-value

    def __init__(self, name: str, /, *unnamed: Any, **indices: Any) -> None:
        if not isinstance(name, str):
            raise SiteError(f"Site expects the name of a hook point, not {type(name).__name__}.")
        if unnamed:
            raise SiteError(f"Site({name!r}, {unnamed[0]!r}): indices must be passed by axis name, as in channel=2.")
        selections = {axis: _selection(name, axis, index) for axis, index in indices.items()}
        vars(self).update(name=name, indices=tuple(sorted(selections.items())), point=None)  # a frozen dataclass

    def split(self, axis: str) -> tuple[Site, ...]:
        """Return one site per index along an axis, in order.

        Raises:
            SiteError: If the axis does not exist or its length is unknown.
        """
        chosen, point = dict(self.indices).get(axis), self.point
        if isinstance(chosen, Flags):
            chosen = tuple(_positions(chosen, len(chosen.values), axis))
        elif chosen is None and point is not None and axis in point.axes:
            chosen = tuple(range(point.length(axis) or 0)) or None
        if isinstance(chosen, tuple):
            return tuple(Site(self.name, **{**dict(self.indices), axis: index}).at(point) for index in chosen)
        if point is None:
            why = "the length of that axis is unknown. Pass indices, or create the site with points.site(...)."
        elif axis in point.axes:
            why = "the batch size varies between forward passes. Pass indices, or select rows with where=."
        else:
            why = f"there is no such axis.{did_you_mean(axis, point.axes)} "
            why += f"Hook point '{self.name}' has axes ({', '.join(point.axes)})."
        raise SiteError(f"{self!r} cannot be split along '{axis}': {why}")

    def at(self, point: HookPoint | None) -> Site:
        """Return the same site bound to a traced hook point, without checking the axes and indices."""
        traced = object.__new__(Site)
        vars(traced).update(vars(self), point=point)
        return traced

    def positions(self, axes: Axes, lengths: Sequence[int]) -> dict[int, slice | list[int]]:
        """Return the selected positions in a tensor, by axis number; raise SiteError for invalid axes or indices."""
        found: dict[int, slice | list[int]] = {}
        faults = []
        for axis, selection in self.indices:
            if axis not in axes:
                hint = did_you_mean(axis, axes).strip().replace("Did", "did")
                faults.append(f"there is no axis '{axis}'" + (f" ({hint})" if hint else ""))
                continue
            number = axes.index(axis)
            try:
                chosen = _positions(selection, lengths[number], axis)
                first, last = chosen[0], chosen[-1]
                found[number] = slice(first, last + 1) if chosen == [*range(first, last + 1)] else chosen
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
        parts = index.start, index.stop, index.step
        try:
            return Span(*(None if part is None else operator.index(part) for part in parts))
        except TypeError as fault:
            raise SiteError(f"Site({name!r}, {axis}={index!r}): slice bounds must be integers.") from fault
    if isinstance(index, (Tensor, np.ndarray)):
        index = index.tolist()
    values = [index] if _is_whole(index) else index
    if isinstance(values, Sequence) and not isinstance(values, str):
        if not values:
            raise SiteError(f"Site({name!r}, {axis}=[]) selects nothing. Omit {axis} to select the whole axis.")
        if all(map(_is_whole, values)):
            return tuple(map(int, values))
        if all(isinstance(value, (bool, np.bool_)) for value in values):
            if any(values):
                return Flags(tuple(map(bool, values)))
            raise SiteError(f"Site({name!r}, {axis}=...): the mask over {axis} selects nothing.")
    raise SiteError(
        f"Site({name!r}, {axis}={index!r}): an index must be an int, a slice, a sequence of ints or a boolean mask."
    )


def _is_whole(index: Any) -> bool:
    return isinstance(index, (int, np.integer)) and not isinstance(index, bool)


def _positions(selection: Selection, length: int, axis: str) -> list[int]:
    if isinstance(selection, Flags):
        if len(selection.values) != length:
            raise ValueError(f"the mask over {axis} has length {len(selection.values)}")
        return [position for position, chosen in enumerate(selection.values) if chosen]
    if isinstance(selection, Span):
        chosen = [*range(length)[selection.start : selection.stop : selection.step]]
        if not chosen:
            raise ValueError(f"{axis}={_shown(selection)} selects nothing")
        return chosen
    outside = [str(position) for position in selection if not -length <= position < length]
    if outside:
        more = f" and {len(outside) - 8} more" * (len(outside) > 8)
        raise ValueError(f"{axis} {', '.join(outside[:8])}{more} {'is' if len(outside) == 1 else 'are'} out of range")
    chosen = [position % length for position in selection]
    if len(set(chosen)) < len(chosen):
        twice = next(position for position, times in Counter(chosen).items() if times > 1)
        raise ValueError(f"{axis} {twice} is listed twice")
    return chosen


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
    """One tensor in a traced forward pass.

    Attributes:
        name: `module`, `module.out<path>` if the module returns more than one tensor, or `module.in<path>` for an
            input. `module#k` is call k of a module that is called more than once. `.out` is the model's output. A tap
            has the name passed to `tap`.
        axes: Axis names, such as `(batch, channel, row, col)`.
        shape: Lengths of all axes except the batch axis.
        batch_axis: Index of the batch axis, found by running the model with one more row; None if not found.
        dtype, device: Dtype and device of the tensor.
        module_type: Class name of the module, or `tap`.
        parameters: Number of parameters in the module, including its submodules.
        aliases: Other names for the same hook point, if the module is shared.
        read_only: Whether the tensor is inside a distribution, and so can be recorded but not patched.
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
        """Return the length of an axis, or None for the batch axis, whose length varies."""
        position = self.axes.index(axis)
        if position == self.batch_axis:
            return None
        return self.shape[position - (self.batch_axis is not None and position > self.batch_axis)]


def normalized(site: Site, point: HookPoint) -> Site:
    """Check a site against the trace, make all indices explicit, and bind the site to the hook point."""
    batch = None if point.batch_axis is None else point.axes[point.batch_axis]  # varies in length
    lengths = [point.length(axis) or 0 for axis in point.axes]
    written = {axis: index for axis, index in site.indices if axis == batch}
    checked = Site(site.name, **{axis: index for axis, index in site.indices if axis != batch})
    for number, positions in checked.positions(point.axes, lengths).items():
        every = tuple(range(lengths[number]))
        chosen = every[positions] if isinstance(positions, slice) else tuple(positions)
        if chosen != every:
            written[point.axes[number]] = chosen
    same = Site(point.name, **written).at(point)
    vars(same).update(no_p=site.no_p)
    return same


def no_batch(site: Site) -> str:
    """Explain why the batch axis is unknown, for an error message."""
    if site.point is None:
        return "Create the site with hook_points(model, *inputs).site(...), which identifies the batch axis."
    return (
        f"The trace could not identify the batch axis at '{site.name}': no single axis grew when the model ran with "
        "one more row. Name the axes of the model's input: hook_points(..., axes={'.in[0]': (...)})."
    )


def unusual_layout(tensor: Tensor) -> str:
    """Return the layout of a masked or sparse tensor, such as "sparse_coo"; an empty string for a dense tensor."""
    if isinstance(tensor, torch.masked.MaskedTensor):
        return "masked"
    return "" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def read(tensor: Tensor, positions: Positions) -> Tensor:
    """Return the region of a tensor at the given positions.

    Raises:
        UnsupportedModelError: If the region is only part of a sparse or masked tensor.
    """
    if positions and (layout := unusual_layout(tensor)):
        raise UnsupportedModelError(
            f"Cannot select part of a {layout} tensor. Use the whole hook point, or make the tensor dense in the "
            f"model: tensor.{'to_tensor(0.0)' if layout == 'masked' else 'to_dense()'}."
        )
    for axis, chosen in positions.items():
        if isinstance(chosen, slice):
            tensor = tensor.narrow(axis, chosen.start, chosen.stop - chosen.start)
        else:
            tensor = tensor.index_select(axis, torch.as_tensor(chosen, device=tensor.device))
    return tensor


def written(tensor: Tensor, positions: Positions, region: Tensor) -> Tensor:
    """Return a copy of the tensor with the region replaced; gradients flow to the tensor and to the new region.

    The copy shares no memory with the arguments, so in-place writes to the copy do not affect the arguments.
    """
    if not positions:
        return region.clone()
    (axis, chosen), *others = positions.items()
    if others:
        region = written(read(tensor, {axis: chosen}), dict(others), region)
    if isinstance(chosen, slice) and not tensor.is_complex():  # slice_scatter has no complex gradients
        return torch.slice_scatter(tensor, region, axis, chosen.start, chosen.stop)
    numbers = torch.arange(tensor.shape[axis])[chosen] if isinstance(chosen, slice) else torch.as_tensor(chosen)
    index = numbers.to(tensor.device)
    # vmap does not support the in-place write below.
    if inside_vmap(region) or inside_vmap(tensor):
        return tensor.index_copy(axis, index, region)
    return tensor.clone().index_copy_(axis, index, region)  # a clone keeps the strides, for bit-identical results
