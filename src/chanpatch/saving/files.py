"""Files of interventions: written whole or not at all, read without running anything that is in them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.inputs import Inputs
from ..errors import ChanpatchError, InterventionError
from ..patching.patch import Patch
from ..registry.lookup import bound, refuse_untraced
from ..registry.points import HookPoints
from ..results import imported, table
from .format import Operands, TracedPoint, decoded, encoded, in_one
from .receipts import Receipt, receipt_of

_FORMAT = 1


_KEY = "chanpatch"  # of the one entry in the metadata; with one, equal patches make equal files


@dataclass(frozen=True, repr=False, eq=False)
class Contents:
    """What a file of interventions holds; it prints as a table.

    Attributes:
        patches: In order of application.
        hook_points: Of each patch, what the file knows of its hook point; None where its site had no trace.
        chanpatch: The version that saved the file.
        receipt: Of a run with the patches, or None if they were saved without inputs.
    """

    patches: tuple[Patch, ...]
    hook_points: tuple[TracedPoint | None, ...]
    chanpatch: str
    receipt: Receipt | None

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch: patch, site, edit, where, hook point."""
        return [
            {
                "patch": number,
                "site": repr(patch.site),
                "edit": _edit_text(patch.edit),
                "where": "everywhere" if patch.where is None else _operand_text(patch.where),
                "hook point": "not traced" if traced is None else _traced_text(traced),
            }
            for number, (patch, traced) in enumerate(zip(self.patches, self.hook_points, strict=True), start=1)
        ]

    def __repr__(self) -> str:
        receipt = ["No receipt: saved without inputs."]
        if self.receipt is not None:
            receipt = ["Receipt:", *(f"  {name}  {text}" for name, text in asdict(self.receipt).items())]
        count = f"{len(self.patches)} patch{'es' if len(self.patches) != 1 else ''}"
        title = f"{count}, saved by chanpatch {self.chanpatch}"
        return _printable("\n".join([title, *table(self.to_records()), *receipt]))


def save(
    file: str | os.PathLike[str],
    patches: Patch | Iterable[Patch],
    points: HookPoints | None = None,
    *,
    inputs: Inputs | None = None,
) -> None:
    """Save patches as data, in one file in the format of safetensors; nothing is returned.

    The file takes its name when it is complete, so that an older one of that name stays if saving fails. With inputs
    it holds a receipt, for which the model runs twice: as the patches are, and as they are read back from the file.
    Operands are saved without their autograd graph.

    Args:
        file: Where; `.safetensors` is the usual ending.
        patches: One or more, in order of application. Their edits are those of `chanpatch.patching`, and every `where`
            a mask.
        points: The hook points that they are for. Sites that were taken from `HookPoints.site` know theirs already.
        inputs: To run the model with, in the receipt: a tensor, a tuple of arguments, or a mapping of keywords.

    Raises:
        InterventionError: If a patch holds a function, or an operand that safetensors has no type for, all faults at
            once; if inputs come without points; or if a forward with the patches does not repeat bit for bit.
        HookPointError, SiteError: If a site does not exist in `points`.
        UnreachedError: If a patch never runs on the inputs.
        MissingPackageError: If safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from chanpatch import hook_points, zero_ablate
        >>> points = hook_points(nn.Linear(2, 3), torch.ones(4, 2))
        >>> file = Path(tempfile.mkdtemp(), "ablation.safetensors")
        >>> save(file, zero_ablate(points.site(".out", feature=1)), points, inputs=torch.ones(4, 2))
        >>> load(file, points)
        [Patch(Site('.out', feature=1), Set)]
        >>> receipt = verify(file, points, torch.ones(4, 2))
    """
    safetensors = imported("safetensors.torch")
    path = Path(file)
    chosen = _checked(patches)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{path.parent}' to save '{path.name}' in.")
    if inputs is not None and points is None:
        raise InterventionError("A receipt of inputs needs the model: save(file, patches, points, inputs=inputs).")
    if points is not None:
        refuse_untraced(points)
        chosen = _bound(points, chosen)
    records, tensors = encoded(chosen)
    run = None if points is None or inputs is None else functools.partial(receipt_of, points, inputs=inputs)
    receipt = None if run is None else run(chosen)
    metadata = {
        "format": _FORMAT,
        "chanpatch": version("chanpatch"),
        "patches": records,
        "receipt": None if receipt is None else asdict(receipt),
    }
    written = safetensors.save(tensors, {_KEY: json.dumps(metadata, allow_nan=False)})
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        unfinished.write_bytes(written)
        if run is not None and run(load(unfinished, points)) != receipt:
            raise InterventionError(
                "The patches were not saved: the forward, run twice, gave two outputs, so that no receipt can be of "
                "use. Make it repeat, as with torch.use_deterministic_algorithms(True), or save without inputs."
            )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(
    file: str | os.PathLike[str],
    points: HookPoints | None = None,
    *,
    device: str | torch.device | None = None,
) -> list[Patch]:
    """Return the patches of a file, in order of application.

    Nothing in a file is ever run: it is data, and its edits are those of `chanpatch.patching`.

    Args:
        file: That `save` wrote.
        points: The hook points to check the patches against: same names, axes, shapes, dtypes and module types.
        device: Where the operands go. None is the device of each patch's hook point, or the CPU without points.

    Raises:
        InterventionError: If the file is damaged, foreign or of a later format, or does not fit the points, all
            faults at once.
        OSError: If the file cannot be read.
        MissingPackageError: If safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from chanpatch import Site, steer
        >>> file = Path(tempfile.mkdtemp(), "steering.safetensors")
        >>> save(file, steer(Site("fc"), torch.tensor([[1.0, 0.0]]), coefficient=-2.0))
        >>> load(file)[0].edit
        Add(vector=tensor([[1., 0.]]), coefficient=-2.0)
    """

    def device_of(name: str) -> torch.device:
        if device is not None:
            return torch.device(device)
        return points[name].device if points is not None and name in points else torch.device("cpu")

    if points is not None:
        refuse_untraced(points)
    found = _read(file, device_of)
    return list(found.patches if points is None else _fitted(file, found, points))


def verify(file: str | os.PathLike[str], points: HookPoints, inputs: Inputs) -> Receipt:
    """Return the receipt of a file, after repeating its run here with the same result bit for bit.

    Args:
        file: That `save` wrote with inputs.
        points: Of the model.
        inputs: Those that it was saved with.

    Raises:
        InterventionError: If hook points, weights, inputs or the patched output are not the same, or the file holds
            no receipt; otherwise as `load`.
        OSError: If the file cannot be read.
        MissingPackageError: If safetensors is not installed.
    """
    saved = contents(file).receipt
    patches = load(file, points)
    if saved is None:
        raise InterventionError(
            f"'{file}' holds no receipt, so there is no output to compare with. Save the patches with inputs: "
            "save(file, patches, points, inputs=inputs)."
        )
    here = receipt_of(points, patches, inputs)
    if here == saved:
        return saved
    changed = saved.differences(here)
    same = [name for name in ("hook points", "weights", "inputs", "output") if name not in changed]
    advice = " So it is the model's code, or what computes it." if changed == ["output"] else ""
    raise InterventionError(
        f"'{file}' does not repeat here. Not the same: {', '.join(changed)}. The same: {', '.join(same)}.{advice} "
        f"In the file: {_printable(saved.environment)}. Here: {here.environment}."
    )


def contents(file: str | os.PathLike[str]) -> Contents:
    """Return what a file holds: its patches, with operands on the CPU, and what is known of how they were made.

    Args:
        file: That `save` wrote.

    Raises:
        InterventionError: If the file is damaged, foreign or of a later format.
        OSError: If the file cannot be read.
        MissingPackageError: If safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from chanpatch import Site, zero_ablate
        >>> file = Path(tempfile.mkdtemp(), "ablation.safetensors")
        >>> save(file, zero_ablate(Site("relu", channel=[3, 5])))
        >>> print(contents(file))  # doctest: +ELLIPSIS
        1 patch, saved by chanpatch ...
        patch  site                          edit            where       hook point
        1      Site('relu', channel=[3, 5])  Set(value=0.0)  everywhere  not traced
        No receipt: saved without inputs.
    """
    return _read(file, lambda name: torch.device("cpu"))


def _read(file: str | os.PathLike[str], device_of: Callable[[str], torch.device]) -> Contents:
    safetensors = imported("safetensors")
    path = Path(file)
    path.open("rb").close()  # what cannot be opened is told by Python itself
    try:
        with safetensors.safe_open(path, framework="pt") as archive:
            text = (archive.metadata() or {}).get(_KEY)
            if text is None:
                raise InterventionError("holds no interventions: chanpatch.save() did not write it.")
            metadata = json.loads(text)
            if metadata["format"] > _FORMAT:
                raise InterventionError(
                    f"has format {metadata['format']}, but chanpatch {version('chanpatch')} reads up to {_FORMAT}. "
                    "Install a later chanpatch."
                )
            operands = Operands(archive.get_tensor)
            pairs = [decoded(record, operands, device_of) for record in metadata["patches"]]
            receipt = metadata["receipt"]
            return Contents(
                patches=tuple(patch for patch, _ in pairs),
                hook_points=tuple(traced for _, traced in pairs),
                chanpatch=str(metadata["chanpatch"]),
                receipt=None if receipt is None else Receipt(**{name: str(each) for name, each in receipt.items()}),
            )
    except InterventionError as fault:
        raise InterventionError(f"'{file}' {_printable(str(fault))}") from None
    except safetensors.SafetensorError as fault:
        raise InterventionError(f"'{file}' is damaged, or no safetensors file: {_printable(str(fault))}.") from fault
    except Exception as fault:  # there is no end to what a damaged file may hold
        raise InterventionError(f"'{file}' is damaged: {type(fault).__name__}: {_printable(str(fault))}") from fault


def _printable(text: str) -> str:
    """Write control characters out: a file may be anybody's, and a terminal obeys them."""
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def _checked(patches: Patch | Iterable[Patch]) -> list[Patch]:
    each = [patches] if isinstance(patches, Patch) else list(patches)
    for patch in each:
        if not isinstance(patch, Patch):
            raise TypeError(f"Expected a Patch, not {type(patch).__name__}: zero_ablate(Site('conv1', channel=5)).")
    if not each:
        raise InterventionError("There are no patches to save. Give one or more.")
    return each


def _bound(points: HookPoints, patches: Sequence[Patch]) -> list[Patch]:
    sites = bound(points, [patch.site for patch in patches])
    return [Patch(site, patch.edit, patch.where) for site, patch in zip(sites, patches, strict=True)]


def _fitted(file: str | os.PathLike[str], found: Contents, points: HookPoints) -> list[Patch]:
    """Return the patches, bound to hook points that are as they were when the file was saved."""
    patches, faults = [], []
    for patch, traced in zip(found.patches, found.hook_points, strict=True):
        name = patch.site.name
        try:
            here = TracedPoint.of(points[name])
            changed = [] if traced is None else here.differences(traced)
            if changed:
                told = "; ".join(
                    f"{what.replace('_', ' ')} {own!r} here, {other!r} in the file" for what, own, other in changed
                )
                faults.append(f"Hook point '{name}' has {told}.")
            else:
                patches += _bound(points, [patch])
        except ChanpatchError as fault:
            faults.append(str(fault))
    if faults:
        raise InterventionError(
            f"'{file}' does not fit this model. {in_one(list(dict.fromkeys(faults)))}\n"
            "Without points, load(file) returns the patches as they are."
        )
    return patches


def _edit_text(edit: Any) -> str:
    operands = [(item.name, getattr(edit, item.name)) for item in fields(edit)]
    return f"{type(edit).__name__}({', '.join(f'{name}={_operand_text(each)}' for name, each in operands)})"


def _operand_text(operand: Any) -> str:
    if isinstance(operand, Tensor):
        return f"{str(operand.dtype).removeprefix('torch.')} {tuple(operand.shape)}"
    return repr(operand)


def _traced_text(traced: TracedPoint) -> str:
    return f"{traced.module_type} ({', '.join(map(str, traced.axes))}) {traced.dtype}"
