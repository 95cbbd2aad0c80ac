"""What patches have done, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..results import Records
from .firing import Firing
from .patch import edit_name


class Ledger(Records):
    """Counts of what each patch wrote: firings, rows and elements, by method.

    Counted from shapes alone. With a `where` the mask is counted on its device, and read when you look.
    """

    _most = None

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

    def _lines(self) -> list[dict[str, Any]]:
        records = self.to_records()
        if {record["method"] for record in records} <= {"", "__call__"}:
            return [{name: value for name, value in record.items() if name != "method"} for record in records]
        return records

    def _title(self) -> str:
        return f"Ledger of {len(self._firings)} patch{'es' * (len(self._firings) != 1)}"
