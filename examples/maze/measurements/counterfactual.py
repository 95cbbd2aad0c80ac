"""What does the mouse do if a few channels act as if there were no cheese?

Method: Size {SIZE}. In every state of an episode, some channels of relu3 get the activation from the same picture
without the cheese. Probabilities over whole episodes are computed, not sampled.

The post: Not in the post.

Limits: The channels may carry more about the picture than the cheese.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from chanpatch import run_with_cache
from chanpatch.controls import random_sets
from chanpatch.statistics import mean_interval, rank_among
from maze.analysis.cells import Table, Tables, Values, above, below, keyed, shown, verdict
from maze.analysis.cheese_removed import mixed
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import SETS
from maze.analysis.estimates import intervals, primary
from maze.analysis.exact import Chains, first_hits
from maze.analysis.forwards import BATCH, SITE
from maze.analysis.part import SPLITS, Finding, Study
from maze.analysis.tables import suffix
from maze.levels import policy_input
from maze.paths import Direction, top_right

SIZE = 15
LEVELS = 200  # at most
_TOGETHER = 50  # levels in memory at once
_RENDERED = 1024  # states in memory at once
CLAIM = "if the best channels act as without cheese, the mouse finds the cheese less often than with random sets"
BEST, UP, ALL, RANDOM = "best channel of each direction", "UP channel", "all channels", "random channels"


def measure(study: Study) -> dict[str, Table]:
    """P(cheese) and P(corner before the cheese) with the best channels, random sets and all channels cheeseless."""
    best = sorted({study.channel(direction) for direction in Direction})
    others = [channel for channel in study.selection.live if channel not in best]
    sets = random_sets(others, len(best), count=SETS, seed=study.seed_for("counterfactual sets"))
    channels = {UP: [study.channel(Direction.UP)], BEST: best, ALL: list(range(study.points[SITE].length("channel")))}
    channels |= {f"{RANDOM} {number}": list(each) for number, each in enumerate(sets, 1)}
    rows: Table = []
    ranks: Table = []
    for split in SPLITS:
        levels = study.levels(f"counterfactual levels {split}", min(study.n, LEVELS), size=SIZE, cheese=split)
        found, corner = _reached(study, levels, channels)
        for number, name in enumerate(channels, 1):
            change = found[number] - found[0]
            row = {"split": split, "channels": name, "n": len(levels)}
            rows.append(
                row
                | intervals(
                    original=mean_interval(found[0]),
                    modified=mean_interval(found[number]),
                    effect=mean_interval(change),
                    corner_effect=mean_interval(corner[number] - corner[0]),
                )
            )
        effects = {row["channels"]: row["effect"] for row in rows if row["split"] == split}
        rank = rank_among(
            effects[BEST], [effects[name] for name in channels if name.startswith(RANDOM)], alternative="less"
        )
        ranks.append({"split": split, "rank": rank.rank, "controls": rank.controls, "p": rank.p})
    names = [name for name in channels if name.startswith(RANDOM)]  # out of distribution, the last split
    less = found[1 + list(channels).index(BEST)] - np.mean(
        [found[1 + list(channels).index(name)] for name in names], axis=0
    )
    return {
        "effects": rows,
        "ranks": ranks,
        "primary": primary(CLAIM, less, seed=study.seed_for("counterfactual flips")),
    }


def _reached(study: Study, levels: Sequence[bytes], channels: Mapping[str, Sequence[int]]) -> tuple[Values, Values]:
    """P(cheese) and P(corner before the cheese): (1 + set, level) each, the original policy first."""
    found, corner = [], []
    for first in range(0, len(levels), _TOGETHER):
        chains = Chains.of(levels[first : first + _TOGETHER])
        tables = _tables(study, chains, [(), *channels.values()])
        found.append(first_hits(chains, tables, [chains.cheese])[:, chains.start, 0])
        corner.append(first_hits(chains, tables, [chains.at(top_right(chains.mazes))])[:, chains.start, 0])
    return np.concatenate(found, axis=1), np.concatenate(corner, axis=1)


@torch.no_grad()
def _tables(study: Study, chains: Chains, sets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """The action probabilities in every state, each set of channels as without the cheese: (set, state, action)."""
    policy, unseen = suffix(study.points, SITE), replace(chains, mazes=chains.mazes.without_cheese())
    tables: list[list[NDArray[np.float32]]] = [[] for _ in sets]
    for first in tqdm(range(0, len(chains), _RENDERED), desc="states", delay=2, leave=False):
        rows = slice(first, first + _RENDERED)
        shown, removed = (_recorded(study, each.observations(rows)) for each in (chains, unseen))
        for table, channels in zip(tables, sets, strict=True):
            batches = mixed(shown, removed, channels).split(BATCH)
            table += [policy(batch)[0].probs.cpu().numpy() for batch in batches]
    return np.stack([np.concatenate(table) for table in tables])


def _recorded(study: Study, observations: NDArray[np.uint8]) -> Tensor:
    """relu3 on observations: (state, channel, row, col)."""
    device = next(study.points.model.parameters()).device
    inputs = torch.from_numpy(policy_input(observations)).to(device)
    caches = [run_with_cache(study.points, batch, sites=SITE, stop=True) for batch in inputs.split(BATCH)]
    return torch.cat([cache[SITE] for cache in caches])


def finding(tables: Tables) -> Finding:
    effects, ranks = keyed(tables["effects"], "split", "channels"), keyed(tables["ranks"], "split")
    best, every = (effects[SPLITS[1], name] for name in (BEST, ALL))
    inside = effects[SPLITS[0], BEST]
    rank = ranks[SPLITS[1]]
    return Finding(
        f"If the best channels act as without the cheese, P(cheese) changes by {shown(best, 'effect', '+.3f')} out of "
        f"distribution and {shown(inside, 'effect', '+.3f')} in distribution (n={best['n']} each); with all channels "
        f"{shown(every, 'effect', '+.3f')}. The decrease ranks {rank['rank']} among {rank['controls']} random sets.",
        verdict(below(best, "effect"), above(best, "corner_effect"), rank["rank"] == 1),
        f"P(corner before the cheese) changes by {shown(best, 'corner_effect', '+.3f')}.",
    )


figure = chart(
    Panel("effects", "channels", {"cheese": "effect", "corner": "corner_effect"}, "change of the probability", "split")
)
