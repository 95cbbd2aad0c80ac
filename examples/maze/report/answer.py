"""The answer: which predictions (`predictions.md`) are confirmed, and the numbers that decide the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chanpatch.statistics import holm
from maze.analysis.cells import Row, Tables, chosen, shown
from maze.analysis.forwards import SITE
from maze.analysis.part import SPLITS, Finding
from maze.measurements import counterfactual, default, direction, share

LEVEL = 0.05  # of the corrected p-values
CONFIRMED, IN_PART, OPEN, MISSING = "confirmed", "confirmed in part", "not confirmed", "not measured"
_OTHERWISE = {
    IN_PART: "it is confirmed only in part that ",
    OPEN: "it is not confirmed that ",
    MISSING: "it was not measured whether ",
    CONFIRMED: "",
}

# The claims in the three sentences of the answer, by part.
CLAIMS = (
    {"default": "the corner is the mouse's default, which the cheese corrects less out of distribution than in it"},
    {
        "share": "a few channels, the best of each direction, carry much of the cheese's effect",
        "counterfactual": "if these channels act as without the cheese, the mouse finds it less often",
    },
    {
        "direction": "one direction of relu3, “the corner is UP”, carries much of the preference for the corner",
        "dose": "the higher the UP channel is scaled, the less often the mouse finds the cheese",
    },
)


@dataclass(frozen=True)
class Estimate:
    """The place of one estimate in the tables of a part."""

    table: str
    prefix: str  # of its cells
    form: str
    where: Mapping[str, Any] = field(default_factory=dict)
    n: str = "n"  # column
    title: str = ""  # of a panel

    def row(self, tables: Tables) -> Row | None:
        """The first row with the estimate; None if it was not measured."""
        rows = chosen(tables.get(self.table, ()), **self.where)
        return next((row for row in rows if row[self.prefix] is not None), None)

    def text(self, tables: Tables) -> str:
        row = self.row(tables)
        return MISSING if row is None else shown(row, self.prefix, self.form)


_OUT, _UP = {"split": SPLITS[1]}, {"direction": "UP"}
_REMOVED, _BEST = _OUT | {"picture": default.PICTURES[1]}, _OUT | {"channels": counterfactual.BEST}
_ZEROED = {"role": "UP", "cheese": "bottom right", "kind": "zero"}
PREDICTED = {
    "default": Estimate("odds", "log_odds", "+.1f", _REMOVED, title="log odds,\ncheese removed"),
    "share": Estimate("shares", "share", ".0%", _OUT | {"set": share.BEST}, title="effect carried,\nbest channels"),
    "direction": Estimate(
        "choices", "log_odds_change", "+.1f", {"projected": direction.OWN}, title="log odds,\ndirection removed"
    ),
    "counterfactual": Estimate("effects", "effect", "+.2f", _BEST, title="P(cheese),\ncounterfactual"),
    "dose": Estimate("slope", "slope", "+.2f", title="P(cheese),\nper unit of dose"),
}
# The number that decides each part; `argument.jinja` has the words.
NUMBERS = PREDICTED | {
    "pair": Estimate("told", "share", ".0%", n="pairs"),
    "search": Estimate("hook_points", "in", ".2f", {"hook_point": SITE} | _UP, "n_in"),
    "ranking": Estimate("agreement", "spearman", "+.2f", n="channels"),
    "sums": Estimate("precise", "shifted", ".0%", _UP, "n_shifted"),
    "decision": Estimate("choices", "to_cheese", ".0%", _OUT | _UP | {"squares": "accepted"}),
    "ablation": Estimate("effects", "effect", "+.2f", _ZEROED),
    "distance": Estimate("trends", "correlation", "+.2f"),
    "top16": Estimate("effects", "effect", "+.2f", {"measure": "found"}),
    "spatial": Estimate("shares", "share", ".0%", {"role": "UP"}),
    "sizes": Estimate("sizes", "beyond_walls", "+.2f", _UP),
    "parity": Estimate("between", "rank_correlation", "+.2f", n="n_vertical"),
    "generator": Estimate("overall", "share", ".1%"),
    "cheese-vector": Estimate("effects", "effect", "+.2f", {"measure": "found"}),
    "corner-vector": Estimate("effects", "effect", "+.2f", {"measure": "corner"}),
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


def sentences(statuses: Mapping[str, str]) -> list[str]:
    """The answer in three sentences, which follow from the status of each prediction."""
    joined = ["; ".join(_OTHERWISE[statuses[part]] + claim for part, claim in group.items()) for group in CLAIMS]
    return [f"{each[0].upper()}{each[1:]}." for each in joined]
