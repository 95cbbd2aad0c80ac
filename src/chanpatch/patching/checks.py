"""What must hold before a model is hooked and a tensor edited: hooks that run, shapes and operands that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.moments import Moment
from ..engine.sessions import Session
from ..errors import EditError, TraceMismatchError
from ..registry.axes import axis_names
from ..registry.names import BarePoint
from ..registry.sites import Axes, HookPoint, Site
from ..registry.trace import names_by_trace
from .edits import Add, Project, Resample, Scale, Set


class Located:
    """Where a site lies in the tensors of its hook point: looked up, and checked, once per kind of tensor.

    Attributes:
        site: The site.
        axes: Names of the axes of the tensor, and so of the region.
        batch_axis: Which of them is the batch, or None.
        positions: What to select, by axis number.
    """

    def __init__(self, site: Site, point: HookPoint | BarePoint, module: nn.Module | None) -> None:
        self.site, self._point, self._module = site, point, module
        self.wants_names = False  # of all axes, and the batch axis
        self.axes: Axes = ()
        self.batch_axis: int | None = None
        self.positions: dict[int, slice | Tensor] = {}
        self._known: tuple[Any, ...] | None = None

    def locate(self, leaf: Tensor, moment: Moment | Session) -> None:
        """Look up where the site lies in the tensor found at its hook point.

        Raises:
            TraceMismatchError, SiteError: If the tensor is not as in the trace, or has no such region.
        """
        known = type(leaf), leaf.shape, leaf.dtype, leaf.device, leaf.layout
        if known == self._known:
            return
        self._known = None
        # What is kept serves forwards outside of inference mode, too.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self._locate(leaf, moment)
            self._check(leaf)
        if type(leaf) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            self._known = known  # what is made inside a transform, or for a subclass, is of no use after it

    def _locate(self, leaf: Tensor, moment: Moment | Session) -> None:
        if isinstance(self._point, HookPoint):
            self.axes, self.batch_axis = self._point.axes, self._point.batch_axis
            check_traced_shape(leaf, self._point)
        else:
            self.axes, self.batch_axis = self._bare_axes(self._point, leaf, moment)
        self.positions = {
            axis: chosen if isinstance(chosen, slice) else torch.tensor(chosen, device=leaf.device)
            for axis, chosen in self.site.positions(self.axes, leaf.shape).items()
        }

    def _bare_axes(self, point: BarePoint, leaf: Tensor, moment: Moment | Session) -> tuple[Axes, int | None]:
        """Return the axis names that the module's type gives; if they are not enough, those of a trace."""
        names: Sequence[str | None] = (None,) * leaf.dim()
        if self._module is not None:
            names = axis_names(self._module, point.side, point.path, leaf.dim(), None)
        axes = tuple(name or f"axis{number}" for number, name in enumerate(names))
        lacks = any(axis not in axes for axis, _ in self.site.indices)
        lacks |= self.wants_names and (None in names or "batch" not in names)
        readable = not torch._C._functorch.is_functorch_wrapped_tensor(leaf)
        if lacks and readable and isinstance(moment, Session) and (call := moment.root_call) is not None:
            known = names_by_trace(moment.root, call.method, call.args, call.kwargs).get(point.name)
            if known is not None and len(known[0]) == leaf.dim():
                return known
        return axes, axes.index("batch") if "batch" in axes else None

    def _check(self, leaf: Tensor) -> None:
        """Raise if what is done there does not fit the region."""


def check_traced_shape(leaf: Tensor, point: HookPoint) -> None:
    """Raise if a tensor differs from the traced one in anything but the batch and the device."""
    traced = [point.length(axis) for axis in point.axes]
    same = len(traced) == leaf.dim() and all(
        expected is None or axis == "batch" or expected == length
        for axis, expected, length in zip(point.axes, traced, leaf.shape, strict=True)
    )
    if not same:
        lengths = ", ".join("any" if length is None else str(length) for length in traced)
        raise TraceMismatchError(
            f"Hook point '{point.name}' has shape {tuple(leaf.shape)} in this forward, but axes "
            f"({', '.join(point.axes)}) = ({lengths}) in the trace. Trace inputs like these with "
            f"hook_points(); for inputs of many lengths, use a site that has no trace: Site('{point.name}')."
        )
    if leaf.dtype != point.dtype:
        raise TraceMismatchError(
            f"Hook point '{point.name}' is {leaf.dtype} in this forward, but {point.dtype} in the trace. Call "
            "hook_points() on the model as it is run: in the same dtype, inside the same torch.autocast."
        )


def region_lengths(site: Site, point: HookPoint) -> list[int | None]:
    """Return the lengths of a traced site's region; None for the batch."""
    chosen = dict(site.indices)
    lengths = []
    for number, axis in enumerate(point.axes):
        indices = chosen.get(axis)
        length = len(indices) if isinstance(indices, tuple) else point.length(axis)
        lengths.append(None if number == point.batch_axis else length)
    return lengths


_VERBS = {Set: "sets", Add: "adds", Scale: "multiplies", Project: "projects"}


def check_operands(
    edit: Callable[..., Any],
    site: Site,
    axes: Axes,
    lengths: Sequence[int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise if an operand of one of chanpatch's edits would broadcast, or is of another dtype or device.

    Args:
        edit: Any edit; those of others are checked by what they return.
        site: Where it is applied.
        axes: Of the region.
        lengths: Of the region's axes; None where any length may come.
        dtype: Of the region.
        device: Of the region.
    """
    if not isinstance(edit, (*_VERBS, Resample)):
        return
    name = type(edit).__name__
    if isinstance(edit, Resample):  # the donors need not be as many as the rows
        if "batch" in axes and axes.index("batch") != edit.batch_axis:
            number = axes.index("batch")
            raise EditError(
                f"Resample at {site!r} has batch_axis={edit.batch_axis}, but the batch is axis {number} of "
                f"({', '.join(axes)}). Resample(reference, seed, batch_axis={number}) draws rows."
            )
        lengths = [None if number == edit.batch_axis else length for number, length in enumerate(lengths)]
    for item in fields(edit):  # type: ignore[arg-type]
        operand = getattr(edit, item.name)
        if isinstance(operand, Tensor):
            check_shape(f"{name} at {site!r}", item.name, operand, axes, lengths, _VERBS.get(type(edit), "draws"))
            if operand.dtype != dtype or operand.device != device:
                raise EditError(
                    f"{name} at {site!r}: the {item.name} is {operand.dtype} on {operand.device}, but the region is "
                    f"{dtype} on {device}. Convert it: {item.name}.to('{device}', {dtype})."
                )
        elif not _holds(dtype, operand):
            raise EditError(
                f"{name} at {site!r}: the {item.name} is {operand}, which the region, {dtype}, cannot hold. Give a "
                "whole number."
            )


def _holds(dtype: torch.dtype, number: float) -> bool:
    if dtype.is_floating_point or dtype.is_complex:
        return True
    return math.isfinite(number) and number == (bool(number) if dtype == torch.bool else int(number))


def check_mask(mask: Any, site: Site, axes: Axes, lengths: Sequence[int | None]) -> None:
    """Raise if a `where` is no bool tensor that fits the region."""
    check_mask_type(mask, site)
    check_shape(f"where at {site!r}", "mask", mask, axes, lengths, "selects")


def check_mask_type(mask: Any, site: Site) -> None:
    """Raise if a `where` is no bool tensor."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a {mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise EditError(f"where at {site!r} is {got}, but it takes a bool tensor, as in mask = column < 12.")


def fits(operand: Tensor, lengths: Sequence[int | None], *, or_one: bool = False) -> bool:
    """Return whether a tensor has these lengths, None for any, or also 1 in place of each."""
    return operand.dim() == len(lengths) and all(
        expected in (None, length) or (or_one and length == 1)
        for length, expected in zip(operand.shape, lengths, strict=True)
    )


def check_shape(subject: str, noun: str, operand: Tensor, axes: Axes, lengths: Sequence[int | None], verb: str) -> None:
    """Raise unless the operand has one length per axis of the region, each equal or 1."""
    if fits(operand, lengths, or_one=True):
        return
    advice = ""
    rows = [axes.index("batch")] if "batch" in axes else [0]
    others = [number for number in range(len(axes)) if number not in rows]
    # A mask of that length is more often one of rows, a vector more often one of channels.
    fitting = [number for number in (rows + others if noun == "mask" else others) if lengths[number] == operand.numel()]
    if operand.dim() == 1 and fitting:
        number = fitting[0]
        view = ", ".join(str(len(operand)) if axis == number else "1" for axis in range(len(axes)))
        advice = f": {noun}.view({view}) {verb} along {axes[number]}"
    shown = ", ".join("any" if length is None else str(length) for length in lengths)
    raise EditError(
        f"{subject}: the {noun} has shape {tuple(operand.shape)}, but the region has axes ({', '.join(axes)}) = "
        f"({shown}). Give every axis, with length 1 where the {noun} repeats{advice}."
    )


def allowed_names(names: str | Iterable[str], known: Iterable[str], nothing: str) -> frozenset[str]:
    """Return the names in `allow_unreached`.

    Raises:
        ValueError: If one of them is not known; `nothing` says what there is not.
    """
    allowed = frozenset([names] if isinstance(names, str) else names)
    unknown = allowed - set(known)
    if unknown:
        raise ValueError(f"allow_unreached names {sorted(unknown)}, where {nothing}.")
    return allowed
