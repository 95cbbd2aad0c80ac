"""What patches have done, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .patch import Patch, edit_name


class Ledger:
    """What each patch has done: how often it fired, on how many rows and elements, by method.

    Counted from shapes alone; with a `where`, from the mask, on its device, until somebody reads.
    """

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._patches = tuple(patches)
        self._counts: dict[tuple[str, int], tuple[Any, ...]] = {}

    def count(self, method: str | None, number: int, rows: Any, elements: Any) -> None:
        """Add one firing of a patch, on so many rows and elements."""
        key = method or "", number
        firings, total_rows, total_elements = self._counts.get(key, (0, 0, 0))
        total_rows = None if rows is None or total_rows is None else total_rows + rows
        self._counts[key] = firings + 1, total_rows, total_elements + elements

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per method and patch: method, site, edit, firings, rows, elements.

        A patch that never fired has a record with zeros. `rows` is None where the batch axis is not proved.
        """
        keys = [
            *self._counts,
            *((("", n)) for n in range(len(self._patches)) if all(n != k for _, k in self._counts)),
        ]
        records = []
        for method, number in sorted(keys, key=lambda key: (key[1], key[0])):
            firings, rows, elements = self._counts.get((method, number), (0, 0, 0))
            patch = self._patches[number]
            records.append(
                {
                    "method": method,
                    "site": repr(patch.site),
                    "edit": edit_name(patch.edit),
                    "firings": firings,
                    "rows": None if rows is None else int(rows),
                    "elements": int(elements),
                }
            )
        return records

    def __repr__(self) -> str:
        lines = [
            f"{r['site']} {r['edit']}: {r['firings']} firings, {r['rows']} rows, {r['elements']} elements"
            + (f" in {r['method']}()" if r["method"] not in ("", "__call__") else "")
            for r in self.to_records()
        ]
        return "\n".join(lines) or "no patches"


def touched(region: torch.Size, batch_axis: int | None, mask: Tensor | None = None) -> tuple[Any, Any]:
    """Return how many rows, None without a batch axis, and elements of a region of this shape a patch applies to."""
    rows: Any = None if batch_axis is None else region[batch_axis]
    elements: Any = region.numel()
    if mask is None:
        return rows, elements
    if batch_axis is not None:
        others = [axis for axis in range(mask.dim()) if axis != batch_axis]
        chosen = mask.any(dim=others) if others else mask
        rows = chosen.sum() * (rows if mask.shape[batch_axis] == 1 else 1)
    return rows, mask.sum() * (elements // max(mask.numel(), 1))
