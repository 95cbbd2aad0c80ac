"""Which channels respond to the one wall that decides the first step to the cheese?

Method: Two mazes that differ by one moved wall, which decides the first step to the cheese: our five pairs drawn by
hand in four rotations, the first like the post's, averaged over {contrasts.TEXTURES} textures and both facings; and one
pair per level with a wall moved by program. Sums at relu3. The verdict: the fraction of the latter pairs with the
higher sum on the UP side is above {CHANCE:g}.

The post: Channel 121, sums 36.7/1.9, 10.4/6.1, 1.4/1.7, 2.4/35.3 in four rotations: high when the path is UP.

Limits: The result does not show that the channel is used: a difference between two inputs is a correlation.
"""

from __future__ import annotations

from itertools import groupby

from matplotlib.figure import Figure

from chanpatch.statistics import mean_interval
from maze.analysis import contrasts
from maze.analysis.cells import Table, Tables, above, chosen, shown, verdict
from maze.analysis.contrasts import contrast_rows, draw_contrast, moved_walls, pair_contrast
from maze.analysis.drawing import panels
from maze.analysis.estimates import intervals, one_by_one, share
from maze.analysis.forwards import SITE, channel_of, level_sums
from maze.analysis.part import Finding, Study
from maze.paths import Direction, first_steps

AUTOMATIC_LEVELS = 64  # at least 32 of these levels allow a pair
BACKGROUND_LEVELS = 200
CHANCE = 0.5


def measure(study: Study) -> dict[str, Table]:
    channel = study.channel(Direction.UP)
    pictures = []
    for (number, turn), grouped in groupby(contrasts.drawn_pairs(), key=lambda pair: (pair.number, pair.turn)):
        pairs = list(grouped)
        mazes, textures = pairs[0].mazes, [pair.texture for pair in pairs]
        first = first_steps(mazes, mazes.cheese).argmax(axis=1)
        sums = level_sums(study.points, SITE, [level for pair in pairs for level in pair.levels])[:, channel]
        means = one_by_one(mean_interval(sums.reshape(-1, 2), clusters=textures))
        row = {"pair": number, "side": int(mazes.size[0]), "quarter_turns": turn, "channel": channel, "n": len(pairs)}
        row |= {f"first_step_{index}": Direction(first[index]).name for index in range(2)}
        pictures.append(row | intervals(sum_0=means[0], sum_1=means[1]))
    levels = study.levels("pair", AUTOMATIC_LEVELS, size=15, cheese="in distribution")
    pairs = moved_walls(study, levels, "moved walls")
    background = study.levels("pair background", BACKGROUND_LEVELS, size=15, mouse="anywhere")
    found = pair_contrast(study, pairs, SITE, background)
    result = found.top(len(found))
    channels = [
        {"channel": channel_of(site), **row} for site, row in zip(result.sites, contrast_rows(result), strict=True)
    ]
    up, right = (level_sums(study.points, SITE, side)[:, channel] for side in pairs)
    falls, n = int((up > right).sum()), len(up)
    counted = {"channel": channel, "pairs": n, "falls": falls, **intervals(share=share(falls, n))}
    return {"pictures": pictures, "automatic": channels, "falls": [counted]}


def figure(tables: Tables) -> Figure:
    drawn, axes = panels(14, 5.4, 5, width_ratios=(1, 1, 1, 1, 1.7))
    for turn in range(4):
        rows = chosen(tables["pictures"], quarter_turns=turn)
        for row in rows:
            axes[turn].plot([0, 1], [row["sum_0"], row["sum_1"]], "o-", color="black", alpha=0.75)
        names = [rows[0]["first_step_0"], rows[0]["first_step_1"]]
        axes[turn].set(xticks=[0, 1], xticklabels=names, title=f"turned by {turn * 90}°")
    axes[0].set_ylabel(f"sum of channel {rows[0]['channel']}, one line per pair (n={len(rows)})")
    draw_contrast(axes[4], tables["automatic"], len(tables["automatic"]))
    return drawn


def finding(tables: Tables) -> Finding:
    (pairs,) = tables["falls"]
    rows = [row for row in tables["pictures"] if "UP" in (row["first_step_0"], row["first_step_1"])]
    higher = sum((row["sum_0"] > row["sum_1"]) == (row["first_step_0"] == "UP") for row in rows)
    sums = ", ".join(f"{row['sum_0']:.1f}/{row['sum_1']:.1f}" for row in chosen(tables["pictures"], pair=0))
    strong = [row for row in tables["automatic"] if row["p"] is not None and row["p"] <= 0.05]
    return Finding(
        f"Channel {pairs['channel']}, our pair in four rotations: {sums}. The UP side is higher in {higher} of "
        f"{len(rows)} pairs drawn by hand and in {shown(pairs, 'share', '.0%')} of {pairs['pairs']} made from levels.",
        verdict(above(pairs, "share", CHANCE)),
        f"One wall {'changes' if pairs['share_low'] > CHANCE else 'does not reliably change'} the channel's sum. "
        f"{len(strong)} of {len(tables['automatic'])} channels differ between UP and RIGHT (p < 0.05, corrected).",
    )
