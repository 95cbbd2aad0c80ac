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
from tqdm import tqdm

from chanpatch.statistics import mean_interval, rank_among
from maze.analysis.cells import Table, Tables, Values, above, below, keyed, shown, verdict
from maze.analysis.cheese_removed import mixed
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import SETS
from maze.analysis.estimates import intervals, primary
from maze.analysis.exact import Chains, first_hits
from maze.analysis.forwards import BATCH, RENDERED, SITE, activations
from maze.analysis.part import SPLITS, Finding, Study
from maze.analysis.tables import suffix
from maze.paths import Direction, top_right

SIZE = 15
LEVELS = 200  # at most
_TOGETHER = 50  # levels in memory at once
CLAIM = "if the best channels act as without cheese, the mouse finds the cheese less often than with random sets"
BEST, UP, ALL, RANDOM = "best channel of each direction", "UP channel", "all channels", "random channels"


def measure(study: Study) -> dict[str, Table]:
    """P(cheese) and P(corner before the cheese) with the best channels, random sets and all channels cheeseless."""
    best, *sets = study.best_and_random_sets("counterfactual sets", SETS)
    channels = {UP: [study.channel(Direction.UP)], BEST: best, ALL: range(study.points[SITE].length("channel"))}
    channels |= {f"{RANDOM} {number}": each for number, each in enumerate(sets, 1)}
    own, *random = (number for number, name in enumerate(channels) if name == BEST or name.startswith(RANDOM))
    rows: Table = []
    ranks: Table = []
    for split in SPLITS:
        levels = study.levels(f"counterfactual levels {split}", min(study.n, LEVELS), size=SIZE, cheese=split)
        (before, *after), (corner_before, *corner_after) = _reached(study, levels, channels)
        effects = [mean_interval(each - before) for each in after]
        for name, each, effect, corner in zip(channels, after, effects, corner_after, strict=True):
            row = {"split": split, "channels": name, "n": len(levels)}
            row |= intervals(original=mean_interval(before), modified=mean_interval(each), effect=effect)
            rows.append(row | intervals(corner_effect=mean_interval(corner - corner_before)))
        rank = rank_among(effects[own].estimate, [effects[each].estimate for each in random], alternative="less")
        ranks.append({"split": split, "rank": rank.rank, "controls": rank.controls, "p": rank.p})
    less = after[own] - np.mean([after[each] for each in random], axis=0)  # out of distribution, the last split
    claim = primary(CLAIM, less, seed=study.seed_for("counterfactual flips"))
    return {"effects": rows, "ranks": ranks, "primary": claim}


def _reached(study: Study, levels: Sequence[bytes], channels: Mapping[str, Sequence[int]]) -> Values:
    """P(cheese) and P(corner before the cheese): (2, 1 + set, level), the original policy first."""
    parts = []
    for first in range(0, len(levels), _TOGETHER):
        chains = Chains.of(levels[first : first + _TOGETHER])
        tables = _tables(study, chains, [(), *channels.values()])
        goals = (chains.cheese, chains.at(top_right(chains.mazes)))
        parts.append([first_hits(chains, tables, [goal])[:, chains.start, 0] for goal in goals])
    return np.concatenate(parts, axis=2)


@torch.no_grad()
def _tables(study: Study, chains: Chains, sets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """The action probabilities in every state, each set of channels as without the cheese: (set, state, action)."""
    policy, unseen = suffix(study.points, SITE), replace(chains, mazes=chains.mazes.without_cheese())
    tables: list[list[NDArray[np.float32]]] = [[] for _ in sets]
    for first in tqdm(range(0, len(chains), RENDERED), desc="states", delay=2, leave=False):
        rows = slice(first, first + RENDERED)
        shown, removed = (activations(study.points, each.as_levels(rows), SITE)[SITE] for each in (chains, unseen))
        for table, channels in zip(tables, sets, strict=True):
            batches = mixed(shown, removed, channels).split(BATCH)
            table += [policy(batch)[0].probs.cpu().numpy() for batch in batches]
    return np.stack([np.concatenate(table) for table in tables])


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
