"""The picture of the ablations: by kind of ablation, by place of the cheese, and the counts of the walks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanpatch.plots import contingency
from chanpatch.statistics import PairedCounts
from maze.analysis.effects import KINDS
from maze.analysis.episodes import ORIGINAL
from maze.analysis.part import Tables

PLACES = ("bottom right", "in distribution", "top left")  # of the cheese; the first is the post's


def ablation_grid(tables: Tables) -> Figure:
    """The chosen channels by kind of ablation, the same zeroed with the cheese elsewhere, and the post's table.

    Groups of channels have axes of their own below, as their effects are several times as large.
    """
    drawn = Figure(figsize=(16, 6.4), layout="constrained")
    grid = drawn.add_gridspec(2, 3, width_ratios=(1.2, 1.1, 1), height_ratios=(5, 2.4))
    rows = [row for row in tables["effects"] if row["cheese"] == PLACES[0]]
    zeroed = [row for row in tables["effects"] if row["kind"] == KINDS[0]]
    panels = ((rows, "kind", f"cheese in the bottom right, n={rows[0]['n']}"), (zeroed, "cheese", "zeroed"))
    for place, (shown_rows, by, title) in enumerate(panels):
        alone, together = (drawn.add_subplot(grid[level, place]) for level in range(2))
        _draw_effects(alone, [row for row in shown_rows if is_channel(row)], by, controls=by == "kind")
        _draw_effects(together, [row for row in shown_rows if not is_channel(row)], by, controls=False)
        alone.set_title(title)
        together.set_xlabel(
            "change of P(cheese within 256 steps),\npercentage points, 95% interval over levels"
            "\n(too narrow for mean and resample: one reference)"
        )
        together.legend(*alone.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="upper center",
                        bbox_to_anchor=(0.5, -0.6), columnspacing=1, handletextpad=0.2)  # fmt: skip
    walks = {row["direction"]: row for row in tables["walks"]}["UP"]
    counts = PairedCounts(*(walks[name] for name in ("both", "only_modified", "only_original", "neither")))
    mosaic = drawn.add_subplot(grid[:, 2])
    contingency(counts, mosaic, names=("zeroed", ORIGINAL))
    mosaic.set_title(f"channel {walks['channel']} zeroed, walks with common draws")
    return drawn


def is_channel(row: Mapping[str, Any]) -> bool:
    """Whether a row is of one channel alone."""
    return str(row["ablated"]).startswith("channel")


def _draw_effects(axes: Axes, rows: Sequence[Mapping[str, Any]], by: str, *, controls: bool) -> None:
    """The effect of everything chosen with its interval, side by side by `by`; the controls as one row of dots."""
    chosen = [row for row in rows if row["role"] != "control"]
    others = [row for row in rows if row["role"] == "control"] if controls else []
    names = list(dict.fromkeys((row["ablated"], row["role"]) for row in chosen))
    for number, value in enumerate(dict.fromkeys(row[by] for row in rows)):
        shift = 0.24 * (1 - number)
        style = {"marker": "os^"[number], "color": ("black", "tab:orange", "tab:blue")[number]}
        for row in (row for row in chosen if row[by] == value):
            height = len(names) - names.index((row["ablated"], row["role"])) + shift
            axes.plot([row["effect_low"] * 100, row["effect_high"] * 100], [height] * 2, color=style["color"])
            axes.plot(row["effect"] * 100, height, linestyle="none", markersize=6, **style)
        label = f"{value} (n={next(row['n'] for row in rows if row[by] == value)})"
        axes.plot([], [], linestyle="none", label=label, **style)
        dots = [row["effect"] * 100 for row in others if row[by] == value]
        axes.plot(dots, [shift] * len(dots), linestyle="none", markersize=3, alpha=0.6, **style)
    labels = [name if role == name else f"{name}\nbest for {role}" for name, role in names]
    if others:
        labels.append(f"{len({row['ablated'] for row in others})} other live\nchannels, one each")
        far = max((row for row in others if row["kind"] == KINDS[0]), key=lambda row: abs(row["effect"]))
        axes.annotate(named(far), (far["effect"] * 100, 0.24), xytext=(far["effect"] * 100, -0.75), fontsize=8,
                      ha="center", va="center", arrowprops={"arrowstyle": "-", "linewidth": 0.6})  # fmt: skip
    axes.set_yticks(range(len(names), len(names) - len(labels), -1), labels)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.locator_params(axis="x", nbins=6)
    axes.set_ylim(len(names) - len(labels) + (0.0 if others else 0.4), len(names) + 0.6)  # room for the name below
    axes.spines[["top", "right"]].set_visible(False)


def named(row: Mapping[str, Any]) -> str:
    """A channel with what it stands for: "channel 31 (UP)"."""
    return f"{row['ablated']} ({row['label'] or 'no label'})"
