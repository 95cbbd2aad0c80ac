"""Save patches to files, load patches from files, and verify saved runs."""

from __future__ import annotations

import glob
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..engine.inputs import Inputs
from ..errors import ChanpatchError, InterventionError, counted, in_one
from ..patching.contexts import checked_patches
from ..patching.patch import Patch
from ..registry.points import HookPoints, traced
from ..results import Records
from .format import decoded, encoded, printable, regular, trace_of
from .receipts import Receipt, receipt_of


@dataclass(frozen=True, repr=False, eq=False)
class Contents(Records):
    """The contents of a patch file.

    Attributes:
        patches: Patches in the order in which they are applied.
        hook_points: For each patch, a string with the module type, axes, shape and dtype of the patch's hook point;
            None if the site was not traced.
        chanpatch: Version of chanpatch that saved the file.
        receipt: Receipt for the run with the patches; None if the patches were saved without inputs.
        checksum: SHA-256 checksum of the operands and the metadata, which is verified when the file is read.
    """

    patches: tuple[Patch, ...]
    hook_points: tuple[str | None, ...]
    chanpatch: str
    receipt: Receipt | None
    checksum: str
    _most = None

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch, with the keys patch (a number), site, edit, where and hook point."""
        return [
            {
                "patch": number,
                "site": repr(patch.site),
                "edit": _edit_text(patch.edit),
                "where": "everywhere" if patch.where is None else _operand_text(patch.where),
                "hook point": trace or "not traced",
            }
            for number, (patch, trace) in enumerate(zip(self.patches, self.hook_points, strict=True), start=1)
        ]

    def __repr__(self) -> str:
        return printable(super().__repr__())

    def _title(self) -> str:
        return f"{counted(len(self.patches), 'patch')}, saved by chanpatch {self.chanpatch}"

    def _notes(self) -> list[str]:
        checksum = f"Checksum: {self.checksum}"
        if self.receipt is None:
            return [checksum, "No receipt: saved without inputs."]
        return [checksum, "Receipt:", *(f"  {name}  {text}" for name, text in asdict(self.receipt).items())]


def save(
    file: str | os.PathLike[str],
    patches: Patch | Iterable[Patch],
    points_or_model: HookPoints | nn.Module | None = None,
    *,
    inputs: Inputs | None = None,
) -> None:
    """Save patches as data in one safetensors file.

    If saving fails, an existing file stays unchanged. If `inputs` are given, the file also contains a receipt. To
    create and check the receipt, the model runs twice: once with the given patches, and once with the patches read back
    from the file. Operands are saved without their autograd graph.

    Args:
        file: Path of the file, usually ending in `.safetensors`.
        patches: One or more patches, in the order in which they are applied. Edits must be from `chanpatch.patching`;
            `where` cannot be a function.
        points_or_model: Hook points to check the patches against, or the model, which is traced with the inputs.
        inputs: Model inputs for the receipt: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        InterventionError: If a patch contains a function, or a tensor that safetensors cannot store; if there are no
            patches; if there are inputs but no model; if `file` is a folder, pipe or device; or if the second run does
            not reproduce the first bit for bit.
        HookPointError, SiteError: If a site does not exist in the model.
        UnreachedError: If a patch never runs on the inputs.
        MissingPackageError: If safetensors is not installed.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from chanpatch import hook_points, zero_ablate
        >>> points = hook_points(nn.Linear(2, 3), torch.ones(4, 2))
        >>> file = Path(tempfile.mkdtemp(), "ablation.safetensors")
        >>> save(file, zero_ablate(points.site(".out", feature=1)), points, inputs=torch.ones(4, 2))
        >>> load(file, points)
        [Patch(Site('.out', feature=1), Set)]
        >>> receipt = verify(file, points, torch.ones(4, 2))
    """
    path = regular(file)
    points = None if points_or_model is None else traced(points_or_model, inputs)
    chosen = checked_patches(points, patches)
    if not chosen:
        raise InterventionError("There are no patches to save. Pass at least one patch.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"Cannot save '{path.name}': the folder '{path.parent}' does not exist.")
    if inputs is not None and points is None:
        raise InterventionError("inputs were passed without a model. Call save(file, patches, points, inputs=inputs).")
    receipt = None if inputs is None or points is None else receipt_of(points, chosen, inputs)
    with _partial(path, encoded(chosen, receipt)) as partial:
        if points and inputs is not None and receipt_of(points, load(partial, points), inputs) != receipt:
            raise InterventionError(
                "The patches were not saved: two forward passes gave different outputs, so the receipt could not be "
                "verified. Make the model deterministic, for example with torch.use_deterministic_algorithms(True), or "
                "save without inputs."
            )
        os.replace(partial, path)


def load(file: str | os.PathLike[str], points: HookPoints | None = None) -> list[Patch]:
    """Load patches from a file, in the order in which they are applied. Loading never runs code from the file.

    Args:
        file: Path of a file written by `save`.
        points: Hook points to check the patches against: names, axes, shapes, dtypes and module types must match. Each
            operand is moved to the device of its patch's hook point; if `points` is None, operands stay on the CPU.

    Raises:
        InterventionError: If the file is damaged, was not written by `save`, has an unknown format, or does not match
            the hook points. One error lists all mismatches.
        OSError: If the file cannot be read.
        MissingPackageError: If safetensors is not installed.
    """
    if points is None:
        return list(contents(file).patches)
    points = traced(points, None)
    found, traces, *_ = decoded(file, points)
    patches: list[Patch] = []
    faults: dict[str, None] = {}
    for patch, saved in zip(found, traces, strict=True):
        try:
            here = trace_of(points[patch.site.name])
            if saved not in (None, here):
                raise InterventionError(
                    f"Hook point '{patch.site.name}' is {here} in this model, but {saved} in the file."
                )
            patches += checked_patches(points, patch)
        except ChanpatchError as fault:
            faults[printable(str(fault))] = None
    if faults:
        raise InterventionError(
            f"'{file}' does not match this model. {in_one(list(faults))}\n"
            "To load the patches without checks, call load(file) without points."
        )
    return patches


def verify(file: str | os.PathLike[str], points_or_model: HookPoints | nn.Module, inputs: Inputs) -> Receipt:
    """Repeat the saved run, verify that the output is the same bit for bit, and return the file's receipt.

    Args:
        file: Path of a file written by `save` with inputs.
        points_or_model: Hook points of the model, or the model, which is traced with the inputs.
        inputs: The inputs that were passed to `save`.

    Raises:
        InterventionError: If the hook points, the weights, the inputs or the patched output differ from the saved
            run; if the file has no receipt; or for the same reasons as in `load`.
    """
    points = traced(points_or_model, inputs)
    saved, patches = contents(file).receipt, load(file, points)
    if saved is None:
        raise InterventionError(
            f"'{file}' has no receipt, so there is no output to compare with. Save the patches with inputs: "
            "save(file, patches, points, inputs=inputs)."
        )
    here = receipt_of(points, patches, inputs)
    if here == saved:
        return saved
    changed = [name for name in ("weights", "inputs", "output") if getattr(here, name) != getattr(saved, name)]
    same = [name for name in ("hook points", "weights", "inputs", "output") if name not in changed]
    cause = " The difference must therefore come from the model's code or the environment." * (changed == ["output"])
    raise InterventionError(
        f"The run in '{file}' was not reproduced. Different: {', '.join(changed)}. Same: {', '.join(same)}.{cause} "
        f"Environment in the file: {printable(saved.environment)}; environment here: {here.environment}."
    )


def contents(file: str | os.PathLike[str]) -> Contents:
    """Return the contents of a file: patches (with operands on the CPU), the patches' hook points, and the receipt.

    Raises:
        InterventionError: For the same reasons as in `load` without hook points.

    Example:
        >>> import tempfile
        >>> from chanpatch import Site, zero_ablate
        >>> file = Path(tempfile.mkdtemp(), "ablation.safetensors")
        >>> save(file, zero_ablate(Site("relu", channel=[3, 5])))
        >>> print(contents(file))  # doctest: +ELLIPSIS
        1 patch, saved by chanpatch ...
        patch  site                          edit            where       hook point
        1      Site('relu', channel=[3, 5])  Set(value=0.0)  everywhere  not traced
        Checksum: ...
        No receipt: saved without inputs.
    """
    return Contents(*decoded(file, points=None))


@contextmanager
def _partial(path: Path, content: bytes) -> Iterator[Path]:
    """Write `content` to a hidden file next to `path`, yield the hidden file's path, and remove the file on exit.

    First, remove the hidden files that killed processes left behind for the same path at least a minute ago.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.partial"):
        with suppress(OSError):  # another thread may have removed the file
            if time.time() - left.lstat().st_mtime > 60:
                left.unlink()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as stream:  # "x" raises an error if a file or link with this name exists
            stream.write(content)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _edit_text(edit: Any) -> str:
    operands = [f"{item.name}={_operand_text(getattr(edit, item.name))}" for item in fields(edit)]
    return f"{type(edit).__name__}({', '.join(operands)})"


def _operand_text(operand: Any) -> str:
    if isinstance(operand, Tensor):
        return f"{str(operand.dtype).removeprefix('torch.')} {tuple(operand.shape)}"
    return repr(operand)
