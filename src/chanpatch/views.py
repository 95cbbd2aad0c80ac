"""Views name the axes of a tensor and may split an axis, such as a feature axis into heads."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import SiteError


@dataclass(frozen=True)
class View:
    """Names for the axes of a tensor. An axis may be split into several named axes.

    Attributes:
        groups: For each axis of the tensor, the names of the axes into which the axis is split, outermost first. An
            axis that is not split has one name.
        lengths: Known lengths, as pairs (axis, length). In each group, at most one axis has an unknown length.
        labels: Labels of the positions along some axes, as pairs (axis, labels).
    """

    groups: tuple[tuple[str, ...], ...]
    lengths: tuple[tuple[str, int], ...] = ()
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of all axes after splitting."""
        return tuple(axis for group in self.groups for axis in group)

    @property
    def splits(self) -> bool:
        """Whether an axis of the tensor is split."""
        return any(len(group) > 1 for group in self.groups)

    def split_lengths(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the length of each axis after splitting a tensor with the given shape.

        ValueError is raised if the shape does not match this view.
        """
        if len(shape) != len(self.groups):
            raise ValueError(f"the tensor has {len(shape)} axes, but the view has {len(self.groups)}: {self}")
        known, found = dict(self.lengths), []
        for length, group in zip(shape, self.groups, strict=True):
            product = math.prod(known.get(axis, 1) for axis in group)
            rest, left = divmod(length, product)
            if left or (rest != 1 and all(axis in known for axis in group)):
                sizes = " x ".join(f"{axis} {known[axis]}" if axis in known else axis for axis in group)
                raise ValueError(f"an axis of length {length} cannot be split into {sizes}")
            found += [known.get(axis, rest) for axis in group]
        return tuple(found)

    def split(self, tensor: Tensor) -> Tensor:
        """Return the tensor with its axes split. The result shares memory with the tensor."""
        return tensor.view(self.split_lengths(tensor.shape)) if self.splits else tensor

    def merge(self, tensor: Tensor, _: object = None) -> Tensor:
        """Undo `split`: convert a tensor with split axes back to the original axes."""
        if not self.splits:
            return tensor
        lengths = iter(tensor.shape)
        return tensor.reshape([math.prod(next(lengths) for _ in group) for group in self.groups])

    def __str__(self) -> str:
        return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in self.groups)


_GROUP = re.compile(r"\(([^()]*)\)|([^\s()]+)")


def view(pattern: str, **lengths: int | Sequence[str]) -> View:
    """Name the axes of a tensor, and optionally split an axis into several axes.

    Args:
        pattern: Names of the axes, separated by spaces. Parentheses contain the names of the axes into which one axis
            of the tensor is split, outermost first, as in einops: `"batch position (head feature)"`.
        lengths: Length of each axis in parentheses, or labels for the positions along the axis. In each pair of
            parentheses, the length of one axis may be omitted.

    Raises:
        SiteError: If the pattern is not valid, or if lengths are missing or do not match the pattern.

    Example:
        >>> print(view("batch position (part head feature)", part=("q", "k", "v"), head=12))
        batch position (part head feature)
    """
    matches = [*_GROUP.finditer(pattern)]
    groups = tuple(tuple((match[1] or "").split()) if match[2] is None else (match[2],) for match in matches)
    axes = [axis for group in groups for axis in group]
    subject = f"view({pattern!r})"
    if _GROUP.sub("", pattern).strip() or not all(groups) or not all(map(str.isidentifier, axes)):
        raise SiteError(f"{subject}: expected axis names and groups in parentheses, as in 'batch (head feature)'.")
    if twice := [axis for axis in axes if axes.count(axis) > 1]:
        raise SiteError(f"{subject} has two axes named '{twice[0]}'. Give each axis its own name.")
    if unknown := [axis for axis in lengths if axis not in axes]:
        raise SiteError(f"{subject} has no axis '{unknown[0]}'. Add the axis to the pattern, or omit {unknown[0]}=.")
    labels = {axis: tuple(each) for axis, each in lengths.items() if isinstance(each, Sequence)}
    sizes: dict[str, Any] = {axis: len(labels[axis]) if axis in labels else each for axis, each in lengths.items()}
    for axis, size in sizes.items():
        names = labels.get(axis, ())
        is_text = all(isinstance(name, str) for name in names)
        if type(size) is not int or size < 1 or not is_text or len({*names}) != len(names):
            expected = "a positive length or a list of distinct labels"
            raise SiteError(f"{subject}: {axis} must be {expected}; got {lengths[axis]!r}.")
    for group in groups:
        if len(missing := [axis for axis in group if axis not in sizes]) > 1:
            raise SiteError(
                f"{subject}: the lengths of {' and '.join(missing)} are unknown. In each pair of parentheses, at most "
                f"one length may be omitted, so pass {missing[0]}=..."
            )
    return View(groups, tuple(sizes.items()), tuple(labels.items()))
