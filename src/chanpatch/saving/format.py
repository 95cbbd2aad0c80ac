"""The file format: a safetensors file with operands and masks as tensors, and everything else as JSON in the metadata.

    metadata["chanpatch"] = {"format": 3, "chanpatch": version, "patches": [record, ...], "receipt": {...} or null,
              "sha256": checksum of the other entries and the tensors}
    record = {"site": {"name": ..., "indices": {axis: [5] or {"slice": [start, stop, step]}}}, "edit": "Set",
              "operands": {"value": operand}, "where": operand, "hook_point": text or null}
    operand = 5, true, null, {"float": "0.1"} or {"tensor": key, "order": axes from the largest stride to the smallest};
              for Resample, `per` is stored only if it is "step"; files from before the option existed do not contain
              `per`

`encoded` writes this format, and `decoded` reads it without running code from the file. `decoded` also reads format 2,
in which a site has no basis.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InterventionError, in_one
from ..patching.edits import Add, Clamp, Project, Resample, Scale, Set
from ..patching.patch import Patch, edit_name
from ..registry.bases import PCA, Directions
from ..registry.indices import Flags, Labels, Span
from ..registry.sites import Along, Coordinates, HookPoint, Site
from ..results import imported
from .receipts import Receipt, digest

_FORMATS = (2, 3)  # the formats that can be read; files are written in the last one
_KEY = "chanpatch"  # the only metadata entry, because safetensors does not keep the order of several entries
_EDITS: dict[str, Any] = {kind.__name__: kind for kind in (Set, Add, Scale, Clamp, Project, Resample)}


def encoded(patches: Iterable[Patch], receipt: Receipt | None) -> bytes:
    """Return the content of a patch file as bytes; raise one error that lists all patches that cannot be saved."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    records, faults = [], []
    for number, patch in enumerate(patches, start=1):
        try:
            records.append(_record(patch, tensors))
        except InterventionError as fault:
            faults.append(f"Patch {number}, {patch!r}, cannot be saved: {fault}")
    if faults:
        raise InterventionError(in_one(faults))
    named = dict(tensors.values())
    metadata = {
        "format": _FORMATS[-1],
        "chanpatch": version("chanpatch"),
        "patches": records,
        "receipt": None if receipt is None else asdict(receipt),
    }
    metadata["sha256"] = _checksum(metadata, named)
    written: bytes = imported("safetensors.torch").save(named, {_KEY: json.dumps(metadata, allow_nan=False)})
    return written


def decoded(
    file: str | os.PathLike[str], points: Mapping[str, HookPoint] | None
) -> tuple[tuple[Patch, ...], tuple[str | None, ...], str, Receipt | None, str]:
    """Return a file's patches, hook points (as text), chanpatch version, receipt and checksum.

    Each operand is moved to the device of its patch's hook point, or to the CPU if that device is unknown. The errors
    are the same as in `load`.
    """
    path = regular(file)
    path.open("rb").close()  # if the file cannot be read, Python raises an error here
    safetensors = imported("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as archive:
            text = (archive.metadata() or {}).get(_KEY)
            if text is None:
                raise InterventionError("contains no patches: the file was not written by chanpatch.save().")
            metadata = json.loads(text)
            if metadata["format"] not in _FORMATS:
                raise InterventionError(
                    f"has format {metadata['format']!r}, but chanpatch {version('chanpatch')} reads formats 2 and 3. "
                    "Use the version of chanpatch that saved the file."
                )
            stored: dict[str, Tensor] = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
            checksum = metadata.pop("sha256", None)
            if checksum != _checksum(metadata, stored):
                raise InterventionError(
                    "is damaged: its contents do not match its SHA-256 checksum. Copy the file again, or save the "
                    "patches again."
                )

            @cache  # patches that shared a tensor when they were saved share a tensor again
            def tensor(key: str, order: tuple[int, ...], device: torch.device) -> Tensor:
                return stored[key].permute([order.index(axis) for axis in range(len(order))]).to(device, copy=True)

            def device(name: str) -> torch.device:
                return points[name].device if points is not None and name in points else torch.device("cpu")

            records, receipt = metadata["patches"], metadata["receipt"]
            return (
                tuple(_patch(record, tensor, device(record["site"]["name"])) for record in records),
                tuple(record["hook_point"] and str(record["hook_point"]) for record in records),
                str(metadata["chanpatch"]),
                None if receipt is None else Receipt(**{name: str(each) for name, each in receipt.items()}),
                checksum,
            )
    except InterventionError as fault:
        raise InterventionError(f"'{file}' {printable(str(fault))}") from None
    except Exception as fault:  # a damaged file can raise any error
        raise InterventionError(
            f"'{file}' is damaged, or was not written by chanpatch.save(): {type(fault).__name__}: "
            f"{printable(str(fault))}"
        ) from fault


def regular(file: str | os.PathLike[str]) -> Path:
    """Return `file` as a Path. Raise InterventionError if the path is a folder, a pipe or a device."""
    if not isinstance(file, (str, os.PathLike)):
        kind = type(file).__name__
        raise TypeError(f"The first argument must be a path, as in save(file, patches) or load(file); got {kind}.")
    path = Path(file)
    if path.exists() and not path.is_file():
        raise InterventionError(f"'{file}' is a folder, a pipe or a device. Pass the path of a regular file.")
    return path


def _checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the metadata and the tensors. The metadata must not contain the checksum itself."""
    return hashlib.sha256(f"{json.dumps(metadata)}\n{digest(tensors)}".encode()).hexdigest()


def trace_of(point: HookPoint) -> str:
    """Return the text that is saved for a hook point, such as `"ReLU (batch, channel=8, row=4, col=4) float32"`."""
    point = point.lens.base if isinstance(point.lens, Coordinates) else point
    lengths = dict(zip(point.axes, point.lengths, strict=True))
    axes = ", ".join(axis if length is None else f"{axis}={length}" for axis, length in lengths.items())
    return f"{point.module_type} ({axes}) {str(point.dtype).removeprefix('torch.')}"


def printable(text: str) -> str:
    """Escape control characters, because text from an untrusted file could use them to control the terminal."""
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else ascii(found[0])[1:-1], text)


def _record(patch: Patch, tensors: dict[int, tuple[str, Tensor]]) -> dict[str, Any]:
    edit: Any = patch.edit
    if type(edit) not in _EDITS.values():
        raise InterventionError(
            f"its edit {edit_name(edit)} is code, but a file can only contain data. Use one of "
            f"{', '.join(_EDITS)} from chanpatch.patching, or several such patches at the same site, which are "
            "applied in order."
        )
    if patch.where is not None and not isinstance(patch.where, Tensor):
        raise InterventionError(
            "its `where` is a function, but a file can only contain data. Instead, pass the bool tensor that the "
            "function returns."
        )
    operands = {item.name: getattr(edit, item.name) for item in fields(edit)}
    if operands.get("per") == "episode":
        del operands["per"]
    indices: dict[str, Any] = {
        axis: {"slice": [chosen.start, chosen.stop, chosen.step]} if isinstance(chosen, Span)
        else list(chosen.values if isinstance(chosen, (Flags, Labels)) else chosen)
        for axis, chosen in patch.site.indices
    }  # fmt: skip
    return {
        "site": {"name": patch.site.name, "indices": indices, "basis": _basis(patch.site.basis, tensors)},
        "hook_point": None if patch.site.point is None else trace_of(patch.site.point),
        "edit": type(edit).__name__,
        "operands": {name: _operand(operand, name, tensors) for name, operand in operands.items()},
        "where": _operand(patch.where, "where", tensors),
    }


def _patch(record: Mapping[str, Any], tensor: Callable[..., Tensor], device: torch.device) -> Patch:
    def operand(given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if "float" in given:
            return float(given["float"])
        return tensor(given["tensor"], (*given["order"],), device)

    kind, indices = record["edit"], record["site"]["indices"]
    if kind not in _EDITS:
        raise InterventionError(
            f"contains a patch with the edit {kind!r}, but this version of chanpatch supports only {', '.join(_EDITS)}."
        )
    chosen = {axis: slice(*each["slice"]) if isinstance(each, dict) else each for axis, each in indices.items()}
    edit = _EDITS[kind](**{name: operand(given) for name, given in record["operands"].items()})
    site = Site(record["site"]["name"], **chosen)
    if basis := record["site"].get("basis"):  # not in files of earlier formats
        matrix, mean = operand(basis["matrix"]), operand(basis["mean"])
        site = site.with_basis(basis["axis"], Directions(matrix) if mean is None else PCA(matrix, mean))
    return Patch(site, edit, operand(record["where"]))


def _basis(along: Along | None, tensors: dict[int, tuple[str, Tensor]]) -> dict[str, Any] | None:
    """Return a site's basis as JSON data, or None if the site has no basis. Only Directions and PCA can be saved."""
    if along is None:
        return None
    basis = along.basis
    if type(basis) not in (Directions, PCA):
        raise InterventionError(
            f"its basis is of type {type(basis).__name__}, which is code. A file can contain only Directions or PCA. "
            "Save the weights of the basis with torch.save, load them later, and create the site again."
        )
    mean = _operand(getattr(basis, "mean", None), "mean", tensors)
    return {"axis": along.axis, "matrix": _operand(basis.matrix, "matrix", tensors), "mean": mean}


def _operand(operand: Any, name: str, tensors: dict[int, tuple[str, Tensor]]) -> Any:
    """Return an operand as JSON data. If the operand is a tensor that is not in `tensors` yet, add it to `tensors`."""
    if isinstance(operand, Tensor):
        _refuse_unstorable(operand, name)
        # Keep the memory order: sums over channels-last and contiguous tensors round differently.
        strides = operand.stride()
        order = sorted(range(operand.dim()), key=lambda axis: -strides[axis])
        if id(operand) not in tensors:
            dense = operand.detach().permute(order).cpu().clone(memory_format=torch.contiguous_format)
            tensors[id(operand)] = str(len(tensors)), dense
        return {"tensor": tensors[id(operand)][0], "order": order}
    if operand is None or isinstance(operand, (bool, str)):
        return operand
    with suppress(TypeError):
        return operator.index(operand)
    return {"float": repr(float(operand))}  # as text: JSON has no NaN or infinity


def _refuse_unstorable(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise InterventionError(f"its {name} is on the meta device, which stores no data. Pass a tensor with data.")
    if tensor.layout != torch.strided:
        raise InterventionError(f"its {name} has layout {tensor.layout}. Make the tensor dense: {name}.to_dense().")
    try:
        imported("safetensors.torch").save({name: torch.empty(0, dtype=tensor.dtype)})
    except (KeyError, RuntimeError) as fault:  # RuntimeError for quantized dtypes
        raise InterventionError(
            f"its {name} has dtype {tensor.dtype}, which safetensors cannot store. Convert the tensor first."
        ) from fault
