"""What must hold before a model is hooked and a tensor edited: hooks that run, shapes and operands that fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ._axes import axis_names
from ._lookup import BarePoint
from ._regions import read
from ._tree import inside_vmap as inside_vmap
from ._tree import leaves
from ._typing import Axes
from .edits import Add, Project, Resample, Scale, Set
from .errors import BatchAxisError, EditError, MetricError, TraceMismatchError, UnsupportedModelError
from .points import HookPoint
from .sites import Site


def no_batch(site: Site) -> str:
    """Say why a site has no rows, and what to do."""
    if site.point is None:
        return "Take the site from points.site(...) of hook_points(model, *inputs), which proves the batch axis."
    return (
        f"The trace could not prove which axis of '{site.name}' is the batch: no single axis grew when the model "
        "was run with one row more. Name it where the inputs have it: hook_points(..., axes={'.in[0]': (...)})."
    )


def check_shape_against_trace(leaf: Tensor, point: HookPoint) -> None:
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


def bare_axes(point: BarePoint, module: nn.Module | None, leaf: Tensor) -> tuple[Axes, int | None]:
    """Return the axis names that the module's type alone gives, and which is the batch."""
    path = point.path
    names = (None,) * leaf.dim() if module is None else axis_names(module, point.side, path, leaf.dim(), None)
    axes = tuple(name or f"axis{number}" for number, name in enumerate(names))
    return axes, axes.index("batch") if "batch" in axes else None


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
        self.axes: Axes = ()
        self.batch_axis: int | None = None
        self.positions: dict[int, slice | Tensor] = {}
        self._known: tuple[Any, ...] | None = None

    def region(self, leaf: Tensor) -> Tensor:
        """Return the site's region of the tensor found at its hook point.

        Raises:
            TraceMismatchError, SiteError: If the tensor is not as in the trace, or has no such region.
        """
        self.locate(leaf)
        return read(leaf, self.positions)

    def locate(self, leaf: Tensor) -> None:
        """Look up where the site lies in the tensor found at its hook point; raises as `region` does."""
        known = type(leaf), leaf.shape, leaf.dtype, leaf.device, leaf.layout
        if known == self._known:
            return
        self._known = None
        # What is kept serves forwards outside of inference mode, too.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self._locate(leaf)
            self._check(leaf)
        if type(leaf) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            self._known = known  # what is made inside a transform, or for a subclass, is of no use after it

    def _locate(self, leaf: Tensor) -> None:
        if isinstance(self._point, HookPoint):
            self.axes, self.batch_axis = self._point.axes, self._point.batch_axis
            check_shape_against_trace(leaf, self._point)
        else:
            self.axes, self.batch_axis = bare_axes(self._point, self._module, leaf)
        self.positions = {
            axis: chosen if isinstance(chosen, slice) else torch.tensor(chosen, device=leaf.device)
            for axis, chosen in self.site.positions(self.axes, leaf.shape).items()
        }

    def _check(self, leaf: Tensor) -> None:
        """Raise if what is done there does not fit the region."""


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


def check_shape(subject: str, noun: str, operand: Tensor, axes: Axes, lengths: Sequence[int | None], verb: str) -> None:
    """Raise unless the operand has one length per axis of the region, each equal or 1."""
    if operand.dim() == len(axes) and all(
        expected is None or length in (1, expected) for length, expected in zip(operand.shape, lengths, strict=True)
    ):
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


def refuse_unhookable(model: nn.Module) -> None:
    """Raise for a model whose module calls bypass hooks: what is patched there would be ignored in silence."""
    for name, module in model.named_modules():
        why = _unhookable(module)
        if why:
            raise UnsupportedModelError(f"{repr(name) if name else 'The model'} {why}")


def _unhookable(module: nn.Module) -> str | None:
    if "_orig_mod" in module._modules:
        return (
            "is compiled by torch.compile, which ignores hooks that are added after its first call. Pass the original "
            "module (compiled._orig_mod), or compile the PatchedPolicy made of it."
        )
    if module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
        return (
            "was compiled in place, so hooks that are added now are ignored. Work on a copy that is not compiled, or "
            "compile the PatchedPolicy made of it."
        )
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "is a TorchScript module, which runs its submodules without their hooks. Pass the Python module that it "
            "was made from."
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return (
            f"is a DataParallel over {len(module.device_ids)} devices, which runs copies of its module. Pass the "
            "module inside (.module) and run it on one device."
        )
    return None


def refuse_untraceable(model: nn.Module, inputs: Any) -> None:
    """Raise for what cannot be traced: parameters that do not exist yet, inputs without rows."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedModelError(
                f"'{name}' has no shape before the model's first call. Call the model once, then trace it."
            )
    first = next((tensor for _, tensor in leaves(inputs) if tensor.dim() and not tensor.is_nested), None)
    if first is not None and not len(first):
        raise BatchAxisError(
            f"The example inputs have no rows: the first tensor has shape {tuple(first.shape)}. Trace with two rows or "
            "more, which proves the batch axis."
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


@contextmanager
def unwritten(metric: str, *given: Any) -> Iterator[None]:
    """Refuse a metric that writes into what it is given, which is also given to others, and with other patches.

    Args:
        metric: How to call it.
        given: To it.

    Raises:
        MetricError: At the end, if it wrote.
    """
    tensors = [tensor for tree in given for _, tensor in leaves(tree) if not tensor.is_inference()]
    before = [tensor._version for tensor in tensors]
    yield
    if [tensor._version for tensor in tensors] != before:
        raise MetricError(
            f"{metric} wrote into the output or the baseline in place, which others are given too. Return new tensors: "
            "output - baseline instead of output.sub_(baseline)."
        )
