"""Does the mouse go to a square if the activations that mark the cheese are set there by hand?

Method: Size {SIZE}: the channel of block2.res1.resadd that the cheese raises most on its own cell of the map, set at
the cell of a random square in every state; channel and magnitude were chosen on other mazes. The verdict: the effect on
reaching the square is at least {DRAWN:.0%} of the effect of the cheese itself, if the cheese has an effect.

The post: Not in the post. In the work it builds on, one activation set at a square drew the mouse there.

Limits: The result does not show that the mouse was sent there on every level: the cheese stays in the maze and in the
other channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chanpatch import HookPoints, patch_in
from maze.analysis.cells import Integers, Table, Tables, Values, above, keyed, shown, verdict
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import effect_rows, mean_intervals, p_reached
from maze.analysis.estimates import intervals
from maze.analysis.exact import Chains
from maze.analysis.forwards import activations
from maze.analysis.part import Finding, Study
from maze.analysis.steering import BLOCK, difference_vectors
from maze.analysis.tables import Intervention
from maze.levels import random_squares
from maze.paths import START, at_cells
from maze.states import WORLD, Mazes, read_mazes, write_mazes

SIZE = 11
MOST_LEVELS = 400
CHOOSING_LEVELS = 60  # for choosing channels and the magnitude, for any n
SHARE = 11 / 128  # fraction of channels to choose: the fraction that encodes the cheese in the published network
MULTIPLES = (1, 2, 4, 8)  # magnitudes to choose from, relative to a channel's activation at the cheese
ONE, ONE_OTHER = "first cheese channel", "one random other"  # the reference sets one activation
ALL, OTHERS = "all cheese channels", "as many random others"
CONTROLS = {ONE: ONE_OTHER, ALL: OTHERS}
MOVED = "the cheese itself there"  # an upper bound on the effect of a mark
DRAWN = 0.5  # fraction of that effect from which the mouse is drawn as by a cheese


def measure(study: Study) -> dict[str, Table]:
    """The channels that mark the cheese, the magnitude, and the probability of reaching the marked square."""
    choosing = study.levels("retarget choosing", CHOOSING_LEVELS, size=SIZE, cheese="as drawn")
    channels, own, others, marks = cheese_channels(study.points, choosing)
    magnitudes, multiple = _magnitudes(study, choosing, own, marks)
    drawn = study.levels("retarget", min(study.n, MOST_LEVELS), size=SIZE, cheese="as drawn")
    levels, targets = with_targets(drawn, study.seed_for("retarget targets"))
    rng = np.random.default_rng(study.seed_for("retarget controls"))
    random = np.stack([rng.permutation(others)[: len(own)] for _ in levels])  # other channels for every level
    every = np.tile(own, (len(levels), 1))
    sets = {ONE: every[:, :1], ONE_OTHER: random[:, :1], ALL: every, OTHERS: random}
    places = map_cells(read_mazes(levels), targets)
    interventions = {name: retargeted(study.points, places, each, multiple * marks) for name, each in sets.items()}
    moved = write_mazes(read_mazes(levels).moved(cheese=targets), levels)
    reached = np.concatenate(
        [p_reached(study.points, *each, targets, BLOCK) for each in ((levels, interventions), (moved, {}))]
    )
    names = [*sets, MOVED]
    against = []
    for name, control in CONTROLS.items():
        (more,) = mean_intervals((reached[1 + names.index(name)] - reached[1 + names.index(control)])[None])
        row = {"intervention": name, "control": control, "n": len(levels), "multiple": multiple}
        against.append(row | intervals(own_minus_control=more))
    effects = effect_rows({"reached": reached}, names)
    return {"channels": channels, "magnitudes": magnitudes, "effects": effects, "against": against}


def cheese_channels(points: HookPoints, levels: Sequence[bytes]) -> tuple[Table, Integers, Integers, Values]:
    """The channels whose activation the cheese raises most on its own cell of the map.

    Returns one row per channel, the highest contrast first; the chosen channels; the other channels whose activation at
    the cheese varies; and the mean activation of the chosen channels there.
    """
    mazes = read_mazes(levels)
    cells = map_cells(mazes, mazes.cheese)
    contrast = at_cells(difference_vectors(points, levels, mazes, mazes.without_cheese()).numpy(), cells)
    at_cheese = at_cells(activations(points, levels, BLOCK)[BLOCK].numpy(), cells).astype(np.float64)
    order = np.argsort(-contrast.mean(axis=0), kind="stable")
    chosen, others = np.split(order, [max(1, round(SHARE * len(order)))])
    means = [mean_intervals(each.T) for each in (contrast, at_cheese)]
    rows = [
        {
            "channel": int(channel),
            "n": len(levels),
            **intervals(contrast=means[0][channel], activation=means[1][channel]),
            "chosen": bool(channel in chosen),
        }
        for channel in order
    ]
    return rows, chosen, others[np.ptp(at_cheese[:, others], axis=0) > 0], at_cheese[:, chosen].mean(axis=0)


def map_cells(mazes: Mazes, squares: Integers) -> Integers:
    """The cells of block 2's 16x16 maps, whose first row is at the top, for cells of the maze: (batch, 2)."""
    world = squares + (WORLD - mazes.size[:, None]) // 2
    from_top = np.stack([WORLD - 1 - world[:, 0], world[:, 1]], axis=1)
    return ((from_top + 0.5) * 16 / WORLD).astype(np.int64)


def with_targets(levels: Sequence[bytes], seed: int) -> tuple[list[bytes], Integers]:
    """The levels with a square that the mouse can reach before the cheese, and a random such square per level."""
    chains = Chains.of(levels)
    squares = np.zeros(chains.mazes.grid.shape, dtype=bool)
    squares[chains.level, chains.cell[:, 0], chains.cell[:, 1]] = True
    squares[:, START[0], START[1]] = False
    kept = np.flatnonzero(squares.any(axis=(1, 2)))
    return [levels[index] for index in kept], random_squares(squares[kept], np.random.default_rng(seed))


def retargeted(points: HookPoints, places: Integers, channels: Integers, values: Values) -> Intervention:
    """Set activations at each level's cell of the map, (level, 2).

    `channels` are the channels to set, (level, k), and `values` their values in the same order, (k,).
    """
    site = points.site(BLOCK)
    count, rows, cols = points[BLOCK].shape
    every = np.arange(len(places))[:, None]
    which, put = np.zeros((len(places), count), dtype=bool), np.zeros((len(places), count), dtype=np.float32)
    which[every, channels], put[every, channels] = True, values[: channels.shape[1]]
    here = (np.arange(rows)[:, None] == places[:, 0, None, None]) & (np.arange(cols) == places[:, 1, None, None])
    where, source = torch.from_numpy(which[:, :, None, None] & here[:, None]), torch.from_numpy(put)[:, :, None, None]
    return lambda level: [patch_in(site, source[level], where=where[level])]


def _magnitudes(study: Study, levels: Sequence[bytes], own: Integers, marks: Values) -> tuple[Table, int]:
    """The effect of the first channel by magnitude, and the multiple whose interval has the highest low end."""
    levels, targets = with_targets(levels, study.seed_for("retarget choosing targets"))
    places, channels = map_cells(read_mazes(levels), targets), np.tile(own[:1], (len(levels), 1))
    tries = {str(each): retargeted(study.points, places, channels, each * marks) for each in MULTIPLES}
    reached = p_reached(study.points, levels, tries, targets, BLOCK)
    rows = effect_rows({"reached": reached}, list(tries))
    lows = [-np.inf if row["effect_low"] is None else row["effect_low"] for row in rows]  # None if withheld
    return rows, MULTIPLES[int(np.argmax(lows))]


def finding(tables: Tables) -> Finding:
    effects = keyed(tables["effects"], "intervention")
    one, own, moved = (effects[name] for name in (ONE, ALL, MOVED))
    against, against_all = tables["against"]
    first = tables["channels"][0]
    count = sum(row["chosen"] for row in tables["channels"])
    most = max(int(row["intervention"]) for row in tables["magnitudes"])
    edge = " (the largest multiple tried)" if against["multiple"] == most else ""
    # If the cheese itself draws no mouse, half of its effect is undefined.
    draws = above(moved, "effect")
    half = above(one, "effect", DRAWN * moved["effect"]) if draws else None
    fraction = f"; the one channel does {one['effect'] / moved['effect']:.0%} of that" if draws else ""
    return Finding(
        f"Channel {first['channel']}, set to {against['multiple']} times its activation at the cheese{edge}: P(target) "
        f"{one['original']:.3f} becomes {one['modified']:.3f}, effect {shown(one, 'effect', '+.3f')}, n={one['n']}. "
        f"All {count} cheese channels have {shown(own, 'effect', '+.3f')}, and the cheese itself put there "
        f"{shown(moved, 'effect', '+.3f')}{fraction}.",
        verdict(half),
        f"Compared with random other channels, the one does {shown(against, 'own_minus_control', '+.3f')} more, and "
        f"all do {shown(against_all, 'own_minus_control', '+.3f')} more.",
    )


figure = chart(
    Panel("magnitudes", "intervention", "effect", "change of P(target)", title="by magnitude"),
    Panel("effects", "intervention", "effect", "change of P(target)", title="beside controls and the cheese itself"),
    size=(6, 5),
)
