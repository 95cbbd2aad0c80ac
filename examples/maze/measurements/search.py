"""Which hook points encode the first step to the cheese?

Method: The sum of every channel in every module's output: per direction the best channel, by high or low sums, on
separate mazes, and its AUC on n other mazes (size {SIZE}, mouse on a random square with the direction free). Also the
contrast over pairs with a moved wall against the variation over random mazes.

The post: Not done systematically (footnote 1); channel 121 of relu3 stood out.

Limits: The hook points may encode the path to the corner, which mostly starts like the path to the cheese. Earlier hook
points may encode the path in several channels, or in the position of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from chanpatch import HookPoints
from chanpatch.statistics import aucs
from maze.analysis.cells import Row, Table, Tables, Values, above, chosen, keyed, shown, verdict
from maze.analysis.contrasts import contrast_rows, draw_contrast, moved_walls, pair_contrast
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.estimates import intervals, minus
from maze.analysis.forwards import LINEAR, SITE, forward
from maze.analysis.part import POOL, SPLITS, TOO_FEW, Finding, Study, open_to
from maze.analysis.readings import area
from maze.paths import Direction

SIZE = 25
CHOICE_LEVELS = 300  # for choosing the channel of every hook point
PAIR_LEVELS = 48
SHOWN = 30  # channels of the contrast in the table
KNOWS = 0.8  # AUC above which a channel's sum encodes the direction


def measure(study: Study) -> dict[str, Table]:
    levels = study.levels("search pairs", PAIR_LEVELS, size=15, cheese="in distribution")
    pairs = moved_walls(study, levels, "search walls")
    background = study.levels("search background", min(study.n, 500), size=15, mouse="anywhere")
    result = pair_contrast(study, pairs, _searched(study.points), background)
    rows = contrast_rows(result.top(SHOWN))
    largest = [{"rank": rank, "searched": len(result), **row} for rank, row in enumerate(rows, 1)]
    return {"hook_points": _hook_points(study), "contrast": largest}


def _hook_points(study: Study) -> Table:
    """Per hook point and direction, the channel chosen on separate mazes and its AUC on both kinds of mazes.

    A channel is chosen by the distance of its AUC from 0.5, by high or low sums, because activations have both signs.
    """
    sets = {"choice": (SPLITS[0], CHOICE_LEVELS), "in": (SPLITS[0], study.n), "out": (SPLITS[1], study.n)}
    pools = {
        name: (study.levels(f"search {name}", POOL * n, size=SIZE, cheese=cheese, mouse="anywhere"), n)
        for name, (cheese, n) in sets.items()
    }
    rows = []
    for direction in Direction:
        open_levels = {name: open_to(direction, pool, n) for name, (pool, n) in pools.items()}
        sums = {name: _all_sums(study.points, levels) for name, (levels, _) in open_levels.items()}
        for point, of_choice in sums["choice"].items():
            live = np.flatnonzero(np.ptp(of_choice, axis=0) > 0)
            areas = aucs(of_choice[:, live], open_levels["choice"][1]) if live.size else np.array([np.nan])
            if np.isnan(areas).any():
                continue
            best = int(np.argmax(np.abs(areas - 0.5)))
            channel, sign = int(live[best]), 1 if areas[best] >= 0.5 else -1
            row = {
                "hook_point": point,
                "direction": direction.name,
                "channel": channel,
                "told_by": "high sums" if sign > 0 else "low sums",
                "live": len(live),
                "chosen_by": 0.5 + abs(areas[best] - 0.5),
            }
            found = {name: area(sign * sums[name][point][:, channel], open_levels[name][1]) for name in ("in", "out")}
            for name, each in found.items():
                row |= {f"n_{name}": len(open_levels[name][1]), **intervals(**{name: each})}
            rows.append(row | intervals(drop=minus(found["in"], found["out"])))
    return rows


def _searched(points: HookPoints) -> list[str]:
    """The outputs of the modules that have channels but no submodules, and of the linear layer after these modules.

    The flattened map is left out: each feature is one position of one channel. Features that are nearly always 0 would
    have the largest effects, since an effect is in standard deviations.
    """
    return [
        name
        for name, point in points.items()
        if point.side == "out"
        and ("channel" in point.axes or name == LINEAR)
        and not list(points.model.get_submodule(point.module).children())
    ]


def _all_sums(points: HookPoints, levels: Sequence[bytes]) -> dict[str, Values]:
    """The sums of every channel or feature at every searched hook point: (level, channel) by name."""
    named = _searched(points)
    cache = forward(points, levels, named)[1]
    return {name: cache[name].cpu().double().flatten(1).numpy() for name in named}


def figure(tables: Tables) -> Figure:
    drawn, axes = panels(24, 9, 5)
    for each, direction in zip(axes, Direction, strict=False):
        prefixes = {f"cheese {split}": name for name, split in zip(("in", "out"), SPLITS, strict=True)}
        style = {"where": {"direction": direction.name}, "title": direction.name, "line": 0.5}
        draw(each, tables, Panel("hook_points", "hook_point", prefixes, "AUC of the best channel", **style))
    draw_contrast(axes[4], tables["contrast"], tables["contrast"][0]["searched"])
    return drawn


def finding(tables: Tables) -> Finding:
    rows = [row for row in tables["hook_points"] if row["in"] is not None and row["out"] is not None]
    if not rows:
        return TOO_FEW
    at = keyed(chosen(rows, hook_point=SITE), "direction")
    first = next((row["hook_point"] for row in rows if row["direction"] == "UP" and above(row, "in", KNOWS)), "none")
    dropped = [name for name, row in at.items() if above(row, "drop")]
    top = tables["contrast"][0]
    # In the pairs the path starts UP or RIGHT, as in the post's pair. The post's channel for UP is 121.
    wanted = [f"Site('{SITE}', channel={at[name]['channel']})" for name in ("UP", "RIGHT") if name in at]
    ranks = {row["site"]: f"number {row['rank']}" for row in tables["contrast"]}
    placed = " and ".join(ranks.get(site, f"not among the first {SHOWN}") for site in wanted)
    # The best hook point on the choice mazes: the highest score would be biased upwards.
    best = keyed(sorted(rows, key=lambda row: row["chosen_by"]), "direction")
    return Finding(
        f"At {SITE}: {'; '.join(map(_areas, at.values()))}. Over {top['pairs']} pairs, {top['site']} differs most of "
        f"{top['searched']} channels" + (f"; the channels for UP and RIGHT are {placed}." if wanted else "."),
        verdict(_stands_out(tables["contrast"], wanted)),
        f"{first} is the first hook point to predict UP with an AUC above {KNOWS}; the best on the choice mazes are "
        + "; ".join(f"{row['hook_point']} for {_areas(row)}" for row in best.values())
        + f". At {SITE}, the AUC drops out of distribution for {len(dropped)} of {len(at)} directions.",
    )


def _areas(row: Row) -> str:
    turned = "" if row["told_by"] == "high sums" else ", by low sums"
    return (
        f"{row['direction']} channel {row['channel']}{turned}, AUC {shown(row, 'in')} in and {shown(row, 'out')} out "
        f"(n={row['n_in']}, {row['n_out']})"
    )


def _stands_out(contrast: Table, wanted: Sequence[str]) -> bool | None:
    """Whether a wanted channel has the largest effect by size; None if the intervals leave the question open."""
    top, *others = contrast
    low, _ = _size(top)
    if not low or not wanted:
        return None
    if top["site"] in wanted:
        return True
    return None if any(_size(row)[1] >= low for row in others if row["site"] in wanted) else False


def _size(row: Row) -> tuple[float, float]:
    """The interval of an effect's absolute value."""
    low, high = row["effect_low"], row["effect_high"]
    if low is None or high is None:
        return 0.0, np.inf
    ends = sorted((abs(low), abs(high)))
    return (0.0 if low * high <= 0 else ends[0]), ends[1]
