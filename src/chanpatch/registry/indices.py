"""Indices along an axis: ints, slices, boolean masks and labels, in a form that can be compared and hashed."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ..errors import SiteError, did_you_mean

Index: TypeAlias = (
    "int | str | slice | Sequence[int] | Sequence[bool] | Sequence[str] | range | Tensor | np.ndarray[Any, Any]"
)


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


@dataclass(frozen=True)
class Labels:
    """Labels of selected positions along an axis, such as "q". The hook point's view maps the labels to indices."""

    values: tuple[str, ...]


Selection: TypeAlias = "tuple[int, ...] | Span | Flags | Labels"


def selection_of(name: str, axis: str, index: Any) -> Selection:
    """Convert an index along an axis of the site `name` to a hashable selection. Raise SiteError for a bad index."""
    if isinstance(index, (Span, Flags, Labels)):
        return index
    if isinstance(index, slice):
        parts = index.start, index.stop, index.step
        try:
            return Span(*(None if part is None else operator.index(part) for part in parts))
        except TypeError as fault:
            raise SiteError(f"Site({name!r}, {axis}={index!r}): slice bounds must be integers.") from fault
    if isinstance(index, (Tensor, np.ndarray)):
        index = index.tolist()
    values = [index] if _is_whole(index) or isinstance(index, str) else index
    if isinstance(values, Sequence):
        if not values:
            raise SiteError(f"Site({name!r}, {axis}=[]) selects nothing. Omit {axis} to select the whole axis.")
        if all(map(_is_whole, values)):
            return tuple(map(int, values))
        if all(isinstance(value, (bool, np.bool_)) for value in values):
            if any(values):
                return Flags(tuple(map(bool, values)))
            raise SiteError(
                f"Site({name!r}, {axis}=...): the mask over {axis} selects nothing. Set at least one value to True."
            )
        if all(isinstance(value, str) for value in values):
            return Labels(tuple(values))
    raise SiteError(
        f"Site({name!r}, {axis}={index!r}): an index must be an int, a slice, a label, a list of ints or labels, or a "
        "boolean mask."
    )


def _is_whole(index: Any) -> bool:
    return isinstance(index, (int, np.integer)) and not isinstance(index, bool)


def positions_in(selection: Selection, length: int, axis: str) -> list[int]:
    """Return the selected positions along an axis with the given length, as nonnegative ints.

    Raise ValueError if the selection is not valid for this axis.
    """
    if isinstance(selection, Labels):
        raise ValueError(f"{axis}={shown(selection)} uses labels, but {axis} has no labels, so pass integers")
    if isinstance(selection, Flags):
        if len(selection.values) != length:
            raise ValueError(f"the mask over {axis} has length {len(selection.values)}")
        return [position for position, chosen in enumerate(selection.values) if chosen]
    if isinstance(selection, Span):
        chosen = [*range(length)[selection.start : selection.stop : selection.step]]
        if not chosen:
            raise ValueError(f"{axis}={shown(selection)} selects nothing")
        return chosen
    outside = [str(position) for position in selection if not -length <= position < length]
    if outside:
        more = f" and {len(outside) - 8} more" * (len(outside) > 8)
        several = f"indices {', '.join(outside[:8])}{more} are" if len(outside) > 1 else f"{outside[0]} is"
        raise ValueError(f"{axis} {several} out of range")
    chosen = [position % length for position in selection]
    if len(set(chosen)) < len(chosen):
        twice = next(position for position, times in Counter(chosen).items() if times > 1)
        raise ValueError(f"{axis} {twice} is listed twice")
    return chosen


def most_positions(selection: Selection) -> int:
    """Return how many positions a selection selects along an axis that is long enough."""
    if isinstance(selection, Span):
        return len(range(2**62)[selection.start : selection.stop : selection.step])
    values: Any = selection if isinstance(selection, tuple) else selection.values
    return sum(values) if isinstance(selection, Flags) else len(values)


def advice(indexed: Sequence[str], axes: Sequence[str]) -> str:
    """Return advice for an error message about indices: how to name axes, or how positions are counted.

    If neither fits, return an empty string. `indexed` contains the names of the axes that the user indexed.
    """
    if any(axis not in axes and not did_you_mean(axis, axes) for axis in indexed):
        return (
            " To name or split axes, pass axes={...} to hook_points(); for a transformers model, pass "
            "axes=chanpatch.huggingface.axes(model)."
        )
    if "position" in indexed and "position" in axes:
        return (
            " Positions are counted within one forward pass. With a key-value cache, later passes contain only the new "
            "tokens."
        )
    return ""


def shown(selection: Selection) -> str:
    """Format a selection as text for the repr of a site, such as `2:5` or `[55, 121]`."""
    if isinstance(selection, Labels):
        return repr(selection.values[0] if len(selection.values) == 1 else list(selection.values))
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
