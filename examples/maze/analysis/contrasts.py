"""The contrast over pairs with a moved wall, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from chanpatch import contrast
from chanpatch.contrasts import Contrast
from chanpatch.plots import effect_ranking
from chanpatch.statistics import Interval
from maze.analysis.cells import Table, intervals
from maze.analysis.forwards import frames
from maze.analysis.part import Study
from maze.environment.moved_walls import pairs_with_a_moved_wall
from maze.paths import Direction
from maze.states import Mazes, write_mazes


def moved_walls(study: Study, levels: Sequence[bytes], purpose: str) -> tuple[list[bytes], tuple[Mazes, Mazes]]:
    """The levels that allow a pair, and the pairs: with one wall moved, the path starts UP or RIGHT."""
    *pair, kept = pairs_with_a_moved_wall(
        levels, clean=Direction.UP, corrupted=Direction.RIGHT, seed=study.seed_for(purpose)
    )
    return [levels[index] for index in kept], (pair[0], pair[1])


def pair_contrast(
    study: Study, base: Sequence[bytes], pair: Sequence[Mazes], sites: Any, background: Sequence[bytes]
) -> Contrast:
    """The contrast of UP minus RIGHT over these pairs, relative to background levels."""
    clean, corrupted = (frames(write_mazes(mazes, list(base))) for mazes in pair)
    return contrast(study.points, clean, corrupted, sites, background=frames(background))


def contrast_rows(result: Contrast) -> Table:
    """One row per channel, in the order of the contrast: differences of sums, effects and p-values.

    An effect is a difference in units of the channel's background deviation, which counts as known. So both have the
    same interval in other units.
    """
    rows: Table = []
    for record in result.to_records():
        effect, unit = [record[name] for name in ("effect", "low", "high")], record["std"]
        difference = [record["difference"], *(end * unit for end in effect[1:])]
        rows.append(
            {
                "site": record["site"],
                "pairs": result.pairs,
                "background": result.background,
                **intervals(difference=Interval(*difference, 0.95), effect=Interval(*effect, 0.95)),
                **{name: record[name] for name in ("p", "no_p")},
            }
        )
    return rows


def draw_contrast(axes: Axes, rows: Table, count: int) -> None:
    """The largest of `count` effects, drawn by `chanpatch.plots.effect_ranking`."""
    effect_ranking(
        [{**row, "label": _short(row["site"]), "low": row["effect_low"], "high": row["effect_high"]} for row in rows],
        axes,
    )
    axes.set_title(f"{len(axes.get_yticks())} of {count} channels", loc="left", fontsize="medium")
    axes.set_xlabel(
        f"UP minus RIGHT, {rows[0]['pairs']} pairs, in standard deviations\n"
        f"over {rows[0]['background']} random mazes, 95% interval"
    )
    axes.spines[["top", "right"]].set_visible(False)


def _short(site: str) -> str:
    """Site('embedder.relu3', channel=7) as "relu3, channel=7"."""
    return site.removeprefix("Site(").removesuffix(")").replace("'", "").removeprefix("embedder.")
