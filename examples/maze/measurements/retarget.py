"""Retargeting: the activations that mark the cheese, set at another square, and where the mouse then goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import HookPoints, patch_in
from maze.analysis.effects import activations, effect_rows, level_batches, mean_intervals
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import Chains, first_hits
from maze.analysis.off_distribution import METERED, absolute_z, mouse_anywhere
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, interval_cells, shown, verdict
from maze.analysis.steering import BLOCK, difference_vectors
from maze.analysis.tables import Intervention
from maze.environment.levels import random_squares
from maze.environment.paths import START, distances
from maze.environment.states import WORLD, Mazes, read_mazes, write_mazes

SIZE = 11
MOST_LEVELS = 400
CHOOSING_LEVELS = 60  # that channels and magnitude are chosen on, whatever n is
SHARE = 11 / 128  # of the channels are taken: as many as were the cheese's in the published network
MULTIPLES = (1, 2, 4, 8)  # of what a channel has at the cheese, the magnitudes to choose from
BINS = ((1, 5), (6, 10), (11, 20), (21, WORLD * WORLD))  # steps from the start to the target
ONE, ONE_OTHER = "first cheese channel", "one random other"  # the reference sets one activation
ALL, OTHERS = "all cheese channels", "as many random others"
CONTROLS = {ONE: ONE_OTHER, ALL: OTHERS}
MOVED = "the cheese itself there"  # instead of where it was: what a perfect mark would do
DRAWN = 0.5  # of that: with less, the mouse is not drawn as by a cheese

Cells: TypeAlias = NDArray[np.int64]
Values: TypeAlias = NDArray[np.float64]


def measure(study: Study) -> dict[str, Table]:
    """Which channels mark the cheese, how strongly to set them, and how often the mouse gets to the marked square."""
    choosing = study.levels("retarget choosing", CHOOSING_LEVELS, size=SIZE, cheese="as drawn")
    channels, chosen, marks = cheese_channels(study.points, choosing)
    magnitudes, multiple = _magnitudes(study, choosing, chosen, marks)

    drawn = study.levels("retarget", min(study.n, MOST_LEVELS), size=SIZE, cheese="as drawn")
    levels, targets = with_targets(drawn, study.seed_for("retarget targets"))
    rng = np.random.default_rng(study.seed_for("retarget controls"))
    others = np.array([row["channel"] for row in channels if row["varies"] and not row["chosen"]])
    random = np.stack([rng.permutation(others)[: len(chosen)] for _ in levels])  # other channels for every level
    own = np.tile(chosen, (len(levels), 1))
    sets = {ONE: own[:, :1], ONE_OTHER: random[:, :1], ALL: own, OTHERS: random}
    cells, values = map_cells(read_mazes(levels), targets), multiple * marks
    interventions = {name: retargeted(study.points, cells, each, values) for name, each in sets.items()}
    moved = write_mazes(read_mazes(levels).moved(cheese=targets), levels)
    reached = np.concatenate(
        [_reached(study.points, levels, targets, interventions), _reached(study.points, moved, targets, {})]
    )
    names = [*sets, MOVED]
    steps = distances(read_mazes(levels), START)[np.arange(len(levels)), targets[:, 0], targets[:, 1]]
    far = _absolute_z(study, levels, cells, chosen, others, values)
    return {
        "channels": channels,
        "magnitudes": magnitudes,
        "effects": [
            row | {"absolute_z": far.get(row["intervention"])} for row in effect_rows({"reached": reached}, names)
        ],
        "against": _against(dict(zip(names, reached[1:], strict=True)), multiple),
        "distance": [row for ends in BINS for row in _at_distance(ends, steps, reached, names)],
    }


def _against(reached: Mapping[str, Values], multiple: int) -> Table:
    """How much more the cheese channels do than others, over the same levels; and the multiple they were set to."""
    rows: Table = []
    for name, control in CONTROLS.items():
        (more,) = mean_intervals((reached[name] - reached[control])[None])
        known = {"intervention": name, "control": control, "n": len(reached[name]), "multiple": multiple}
        rows.append({**known, **interval_cells("own_minus_control", more)})
    return rows


def _absolute_z(
    study: Study, levels: Sequence[bytes], cells: Cells, chosen: Cells, others: Cells, values: Values
) -> dict[str, float]:
    """How far the sums of the channels that are set lie from those that occur, mean over the channels of each set.

    The controls are other channels on every level. So every channel is tried with every value, and a control has the
    mean of what the others have.
    """
    some = mouse_anywhere(levels[:METERED], study.seed_for("retarget mouse"))
    usual = study.levels("retarget usual", METERED, size=SIZE, cheese="as drawn", mouse="anywhere")
    every = np.tile(np.arange(study.points[BLOCK].length("channel") or 0), (len(levels), 1))
    own, other = [], []
    for channel, value in zip(chosen.tolist(), values, strict=True):
        intervention = retargeted(study.points, cells, every, np.full(every.shape[1], value))
        far = absolute_z(study.points, intervention, some, usual)
        own.append(far[channel])
        other.append(float(np.mean([far[each] for each in others.tolist()])))
    return {ONE: own[0], ONE_OTHER: other[0], ALL: float(np.mean(own)), OTHERS: float(np.mean(other))}


def cheese_channels(points: HookPoints, levels: Sequence[bytes]) -> tuple[Table, Cells, Values]:
    """The channels whose activation the cheese raises most on its own cell of the map.

    Args:
        points: of the policy.
        levels: to choose on.

    Returns:
        One row per channel, the highest contrast first; the channels that are taken; and their mean activation at
        the cheese. `highest` is the activation that a channel has anywhere in these mazes. A channel varies when its
        activation at the cheese is not the same in all of them.
    """
    mazes = read_mazes(levels)
    row, col = map_cells(mazes, mazes.cheese).T
    every = np.arange(len(levels))
    contrast = difference_vectors(points, levels, mazes, mazes.without_cheese()).numpy()[every, :, row, col]
    activation = activations(points, levels, BLOCK)[BLOCK].numpy()
    at_cheese = activation[every, :, row, col].astype(np.float64)
    order = np.argsort(-contrast.mean(axis=0), kind="stable")
    chosen = order[: max(1, round(SHARE * len(order)))]
    means = [mean_intervals(each.T) for each in (contrast, at_cheese)]
    rows: Table = [
        {
            "channel": int(channel),
            "n": len(levels),
            **interval_cells("contrast", means[0][channel]),
            **interval_cells("activation", means[1][channel]),
            "highest": float(activation[:, channel].max()),
            "varies": bool(np.ptp(at_cheese[:, channel]) > 0),
            "chosen": bool(channel in chosen),
        }
        for channel in order
    ]
    return rows, chosen, at_cheese[:, chosen].mean(axis=0)


def map_cells(mazes: Mazes, cells: Cells) -> Cells:
    """Where cells of the maze lie in the 16x16 maps of block 2, whose first row is the top one: (batch, 2)."""
    world = cells + (WORLD - mazes.size[:, None]) // 2
    from_top = np.stack([WORLD - 1 - world[:, 0], world[:, 1]], axis=1)
    return ((from_top + 0.5) * 16 / WORLD).astype(np.int64)


def with_targets(levels: Sequence[bytes], seed: int) -> tuple[list[bytes], Cells]:
    """A random square of each level that the mouse can get to before the cheese; levels without one are left out."""
    chains = Chains.of(levels)
    squares = np.zeros(chains.mazes.grid.shape, dtype=bool)
    squares[chains.level, chains.cell[:, 0], chains.cell[:, 1]] = True
    squares[:, START[0], START[1]] = False
    kept = np.flatnonzero(squares.any(axis=(1, 2)))
    return [levels[index] for index in kept], random_squares(squares[kept], np.random.default_rng(seed))


def retargeted(points: HookPoints, cells: Cells, channels: Cells, values: Values) -> Intervention:
    """Activations set at one cell of the map, another one for every level.

    Args:
        points: of the policy.
        cells: (level, 2), of the map.
        channels: (level, k), which are set.
        values: what the first, the second, ... of them is set to; more than k are not needed.
    """
    site = points.site(BLOCK)
    count, rows, cols = points[BLOCK].shape
    every = np.arange(len(cells))[:, None]
    chosen, put = np.zeros((len(cells), count), dtype=bool), np.zeros((len(cells), count), dtype=np.float32)
    chosen[every, channels], put[every, channels] = True, values[: channels.shape[1]]
    here = (np.arange(rows)[:, None] == cells[:, 0, None, None]) & (np.arange(cols) == cells[:, 1, None, None])
    where, source = torch.from_numpy(chosen[:, :, None, None] & here[:, None]), torch.from_numpy(put)[:, :, None, None]
    return lambda level: [patch_in(site, source[level], where=where[level])]


def _magnitudes(study: Study, levels: Sequence[bytes], chosen: Cells, marks: Values) -> tuple[Table, int]:
    """The effect of the first channel by magnitude on the levels to choose on; the multiple whose low end is highest.

    The estimate alone would favour magnitudes that do something, whatever it is, on a few levels.
    """
    levels, targets = with_targets(levels, study.seed_for("retarget choosing targets"))
    cells, channels = map_cells(read_mazes(levels), targets), np.tile(chosen[:1], (len(levels), 1))
    tries = {str(each): retargeted(study.points, cells, channels, each * marks) for each in MULTIPLES}
    reached = _reached(study.points, levels, targets, tries)
    rows = effect_rows({"reached": reached}, list(tries))
    lows = np.nan_to_num([row["effect_low"] for row in rows], nan=-np.inf)  # NaN if the interval is withheld
    return rows, MULTIPLES[int(np.argmax(lows))]


def _reached(
    points: HookPoints, levels: Sequence[bytes], targets: Cells, interventions: Mapping[str, Intervention]
) -> Values:
    """P(the mouse gets to the target within 256 steps, before the cheese elsewhere): (1 + intervention, level)."""
    parts: list[Values] = []
    first = 0
    for chains, tables in level_batches(points, levels, {ORIGINAL: (), **interventions}, site=BLOCK):
        goal = chains.at(targets[first : first + len(chains.levels)])
        parts.append(first_hits(chains, tables, [goal])[:, chains.start, 0])
        first += len(chains.levels)
    return np.concatenate(parts, axis=1)


def _at_distance(ends: tuple[int, int], steps: NDArray[np.float32], reached: Values, names: Sequence[str]) -> Table:
    """The effects on the levels whose target is so many steps from the start."""
    inside = (steps >= ends[0]) & (steps <= ends[1])
    if not inside.any():
        return []
    known = {"from": ends[0], "to": int(min(ends[1], steps.max()))}
    return [{**known, **row} for row in effect_rows({"reached": reached[:, inside]}, names)]


def figure(tables: Tables) -> Figure:
    """The magnitudes that were tried, and the effects by the distance of the target."""
    drawn = Figure(figsize=(11, 5), layout="constrained")
    tried, by_distance = drawn.subplots(1, 2, width_ratios=(1, 1.6))
    rows = tables["magnitudes"]
    for number, row in enumerate(rows):
        tried.plot([number, number], [row["effect_low"], row["effect_high"]], color="black")
        tried.plot(number, row["effect"], "o", color="black")
    tried.set(xticks=range(len(rows)), xticklabels=[row["intervention"] for row in rows])
    tried.set(xlabel="times the activation at the cheese", title=f"{ONE}, levels to choose on, n={rows[0]['n']}")
    bins = list(dict.fromkeys((row["from"], row["to"], row["n"]) for row in tables["distance"]))
    styles = zip(
        (ONE, ONE_OTHER, ALL, OTHERS, MOVED), ("black", "0.5", "tab:orange", "0.6", "tab:purple"), "osD^v", strict=True
    )
    for number, (name, color, marker) in enumerate(styles):
        of = [row for row in tables["distance"] if row["intervention"] == name]
        place = np.arange(len(of)) + 0.15 * (number - 2)
        by_distance.vlines(place, [row["effect_low"] for row in of], [row["effect_high"] for row in of], color=color)
        by_distance.plot(place, [row["effect"] for row in of], marker, color=color, label=name)
    labels = [f"{first} to {last}\n(n={n})" for first, last, n in bins]
    by_distance.set(xticks=range(len(bins)), xticklabels=labels, xlabel="steps from the start to the target")
    by_distance.set(title=f"set to {tables['against'][0]['multiple']} times the activation at the cheese")
    by_distance.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3)
    for axes in (tried, by_distance):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("change of P(target within 256 steps),\n95% interval over levels")
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def finding(tables: Tables) -> Finding:
    effects = {row["intervention"]: row for row in tables["effects"]}
    one, other, own, others, moved = (effects[name] for name in (ONE, ONE_OTHER, ALL, OTHERS, MOVED))
    against, against_all = tables["against"]
    first = tables["channels"][0]
    count = sum(row["chosen"] for row in tables["channels"])
    near, far = ([row for row in tables["distance"] if row["intervention"] == ONE][end] for end in (0, -1))
    most = max(int(row["intervention"]) for row in tables["magnitudes"])
    edge = " (the largest multiple tried)" if against["multiple"] == most else ""
    more = above(one, "effect")
    # Where the cheese itself draws no mouse, there is nothing that the mark could be half of.
    half = above(one, "effect", DRAWN * moved["effect"]) if above(moved, "effect") else None
    claims = [more, above(against, "own_minus_control"), half] if more else [more]
    return Finding(
        f"Channel {first['channel']}, set to {against['multiple']} times what it has at the cheese{edge}: P(target) "
        f"{one['original']:.3f} becomes {one['modified']:.3f}, effect {shown(one, 'effect', '+.3f')}, n={one['n']}; "
        f"all {count} cheese channels {shown(own, 'effect', '+.3f')}; the cheese itself put there "
        f"{shown(moved, 'effect', '+.3f')}{_share(one, moved)}.",
        verdict(*claims),
        f"Another channel, drawn anew for every level: {shown(other, 'effect', '+.3f')}; the cheese channel does "
        f"{shown(against, 'own_minus_control', '+.3f')} more. {count} others: {shown(others, 'effect', '+.3f')}; all "
        f"cheese channels do {shown(against_all, 'own_minus_control', '+.3f')} more. Targets {near['from']} to "
        f"{near['to']} steps away: {shown(near, 'effect', '+.3f')} (n={near['n']}); {far['from']} to {far['to']}: "
        f"{shown(far, 'effect', '+.3f')} (n={far['n']}). The activation is "
        f"{against['multiple'] * first['activation'] / first['highest']:.1f} times the highest that the channel has "
        f"anywhere in {first['n']} mazes; its sum lies {one['absolute_z']:.1f} standard deviations from those that "
        f"occur, that of another channel {other['absolute_z']:.1f} (0.8 is usual).",
        "That the mouse was sent there on every level: the cheese stays in the maze and in the other channels, and "
        "what is told is how much more often the mouse comes by.",
    )


def _share(one: Mapping[str, Any], moved: Mapping[str, Any]) -> str:
    """How much of what the cheese does the mark does, in words; nothing where the cheese itself does nothing."""
    if not above(moved, "effect"):
        return ""
    return f", of which the one channel does {one['effect'] / moved['effect']:.0%} (a half would be drawing the mouse)"


PART = Part(
    name="retarget",
    question="Does the mouse go to a square where the activations that mark the cheese are set by hand?",
    method=f"Size {SIZE}: the channel of block2.res1.resadd that the cheese raises most on its own cell of the map, "
    "set at the cell of a random square in every state; channel and magnitude were chosen on other mazes.",
    post="Not in the post. In the work it builds on, one activation set at a square drew the mouse there.",
    measure=measure,
    figure=figure,
    finding=finding,
)
