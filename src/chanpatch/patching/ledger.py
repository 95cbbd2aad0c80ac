"""What patches have done, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .firing import Firing
from .patch import edit_name


class Ledger:
    """What each patch has done: how often it fired, on how many rows and elements, by method.

    Counted from shapes alone. With a `where` the mask is counted on its device, and read when you look.
    """

    def __init__(self, firings: Sequence[Firing]) -> None:
        self._firings = firings

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch and method: method, site, edit, firings, rows, elements.

        A patch that never fired has a record with zeros. `rows` is None if the batch axis is not proved.
        """
        return [
            {
                "method": method,
                "site": repr(each.patch.site),
                "edit": edit_name(each.patch.edit),
                "firings": firings,
                "rows": None if rows is None else int(rows),
                "elements": int(elements),
            }
            for each in self._firings
            for method, (firings, rows, elements) in sorted(each.counts.items()) or [("", (0, 0, 0))]
        ]

    def __repr__(self) -> str:
        lines = [
            f"{r['site']} {r['edit']}: {r['firings']} firings, {r['rows']} rows, {r['elements']} elements"
            + (f" in {r['method']}()" if r["method"] not in ("", "__call__") else "")
            for r in self.to_records()
        ]
        return "\n".join(lines) or "no patches"
