"""Which hook points know the way: the best channel of each, in distribution and out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from chanpatch import HookPoints, contrast, recording
from chanpatch.statistics import difference_interval
from maze.analysis.contrasts import contrast_rows, draw_contrast
from maze.analysis.part import POOL, Finding, Part, Study, Table, Tables, above, open_to, shown, verdict
from maze.analysis.readings import area, areas, optional_cells
from maze.analysis.tables import LINEAR, SITE
from maze.environment.levels import observe, policy_input
from maze.environment.moved_walls import pairs_with_a_moved_wall
from maze.environment.paths import Direction
from maze.environment.states import write_mazes

SIZE = 25
CHOICE_LEVELS = 300  # that the channel of every hook point is chosen on
PAIR_LEVELS = 48
SHOWN = 30  # channels of the systematic search that the table keeps
KNOWS = 0.8  # an AUC from which a channel's sum is said to know the direction
LEGEND = {"in": "in", "out": "out of"}
_BATCH = 64


def measure(study: Study) -> dict[str, Table]:
    return {"hook_points": _hook_points(study), "contrast": _contrast(study)}


def _hook_points(study: Study) -> Table:
    """Per hook point and direction the channel chosen on other mazes, and its AUC on both kinds of mazes.

    Where activations have both signs a direction may be told by low sums as well as by high ones, so a channel is
    chosen by how far its AUC is from 0.5, and is read the way round that it has there.
    """
    sets = {"choice": ("in distribution", CHOICE_LEVELS), "in": ("in distribution", study.n)}
    sets["out"] = ("out of distribution", study.n)
    pools = {
        name: (study.levels(f"search {name}", POOL * n, size=SIZE, cheese=cheese, mouse="anywhere"), n)
        for name, (cheese, n) in sets.items()
    }
    rows: Table = []
    for direction in Direction:
        open_levels = {name: open_to(direction, pool, n) for name, (pool, n) in pools.items()}
        sums = {name: _all_sums(study.points, levels) for name, (levels, _) in open_levels.items()}
        for point, chosen_on in sums["choice"].items():
            if not (live := np.flatnonzero(np.ptp(chosen_on, axis=0) > 0)).size:
                continue
            chosen = areas(chosen_on[:, live], open_levels["choice"][1])
            if np.isnan(chosen).any():
                continue
            best = int(np.argmax(np.abs(chosen - 0.5)))
            channel, sign = int(live[best]), 1 if chosen[best] >= 0.5 else -1
            row: dict[str, Any] = {
                "hook_point": point,
                "direction": direction.name,
                "channel": channel,
                "told_by": "high sums" if sign > 0 else "low sums",
                "live": len(live),
                "chosen_by": 0.5 + abs(chosen[best] - 0.5),
            }
            told = {name: area(sign * sums[name][point][:, channel], open_levels[name][1]) for name in ("in", "out")}
            for name, each in told.items():
                row |= {f"n_{name}": len(open_levels[name][1]), **optional_cells(name, each)}
            known = told["in"] is not None and told["out"] is not None
            rows.append(row | optional_cells("drop", difference_interval(told["in"], told["out"]) if known else None))
    return rows


def _searched(points: HookPoints) -> list[str]:
    """What each module with channels returns, and the linear layer, which ends the way from channels to actions.

    Modules that consist of others are left out, as the last of these returns the same.
    """
    # Not `sites="all"`, which has the flattened map too: each of its features is one position of one channel and no
    # sum, and those that are nearly always 0 have the largest effects of all, in standard deviations of almost nothing.
    return [
        name
        for name, point in points.items()
        if point.side == "out"
        and ("channel" in point.axes or name == LINEAR)
        and not list(points.model.get_submodule(point.module).children())
    ]


def _all_sums(points: HookPoints, levels: Sequence[bytes]) -> dict[str, NDArray[np.float64]]:
    """The sums of every channel or feature at every searched hook point: (level, channel) by name."""
    named = _searched(points)
    frames = observe(levels)
    with recording(points, named, reduce="sum") as cache, torch.no_grad():
        for start in tqdm(range(0, len(frames), _BATCH), desc="search", unit="batch", delay=2, leave=False):
            points.model(torch.from_numpy(policy_input(frames[start : start + _BATCH])))
    return {name: cache[name].double().flatten(1).numpy() for name in named}


def _contrast(study: Study) -> Table:
    """The systematic search: every channel of every hook point, over pairs with a moved wall."""
    levels = study.levels("search pairs", PAIR_LEVELS, size=15, cheese="in distribution")
    up, right, kept = pairs_with_a_moved_wall(
        levels, clean=Direction.UP, corrupted=Direction.RIGHT, seed=study.seed_for("search walls")
    )
    base = [levels[index] for index in kept]
    clean, corrupted = (torch.from_numpy(policy_input(observe(write_mazes(mazes, base)))) for mazes in (up, right))
    background = study.levels("search background", min(study.n, 500), size=15, mouse="anywhere")
    usual = torch.from_numpy(policy_input(observe(background)))
    result = contrast(study.points, clean, corrupted, _searched(study.points), background=usual)
    return [
        {"rank": rank, "searched": len(result), **row} for rank, row in enumerate(contrast_rows(result.top(SHOWN)), 1)
    ]


def figure(tables: Tables) -> Figure:
    """AUC of the best channel by hook point, in execution order, in and out of distribution; the largest contrasts."""
    drawn = Figure(figsize=(18, 8.5), layout="constrained")
    left, right = drawn.subfigures(1, 2, width_ratios=(2.4, 1))
    panels = left.subplots(2, 2, sharex=True, sharey=True)
    names = list(dict.fromkeys(row["hook_point"] for row in tables["hook_points"]))
    for axes, direction in zip(panels.flat, Direction, strict=True):
        rows = [row for row in _measured(tables) if row["direction"] == direction.name]
        place = np.array([names.index(row["hook_point"]) for row in rows])
        for name, marker, shift in (("in", "o", -0.15), ("out", "x", 0.15)):
            centre, low, high = (np.array([row[f"{name}{end}"] for row in rows]) for end in ("", "_low", "_high"))
            axes.vlines(place + shift, low, high, color="0.6", linewidth=1.2)
            axes.plot(
                place + shift, centre, marker, color="black", markersize=4, label=f"cheese {LEGEND[name]} distribution"
            )
        axes.axhline(0.5, color="0.7", linewidth=0.8)
        axes.set_title(f"{direction.name}, n={rows[0]['n_in']} and {rows[0]['n_out']}" if rows else direction.name)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1]:
        axes.set_xticks(range(len(names)), [name.removeprefix("embedder.") for name in names], rotation=90, fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("AUC of the best channel, 95% interval")
    panels[0, 0].legend(frameon=False, loc="upper left")
    draw_contrast(right.subplots(), tables["contrast"], tables["contrast"][0]["searched"])
    return drawn


def _measured(tables: Tables) -> Table:
    """The rows with both areas: with few mazes there may be none to estimate."""
    return [row for row in tables["hook_points"] if row["in"] is not None and row["out"] is not None]


def finding(tables: Tables) -> Finding:
    rows = _measured(tables)
    if not rows:
        return Finding("Too few mazes.", "not comparable", "Nothing.", "Raise --n.")
    at = {row["direction"]: row for row in rows if row["hook_point"] == SITE}
    first = next((row["hook_point"] for row in rows if row["direction"] == "UP" and above(row, "in", KNOWS)), None)
    dropped = [name for name, row in at.items() if above(row, "drop")]
    top = tables["contrast"][0]
    # The pairs differ in whether the way is UP or RIGHT, as the post's pair does, and 121 is its channel for UP.
    wanted = [f"Site('{SITE}', channel={at[name]['channel']})" for name in ("UP", "RIGHT") if name in at]
    return Finding(
        f"At {SITE}: "
        + "; ".join(_told(row) for row in at.values())
        + f". Over {top['pairs']} pairs with a moved wall, {top['site']} differs most of {top['searched']} channels; "
        + (f"the channels for UP and RIGHT there are {_ranks(tables['contrast'], wanted)}." if wanted else ""),
        verdict(_stands_out(tables["contrast"], wanted)),
        f"The first hook point in execution order whose best channel tells UP with an AUC above {KNOWS}, all of its "
        f"interval, is {first or 'none'}. The hook points with the best channel by the mazes that channels are chosen "
        f"on, scored on others: {_best(rows)}. At {SITE} {len(dropped)} of {len(at)} directions are told worse out of "
        "distribution, interval of the difference above 0.",
        "That the cheese is what they tell of: the way to the corner mostly starts alike; the part sums tells the two "
        "apart. Nor that nothing before knows the way: this asks for one channel's sum. What is spread over channels, "
        "or lies in the place of an activation and not in its sum, does not show. Nor that the best of "
        f"{_many(rows)} hook points is better than the next: no interval is of that comparison, and the more channels "
        "a hook point has, the higher the best of them.",
    )


def _told(row: dict[str, Any]) -> str:
    turned = "" if row["told_by"] == "high sums" else ", by low sums"
    return (
        f"{row['direction']} channel {row['channel']}{turned}, AUC {shown(row, 'in')} in and {shown(row, 'out')} out "
        f"(n={row['n_in']}, {row['n_out']})"
    )


def _stands_out(contrast: Table, wanted: Sequence[str]) -> bool | None:
    """Whether one of the wanted channels differs most; None where none does, but the interval of one reaches the top's.

    That reads effects without their sign. A top whose own interval holds 0 says nothing.
    """
    top, *others = contrast
    low, _ = _size(top)
    if not low or not wanted:
        return None
    if top["site"] in wanted:
        return True
    return None if any(_size(row)[1] >= low for row in others if row["site"] in wanted) else False


def _size(row: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of an effect's size: from 0 on where the effect's own holds 0 or is not known."""
    low, high = row["effect_low"], row["effect_high"]
    if low is None or high is None:
        return 0.0, np.inf
    ends = sorted((abs(low), abs(high)))
    return (0.0 if low * high <= 0 else ends[0]), ends[1]


def _ranks(contrast: Table, sites: Sequence[str]) -> str:
    ranks = {row["site"]: row["rank"] for row in contrast}
    return " and ".join(f"number {ranks[site]}" if site in ranks else f"not among the first {SHOWN}" for site in sites)


def _best(rows: Table) -> str:
    """Of each direction the hook point that was best on the choice mazes: the highest of the scores would flatter."""
    best = {row["direction"]: row for row in sorted(rows, key=lambda row: row["chosen_by"])}
    told = [best[each.name] for each in Direction if each.name in best]
    return "; ".join(f"{row['hook_point']} for {_told(row)}" for row in told)


def _many(rows: Table) -> int:
    return len({row["hook_point"] for row in rows})


PART = Part(
    name="search",
    question="Which hook points tell the first step to the cheese?",
    method="The sum of every channel of every module's output: per direction the best channel on mazes of its own, "
    f"by high or low sums, its AUC on n others (size {SIZE}, mouse on a random square where the direction is free); "
    "and the contrast over pairs with a moved wall against the variation over random mazes.",
    post="Not done systematically (footnote 1); channel 121 of relu3 stood out.",
    measure=measure,
    figure=figure,
    finding=finding,
)
