"""Every channel of every convolution zeroed in turn: what each does for reaching the cheese, exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from chanpatch import HookPoints, sweep, zero_ablate
from chanpatch.statistics import benjamini_hochberg, rank_among, sign_flip_test
from maze.analysis.effects import mean_intervals
from maze.analysis.exact import Chains, first_hits
from maze.analysis.part import Finding, Part, Study, Table, Tables, interval_cells, shown
from maze.environment.levels import policy_input
from maze.policy.network import ACTION_COUNT, ACTIONS, NO_MOVE

SIZE = 11  # the smallest at which the shipped policy finds that cheese about as often as not: room for both signs
MOST_LEVELS = 40  # every state of each goes through the rest of the network once per channel
LEVEL = 0.05  # of the corrected p
LIVE = 1e-6  # how much a move's probability must change for a channel to do anything; rounding changes it by 1e-8
_STATES = 256  # in one sweep
_TABLES = 32  # interventions whose chains are computed at once


def measure(study: Study) -> dict[str, Table]:
    """The effect of every channel with its rank among the others of its hook point, and a corrected p."""
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


def _rows(
    study: Study,
    channels: Sequence[tuple[str, int]],
    before: NDArray[np.float64],
    effects: NDArray[np.float64],
    live: NDArray[np.bool_],
) -> Table:
    """One row per channel: its effect, a p corrected for all live ones, its rank among those of its hook point.

    Args:
        study: for the seeds.
        channels: (hook point, channel) of each.
        before: P(cheese) of the policy itself, (level,).
        effects: how much zeroing changes it, (channel, level).
        live: which of them do anything at all.
    """
    intervals = mean_intervals(effects)
    p = sign_flip_test(effects.T, seed=study.seed_for("sweep flips"))
    p_bh = benjamini_hochberg(np.where(live, p, np.nan))
    rows: Table = []
    for number, (point, channel) in enumerate(channels):
        others = [
            effects[other].mean()
            for other, (name, _) in enumerate(channels)
            if name == point and other != number and live[other]
        ]
        rank = rank_among(effects[number].mean(), others) if live[number] and others else None
        rows.append(
            {
                "hook_point": point,
                "channel": channel,
                "live": bool(live[number]),
                "n": len(before),
                "original": float(before.mean()),
                **interval_cells("effect", intervals[number]),
                "p": float(p[number]) if live[number] else None,
                "p_bh": float(p_bh[number]) if live[number] else None,
                "rank": rank and rank.rank,
                "controls": rank
                and rank.controls,  # without a p: the channel that is told of was picked for its effect
            }
        )
    return rows


def _channels(points: HookPoints) -> Iterator[tuple[str, int]]:
    for name, point in points.items():
        if point.side == "out" and isinstance(points.model.get_submodule(point.module), nn.Conv2d):
            yield from ((name, channel) for channel in range(point.length("channel") or 0))


def _swept(
    points: HookPoints, chains: Chains, channels: list[tuple[str, int]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Action tables with each channel zeroed, (channel, state, action), and the policy's own, (state, action).

    What is asked of the policy is the probability of each move; a table has all of it at one of the move's actions.
    """
    patches = [zero_ablate(points.site(name, channel=channel)) for name, channel in channels]
    metrics = {move.name: _probability(actions) for move, actions in ACTIONS.items()}
    columns = {move.name: actions[0] for move, actions in ACTIONS.items()}
    tables = np.zeros((len(channels), len(chains), ACTION_COUNT), dtype=np.float32)
    plain = np.zeros((len(chains), ACTION_COUNT), dtype=np.float32)
    for first in tqdm(range(0, len(chains), _STATES), desc="sweep", unit="batch", delay=2, leave=False):
        here = slice(first, min(first + _STATES, len(chains)))
        observations = torch.from_numpy(policy_input(chains.observations(here)))
        result = sweep(points, observations, patches=patches, metric=metrics, progress=False)
        for name, column in columns.items():
            tables[:, here, column] = result.values[name]
            plain[here, column] = result.baseline[name]
    for table in (tables, plain):
        table[..., NO_MOVE] = np.maximum(1 - table.sum(axis=-1), 0)
    return tables, plain


def _probability(actions: tuple[int, ...]):
    def probability(output: tuple[torch.distributions.Categorical, Tensor]) -> Tensor:
        return output[0].probs[:, list(actions)].sum(dim=1)

    return probability


def figure(tables: Tables) -> Figure:
    """Effects by hook point, in execution order; filled where they stand after correction."""
    drawn = Figure(figsize=(12, 4.8), layout="constrained")
    axes = drawn.subplots()
    counts = Counter(row["hook_point"] for row in tables["channels"])
    names = list(counts)
    for row in tables["channels"]:
        if row["live"]:
            place = names.index(row["hook_point"]) + 0.6 * (row["channel"] / counts[row["hook_point"]] - 0.5)
            axes.plot(place, row["effect"], "o" if _stands(row) else "x", color="black", markersize=4, alpha=0.7)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.removeprefix("embedder.") for name in names], rotation=45, ha="right")
    axes.set_ylabel(f"change of P(cheese within 256 steps)\nn={tables['channels'][0]['n']} levels of side {SIZE}")
    axes.set_title("One channel zeroed; a dot where the change stands after correction for all channels, else a cross")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _stands(row: Mapping[str, Any]) -> bool:
    return row["p_bh"] is not None and row["p_bh"] < LEVEL


def finding(tables: Tables) -> Finding:
    rows = [row for row in tables["channels"] if row["live"]]
    if not rows:
        return Finding("No channel changes anything.", "not comparable", "Nothing.", "Anything.")
    helps = [row for row in rows if _stands(row) and row["effect"] > 0]
    hurts = [row for row in rows if _stands(row) and row["effect"] < 0]
    best = max(rows, key=lambda row: row["effect"])
    ranked = "" if best["rank"] is None else f", rank {best['rank']} of the {best['controls'] + 1} live ones there"
    where = list(dict.fromkeys(row["hook_point"] for row in helps))
    return Finding(
        f"Of {len(rows)} live channels, zeroing raises P(cheese), {best['original']:.3f}, for {len(helps)} and lowers "
        f"it for {len(hurts)} after Benjamini-Hochberg correction at {LEVEL}. The largest gain: {best['hook_point']} "
        f"channel {best['channel']}, {shown(best, 'effect', '+.3f')}{ranked}; n={best['n']}.",
        "not comparable",
        f"Channels that lower the chance of the cheese in the bottom right corner are at {len(where)} of "
        f"{len({row['hook_point'] for row in rows})} hook points: {', '.join(where) or 'none'}.",
        "That the channel with the largest gain would have it again: it is the best of many. Its interval is not "
        "corrected for that choice; the p-values are.",
    )


PART = Part(
    name="sweep",
    question="Which channels of which convolution keep the mouse from the cheese in the bottom right corner?",
    method=f"Size {SIZE}, at most {MOST_LEVELS} levels. Every channel of every convolution's output zeroed in turn, "
    "in every state; P(cheese within 256 steps) computed, not sampled. Controls: the other live channels of the hook "
    "point; p by sign flips over levels.",
    post="Not done; the post zeroed one channel of relu3.",
    measure=measure,
    figure=figure,
    finding=finding,
)
