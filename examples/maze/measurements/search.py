"""Which hook points encode the first step to the cheese?

Method: The sum of every channel in every module's output: per direction the best channel, by high or low sums, on
separate mazes, and its AUC on n other mazes (size {SIZE}, mouse on a random square with the direction free). Also the
contrast over pairs with a moved wall against the deviation over random mazes, and the post's own question: single
activations in our pair against their deviation over random mazes of its size. A deviation counts as at least {FLOOR:g}
times the root mean square at its hook point. The verdict: in the contrast, the UP channel of relu3 is higher on the UP
side, with p at most {LEVEL:g} (max-t, corrected for all channels that are searched).

The post: Not done systematically (footnote 1, single activations); channel 121 of relu3 stood out.

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
from maze.analysis.contrasts import contrast_rows, draw_contrast, drawn_pairs, moved_walls, pair_contrast
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.estimates import intervals, minus
from maze.analysis.forwards import BATCH, LINEAR, SITE, activations, forward
from maze.analysis.part import POOL, SPLITS, TOO_FEW, Finding, Study, open_to
from maze.analysis.readings import area
from maze.paths import Direction

SIZE = 25
CHOICE_LEVELS = 300  # for choosing the channel of every hook point
PAIR_LEVELS = 48
SHOWN = 30  # channels of the contrast in the table, and the directions' channels
SINGLES = 10  # single activations in the table, and the UP channel's
FLOOR = 0.5  # of the deviations at a hook point, below which an activation counts as nearly silent
LEVEL = 0.05
KNOWS = 0.8  # AUC above which a channel's sum encodes the direction


def measure(study: Study) -> dict[str, Table]:
    levels = study.levels("search pairs", PAIR_LEVELS, size=15, cheese="in distribution")
    pairs = moved_walls(study, levels, "search walls")
    background = study.levels("search background", min(study.n, 500), size=15, mouse="anywhere")
    result = pair_contrast(study, pairs, _searched(study.points), background)
    own: dict[str, list[str]] = {}
    for direction in Direction:
        own.setdefault(f"Site('{SITE}', channel={study.channel(direction)})", []).append(direction.name)
    rows = sorted(contrast_rows(result, FLOOR), key=lambda row: -abs(row["effect"] or 0.0))
    ranked = [
        {"rank": rank, "searched": len(rows), "direction": ", ".join(own.get(row["site"], ())), **row}
        for rank, row in enumerate(rows, 1)
    ]
    largest = [row for row in ranked if row["rank"] <= SHOWN or row["direction"]]
    return {"hook_points": _hook_points(study), "contrast": largest, "activations": _singles(study)}


def _singles(study: Study) -> Table:
    """The single activations with the largest effects: our pair's difference over the deviation on random mazes."""
    named = _searched(study.points)
    pairs = [pair for pair in drawn_pairs() if (pair.number, pair.turn) == (0, 0)]
    count, size = min(study.n, 500), int(pairs[0].mazes.size[0])
    background = study.levels("search pair background", count, size=size, mouse="anywhere")
    sides = [activations(study.points, [pair.levels[side] for pair in pairs], *named) for side in range(2)]
    total, squares = dict.fromkeys(named, 0.0), dict.fromkeys(named, 0.0)
    for first in range(0, count, BATCH):
        cache = activations(study.points, background[first : first + BATCH], *named)
        for name in named:
            each = cache[name].cpu().double().numpy()
            total[name], squares[name] = total[name] + each.sum(axis=0), squares[name] + (each**2).sum(axis=0)
    differences = [(sides[0][name] - sides[1][name]).cpu().double().numpy().mean(axis=0) for name in named]
    stds = [np.sqrt(np.maximum(squares[name] / count - (total[name] / count) ** 2, 0.0)) for name in named]
    is_up = [np.zeros(each.shape, dtype=np.bool_) for each in stds]
    is_up[named.index(SITE)][study.channel(Direction.UP)] = True
    units = [np.maximum(each, FLOOR * np.sqrt(np.mean(each**2))) for each in stds]
    difference, std, unit, up = (
        np.concatenate([each.ravel() for each in of]) for of in (differences, stds, units, is_up)
    )
    effect = np.divide(difference, unit, out=np.zeros_like(unit), where=unit > 0)
    order, ends = np.argsort(-np.abs(effect), kind="stable"), np.cumsum([each.size for each in stds])
    rows = []
    for rank in dict.fromkeys([*range(SINGLES), int(up[order].argmax())]):
        index = order[rank]
        number = int(np.searchsorted(ends, index, side="right"))
        place = np.unravel_index(index - (ends[number] - stds[number].size), stds[number].shape)
        text = ", ".join(f"{axis}={at}" for axis, at in zip(("channel", "row", "col"), place, strict=False))
        row = {"rank": rank + 1, "searched": len(order), "activation": f"{named[number]}, {text}"}
        row |= {"of_up_channel": bool(up[index]), "pictures": len(pairs), "background": count}
        rows.append(row | {"difference": difference[index], "std": std[index], "effect": effect[index]})
    return rows


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
                "works_by": "high sums" if sign > 0 else "low sums",
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
    draw_contrast(axes[4], tables["contrast"][:SHOWN], tables["contrast"][0]["searched"])
    return drawn


def finding(tables: Tables) -> Finding:
    rows = [row for row in tables["hook_points"] if row["in"] is not None and row["out"] is not None]
    if not rows:
        return TOO_FEW
    at = keyed(chosen(rows, hook_point=SITE), "direction")
    first = next((row["hook_point"] for row in rows if row["direction"] == "UP" and above(row, "in", KNOWS)), "none")
    dropped = [name for name, row in at.items() if above(row, "drop")]
    single, own = tables["activations"][0], chosen(tables["activations"], of_up_channel=True)[0]
    top, up = tables["contrast"][0], next(row for row in tables["contrast"] if "UP" in (row["direction"] or ""))
    p = "" if up["p"] is None else f", p = {up['p']:.2g}"
    # The best hook point on the choice mazes: the highest score would be biased upwards.
    best = keyed(sorted(rows, key=lambda row: row["chosen_by"]), "direction")
    return Finding(
        f"Over {top['pairs']} pairs, the UP channel's effect is {shown(up, 'effect', '+.2f')} deviations{p}, number "
        f"{up['rank']} of {top['searched']} channels; {top['site']} has the largest effect. By single activations of "
        f"our pair, {single['activation']} differs most of {single['searched']}; the UP channel's first is number "
        f"{own['rank']}. "
        f"At {SITE}: {'; '.join(map(_areas, at.values()))}.",
        verdict(None if up["p"] is None or not up["p"] <= LEVEL else up["effect"] > 0),
        f"{first} is the first hook point to predict UP with an AUC above {KNOWS}; the best on the choice mazes are "
        + "; ".join(f"{row['hook_point']} for {_areas(row)}" for row in best.values())
        + f". At {SITE}, the AUC drops out of distribution for {len(dropped)} of {len(at)} directions.",
    )


def _areas(row: Row) -> str:
    turned = "" if row["works_by"] == "high sums" else ", by low sums"
    return (
        f"{row['direction']} channel {row['channel']}{turned}, AUC {shown(row, 'in')} in and {shown(row, 'out')} out "
        f"(n={row['n_in']}, {row['n_out']})"
    )
