"""A patch as a record of JSON and the tensors that it names; no code, and nothing that runs when it is read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import InterventionError
from ..patching.edits import Add, Clamp, Project, Resample, Scale, Set
from ..patching.patch import Patch, edit_name
from ..registry.sites import Axes, Flags, HookPoint, Selection, Shape, Site, Span
from ..results import imported

EDITS = {kind.__name__: kind for kind in (Set, Add, Scale, Clamp, Project, Resample)}


@dataclass(frozen=True)
class TracedPoint:
    """What a file keeps of a hook point, to know it again.

    Attributes:
        axes: Axis names, such as `(batch, channel, row, col)`.
        shape: Lengths of all axes but the batch axis.
        dtype: Of the tensor, such as `"float32"`.
        module_type: Class name of the module; `tap` for a tap.
    """

    axes: Axes
    shape: Shape
    dtype: str
    module_type: str

    @classmethod
    def of(cls, point: HookPoint) -> TracedPoint:
        """Return what is kept of a hook point."""
        return cls(point.axes, point.shape, str(point.dtype).removeprefix("torch."), point.module_type)

    def differences(self, there: TracedPoint) -> list[tuple[str, Any, Any]]:
        """Return name, own and other for each attribute in which another one differs."""
        pairs = [(item.name, getattr(self, item.name), getattr(there, item.name)) for item in fields(self)]
        return [(name, own, other) for name, own, other in pairs if own != other]


def encoded(patches: Iterable[Patch]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return a record of each patch, and the tensors that the records name.

    Raises:
        InterventionError: Naming every patch that is not data.
    """
    tensors = _Tensors()
    records, faults = [], []
    for number, patch in enumerate(patches, start=1):
        try:
            records.append(_encoded(patch, tensors))
        except InterventionError as fault:
            faults.append(f"Patch {number}, {patch!r}, cannot be saved: {fault}")
    if faults:
        raise InterventionError(in_one(faults))
    return records, tensors.stored


def decoded(
    record: dict[str, Any], operands: Operands, device_of: Callable[[str], torch.device]
) -> tuple[Patch, TracedPoint | None]:
    """Return the patch of a record, and what is known of its hook point.

    Args:
        record: As `encoded` returns it.
        operands: Of the file.
        device_of: Where the operands of a patch belong, by the name of its hook point.

    Raises:
        InterventionError: If the edit is none of chanpatch's.
        Exception: Of any kind, if the record is none.
    """
    name, kind, traced = record["site"]["name"], record["edit"], record["hook_point"]
    if kind not in EDITS:
        raise InterventionError(f"has the edit {kind!r}, but this chanpatch knows {', '.join(EDITS)}.")
    site = Site(name, **{axis: _decoded_index(index) for axis, index in record["site"]["indices"].items()})
    device = device_of(name)
    edit = EDITS[kind](**{key: operands.decoded(each, device) for key, each in record["operands"].items()})
    patch = Patch(site, edit, operands.decoded(record["where"], device))
    if traced is None:
        return patch, None
    return patch, TracedPoint(tuple(traced["axes"]), tuple(traced["shape"]), traced["dtype"], traced["module_type"])


def in_one(faults: list[str]) -> str:
    """Return one message of all faults."""
    return faults[0] if len(faults) == 1 else "\n".join([f"{len(faults)} faults:", *(f"- {each}" for each in faults)])


def _encoded(patch: Patch, tensors: _Tensors) -> dict[str, Any]:
    edit: Any = patch.edit
    if type(edit) not in EDITS.values():
        raise InterventionError(
            f"its edit {edit_name(edit)} is code, and a file holds data only. Write it with {', '.join(EDITS)} of "
            "chanpatch.patching; several patches of one site apply in order."
        )
    if patch.where is not None and not isinstance(patch.where, Tensor):
        raise InterventionError(
            "its where is a function, and a file holds data only. Give the mask that it returns: a bool tensor."
        )
    return {
        "site": {
            "name": patch.site.name,
            "indices": {axis: _encoded_index(selection) for axis, selection in patch.site.indices},
        },
        "hook_point": None if patch.site.point is None else asdict(TracedPoint.of(patch.site.point)),
        "edit": type(edit).__name__,
        "operands": {
            each.name: _encoded_operand(getattr(edit, each.name), each.name, tensors) for each in fields(edit)
        },
        "where": _encoded_operand(patch.where, "where", tensors),
    }


def _encoded_index(selection: Selection) -> Any:
    if isinstance(selection, Span):
        return {"slice": [selection.start, selection.stop, selection.step]}
    return list(selection.values if isinstance(selection, Flags) else selection)


def _decoded_index(index: Any) -> Any:
    return slice(*index["slice"]) if isinstance(index, dict) else index


def _encoded_operand(operand: Any, name: str, tensors: _Tensors) -> Any:
    if isinstance(operand, Tensor):
        return tensors.add(operand, name)
    if operand is None or isinstance(operand, bool):
        return operand
    with suppress(TypeError):
        return operator.index(operand)
    return {"float": repr(float(operand))}  # as text, since JSON has neither NaN nor infinities


class Operands:
    """The operands of a file; a tensor that several patches hold is read once, and is one tensor again.

    Args:
        tensor: Reads a tensor of the file by name.
    """

    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        self._tensor = tensor
        self._read: dict[tuple[str, torch.device], Tensor] = {}

    def decoded(self, operand: Any, device: torch.device) -> Any:
        """Return a number, None, or a tensor on that device."""
        if not isinstance(operand, dict):
            return operand
        if "float" in operand:
            return float(operand["float"])
        name, order = operand["tensor"], operand["order"]
        if (name, device) not in self._read:
            dense = self._tensor(name).permute([order.index(axis) for axis in range(len(order))])
            self._read[name, device] = dense.to(device, copy=True).expand(operand["shape"])
        return self._read[name, device]


class _Tensors:
    """The tensors of a file, each stored once however many patches hold it.

    What comes after a patch may compute other last bits for another memory layout, so the order of the axes in memory
    is kept (channels-last stays), and so is a tensor that repeats without taking memory.
    """

    def __init__(self) -> None:
        self.stored: dict[str, Tensor] = {}
        self._records: dict[int, dict[str, Any]] = {}

    def add(self, tensor: Tensor, name: str) -> dict[str, Any]:
        if id(tensor) not in self._records:
            _refuse_unstorable(tensor, name)
            dense = tensor.detach()
            for axis, stride in enumerate(dense.stride()):
                if not stride and dense.shape[axis] > 1:
                    dense = dense.narrow(axis, 0, 1)
            strides = dense.stride()
            order = sorted(range(dense.dim()), key=lambda axis: -strides[axis])
            key = str(len(self.stored))
            self.stored[key] = dense.permute(order).cpu().clone(memory_format=torch.contiguous_format)
            self._records[id(tensor)] = {"tensor": key, "order": order, "shape": list(tensor.shape)}
        return self._records[id(tensor)]


def _refuse_unstorable(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise InterventionError(f"its {name} is on the meta device, and so has no numbers.")
    if tensor.layout != torch.strided:
        raise InterventionError(f"its {name} is {tensor.layout}. Make it dense: {name}.to_dense().")
    try:
        imported("safetensors.torch").save({name: torch.empty(0, dtype=tensor.dtype)})
    except (KeyError, RuntimeError) as fault:  # the second for quantized types
        raise InterventionError(f"its {name} is {tensor.dtype}, which a safetensors file cannot hold.") from fault
