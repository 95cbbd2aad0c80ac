"""The figures of the study: panels of estimates with their intervals, drawn from tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maze.analysis.cells import Row, Table, Tables, chosen

Columns: TypeAlias = str | tuple[str, ...]

_MARKERS = "os^Dvx+*"
_COLORS = ("black", "tab:orange", "tab:blue", "tab:green", "tab:purple", "0.5", "0.3", "0.7")


@dataclass(frozen=True)
class Panel:
    """Estimates with their 95% intervals, by category or along a column of numbers."""

    table: str  # name of the table
    by: Columns  # the column or columns with the categories, or the column with the numbers if `along`
    prefix: str | Mapping[str, str]  # name of the cells (see `cells`), or several by label, each a separate series
    label: str  # label of the estimates
    series: Columns = ()  # the column or columns whose values have separate marks
    where: Mapping[str, Any] = field(default_factory=dict)  # cells of the rows to draw: values, or functions of values
    names: Mapping[str, str] = field(default_factory=dict)  # labels of the categories, by default their values
    title: str = ""
    scale: float = 1.0  # factor for the estimates, such as 100 for percent
    line: float | None = 0.0  # a reference value
    along: bool = False  # whether the categories are numbers for the x axis


def chart(*drawn: Panel, size: tuple[float, float] = (5.0, 4.8)) -> Callable[[Tables], Figure]:
    """A function that draws panels side by side, each with this size."""

    def figure(tables: Tables) -> Figure:
        found, axes = panels(size[0] * len(drawn), size[1], len(drawn))
        for each, panel in zip(np.atleast_1d(axes), drawn, strict=True):
            draw(each, tables, panel)
        return found

    return figure


def panels(width: float, height: float, count: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes side by side, without upper and right spines."""
    found = Figure(figsize=(width, height), layout="constrained")
    axes = found.subplots(1, count, **options)
    for each in found.axes:
        each.spines[["top", "right"]].set_visible(False)
    return found, axes


def draw(axes: Axes, tables: Tables, panel: Panel) -> None:
    """Draw one panel without the rows that have no estimate."""
    rows = chosen(tables.get(panel.table, ()), **panel.where)
    prefixes = {"": panel.prefix} if isinstance(panel.prefix, str) else panel.prefix
    series = {}
    for row in rows:
        for label, prefix in prefixes.items():
            if row[prefix] is not None:
                name = ", ".join(filter(None, (_text(row, panel.series), label)))
                series.setdefault(name, (prefix, []))[1].append(row)
    names = list(dict.fromkeys(_text(row, panel.by) for _, each in series.values() for row in each))
    for number, (label, (prefix, each)) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) / (len(series) + 1)
        low, middle, high = (
            panel.scale * np.array([row[f"{prefix}{end}"] for row in each], dtype=float)
            for end in ("_low", "", "_high")
        )
        style = {"color": _COLORS[number % len(_COLORS)], "alpha": 0.9}
        marks = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 5, "label": label, **style}
        if panel.along:
            at = np.array([row[panel.by] for row in each], dtype=float)
            axes.vlines(at, low, high, **style)
            axes.plot(at, middle, linestyle="none" if len({*at.tolist()}) > 16 else "-", linewidth=1, **marks)
        else:
            at = np.array([len(names) - names.index(_text(row, panel.by)) - shift for row in each])
            axes.hlines(at, low, high, **style)
            axes.plot(middle, at, linestyle="none", **marks)
    if panel.line is not None:
        (axes.axhline if panel.along else axes.axvline)(panel.line, color="black", linewidth=0.8)
    if panel.along:
        axes.set(xlabel=str(panel.by).replace("_", " "), ylabel=f"{panel.label}, 95% interval")
    else:
        counts = {name: _counts(rows, panel.by, name) for name in names}
        one = len({*counts.values()}) == 1
        labels = [panel.names.get(name, name) + ("" if one else f"\n{counts[name]}") for name in names]
        axes.set_yticks(range(len(names), 0, -1), labels, fontsize=8 if len(names) < 20 else 6)
        of_all = f", {counts[names[0]]}" if names and one else ""
        axes.set(ylim=(0.4, len(names) + 0.6), xlabel=f"{panel.label}, 95% interval{of_all}")
    axes.set_title(panel.title, fontsize=10)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def _text(row: Row, columns: Columns) -> str:
    return ", ".join(str(row[name]) for name in ((columns,) if isinstance(columns, str) else columns))


def _counts(rows: Table, by: Columns, name: str) -> str:
    counts = sorted({row["n"] for row in rows if "n" in row and _text(row, by) == name})
    return f"n={counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''}" if counts else ""
