"""Contrastive pairs: one wall decides the first step to the cheese; what the channel for UP makes of it."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from chanpatch import contrast
from chanpatch.statistics import wilson_interval
from maze.analysis.channels import channel_of, level_sums
from maze.analysis.contrasts import contrast_rows, draw_contrast
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, interval_cells, shown, verdict
from maze.analysis.tables import SITE
from maze.environment.levels import draw_levels, observe, policy_input
from maze.environment.moved_walls import pairs_with_a_moved_wall
from maze.environment.pairs import contrastive_pairs, rotations
from maze.environment.paths import Direction, first_steps
from maze.environment.states import Mazes, write_mazes

AUTOMATIC_LEVELS = 64  # at least 32 of them allow a pair
BACKGROUND_LEVELS = 200


def measure(study: Study) -> dict[str, Table]:
    channel = study.channel(Direction.UP)
    rows: Table = []
    for number, pair in enumerate(contrastive_pairs()):
        base = draw_levels(1, size=int(pair.size[0]), seed=0)[0]  # lends its textures, as in `pair_sums`
        for turn, mazes in enumerate(rotations(pair)):
            first = first_steps(mazes, mazes.cheese).argmax(axis=1)
            sums = level_sums(study.points, SITE, write_mazes(mazes, base))[:, channel]
            rows += [
                {
                    "pair": number,
                    "side": int(mazes.size[0]),
                    "quarter_turns": turn,
                    "channel": channel,
                    **{f"first_step_{index}": Direction(first[index]).name for index in range(2)},
                    **{f"sum_{index}": float(sums[index]) for index in range(2)},
                }
            ]
    automatic, told = _automatic(study, channel)
    return {"pictures": rows, "automatic": automatic, "told": told}


def _automatic(study: Study, channel: int) -> tuple[Table, Table]:
    """The contrast over pairs made from levels, one per level, and how often the channel's sum falls in a pair."""
    levels = study.levels("pair", AUTOMATIC_LEVELS, size=15, cheese="in distribution")
    up, right, kept = pairs_with_a_moved_wall(
        levels, clean=Direction.UP, corrupted=Direction.RIGHT, seed=study.seed_for("moved walls")
    )
    base = [levels[index] for index in kept]
    background = study.levels("pair background", BACKGROUND_LEVELS, size=15, mouse="anywhere")
    found = contrast(study.points, _seen(up, base), _seen(right, base), SITE, background=_frames(background))
    result = found.top(len(found))
    rows: Table = [
        {"channel": channel_of(site), **row} for site, row in zip(result.sites, contrast_rows(result), strict=True)
    ]
    sums = [level_sums(study.points, SITE, write_mazes(mazes, base))[:, channel] for mazes in (up, right)]
    falls = int((sums[0] > sums[1]).sum())
    told = {"channel": channel, "pairs": len(kept), "falls": falls}
    return rows, [{**told, **interval_cells("share", wilson_interval(falls, len(kept)))}]


def _seen(mazes: Mazes, base: list[bytes]) -> torch.Tensor:
    return _frames(write_mazes(mazes, base))


def _frames(levels: list[bytes]) -> torch.Tensor:
    return torch.from_numpy(policy_input(observe(levels)))


def figure(tables: Tables) -> Figure:
    """The sums of every pair, one panel per rotation, and the most telling channels over the automatic pairs."""
    drawn = Figure(figsize=(14, 5.4), layout="constrained")
    axes = drawn.subplots(1, 5, sharey=False, width_ratios=(1, 1, 1, 1, 1.7))
    highest = max(max(row["sum_0"], row["sum_1"]) for row in tables["pictures"])
    for turn in range(4):
        rows = [row for row in tables["pictures"] if row["quarter_turns"] == turn]
        for number, row in enumerate(rows):
            axes[turn].plot([0, 1], [row["sum_0"], row["sum_1"]], "-" + "os^Dv"[number], color="black", alpha=0.75)
        names = [rows[0]["first_step_0"], rows[0]["first_step_1"]]
        axes[turn].set(xticks=[0, 1], xticklabels=names, xlim=(-0.4, 1.4), ylim=(-0.03 * highest, 1.08 * highest))
        axes[turn].set(title=f"turned by {turn * 90}°", xlabel="first step to the cheese")
        axes[turn].spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"sum of channel {tables['pictures'][0]['channel']}, one mark per pair (n={len(rows)})")
    draw_contrast(axes[4], tables["automatic"], len(tables["automatic"]))
    return drawn


def finding(tables: Tables) -> Finding:
    told = tables["told"][0]
    rows = [row for row in tables["pictures"] if "UP" in (row["first_step_0"], row["first_step_1"])]
    higher = sum((row["sum_0"] > row["sum_1"]) == (row["first_step_0"] == "UP") for row in rows)
    channel = told["channel"]
    post = [row for row in tables["pictures"] if row["pair"] == 0]
    sums = ", ".join(f"{row['sum_0']:.1f}/{row['sum_1']:.1f}" for row in post)
    strong = [row for row in tables["automatic"] if row["p"] is not None and row["p"] <= 0.05]
    mostly = None if higher > len(rows) / 2 else False
    agrees = verdict(above(told, "share", 0.5), True if higher == len(rows) else mostly)
    return Finding(
        f"Channel {channel}, the post's pair in four rotations: {sums}. Over five pairs, higher on the UP side in "
        f"{higher} of {len(rows)}; over {told['pairs']} pairs made from levels, in {shown(told, 'share', '.0%')}.",
        agrees,
        f"One wall {'changes' if told['share_low'] > 0.5 else 'does not reliably change'} what the channel says. "
        f"{len(strong)} of {len(tables['automatic'])} channels differ between "
        "UP and RIGHT after correction for their number.",
        "That the channel is used: a difference between two inputs is a correlation until something is ablated.",
    )


PART = Part(
    name="pair",
    question="Which channels notice the one wall that decides the first step to the cheese?",
    method="Two mazes that differ by one moved wall, with the mouse where one step or another leads to the cheese; "
    "five pairs drawn by hand in four rotations, and one pair per level with a wall moved by program. Sums at relu3.",
    post="Channel 121, sums 36.7/1.9, 10.4/6.1, 1.4/1.7, 2.4/35.3 in four rotations: high when the path is UP.",
    measure=measure,
    figure=figure,
    finding=finding,
)
