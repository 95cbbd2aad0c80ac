"""The answer: which predictions (`predictions.md`) are confirmed, and the numbers that decide the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chanpatch.statistics import holm
from maze.analysis.cells import Row, Tables, chosen, shown
from maze.analysis.part import SPLITS, Finding
from maze.measurements import corner_vector, counterfactual, default, direction, share, spatial, sums

LEVEL = 0.05  # of the corrected p-values
CONFIRMED, IN_PART, OPEN, MISSING = "confirmed", "confirmed in part", "not confirmed", "not measured"


@dataclass(frozen=True)
class Estimate:
    """The place of one estimate in the tables of a part; `argument.jinja` has the words for it."""

    table: str
    prefix: str  # of its cells
    form: str
    where: Mapping[str, Any] = field(default_factory=dict)  # as in a `Panel`
    n: str = "n"  # column
    lowest: bool = False  # of the rows, instead of the first
    title: str = ""  # of a panel

    def row(self, tables: Tables) -> Row | None:
        """The row with the estimate; None if it was not measured."""
        rows = [row for row in chosen(tables.get(self.table, ()), **self.where) if row.get(self.prefix) is not None]
        return min(rows, key=lambda row: row[self.prefix] if self.lowest else 0, default=None)

    def text(self, tables: Tables) -> str:
        row = self.row(tables)
        return MISSING if row is None else shown(row, self.prefix, self.form)


_IN, _OUT, _UP = {"split": SPLITS[0]}, {"split": SPLITS[1]}, {"direction": "UP"}
_REMOVED, _BEST = _OUT | {"picture": default.PICTURES[1]}, _OUT | {"channels": counterfactual.BEST}
_PRECISION = _UP | {"quantity": lambda name: name.startswith(sums.EQUAL_RATES)}
_CORNER = _OUT | _UP | {"squares": "accepted", "leads_to": "corner", "goes": True}
_ZEROED = {"role": "UP", "cheese": "bottom right", "kind": "zero"}
_JUDGED = {"measure": "corner", "control": lambda name: name in corner_vector.JUDGES}
_NEAR = {"role": lambda role: role != "control", "distance": spatial.NEAR}
PREDICTED = {
    "default": Estimate("odds", "log_odds", "+.1f", _REMOVED, title="log odds,\ncheese removed"),
    "share": Estimate("shares", "share", ".0%", _OUT | {"set": share.BEST}, title="effect carried,\nbest channels"),
    "direction": Estimate(
        "choices", "log_odds_change", "+.1f", {"projected": direction.OWN}, title="log odds,\ndirection removed"
    ),
    "counterfactual": Estimate("effects", "effect", "+.2f", _BEST, title="P(cheese),\ncounterfactual"),
    "dose": Estimate("slope", "slope", "+.2f", title="P(cheese),\nper unit of dose"),
}
# P(cheese) without the direction, which the first page states beside the choice on decision squares.
EPISODES = Estimate("episodes", "effect", "+.2f", {"projected": direction.OWN})
# The number that decides each part.
NUMBERS = PREDICTED | {
    "pair": Estimate("falls", "share", ".0%", n="pairs"),
    "search": Estimate("contrast", "effect", "+.1f", _UP, "pairs"),
    "ranking": Estimate("agreement", "spearman", "+.2f", n="channels"),
    "sums": Estimate("precise", "drop", "+.2f", _PRECISION, "n_shifted"),
    "decision": Estimate("squares", "share", ".0%", _CORNER),
    "ablation": Estimate("effects", "effect", "+.2f", _ZEROED),
    "distance": Estimate("trends", "correlation", "+.2f"),
    "top16": Estimate("effects", "effect", "+.2f", {"measure": "found"}),
    "spatial": Estimate("shares", "share", ".0%", _NEAR, lowest=True),
    "sizes": Estimate("sizes", "beyond_walls", "+.2f", _IN, lowest=True),
    "parity": Estimate("between", "rank_correlation", "+.2f", n="n_one"),
    "generator": Estimate("overall", "share", ".1%", lowest=True),
    "cheese-vector": Estimate("ignoring", "own_minus_unseen", "+.2f"),
    "corner-vector": Estimate("against", "own_minus_control", "+.2f", _JUDGED, lowest=True),
    "retarget": Estimate("effects", "effect", "+.2f"),
    "statistics": Estimate("scores", "gain", "+.2f"),
    "random-mazes": Estimate("behaviour", "right", ".0%", {"share": 0.5}),
    "hypothesis": Estimate("predictions", "gain", "+.2f", _OUT),
}


def corrected(parts: Mapping[str, Tables]) -> dict[str, float]:
    """Holm's p-values of the primary claims; a part that was not measured counts as a test with p = 1."""
    raw = [parts[part]["primary"][0]["p"] if part in parts else 1.0 for part in PREDICTED]
    return dict(zip(PREDICTED, holm(raw).tolist(), strict=True))


def status(found: Finding | None, p: float) -> str:
    """Confirmed if all criteria hold and the corrected p-value is small; in part if only some of this holds."""
    if found is None:
        return MISSING
    if found.agrees == "yes" and p <= LEVEL:
        return CONFIRMED
    return IN_PART if found.agrees in ("yes", "in part") else OPEN
