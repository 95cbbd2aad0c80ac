"""Does the sum of a channel predict the path to the cheese, in distribution and out of it?

Method: Size 25, mouse on a random square with the direction free; per direction the channel chosen on other mazes; AUCs
are over all n of these. Two thresholds are fitted on half of the mazes in distribution and scored on the other half and
out of distribution: the threshold that divides best, and the smallest with precision {PRECISION:g}. A logistic
regression on the sums of all channels is the comparison. The verdict: above the precise threshold for UP, the precision
is lower out of distribution than in distribution, at the same base rate.

The post: Above 30, channel 121 means UP almost surely in distribution, and does not outside (n=1000 each).

Limits: The result does not show that the channel encodes the cheese: the paths to the cheese and to the corner start
alike in most mazes. Other parts report other AUCs of the same channel, as they use other mazes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanpatch import ThresholdProbe
from chanpatch.errors import ProbeError
from chanpatch.plots import strip
from maze.analysis.cells import Flags, Row, Table, Tables, Values, above, chosen, keyed, shown, verdict
from maze.analysis.decision_squares import PRECISION, precise_threshold
from maze.analysis.drawing import panels
from maze.analysis.estimates import intervals, minus
from maze.analysis.forwards import SITE, level_sums
from maze.analysis.part import POOL, SPLITS, TOO_FEW, Finding, Study, open_to, towards_corner
from maze.analysis.readings import area, readout
from maze.paths import Direction

SIZE = 25
EQUAL_RATES = "precision at the base rate"  # start of the quantity that is compared in and out of distribution

Sums: TypeAlias = tuple[Values, Flags]  # one channel's sums, and whether the path starts in its direction


def measure(study: Study) -> dict[str, Table]:
    """Sums per level, and per direction the AUCs and the transfer of two thresholds."""
    tables = {name: [] for name in ("sums", "transfer", "precise", "goals", "linear")}
    pools = {
        split: study.levels(f"sums {split}", POOL * study.n, size=SIZE, cheese=split, mouse="anywhere")
        for split in SPLITS
    }
    for direction in Direction:
        channel = study.channel(direction)
        row = {"direction": direction.name, "channel": channel}
        sets = []
        for split, pool in pools.items():
            levels, labels = open_to(direction, pool, study.n)
            every = level_sums(study.points, SITE, levels)
            sets.append((every[:, channel], labels))
            probe = readout(study.selection, direction, channel, every, labels)
            tables["linear"].append({"direction": direction.name, "split": split, **probe})
            corner = towards_corner(direction, levels)
            goals = {"cheese": area(*sets[-1]), "corner": area(sets[-1][0], corner)}
            goals["corner_alone"] = area(corner.astype(float), labels)
            drop = minus(area(*sets[0]), area(*sets[1])) if len(sets) == 2 else None
            tables["goals"].append({**row, "split": split, "n": len(levels), **intervals(**goals, drop=drop)})
            tables["sums"] += [
                {**row, "split": split, "sum": float(each), "is_it": bool(label)}
                for each, label in zip(*sets[-1], strict=True)
            ]
        for name, fit in (("transfer", ThresholdProbe.fit), ("precise", precise_threshold)):
            tables[name] += [row | each for each in _transferred(fit, *sets, seed=study.seed_for("halves"))]
    return tables


def _transferred(fit: Callable[..., ThresholdProbe | None], inside: Sums, outside: Sums, *, seed: int) -> Table:
    """A threshold fitted on one half of the mazes in distribution, scored on the other half and out of distribution."""
    probe, why = None, "the channel has no threshold"
    try:
        probe = fit(*inside, seed=seed)
        records = [] if probe is None else probe.transfer(*outside).to_records()
    except ProbeError as error:  # a label is too rare
        probe, why = None, str(error)
    if probe is None:
        known = {"threshold": None, "criterion": None, "n_fit": 0, "n_shifted": 0, "quantity": f"not measured: {why}"}
        return [known | intervals(fit=None, shifted=None, drop=None)]
    known = {"threshold": probe.threshold, "criterion": probe.criterion, "n_fit": probe.held_out.n}
    known["n_shifted"] = len(outside[0])
    return [
        known | {name.replace(" ", "_"): cell for name, cell in record.items() if not name.endswith(" note")}
        for record in records
        if record["quantity"] != "AUC"  # the table "goals" has the AUC over all mazes
    ]


def figure(tables: Tables) -> Figure:
    drawn, axes = panels(20, 5.4, 4)
    for each, direction in zip(axes, Direction, strict=True):
        _draw_sums(each, tables, direction.name)
    drawn.suptitle("Does the path to the cheese start in the channel's direction?")
    return drawn


def _draw_sums(axes: Axes, tables: Tables, direction: str) -> None:
    rows = chosen(tables["sums"], direction=direction)
    labels = [direction if row["is_it"] else f"not {direction}" for row in rows]
    strip([row["sum"] for row in rows], labels, [f"cheese {row['split']}" for row in rows], ax=axes)
    for name, style in (("transfer", "--"), ("precise", ":")):
        row = chosen(tables[name], direction=direction)[0]
        if row["threshold"] is not None:
            label = f"{row['threshold']:.1f}: {row['criterion']}"
            axes.axhline(row["threshold"], color="black", linestyle=style, linewidth=1.1, label=label)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.set(xlabel="first step to the cheese", ylabel=f"sum of channel {rows[0]['channel']}")


def finding(tables: Tables) -> Finding:
    rates = chosen(tables["transfer"], quantity="false-positive rate")
    if not rates:
        return TOO_FEW
    false = keyed(rates, "direction").get("UP", rates[0])
    direction = false["direction"]
    areas = keyed(tables["goals"], "direction", "split")
    inside, outside = (areas[direction, split] for split in SPLITS)
    precise = {row["direction"]: row for row in tables["precise"] if row["quantity"].startswith(EQUAL_RATES)}
    own = precise.get(direction)
    return Finding(
        f"Channel {false['channel']} ({direction}): AUC in distribution {shown(inside, 'cheese')}, n={inside['n']}; "
        f"out of it {shown(outside, 'cheese')}, n={outside['n']}. {_precision(own)}; false positives at the best "
        f"threshold, {false['threshold']:.1f}: {shown(false, 'fit', '.1%')} and {shown(false, 'shifted', '.1%')}.",
        verdict(None if own is None else above(own, "drop")),
        f"Out of distribution, the AUC is {shown(outside, 'corner', '.2f')} for the first step to the corner; the step "
        f"to the corner predicts the step to the cheese with {shown(outside, 'corner_alone', '.2f')}. "
        f"{_linear(tables['linear'], direction)}",
    )


def _linear(linear: Table, direction: str) -> str:
    inside, outside = chosen(linear, direction=direction)
    if inside["linear"] is None or outside["linear"] is None:
        return "There are too few mazes for a probe of all channels."
    return (
        f"A logistic probe of all {inside['live']} live channels has AUC {shown(inside, 'linear')} in distribution, "
        f"{shown(inside, 'more', '+.3f')} more than the channel, and {shown(outside, 'linear')} out of distribution, "
        f"{shown(outside, 'more', '+.3f')} more."
    )


def _precision(precise: Row | None) -> str:
    """The precision of the precise threshold in and out of distribution."""
    if precise is None:
        return f"There are too few mazes for a threshold with precision {PRECISION:g}"
    inside, outside = (
        "undefined, as no sum is accepted" if np.isnan(precise[which]) else shown(precise, which, ".1%")
        for which in ("fit", "shifted")
    )
    return (
        f"Above {precise['threshold']:.1f} the path is {precise['direction']} with precision {inside} in distribution "
        f"and {outside} out of it at the same base rate"
    )
