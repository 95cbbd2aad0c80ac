"""Which channels of which convolution keep the mouse from the cheese in the bottom right corner?

Method: Size {SIZE}, at most {MOST_LEVELS} levels. Every channel of every convolution's output zeroed in turn, in every
state; P(cheese within 256 steps) computed, not sampled. Controls: the other live channels of the hook point; p by sign
flips over levels.

The post: Not done; the post zeroed one channel of relu3.

Limits: The channel with the largest gain need not have that gain again: the channel is the best of many, and the
interval is not corrected for the selection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from chanpatch import HookPoints, sweep, zero_ablate
from chanpatch.statistics import benjamini_hochberg, sign_flip_test
from maze.analysis.cells import Flags, Row, Table, Tables, Values, shown
from maze.analysis.drawing import panels
from maze.analysis.effects import mean_intervals
from maze.analysis.estimates import intervals, rank_cells
from maze.analysis.exact import Chains, first_hits
from maze.analysis.part import Finding, Study
from maze.levels import policy_input
from maze.policy.network import ACTION_COUNT, ACTIONS, NO_MOVE

SIZE = 11  # the smallest size at which the shipped policy finds that cheese about half of the time
MOST_LEVELS = 40  # every state runs through the rest of the network once per channel
LEVEL = 0.05  # significance level for the corrected p-value
LIVE = 1e-6  # smallest change in a move's probability that is not rounding
_STATES = 256  # states in one sweep
_TABLES = 32  # interventions whose chains are computed at once


def measure(study: Study) -> dict[str, Table]:
    """The effect of every channel, its rank among the other channels of its hook point, and a corrected p-value."""
    levels = study.levels("sweep", min(study.n, MOST_LEVELS), size=SIZE, cheese="bottom right")
    chains = Chains.of(levels)
    channels = list(_channels(study.points))
    moves, plain = _swept(study.points, chains, channels)
    before = first_hits(chains, plain, [chains.cheese])[chains.start, 0]
    found = np.concatenate(
        [
            first_hits(chains, moves[first : first + _TABLES], [chains.cheese])[:, chains.start, 0]
            for first in range(0, len(moves), _TABLES)
        ]
    )
    live = np.abs(moves - plain).max(axis=(1, 2)) > LIVE
    return {"channels": _rows(study, channels, before, found - before, live)}


def _rows(study: Study, channels: Sequence[tuple[str, int]], before: Values, effects: Values, live: Flags) -> Table:
    """One row per channel, (hook point, channel): its effect, a p corrected for all live channels, and its rank.

    `before` is the policy's P(cheese), (level,), and `effects` the changes, (channel, level).
    """
    means = mean_intervals(effects)
    p = sign_flip_test(effects.T, seed=study.seed_for("sweep flips"))
    p_bh = benjamini_hochberg(np.where(live, p, np.nan))
    rows = []
    for number, (point, channel) in enumerate(channels):
        others = [
            effects[other].mean()
            for other, (name, _) in enumerate(channels)
            if name == point and other != number and live[other]
        ]
        row = {"hook_point": point, "channel": channel, "live": bool(live[number]), "n": len(before)}
        row |= {"original": float(before.mean()), **intervals(effect=means[number])}
        row |= {name: float(each[number]) if live[number] else None for name, each in (("p", p), ("p_bh", p_bh))}
        # Without a p-value for the rank, as the finding selects a channel by its effect.
        rank = rank_cells(effects[number].mean(), others, ranked=live[number])
        rows.append(row | {"rank": rank["rank"], "controls": rank["controls"]})
    return rows


def _channels(points: HookPoints) -> Iterator[tuple[str, int]]:
    for name, point in points.items():
        if point.side == "out" and isinstance(points.model.get_submodule(point.module), nn.Conv2d):
            yield from ((name, channel) for channel in range(point.length("channel") or 0))


def _swept(points: HookPoints, chains: Chains, channels: list[tuple[str, int]]) -> tuple[Values, Values]:
    """Action tables with each channel zeroed, (channel, state, action), and the policy's own, (state, action).

    The metrics are the probabilities of moves; a table has each at one of the move's actions.
    """
    patches = [zero_ablate(points.site(name, channel=channel)) for name, channel in channels]
    metrics = {move.name: _probability(actions) for move, actions in ACTIONS.items()}
    tables = np.zeros((len(channels), len(chains), ACTION_COUNT), dtype=np.float32)
    plain = np.zeros((len(chains), ACTION_COUNT), dtype=np.float32)
    for first in tqdm(range(0, len(chains), _STATES), desc="sweep", unit="batch", delay=2, leave=False):
        here = slice(first, min(first + _STATES, len(chains)))
        observations = torch.from_numpy(policy_input(chains.observations(here)))
        result = sweep(points, observations, patches=patches, metric=metrics, progress=False)
        for move, actions in ACTIONS.items():
            tables[:, here, actions[0]] = result.values[move.name]
            plain[here, actions[0]] = result.baseline[move.name]
    for table in (tables, plain):
        table[..., NO_MOVE] = np.maximum(1 - table.sum(axis=-1), 0)
    return tables, plain


def _probability(actions: tuple[int, ...]):
    def probability(output: tuple[torch.distributions.Categorical, Tensor]) -> Tensor:
        return output[0].probs[:, list(actions)].sum(dim=1)

    return probability


def figure(tables: Tables) -> Figure:
    drawn, axes = panels(12, 4.8)
    counts = Counter(row["hook_point"] for row in tables["channels"])
    names = list(counts)
    for row in tables["channels"]:
        if row["live"]:
            place = names.index(row["hook_point"]) + 0.6 * (row["channel"] / counts[row["hook_point"]] - 0.5)
            axes.plot(place, row["effect"], "o" if _stands(row) else "x", color="black", markersize=4, alpha=0.7)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.removeprefix("embedder.") for name in names], rotation=45, ha="right")
    axes.set_ylabel(f"change of P(cheese within 256 steps)\nn={tables['channels'][0]['n']} levels of side {SIZE}")
    axes.set_title("One channel zeroed; a dot if the change is significant after correction for all channels")
    return drawn


def _stands(row: Row) -> bool:
    return row["p_bh"] is not None and row["p_bh"] < LEVEL


def finding(tables: Tables) -> Finding:
    rows = [row for row in tables["channels"] if row["live"]]
    if not rows:
        return Finding("No channel changes anything.", "not comparable", "Nothing follows.")
    helps, hurts = ([row for row in rows if _stands(row) and (row["effect"] > 0) == up] for up in (True, False))
    best = max(rows, key=lambda row: row["effect"])
    ranked = "" if best["rank"] is None else f", rank {best['rank']} of {best['controls'] + 1} live channels there"
    points = list(dict.fromkeys(row["hook_point"] for row in helps))
    return Finding(
        f"Zeroing raises P(cheese), {best['original']:.3f}, for {len(helps)} and lowers it for {len(hurts)} of "
        f"{len(rows)} live channels (n={best['n']}, Benjamini-Hochberg at {LEVEL}). The largest gain: "
        f"{best['hook_point']} channel {best['channel']}, {shown(best, 'effect', '+.3f')}{ranked}.",
        "not comparable",
        f"Channels that lower the chance of the cheese in the bottom right corner are at {len(points)} of "
        f"{len({row['hook_point'] for row in rows})} hook points: {', '.join(points) or 'none'}.",
    )
