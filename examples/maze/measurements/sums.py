"""The sums of a direction's channel against that direction, in distribution and out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import ThresholdProbe
from chanpatch.errors import ProbeError
from chanpatch.plots import strip
from chanpatch.statistics import Interval, difference_interval
from maze.analysis.channels import level_sums
from maze.analysis.decision_squares import PRECISION, precise_threshold
from maze.analysis.linear import readout
from maze.analysis.part import (
    POOL,
    Cell,
    Finding,
    Part,
    Study,
    Table,
    Tables,
    above,
    below,
    open_to,
    shown,
    towards_corner,
    verdict,
)
from maze.analysis.readings import area, optional_cells
from maze.analysis.tables import SITE
from maze.environment.paths import Direction

SPLITS = ("in distribution", "out of distribution")
SIZE = 25
SURE = 0.9  # "almost surely": all of the interval of a precision is above this
ELSEWHERE = (
    "Other parts have other AUCs of the same channel, as they ask elsewhere: search on other mazes of this kind, sizes "
    "in mazes of one size each, parity and ranking on squares with a choice, random-mazes where several ways are right."
)
EQUAL_RATES = "precision at the base rate"  # how the row of the precision that compares in and out begins

Sums: TypeAlias = tuple[NDArray[np.float64], NDArray[np.bool_]]  # of one channel, and whether the way starts so


def measure(study: Study) -> dict[str, Table]:
    """Sums per level, and per direction how two thresholds on them fare out of distribution."""
    sums: Table = []
    transfer: Table = []
    precise: Table = []
    goals: Table = []
    linear: Table = []
    pools = {
        split: study.levels(f"sums {split}", POOL * study.n, size=SIZE, cheese=split, mouse="anywhere")
        for split in SPLITS
    }
    for direction in Direction:
        channel = study.channel(direction)
        sets = []
        for split, pool in pools.items():
            levels, labels = open_to(direction, pool, study.n)
            every = level_sums(study.points, SITE, levels)
            values = every[:, channel]
            sets.append((values, labels))
            told = readout(study.selection, direction, every, labels, seed=study.seed_for("readout bootstrap"))
            linear.append({"direction": direction.name, "split": split, **told})
            goals.append({"direction": direction.name, "channel": channel, "split": split, "n": len(levels)})
            goals[-1] |= _goals(values, labels, towards_corner(direction, levels))
            named: dict[str, Cell] = {"direction": direction.name, "channel": channel, "split": split}
            sums += [
                {**named, "sum": float(each), "is_it": bool(label)} for each, label in zip(values, labels, strict=True)
            ]
        goals[-2] |= optional_cells("drop", None)
        goals[-1] |= optional_cells("drop", _drop(*sets))
        for table, fit in ((transfer, ThresholdProbe.fit), (precise, precise_threshold)):
            named = {"direction": direction.name, "channel": channel}
            table += [{**named, **row} for row in _transferred(fit, *sets, seed=study.seed_for("halves"))]
    return {"sums": sums, "transfer": transfer, "precise": precise, "goals": goals, "linear": linear}


def _drop(inside: Sums, outside: Sums) -> Interval | None:
    """How much lower the AUC is out of distribution; None with too few mazes."""
    known, shifted = area(*inside), area(*outside)
    return None if known is None or shifted is None else difference_interval(known, shifted)


def _goals(values: NDArray[np.float64], cheese: NDArray[np.bool_], corner: NDArray[np.bool_]) -> dict[str, Cell]:
    """What the sums tell of the ways to the cheese and to the corner, which mostly start alike.

    Beside them stands what one would tell of the way to the cheese who knew the way to the corner only. All mazes
    count, in distribution too: an AUC needs no fit.
    """
    parted = cheese != corner
    return {
        **optional_cells("cheese", area(values, cheese)),
        **optional_cells("corner", area(values, corner)),
        **optional_cells("corner_alone", area(corner.astype(np.float64), cheese)),
        "n_parted": int(parted.sum()),
        **optional_cells("cheese_where_parted", area(values[parted], cheese[parted])),
    }


def _transferred(fit: Callable[..., ThresholdProbe | None], inside: Sums, outside: Sums, *, seed: int) -> Table:
    """A threshold of one half of the mazes in distribution, on the other half and on the mazes out of it."""
    try:
        probe = fit(*inside, seed=seed)
        records = [] if probe is None else probe.transfer(*outside).to_records()
        why = "the channel has no threshold"
    except ProbeError as error:  # a label is too rare among so few mazes
        probe, records, why = None, [], str(error)
    if probe is None:
        empty = {f"{which}{end}": None for which in ("fit", "shifted", "drop") for end in ("", "_low", "_high")}
        known = {"threshold": None, "criterion": None, "n_fit": 0, "n_shifted": 0}
        return [{**known, "quantity": f"not measured: {why}", **empty}]
    known = {"threshold": probe.threshold, "criterion": probe.criterion, "n_fit": probe.held_out.n}
    return [
        {**known, "n_shifted": len(outside[0]), **{name.replace(" ", "_"): cell for name, cell in record.items()}}
        for record in records
        if record["quantity"] != "AUC"  # of all mazes, see `_goals`, and not of this half
    ]


def figure(tables: Tables) -> Figure:
    """Sums by label and split, one panel per direction."""
    drawn = Figure(figsize=(14, 10), layout="constrained")
    for axes, direction in zip(drawn.subplots(2, 2).flat, Direction, strict=True):
        _draw_sums(axes, tables, direction.name)
    drawn.suptitle("Does the way to the cheese start in the channel's direction?")
    return drawn


def _draw_sums(axes: Axes, tables: Tables, direction: str) -> None:
    """The sums of one direction's channel, and both thresholds."""
    rows = [row for row in tables["sums"] if row["direction"] == direction]
    labels = [direction if row["is_it"] else f"not {direction}" for row in rows]
    strip([row["sum"] for row in rows], labels, [f"cheese {row['split']}" for row in rows], ax=axes)
    for name, style in (("transfer", "--"), ("precise", ":")):
        row = next(row for row in tables[name] if row["direction"] == direction)
        if row["threshold"] is not None:
            label = f"{row['threshold']:.1f}: {row['criterion']}"
            axes.axhline(row["threshold"], color="black", linestyle=style, linewidth=1.1, label=label)
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes.set(xlabel="first step to the cheese", ylabel=f"sum of channel {rows[0]['channel']}")
    axes.spines[["top", "right"]].set_visible(False)


def finding(tables: Tables) -> Finding:
    rates = [row for row in tables["transfer"] if row["quantity"] == "false-positive rate"]
    if not rates:
        return Finding("Too few mazes.", "not comparable", "Nothing.", "Raise --n.")
    false = {row["direction"]: row for row in rates}.get("UP", rates[0])
    areas = {(row["direction"], row["split"]): row for row in tables["goals"]}
    inside, outside = (areas[false["direction"], split] for split in SPLITS)
    sure = {row["direction"]: row for row in tables["precise"] if row["quantity"].startswith(EQUAL_RATES)}
    precise = sure.get(false["direction"])
    claims = [None, None] if precise is None else [above(precise, "fit", SURE), below(precise, "shifted", SURE)]
    names = dict.fromkeys(name for name, _ in areas)
    both = [name for name in names if all(above(areas[name, split], "cheese", 0.5) for split in SPLITS)]
    worse = [name for name in names if above(areas[name, SPLITS[1]], "drop")]
    kept = [name for name, row in sure.items() if above(row, "fit", SURE)]
    lost = [name for name in kept if below(sure[name], "shifted", SURE)]
    return Finding(
        f"Channel {false['channel']} ({false['direction']}): AUC in distribution {shown(inside, 'cheese')}, "
        f"n={inside['n']}; out of it {shown(outside, 'cheese')}, n={outside['n']}. {_told(tables, precise)} "
        f"At the threshold that divides best, {false['threshold']:.1f} (fitted on one half in distribution, scored on "
        f"the {false['n_fit']} of the other), false positives go from {shown(false, 'fit', '.1%')} to "
        f"{shown(false, 'shifted', '.1%')}.",
        verdict(*claims),
        f"The sums tell {_named(both)} in both sets, intervals above 0.5; the drop in AUC from in to out of "
        f"distribution is beyond its interval for {_named(worse)}. A sum past the precise threshold is right in more "
        f"than {SURE:.0%} of mazes in distribution, all of the interval, for {_named(kept)}"
        + (f"; out of it in less, for {_named(lost)} of these. " if kept else ". ")
        + f"{_goals_told(tables['goals'], false['direction'])} {_linear_told(tables['linear'], false['direction'])} "
        + ELSEWHERE,
        "That the channel knows the cheese: the ways to the cheese and to the corner start alike in most mazes, so the "
        "corner's tells the cheese's well. Nor that the threshold is wrong out of distribution because its raw "
        "precision is lower there: the share of mazes in which the way starts in that direction differs too. So "
        "precisions are compared at one share, that of the mazes in distribution.",
    )


def _goals_told(goals: Table, direction: str) -> str:
    """Whether the sums are of the way to the cheese or to the corner."""
    (outside,) = (row for row in goals if (row["direction"], row["split"]) == (direction, SPLITS[1]))
    if any(outside[name] is None for name in ("cheese", "corner", "corner_alone")):
        return "There are too few mazes to tell the cheese from the corner."
    parted = (
        f"; in the {outside['n_parted']} mazes where only one of the two ways starts {direction} it tells the cheese's "
        f"with {shown(outside, 'cheese_where_parted', '.2f')}"
        if outside["cheese_where_parted"] is not None
        else ""
    )
    return (
        f"Out of distribution the sum for {direction} tells the first step to the cheese with AUC "
        f"{shown(outside, 'cheese', '.2f')} and that to the corner with {shown(outside, 'corner', '.2f')}; the "
        f"corner's step alone would tell the cheese's with {shown(outside, 'corner_alone', '.2f')}{parted}."
    )


def _linear_told(linear: Table, direction: str) -> str:
    """How much more all channels tell than the one, in distribution and out of it."""
    inside, outside = (row for row in linear if row["direction"] == direction)
    if inside["linear"] is None or outside["linear"] is None:
        return "There are too few mazes for a readout of all channels."
    return (
        f"A linear readout of all {inside['live']} live channels, fitted on the {inside['n_fit']} mazes that the "
        f"channel was chosen on, tells {direction} with AUC {shown(inside, 'linear')} in distribution, "
        f"{shown(inside, 'more', '+.3f')} more than the channel (n={inside['n']}), and {shown(outside, 'linear')} out "
        f"of it, {shown(outside, 'more', '+.3f')} more (n={outside['n']})."
    )


def _named(directions: list[str]) -> str:
    return ", ".join(directions) or "no direction"


def _row(table: Table, like: Mapping[str, Any], quantity: str) -> dict[str, Any]:
    """The row of a quantity for the direction of another row."""
    return next(row for row in table if (row["direction"], row["quantity"]) == (like["direction"], quantity))


def _told(tables: Tables, precise: Mapping[str, Any] | None) -> str:
    """What a threshold that is to mean the direction almost surely is worth."""
    if precise is None:
        return f"Too few mazes for a threshold with precision {PRECISION:g}."
    accepted = _row(tables["precise"], precise, "accepted")
    told = {
        which: "no sum is past it" if np.isnan(precise[which]) else shown(precise, which, ".1%")
        for which in ("fit", "shifted")
    }
    return (
        f"Above {precise['threshold']:.1f} (chosen for a {precise['criterion']} on the other half) the way is "
        f"{precise['direction']} in distribution in {told['fit']} of the mazes it accepts, which are "
        f"{shown(accepted, 'fit', '.1%')} of {precise['n_fit']}; out of it, at the same base rate, in "
        f"{told['shifted']} of those it accepts, {shown(accepted, 'shifted', '.1%')} of {precise['n_shifted']}."
    )


PART = Part(
    name="sums",
    question="Does the sum of a channel tell the way to the cheese, in distribution and out of it?",
    method="Size 25, mouse on a random square where the direction is free; per direction the channel chosen on "
    "other mazes; AUCs are over all n of these. Two thresholds are fitted on half of the mazes in distribution and "
    "scored on the other half and on those out of it: the one that divides best, and the smallest with precision "
    f"{PRECISION:g}. Beside the channel stands a logistic regression on the sums of all channels.",
    post="Above 30, channel 121 means UP almost surely in distribution, and does not outside (n=1000 each).",
    measure=measure,
    figure=figure,
    finding=finding,
)
