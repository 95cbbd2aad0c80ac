"""The sums of a direction's channel as a predictor of that direction, in and out of distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import ThresholdProbe
from chanpatch.errors import ProbeError
from chanpatch.plots import strip
from maze.analysis.cells import Row, Table, Tables, above, below, cells, chosen, intervals, keyed, minus, shown, verdict
from maze.analysis.decision_squares import PRECISION, precise_threshold
from maze.analysis.drawing import panels
from maze.analysis.forwards import SITE, level_sums
from maze.analysis.part import POOL, SPLITS, TOO_FEW, Finding, Part, Study, open_to, towards_corner
from maze.analysis.readings import area, readout
from maze.paths import Direction

SIZE = 25
SURE = 0.9  # "almost surely": the interval of a precision is above this
EQUAL_RATES = "precision at the base rate"  # first words of the quantity that compares in and out

Sums: TypeAlias = tuple[NDArray[np.float64], NDArray[np.bool_]]  # of one channel, and whether the path starts so


def measure(study: Study) -> dict[str, Table]:
    """Sums per level, and per direction the AUCs and the transfer of two thresholds."""
    tables: dict[str, Table] = {name: [] for name in ("sums", "transfer", "precise", "goals", "linear")}
    pools = {
        split: study.levels(f"sums {split}", POOL * study.n, size=SIZE, cheese=split, mouse="anywhere")
        for split in SPLITS
    }
    for direction in Direction:
        channel = study.channel(direction)
        row: Row = {"direction": direction.name, "channel": channel}
        sets: list[Sums] = []
        for split, pool in pools.items():
            levels, labels = open_to(direction, pool, study.n)
            every = level_sums(study.points, SITE, levels)
            sets.append((every[:, channel], labels))
            probe = readout(study.selection, direction, every, labels)
            tables["linear"].append({"direction": direction.name, "split": split, **probe})
            goals = _goals(*sets[-1], towards_corner(direction, levels))
            drop = minus(area(*sets[0]), area(*sets[1])) if len(sets) == 2 else None
            tables["goals"].append({**row, "split": split, "n": len(levels), **goals, **cells("drop", drop)})
            tables["sums"] += [
                {**row, "split": split, "sum": float(each), "is_it": bool(label)}
                for each, label in zip(*sets[-1], strict=True)
            ]
        for name, fit in (("transfer", ThresholdProbe.fit), ("precise", precise_threshold)):
            tables[name] += [row | each for each in _transferred(fit, *sets, seed=study.seed_for("halves"))]
    return tables


def _goals(sums: NDArray[np.float64], cheese: NDArray[np.bool_], corner: NDArray[np.bool_]) -> Row:
    """The AUCs of the sums for the first steps to cheese and corner, and of one step for the other."""
    parted = cheese != corner
    return {
        **intervals(cheese=area(sums, cheese), corner=area(sums, corner)),
        **cells("corner_alone", area(corner.astype(np.float64), cheese)),
        "n_parted": int(parted.sum()),
        **cells("cheese_where_parted", area(sums[parted], cheese[parted])),
    }


def _transferred(fit: Callable[..., ThresholdProbe | None], inside: Sums, outside: Sums, *, seed: int) -> Table:
    """A threshold from one half of the mazes in distribution, on the other half and on the mazes out of it."""
    probe, why = None, "the channel has no threshold"
    try:
        probe = fit(*inside, seed=seed)
        records = [] if probe is None else probe.transfer(*outside).to_records()
    except ProbeError as error:  # a label is too rare
        probe, why = None, str(error)
    if probe is None:
        known = {"threshold": None, "criterion": None, "n_fit": 0, "n_shifted": 0, "quantity": f"not measured: {why}"}
        return [known | cells("fit", None) | cells("shifted", None) | cells("drop", None)]
    known = {"threshold": probe.threshold, "criterion": probe.criterion, "n_fit": probe.held_out.n}
    return [
        {
            **known,
            "n_shifted": len(outside[0]),
            **{name.replace(" ", "_"): cell for name, cell in record.items() if not name.endswith(" note")},
        }
        for record in records
        if record["quantity"] != "AUC"  # `_goals` has that of all mazes
    ]


def figure(tables: Tables) -> Figure:
    """Sums by label and split, one panel per direction."""
    drawn, axes = panels(20, 5.4, 4)
    for each, direction in zip(axes, Direction, strict=True):
        _draw_sums(each, tables, direction.name)
    drawn.suptitle("Does the path to the cheese start in the channel's direction?")
    return drawn


def _draw_sums(axes: Axes, tables: Tables, direction: str) -> None:
    """The sums of one direction's channel, and both thresholds."""
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
    claims = [None, None] if own is None else [above(own, "fit", SURE), below(own, "shifted", SURE)]
    names = dict.fromkeys(name for name, _ in areas)
    both = [name for name in names if all(above(areas[name, split], "cheese", 0.5) for split in SPLITS)]
    worse = [name for name in names if above(areas[name, SPLITS[1]], "drop")]
    kept = [name for name, row in precise.items() if above(row, "fit", SURE)]
    lost = [name for name in kept if below(precise[name], "shifted", SURE)]
    return Finding(
        f"Channel {false['channel']} ({direction}): AUC in distribution {shown(inside, 'cheese')}, n={inside['n']}; "
        f"out of it {shown(outside, 'cheese')}, n={outside['n']}. {_precision(tables, own)} At the threshold that "
        f"divides best, {false['threshold']:.1f} (fitted on one half in distribution, scored on the {false['n_fit']} "
        f"of the other), false positives go from {shown(false, 'fit', '.1%')} to {shown(false, 'shifted', '.1%')}.",
        verdict(*claims),
        f"The sums predict {_named(both)} in both sets, intervals above 0.5; the AUC drops out of distribution beyond "
        f"its interval for {_named(worse)}. A sum past the precise threshold is right in more than {SURE:.0%} of mazes "
        f"in distribution, all of the interval, for {_named(kept)}"
        + (f"; out of it in less, for {_named(lost)} of these. " if kept else ". ")
        + f"{_corner(outside)} {_linear(tables['linear'], direction)} Other parts have other AUCs of the same channel, "
        "as they use other mazes.",
        "It does not follow that the channel encodes the cheese: the paths to the cheese and to the corner start alike "
        "in most mazes. Precisions are compared at one base rate, that of the mazes in distribution.",
    )


def _named(directions: list[str]) -> str:
    return ", ".join(directions) or "no direction"


def _corner(outside: Row) -> str:
    """Whether the sums follow the cheese or the corner."""
    direction = outside["direction"]
    if any(outside[name] is None for name in ("cheese", "corner", "corner_alone")):
        return "There are too few mazes to separate the cheese from the corner."
    parted = (
        f"; in the {outside['n_parted']} mazes in which only one of the two starts {direction}, it predicts the step "
        f"to the cheese with {shown(outside, 'cheese_where_parted', '.2f')}"
        if outside["cheese_where_parted"] is not None
        else ""
    )
    return (
        f"Out of distribution the sum for {direction} predicts the first step to the cheese with AUC "
        f"{shown(outside, 'cheese', '.2f')} and that to the corner with {shown(outside, 'corner', '.2f')}; the step to "
        f"the corner alone predicts that to the cheese with {shown(outside, 'corner_alone', '.2f')}{parted}."
    )


def _linear(linear: Table, direction: str) -> str:
    """The gain of all channels over the one."""
    inside, outside = chosen(linear, direction=direction)
    if inside["linear"] is None or outside["linear"] is None:
        return "There are too few mazes for a probe of all channels."
    return (
        f"A logistic probe of all {inside['live']} live channels, fitted on {inside['n_fit']} selection mazes, has AUC "
        f"{shown(inside, 'linear')} for {direction} in distribution, {shown(inside, 'more', '+.3f')} more than the "
        f"channel (n={inside['n']}), and {shown(outside, 'linear')} out of it, {shown(outside, 'more', '+.3f')} more "
        f"(n={outside['n']})."
    )


def _precision(tables: Tables, precise: Row | None) -> str:
    """The precision of the precise threshold in and out of distribution."""
    if precise is None:
        return f"Too few mazes for a threshold with precision {PRECISION:g}."
    (accepted,) = chosen(tables["precise"], direction=precise["direction"], quantity="accepted")
    inside, outside = (
        "no sum is past it" if np.isnan(precise[which]) else shown(precise, which, ".1%")
        for which in ("fit", "shifted")
    )
    return (
        f"Above {precise['threshold']:.1f} (chosen for a {precise['criterion']} on the other half) the path is "
        f"{precise['direction']} in distribution in {inside} of the mazes it accepts, which are "
        f"{shown(accepted, 'fit', '.1%')} of {precise['n_fit']}; out of it, at the same base rate, in {outside} of "
        f"those it accepts, {shown(accepted, 'shifted', '.1%')} of {precise['n_shifted']}."
    )


PART = Part(
    name="sums",
    question="Does the sum of a channel predict the path to the cheese, in distribution and out of it?",
    method="Size 25, mouse on a random square with the direction free; per direction the channel chosen on "
    "other mazes; AUCs are over all n of these. Two thresholds are fitted on half of the mazes in distribution and "
    "scored on the other half and on those out of it: the one that divides best, and the smallest with precision "
    f"{PRECISION:g}. Beside the channel stands a logistic regression on the sums of all channels.",
    post="Above 30, channel 121 means UP almost surely in distribution, and does not outside (n=1000 each).",
    measure=measure,
    figure=figure,
    finding=finding,
)
