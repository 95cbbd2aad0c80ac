"""Figures for results. Each function returns the `Axes` with the plot: the given `ax`, or new axes.

    contrast(points, clean, corrupted, background=observations).plot()
    contingency(paired_counts(patched_success, original_success), names=("patched", "original"))

Plotting requires matplotlib: `pip install "chanpatch[plot]"`. All figures are readable in black and white. The
functions do not change matplotlib settings, and neither show nor save figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .errors import StatisticsError, counted
from .results import ROWS, imported, largest_first, one_line, shown_p
from .statistics.interval import finite, numbered
from .statistics.proportions import PairedCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["channel_map", "contingency", "effect_ranking", "heat_map", "strip", "survival"]

_MARKERS = ("o", "x", "^", "s", "+", "v")
_LINES = tuple(zip(("solid", "dashed", "dotted") * 2, ("black",) * 3 + ("0.6",) * 3, strict=True))  # style, color
_TICKS = 40  # maximum number of labels along one side of a heat map


def strip(
    sums: ArrayLike,
    labels: ArrayLike,
    split: ArrayLike | None = None,
    threshold: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw a strip plot of one channel's sums, with a column of markers for each label and part of the data.

    Args:
        sums: Sums of one channel, with shape `(input,)`, such as `channel_sums(...)[:, 55]`.
        labels: Label of each input, with shape `(input,)`, such as the direction of the next step.
        split: Name of the part of the data to which each input belongs, with shape `(input,)`, such as
            `"in distribution"`. At most six parts are allowed; each part has its own marker.
        threshold: Value to mark with a dashed line, such as `probe.threshold`.
        ax: Axes to draw on; new axes if None.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        StatisticsError: If lengths differ, a sum is not finite, there are more than six parts, or `threshold` is not a
            number.

    Example:
        >>> ax = strip([1.0, 5.0, 2.0], ["LEFT", "UP", "LEFT"], threshold=3.0)
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['LEFT\nn = 2', 'UP\nn = 1']
    """
    values, label = finite("sums", sums, ("input",)), np.asarray(labels)
    part = np.zeros(len(label), dtype=np.int64) if split is None else np.asarray(split)
    if not values.shape == label.shape == part.shape:
        raise StatisticsError(
            f"sums, labels and split must have equal lengths; got shapes {values.shape}, {label.shape} and "
            f"{part.shape}."
        )
    (names, column_of), (parts, part_of) = map(numbered, (label, part))
    if len(names) > _TICKS:
        raise StatisticsError(f"labels must contain at most {_TICKS} different labels; got {len(names)}.")
    if len(parts) > len(_MARKERS):
        raise StatisticsError(f"split must contain at most {len(_MARKERS)} different names; got {len(parts)}.")
    if not isinstance(threshold, (Real, type(None))):
        raise StatisticsError(f"threshold must be a number, such as probe.threshold; got {type(threshold).__name__}.")
    ax = ax or _new_axes(1.5 + 1.1 * len(names), 4)
    width = 0.8 / len(parts)
    for number, (each, marker) in enumerate(zip(parts, _MARKERS, strict=False)):
        center = (number + 0.5) * width - 0.4
        chosen = [np.flatnonzero((column_of == column) & (part_of == number)) for column in range(len(names))]
        at = [column + center + _spread(len(rows), 0.7 * width) for column, rows in enumerate(chosen)]
        style: dict[str, Any] = {"facecolors": "none"} if marker in "o^sv" else {}
        name = f"{each} (n = {(part_of == number).sum()})"
        ax.scatter(np.concatenate(at), values[np.concatenate(chosen)], s=16, marker=marker, linewidths=0.8,
                   color=str(0.5 * (number % 2)), label=name, **style)  # fmt: skip
    if threshold is not None:
        ax.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.4g}")
    ticks = [f"{name}\nn = {count}" for name, count in zip(names, np.bincount(column_of), strict=True)]
    ax.set_xticks(range(len(names)), ticks, parse_math=False)
    ax.set(xlim=(-0.5, len(names) - 0.5), xlabel="label", ylabel="channel sum\n(activation summed over positions)")
    if split is not None or threshold is not None:
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    return ax


def effect_ranking(records: Sequence[Mapping[str, Any]], ax: Axes | None = None, *, label: str = "effect") -> Axes:
    """Plot effects as dots with their 95% intervals and p-values, with the largest absolute effect at the top.

    At most 20 effects and 20 controls are drawn, the largest first; the title states how many are hidden. Controls are
    drawn as squares below the other effects. The `plot` methods of contrasts, sweeps and attributions draw this figure.

    Args:
        records: One record per effect, with the keys `effect` and `label` (or `site`). Optional keys are the interval
            (`low`, `high`, `note`), the p-value `p`, and a bool `control`.
        ax: Axes to draw on; new axes if None.
        label: Label of the effect axis.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        StatisticsError: If no effect is finite.
    """
    groups = [[each for each in records if bool(each.get("control")) is control] for control in (False, True)]
    ranked = [[group[row] for row in largest_first([each["effect"] for each in group])] for group in groups]
    shown = [[each for each in group if _is_number(each["effect"])][:ROWS] for group in ranked]
    drawn = [*shown[0], *shown[1]]
    if not drawn:
        raise StatisticsError(f"No effect is finite (number of effects: {len(records)}), so there is nothing to plot.")
    places = np.arange(len(drawn)) + np.repeat([0, 1], [len(each) for each in shown])  # a gap before the controls
    ax = ax or _new_axes(7, 1.2 + 0.25 * (places[-1] + 1))
    for record, place in zip(drawn, places, strict=True):
        marker, color, face = ("s", "0.5", "white") if record.get("control") else ("o", "black", "black")
        if _is_bounded(record):
            ax.hlines(place, record["low"], record["high"], color=color, linewidth=1.2)
        ax.plot(record["effect"], place, marker, color=color, markerfacecolor=face, markersize=5)
        if _is_number(record.get("p")):
            ax.text(1.02, place, shown_p(record["p"]), transform=ax.get_yaxis_transform(), va="center")
    if any(_is_number(each.get("p")) for each in drawn):
        ax.text(1.02, 1.02, "p", transform=ax.transAxes, va="bottom")
    ax.axvline(0, color="black", linestyle=":", linewidth=1)
    texts = [one_line(each["label"] if "label" in each else each["site"]) for each in drawn]
    ax.set_yticks(places, texts, parse_math=False)
    ax.set(ylim=(places[-1] + 0.7, -0.7), xlabel=textwrap.fill(label, 60))
    title = [_counted(*each) for each in zip(("effect", "control"), groups, shown, strict=True) if each[1]]
    few = " (few inputs)" * any(each.get("note") == "few" for each in drawn)
    title += [f"lines: 95% intervals{few}"] if any(map(_is_bounded, drawn)) else []
    ax.set_title("; ".join(title), loc="left", fontsize="medium")
    return ax


def _counted(noun: str, group: Sequence[Any], shown: Sequence[Any]) -> str:
    every, hidden = counted(len(group), noun), len(group) - len(shown)
    return f"{len(shown)} of {every}, {hidden} hidden" if hidden else every


def heat_map(
    values: ArrayLike, rows: Sequence[Any], cols: Sequence[Any], ax: Axes | None = None, *, label: str = "effect"
) -> Axes:
    """Draw a matrix of effects with shape `(row, col)` as a heat map; `label` is the label of the color bar.

    Dashes mark negative effects of at least a tenth of the largest absolute effect, so you can read the signs without
    color. Crosses mark NaN and infinity. StatisticsError is raised if the labels do not match the shape, or if no
    effect is finite.
    """
    effects = np.asarray(values, dtype=np.float64)
    if effects.shape != (len(rows), len(cols)):
        raise StatisticsError(
            f"values must have one row per row label and one column per column label; got shape {effects.shape}, "
            f"{len(rows)} row labels and {len(cols)} column labels."
        )
    missing = ~np.isfinite(effects)
    if missing.all():
        raise StatisticsError(f"No effect is finite (number of effects: {effects.size}), so there is nothing to plot.")
    ax = ax or _new_axes(min(2.5 + 0.32 * len(cols), 11), min(1.8 + 0.28 * len(rows), 9))
    top, colors = _color_scale(effects[~missing])
    shown = ax.imshow(effects, aspect="auto", **colors)
    strong, negative = (effects < -0.6 * top) & ~missing, (effects <= -top / 10) & ~missing
    for marked, marker, color in ((negative & ~strong, "_", "black"), (strong, "_", "white"), (missing, "x", "0.5")):
        at = np.argwhere(marked)
        ax.scatter(at[:, 1], at[:, 0], s=min(60, (200 / max(effects.shape)) ** 2), marker=marker, color=color)
    for axis, labels in ((ax.yaxis, rows), (ax.xaxis, cols)):
        every = range(0, len(labels), -(-len(labels) // _TICKS))
        text = [one_line(labels[place]) for place in every]
        axis.set_ticks(every, text, parse_math=False)
    if max(len(str(each)) for each in cols) > 2:
        ax.tick_params(axis="x", rotation=90)
    notes = ["dashes: negative"] * bool(negative.any()) + ["crosses: no finite value"] * bool(missing.any())
    letters = max(12, int(10 * ax.get_window_extent().height / ax.figure.dpi))  # ten letters per inch
    ax.figure.colorbar(shown, ax=ax, label=textwrap.fill(label, letters))
    ax.set_title("\n".join(notes), loc="left", fontsize="medium")
    return ax


def survival(values: Mapping[str, ArrayLike], ax: Axes | None = None, *, label: str = "value") -> Axes:
    """Draw one survival curve per policy: the fraction of episodes whose return, for example, is above each value.

    `values` maps each policy's name to the returns or lengths of the policy's episodes, with shape `(episode,)`.
    StatisticsError is raised if there are no policies or more than six, or if a value is not finite.
    """
    if not 0 < len(values) <= len(_LINES):
        raise StatisticsError(
            f"survival() can draw 1 to {len(_LINES)} policies, each in its own line style; got {len(values)}."
        )
    ax = ax or _new_axes(6, 4)
    for place, ((name, each), (style, color)) in enumerate(zip(values.items(), _LINES, strict=False)):
        found = finite(name, each, ("episode",))
        text = f"{name} (n = {len(found)})"
        ax.ecdf(found, complementary=True, linestyle=style, color=color, label=text, zorder=3 - place / 10)
    ax.set(ylim=(0, 1.03), xlabel=label, ylabel="fraction of episodes above")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return ax


def contingency(counts: PairedCounts, ax: Axes | None = None, *, names: tuple[str, str] = ("first", "second")) -> Axes:
    """Draw a mosaic plot of a paired comparison: four rectangles whose areas are fractions of the pairs.

    Rectangles for pairs with different outcomes are hatched.

    Args:
        counts: Counts from `chanpatch.statistics.paired_counts`.
        ax: Axes to draw on; new axes if None.
        names: Names of the first and second condition, such as `("patched", "original")`.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        StatisticsError: If there are no pairs, or a count is negative.

    Example:
        >>> ax = contingency(PairedCounts(both=2, only_first=1, only_second=0, neither=1))
        >>> [round(bar.get_width(), 2) for bar in ax.patches]
        [0.75, 0.75, 0.25, 0.25]
    """
    counts, (first, second) = PairedCounts(*counts), names
    n = sum(counts)
    if min(counts) < 0:
        raise StatisticsError(f"counts must not be negative; got {counts}.")
    if not n:
        raise StatisticsError("All four counts are 0, so there are no pairs to plot.")
    ax = ax or _new_axes(7, 4.5)
    won = counts.both + counts.only_first
    columns = [(0.0, won / n, won), (won / n, 1 - won / n, n - won)]  # left edge, width, pairs
    names_of_cells = ("both", f"only {first}", f"only {second}", "neither")
    for number, (name, count) in enumerate(zip(names_of_cells, counts, strict=True)):
        column, is_upper = divmod(number, 2)  # the second condition succeeded in the lower cells
        left, width, total = columns[column]
        height = count / total if total else 0.5  # a column without pairs has no width
        bottom = (1 - height) * is_upper
        hatch = "//" if name.startswith("only") else ""
        ax.bar(left, height, width, bottom, align="edge", facecolor="white" if is_upper else "0.8",
               edgecolor="black", hatch=hatch)  # fmt: skip
        text, middle = f"{name}\n{count} ({count / n:.1%})", bottom + height / 2
        if width > 0.25 and height > 0.12:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
            ax.text(left + width / 2, middle, text, ha="center", va="center", bbox=box)
        else:  # the centers of a column's cells are half the plot's height apart, so both texts fit
            ax.annotate(text, (column, middle), ((-0.03, 1.03)[column], middle), ha=("right", "left")[column],
                        va="center", annotation_clip=False,
                        arrowprops={"arrowstyle": "-", "linewidth": 0.8})  # fmt: skip
    titles = [f"{first} {how}\n{count} of {n} pairs" for how, count in (("succeeded", won), ("failed", n - won))]
    ax.set_xticks([left + width / 2 for left, width, _ in columns], titles)
    ax.set(xlim=(0, 1), ylim=(0, 1), yticks=[], xlabel=f"gray: {second} succeeded; hatched: discordant; n = {n} pairs")
    return ax


def channel_map(observation: Tensor | NDArray[Any], activation: Tensor, ax: Axes | None = None) -> Axes:
    """Draw one channel's activation map, stretched to the size of the observation, over the observation.

    Contours enclose activations whose absolute value is more than half of the largest absolute value. Contours around
    positive activations are solid, and contours around negative activations are dashed.

    Args:
        observation: Tensor or array with shape `(channel, row, col)` and one or three channels; floats from 0 to 1, or
            uint8.
        activation: Activation of one channel, with shape `(row, col)` no larger than the observation, such as
            `cache["relu3"][0, 55]`.
        ax: Axes to draw on; new axes if None.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        StatisticsError: If the shapes, dtypes or values are not as described.

    Example:
        >>> import torch
        >>> ax = channel_map(torch.rand(3, 64, 64), torch.rand(8, 8))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('column (pixel)', 'row (pixel)')
    """
    observation = torch.as_tensor(observation)
    numbers = observation.float() if observation.is_floating_point() else observation  # numpy has no bfloat16
    if not isinstance(activation, Tensor):
        raise StatisticsError(
            "activation must be a tensor with shape (row, col), such as cache['relu3'][0, 55]; got "
            f"{type(activation).__name__}."
        )
    pixels, cells = numbers.detach().cpu().numpy(), activation.detach().cpu().double().numpy()
    fits = pixels.ndim == 3 and pixels.shape[0] in (1, 3) and cells.ndim == 2 and cells.size
    if not fits or (np.array(cells.shape) > pixels.shape[1:]).any() or not np.isfinite(cells).all():
        raise StatisticsError(
            "observation must have shape (channel, row, col) with 1 or 3 channels. activation must be finite, with "
            f"shape (row, col) no larger than observation; got shapes {pixels.shape} and {cells.shape}."
        )
    if pixels.dtype != np.uint8 and not (observation.is_floating_point() and pixels.min() >= 0 and pixels.max() <= 1):
        raise StatisticsError(
            f"observation must be torch.uint8 or floats from 0 to 1; got {observation.dtype} with values from "
            f"{pixels.min():g} to {pixels.max():g}."
        )
    ax = ax or _new_axes(5.5, 4.5)
    gray = pixels.mean(axis=0) / (255 if pixels.dtype == np.uint8 else 1)
    height, width = gray.shape
    rows, cols = (np.arange(length) * cell // length for length, cell in zip(gray.shape, cells.shape, strict=True))
    upsampled = cells[np.ix_(rows, cols)]
    top, colors = _color_scale(cells)
    ax.imshow(gray, cmap="gray", vmin=-1.5, vmax=1.0)
    shown = ax.imshow(upsampled, alpha=0.75 * np.abs(upsampled) / top, **colors)
    framed = np.pad(upsampled, 1)  # close the contours at the edges
    lines = []
    for sign, style, side in ((1, "solid", "above"), (-1, "dashed", "below")):
        beyond = sign * framed > top / 2
        if beyond.any():
            lines.append(f"{style} line: {side} {sign * top / 2:.3g}")
            ax.contour(np.arange(-1, width + 1), np.arange(-1, height + 1), beyond, levels=[0.5],
                       colors="black", linewidths=1.2, linestyles=style)  # fmt: skip
    ax.figure.colorbar(shown, ax=ax, label=f"activation (no unit), {cells.shape[0]} x {cells.shape[1]} cells")
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xlabel="column (pixel)", ylabel="row (pixel)")
    ax.set_title("; ".join(lines) or "zero everywhere", fontsize="medium")
    return ax


def _new_axes(width: float, height: float) -> Axes:
    axes: Axes = imported("matplotlib.pyplot").subplots(figsize=(width, height), layout="constrained")[1]
    return axes


def _color_scale(values: NDArray[np.float64]) -> tuple[float, dict[str, Any]]:
    """Return the largest absolute value (1 if all values are 0), and the colors for `imshow`, with 0 as white."""
    top = float(np.abs(values).max()) or 1.0
    signed = bool((values < 0).any())
    return top, {"cmap": "RdBu_r" if signed else "Reds", "vmin": -top if signed else 0.0, "vmax": top}


def _spread(count: int, width: float) -> NDArray[np.float64]:
    """Return `count` offsets that spread markers evenly over `width`, with consecutive markers far apart."""
    golden = (5**0.5 - 1) / 2
    return (np.arange(1, count + 1) * golden % 1 - 0.5) * width


def _is_number(value: Any) -> bool:
    return value is not None and bool(np.isfinite(value))


def _is_bounded(record: Mapping[str, Any]) -> bool:
    return all(_is_number(record.get(end)) for end in ("low", "high"))
