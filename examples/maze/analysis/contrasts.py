"""Contrastive pairs with one moved wall, and their contrast as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from chanpatch import contrast
from chanpatch.contrasts import Contrast
from chanpatch.plots import effect_ranking
from chanpatch.statistics import Interval
from maze.analysis.cells import Table
from maze.analysis.estimates import intervals
from maze.analysis.forwards import frames
from maze.analysis.part import Study
from maze.environment.moved_walls import pairs_with_a_moved_wall
from maze.environment.pairs import contrastive_pairs, rotations
from maze.levels import draw_levels
from maze.paths import Direction
from maze.states import Mazes, write_mazes

TEXTURES = 16  # levels of the same size that give a pair its textures


class DrawnPair(NamedTuple):
    """One picture of a pair drawn by hand: the numbers of the pair, of quarter turns and of the texture, and mazes."""

    number: int
    turn: int
    texture: int
    mazes: Mazes
    levels: list[bytes]


def drawn_pairs() -> list[DrawnPair]:
    """The pairs drawn by hand in four rotations, `TEXTURES` textures and both facings; the first is like the post's."""
    found = []
    for number, pair in enumerate(contrastive_pairs()):
        bases = draw_levels(TEXTURES, size=int(pair.size[0]), seed=0)
        for (turn, mazes), (texture, base) in product(enumerate(rotations(pair)), enumerate(bases)):
            for faced in (mazes.moved(facing_right=False), mazes.moved(facing_right=True)):
                found.append(DrawnPair(number, turn, texture, faced, write_mazes(faced, base)))
    return found


def moved_walls(study: Study, levels: Sequence[bytes], purpose: str) -> tuple[list[bytes], list[bytes]]:
    """The pairs that levels allow: with one wall moved, the path starts UP in the first and RIGHT in the second."""
    *pair, kept = pairs_with_a_moved_wall(
        levels, clean=Direction.UP, corrupted=Direction.RIGHT, seed=study.seed_for(purpose)
    )
    base = [levels[index] for index in kept]
    clean, corrupted = (write_mazes(mazes, base) for mazes in pair)
    return clean, corrupted


def pair_contrast(
    study: Study, pairs: tuple[list[bytes], list[bytes]], sites: Any, background: Sequence[bytes]
) -> Contrast:
    """The contrast of UP minus RIGHT over these pairs, relative to background levels."""
    return contrast(study.points, *map(frames, pairs), sites, background=frames(background))


def contrast_rows(result: Contrast, floor: float = 0.0) -> Table:
    """One row per channel, in the order of the contrast: differences of sums, effects and p-values.

    An effect is a difference in units of the channel's background deviation, which counts as known. So effects and
    differences have the same interval in different units. The unit is at least `floor` times the root mean square of
    the deviations at the hook point, so that a nearly silent channel has no large effect.
    """
    names = np.array([site.name for site in result.sites])
    least = {name: floor * float(np.sqrt(np.mean(result.std[names == name] ** 2))) for name in {*names.tolist()}}
    rows = []
    for site, record in zip(result.sites, result.to_records(), strict=True):
        unit = max(record["std"], least[site.name])
        effect = [record[name] * (record["std"] / unit if unit else 1.0) for name in ("effect", "low", "high")]
        difference = Interval(record["difference"], *(record[name] * record["std"] for name in ("low", "high")), 0.95)
        row = {"site": record["site"], "pairs": result.pairs, "background": result.background}
        row |= intervals(difference=difference, effect=Interval(*effect, 0.95))
        rows.append(row | {name: record[name] for name in ("p", "no_p")})
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
