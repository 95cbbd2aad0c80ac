"""The figures of the argument, drawn from the tables alone; their claims and captions are in `argument.jinja`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maze.analysis.cells import Row, Tables, chosen, keyed, shown
from maze.analysis.drawing import panels
from maze.analysis.part import SPLITS
from maze.measurements import default, direction, share
from maze.report.answer import PREDICTED

# One color per thing, in every figure.
CHEESE, CORNER, CHANNEL, RANDOM, INK = "#c46a00", "#1b5ea6", "#7a2a8c", "#8c8c8c", "#222222"
WIDTH = 7.2  # inches
TEXT = {"font.size": 13, "axes.titlesize": 13, "axes.titlelocation": "left"}  # readable at half width
IN, OUT = SPLITS

Parts = Mapping[str, Tables]


def point(parts: Parts) -> Figure:
    """Sums of the UP channel on pairs of mazes, and on squares by the first step to the cheese."""
    figure, (left, right) = panels(WIDTH, 3.5, 2)
    for row in parts["pair"]["pictures"]:
        sums = {row[f"first_step_{index}"]: row[f"sum_{index}"] for index in range(2)}
        if "UP" in sums:
            left.plot([1, 0], [sums.pop("UP"), *sums.values()], "o-", color=CHANNEL, alpha=0.7)
    (pairs,) = parts["pair"]["falls"]
    title = f"UP is higher in\n{shown(pairs, 'share', '.0%')}, n={pairs['pairs']}"
    left.set(xticks=[0, 1], xticklabels=["not UP", "UP"], xlim=(-0.3, 1.3), ylabel="sum of the UP channel", title=title)
    rows = chosen(parts["sums"]["sums"], direction="UP", split=IN)
    for is_it, color in ((False, RANDOM), (True, CHANNEL)):
        values = [row["sum"] for row in rows if row["is_it"] is is_it]
        spread = 0.3 * np.sin(np.arange(len(values)) * 2.4)  # so that points do not overlap
        right.plot(is_it + spread, values, "o", color=color, alpha=0.5, markersize=4)
    area = keyed(parts["sums"]["goals"], "direction", "split")["UP", IN]
    right.set(xticks=[0, 1], xticklabels=["not UP", "UP"], title=f"AUC\n{shown(area, 'cheese', '.2f')}, n={area['n']}")
    figure.supxlabel("first step of the path to the cheese", fontsize=13)
    return figure


def misled(parts: Parts) -> Figure:
    """The goal that the mouse goes to if a channel is high, in and out of distribution."""
    figure, axes = panels(WIDTH, 3.6)
    cells = keyed(chosen(parts["decision"]["squares"], squares="accepted"), "direction", "split", "leads_to", "goes")
    labels = []
    for name, split in [(name, split) for name in ("RIGHT", "UP") for split in (OUT, IN)]:
        rows = [cells[name, split, goal, True] for goal in ("cheese", "corner")]
        left, y = 0.0, len(labels)
        for row, color, goal in zip(rows, (CHEESE, CORNER), ("cheese", "corner"), strict=True):
            width = 100 * (row["share"] or 0.0)
            axes.barh(y, width, left=left, color=color, edgecolor="white", hatch="//" if goal == "corner" else "")
            if width >= 8:
                back = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
                text = f"{goal} {width:.0f}%" if width >= 26 else f"{width:.0f}%"
                axes.text(left + width / 2, y, text, color="white", ha="center", va="center", bbox=back)
            left += width
        labels.append(f"{name} high, n={rows[0]['n']},\n{split}")
    axes.set(yticks=range(4), yticklabels=labels, xlim=(0, 100), xlabel="percent of squares; empty: another step")
    return figure


def dose(parts: Parts) -> Figure:
    """The change of P(cheese) by the factor of the UP channel."""
    figure, axes = panels(WIDTH, 3.6)
    rows, (slope,) = parts["dose"]["doses"], parts["dose"]["slope"]
    at, middle, low, high = (np.array([row[name] or 0.0 for row in rows]) for name in ("factor", *_ends("effect")))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.vlines(at, low, high, color=CHANNEL, linewidth=2.5)
    axes.plot(at, middle, "o-", color=CHANNEL, markersize=8)
    axes.annotate("zeroed", (at[0], high[0]), (6, 6), textcoords="offset points")
    axes.annotate("unchanged", (1, 0), (6, 8), textcoords="offset points")
    title = f"slope {shown(slope, 'slope', '+.2f')}, n={slope['n']}"
    axes.set(xlabel="factor of the UP channel", ylabel="change of P(cheese)", title=title, ymargin=0.15)
    return figure


def corner_default(parts: Parts) -> Figure:
    """Log odds with the cheese shown and removed."""
    figure, axes = panels(WIDTH, 3.4)
    odds = keyed(parts["default"]["odds"], "split", "picture")
    axes.axvline(0, color=INK, linewidth=0.8)
    for number, (split, picture) in enumerate((split, each) for split in SPLITS for each in default.PICTURES[:2]):
        _mark(axes, odds[split, picture], "log_odds", 3 - number, (CHEESE, CORNER)[number % 2], "+.1f")
    labels = [f"cheese {word},\n{split}" for split in (OUT, IN) for word in ("removed", "shown")]
    axes.set(yticks=range(4), yticklabels=labels, ylim=(-0.5, 3.8), xmargin=0.15)
    axes.set_xlabel("← corner      log odds      cheese →")
    return figure


def one_direction(parts: Parts) -> Figure:
    """The chosen channels and the direction beside random ones."""
    figure, (left, right) = panels(WIDTH, 3.6, 2)
    rows = keyed(parts["share"]["shares"], "split", "set")
    for y, split in ((1, IN), (0, OUT)):
        others = [row["share"] for (at, name), row in rows.items() if at == split and name != share.BEST]
        _mark(left, rows[split, share.BEST], "share", y, CHANNEL, ".0%", others)
    left.set(yticks=[1, 0], yticklabels=["in\ndistribution", "out of\ndistribution"])
    left.set(xlabel="of the cheese's effect", title="best channels\n(gray: random sets)")
    rows = keyed(parts["direction"]["choices"], "projected")
    others = [row["to_cheese"] for name, row in rows.items() if name.startswith(direction.RANDOM)]
    _mark(right, rows["nothing"], "to_cheese", 1, CORNER, ".0%")
    _mark(right, rows[direction.OWN], "to_cheese", 0, CHANNEL, ".0%", others)
    right.set(yticks=[1, 0], yticklabels=["as it is", "direction\nremoved"])
    right.set(xlabel="choose the cheese", title="one direction\n(gray: random ones)")
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set(ylim=(-0.6, 1.6), xlim=(min(0, axes.get_xlim()[0]), axes.get_xlim()[1] * 1.1))
    return figure


def across(measured: Mapping[str, Parts], parts: Sequence[str]) -> Figure:
    """Estimates of all policies, the main one on top."""
    figure, axes = panels(WIDTH, 1.9 + 0.45 * len(measured), len(parts), sharey=True)
    for each, part in zip(np.atleast_1d(axes), parts, strict=True):
        each.axvline(0, color=INK, linewidth=0.8)
        for y, name in enumerate(reversed(measured)):
            if row := PREDICTED[part].row(measured[name].get(part, {})):
                color = CHANNEL if name == next(iter(measured)) else INK
                _mark(each, row, PREDICTED[part].prefix, y, color, PREDICTED[part].form)
        each.set(title=PREDICTED[part].title, xmargin=0.3)
        each.tick_params(axis="y", length=0)
        if PREDICTED[part].form.endswith("%"):
            each.xaxis.set_major_formatter("{x:.0%}")
    each.set(yticks=range(len(measured)), yticklabels=list(measured)[::-1], ylim=(-0.6, len(measured) - 0.1))
    return figure


# By name: the parts, and the figure of the main policy's tables or of all policies' tables.
MAIN: dict[str, tuple[tuple[str, ...], Callable[[Parts], Figure]]] = {
    "point": (("pair", "sums"), point),
    "misled": (("decision",), misled),
    "dose": (("dose",), dose),
    "default": (("default",), corner_default),
    "direction": (("share", "direction"), one_direction),
}
ALL = {"overview": ("default", "share", "direction"), "policies": ("counterfactual", "dose")}


def argument(measured: Mapping[str, Parts]) -> dict[str, Callable[[], Figure]]:
    """The figures whose parts were measured on the main policy, by name."""
    main = next(iter(measured.values()))
    found = {name: partial(draw, main) for name, (parts, draw) in MAIN.items() if set(parts) <= set(main)}
    known = {name: [part for part in parts if part in main] for name, parts in ALL.items()}
    return found | {name: partial(across, measured, parts) for name, parts in known.items() if parts}


def _mark(axes: Axes, row: Row, prefix: str, y: float, color: str, form: str, random: Sequence[float] = ()) -> None:
    """An estimate with its interval and its value, and random ones below it."""
    middle, low, high = (row[name] for name in _ends(prefix))
    if middle is None:
        return
    axes.plot(random, np.full(len(random), y - 0.2), "|", color=RANDOM, markersize=12, markeredgewidth=2)
    if low is not None and high is not None:
        axes.hlines(y, low, high, color=color, linewidth=2.5)
    axes.plot(middle, y, "o", color=color, markersize=9)
    axes.annotate(f"{middle:{form}}", (middle, y), (0, 8), textcoords="offset points", ha="center", color=color)


def _ends(prefix: str) -> tuple[str, str, str]:
    return prefix, f"{prefix}_low", f"{prefix}_high"
