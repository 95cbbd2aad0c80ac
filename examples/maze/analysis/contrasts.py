"""What contrastive pairs say of every channel, as a table and as a figure."""

from __future__ import annotations

from matplotlib.axes import Axes

from chanpatch.contrasts import Contrast
from chanpatch.plots import effect_ranking
from chanpatch.statistics import Interval
from maze.analysis.part import Table, interval_cells


def contrast_rows(result: Contrast) -> Table:
    """One row per channel of a contrast, in its order: differences of sums, and p-values.

    An effect is a difference divided by what the channel varies by over the background, which counts as known. So the
    interval of one is that of the other in another unit.
    """
    rows: Table = []
    for record in result.to_records():
        low, high, unit = record["low"], record["high"], record["std"]
        rows.append(
            {
                "site": record["site"],
                "pairs": result.pairs,
                "background": result.background,
                **interval_cells("difference", Interval(record["difference"], low * unit, high * unit, 0.95)),
                **interval_cells("effect", Interval(record["effect"], low, high, 0.95)),
                **{name: record[name] for name in ("p", "no_p")},
            }
        )
    return rows


def draw_contrast(axes: Axes, rows: Table, count: int) -> None:
    """The largest effects with their intervals, as `chanpatch.plots.effect_ranking` draws them.

    Args:
        axes: to draw into.
        rows: as of `contrast_rows`.
        count: of the channels that were compared; `rows` may be the first of them.
    """
    ends = {"low": "effect_low", "high": "effect_high"}
    effect_ranking(
        [{**row, "label": _short(row["site"]), **{name: row[column] for name, column in ends.items()}} for row in rows],
        axes,
    )
    axes.set_title(f"{len(axes.get_yticks())} of {count} channels", loc="left", fontsize="medium")
    axes.set_xlabel(
        f"UP minus RIGHT, {rows[0]['pairs']} pairs, in standard deviations\n"
        f"over {rows[0]['background']} random mazes, 95% interval"
    )
    axes.spines[["top", "right"]].set_visible(False)


def _short(site: str) -> str:
    """A site without what all have: "Site('embedder.relu3', channel=7)" is "relu3, channel=7"."""
    return site.removeprefix("Site(").removesuffix(")").replace("'", "").removeprefix("embedder.")
