"""Checks before a tensor is read or edited: the region exists, and operands and masks fit it."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from .edits import Add, Edit, Project, Resample, Scale, Set


class Located:
    """A site in the tensors of its hook point, located and checked once per kind of tensor.

    Attributes:
        site: The site.
        axes: Axis names of the tensor, and so of the region.
        batch_axis: Number of the batch axis, or None.
        positions: Selected positions, by axis number.
    """

    wants_names = False  # whether every axis needs a name, and the batch axis must be known

    def __init__(self, site: Site, point: HookPoint | BarePoint, module: nn.Module | None) -> None:
        self.site, self._point, self._module = site, point, module
        self.axes: Axes = ()
        self.batch_axis: int | None = None
        self.positions: dict[int, slice | Tensor] = {}
        self._known: tuple[Any, ...] | None = None

    def locate(self, leaf: Tensor, moment: Moment | Session) -> None:
        """Locate the site in the tensor at its hook point; raise if it differs from the traced one or does not fit."""
        known = type(leaf), leaf.shape, leaf.dtype, leaf.device, leaf.layout
        if known == self._known:
            return
        self._known = None
        # The positions are kept, so they must also work outside of inference mode.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if isinstance(self._point, HookPoint):
                self.axes, self.batch_axis = self._point.axes, self._point.batch_axis
                check_traced_shape(leaf, self._point)
            else:
                self.axes, self.batch_axis = self._bare_axes(self._point, leaf, moment)
            self.positions = {
                axis: chosen if isinstance(chosen, slice) else torch.tensor(chosen, device=leaf.device)
                for axis, chosen in self.site.positions(self.axes, leaf.shape).items()
            }
            self._check(leaf)
        if type(leaf) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            self._known = known  # tensors that were made inside a transform, or for a subclass, are not reused

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
        """Raise if the patch or the record does not fit the region."""


def check_traced_shape(leaf: Tensor, point: HookPoint) -> None:
    """Raise if a tensor differs from the traced one in anything but the batch and the device."""
    lengths = [None if axis == "batch" else point.length(axis) for axis in point.axes]
    if not fits(leaf, lengths):
        raise TraceMismatchError(
            f"Hook point '{point.name}' has shape {tuple(leaf.shape)} in this forward, but axes "
            f"{_shown(point.axes, lengths)} in the trace. Trace inputs like these with hook_points(); for inputs of "
            f"many lengths, use a site that has no trace: Site('{point.name}')."
        )
    if leaf.dtype != point.dtype:
        raise TraceMismatchError(
            f"Hook point '{point.name}' is {leaf.dtype} in this forward, but {point.dtype} in the trace. Call "
            "hook_points() on the model as it is run: in the same dtype, inside the same torch.autocast."
        )


def region_lengths(site: Site, point: HookPoint) -> list[int | None]:
    """Return the lengths of a traced site's region; None for the batch."""
    chosen = {axis: len(index) for axis, index in site.indices if isinstance(index, tuple)}
    return [
        None if number == point.batch_axis else chosen.get(axis, point.length(axis))
        for number, axis in enumerate(point.axes)
    ]


_VERBS = {Set: "sets", Add: "adds", Scale: "multiplies", Project: "projects", Resample: "draws"}


def check_operands(
    edit: Edit, site: Site, axes: Axes, lengths: Sequence[int | None], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise if an operand of one of chanpatch's edits would broadcast, or has another dtype or device."""
    verb = next((verb for kind, verb in _VERBS.items() if isinstance(edit, kind)), None)
    if verb is None:
        return
    subject = f"{type(edit).__name__} at {site!r}"
    if isinstance(edit, Resample):
        number = axes.index("batch") if "batch" in axes else edit.batch_axis
        if number != edit.batch_axis:
            raise EditError(
                f"{subject} has batch_axis={edit.batch_axis}, but the batch is axis {number} of "
                f"({', '.join(axes)}). Resample(reference, seed, batch_axis={number}) draws rows."
            )
        # The reference may have any number of rows.
        lengths = [None if number == edit.batch_axis else length for number, length in enumerate(lengths)]
    for item in fields(edit):  # type: ignore[arg-type]
        operand = getattr(edit, item.name)
        if isinstance(operand, Tensor):
            check_shape(subject, item.name, operand, axes, lengths, verb)
            if operand.dtype != dtype or operand.device != device:
                raise EditError(
                    f"{subject}: the {item.name} is {operand.dtype} on {operand.device}, but the region is "
                    f"{dtype} on {device}. Convert it: {item.name}.to('{device}', {dtype})."
                )
        elif verb != "draws" and not _holds(dtype, operand):
            raise EditError(
                f"{subject}: the {item.name} is {operand}, which the region, {dtype}, cannot hold. Give a whole number."
            )


def _holds(dtype: torch.dtype, number: float) -> bool:
    inexact = dtype.is_floating_point or dtype.is_complex
    return inexact or (math.isfinite(number) and number == (bool if dtype == torch.bool else int)(number))


def check_mask(mask: Any, site: Site, axes: Axes = (), lengths: Sequence[int | None] | None = None) -> None:
    """Raise if a `where` is not a bool tensor, or does not fit a region of these lengths, if they are known."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a {mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise EditError(
            f"where at {site!r} is {got}; it takes a bool tensor, such as column < 12, or a function that returns one."
        )
    if lengths is not None:
        check_shape(f"where at {site!r}", "mask", mask, axes, lengths, "selects")


def fits(operand: Tensor, lengths: Sequence[int | None], *, or_one: bool = False) -> bool:
    """Return whether a tensor has these lengths, None for any; with `or_one`, each may also be 1."""
    return operand.dim() == len(lengths) and all(
        expected in (None, length) or (or_one and length == 1)
        for length, expected in zip(operand.shape, lengths, strict=True)
    )


def check_shape(subject: str, noun: str, operand: Tensor, axes: Axes, lengths: Sequence[int | None], verb: str) -> None:
    """Raise unless the operand has one length per axis of the region, each equal or 1."""
    if fits(operand, lengths, or_one=True):
        return
    advice = ""
    rows = axes.index("batch") if "batch" in axes else 0
    others = [number for number in range(len(axes)) if number != rows]
    # A vector as long as the batch is probably a mask of rows, but not an operand per row.
    tried = [rows, *others] if noun == "mask" else others
    number = next((number for number in tried if lengths[number] == operand.numel()), None)
    if operand.dim() == 1 and number is not None:
        view = ", ".join(str(len(operand)) if axis == number else "1" for axis in range(len(axes)))
        advice = f": {noun}.view({view}) {verb} along {axes[number]}"
    raise EditError(
        f"{subject}: the {noun} has shape {tuple(operand.shape)}, but the region has axes {_shown(axes, lengths)}. "
        f"Give every axis, with length 1 where the {noun} repeats{advice}."
    )


def _shown(axes: Axes, lengths: Sequence[int | None]) -> str:
    shown = ("any" if length is None else str(length) for length in lengths)
    return f"({', '.join(axes)}) = ({', '.join(shown)})"
