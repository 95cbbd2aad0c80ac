"""Which channel stands for a direction: its sums on contrastive pairs, and how well its sum tells the way.

choice = choose_channel(points, "embedder.relu3", levels, Direction.UP)
choice.channel, choice.auc
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from chanpatch import HookPoints, Site, channel_sums
from chanpatch.statistics import Interval, auc
from maze.environment.levels import draw_levels, observe, policy_input
from maze.environment.pairs import contrastive_pairs, rotations
from maze.environment.paths import Direction, first_steps, legal_moves
from maze.environment.states import Mazes, read_mazes, write_mazes

_BATCH = 64  # observations in one forward


@dataclass(frozen=True)
class ChannelChoice:
    """The channel whose sum tells best whether the way to the cheese starts in a direction.

    Attributes:
        channel: its index.
        auc: of its sum, with its interval: the probability that the sum is higher in a maze where the way starts
            in that direction than in one where it does not.
        live: the channels whose sum is not the same in all mazes; the others are dead and say nothing.
        n: number of mazes.
        positives: in how many of them the way starts in that direction.
    """

    channel: int
    auc: Interval
    live: tuple[int, ...]
    n: int
    positives: int


def level_sums(points: HookPoints, name: str, levels: Sequence[bytes]) -> NDArray[np.float64]:
    """Sums of every channel at a hook point, one observation of each level: (level, channel)."""
    frames = observe(levels)
    batches = (frames[start : start + _BATCH] for start in range(0, len(frames), _BATCH))
    return channel_sums(points, (torch.from_numpy(policy_input(batch)) for batch in batches), name)


def channel_of(site: Site) -> int:
    """The number of the one channel that a site is."""
    (channel,) = dict(site.indices)["channel"]
    return int(channel)


def pair_sums(points: HookPoints, name: str) -> tuple[list[Mazes], NDArray[np.float64]]:
    """The contrastive pair in its four rotations, and the sums of every channel: (rotation, maze=2, channel)."""
    pairs = rotations(contrastive_pairs()[0])
    base = draw_levels(1, size=int(pairs[0].size[0]), seed=0)[0]  # lends its textures
    sums = [level_sums(points, name, write_mazes(pair, base)) for pair in pairs]
    return pairs, np.stack(sums)


def choose_channel(
    points: HookPoints, name: str, levels: Sequence[bytes], direction: Direction, channel: int | None = None
) -> ChannelChoice:
    """The channel with the highest AUC, or what is true of a given one.

    Mazes in which the direction is walled off are left out: there is nothing to tell in them.

    Args:
        points: of the policy.
        name: a hook point with channels.
        levels: to choose on; others than those of the experiment.
        direction: that the channel is to stand for.
        channel: to describe instead of choosing.
    """
    mazes = read_mazes(levels)
    legal = legal_moves(mazes)[np.arange(len(mazes)), direction, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    labels = first_steps(mazes, mazes.cheese)[legal, direction]
    sums = level_sums(points, name, [level for level, chosen in zip(levels, legal, strict=True) if chosen])
    live = np.flatnonzero(np.ptp(sums, axis=0) > 0)
    candidates = live if channel is None else [channel]
    scored = {int(candidate): auc(sums[:, candidate], labels) for candidate in candidates}
    best = max(scored, key=lambda candidate: scored[candidate].estimate)
    return ChannelChoice(best, scored[best], tuple(map(int, live)), len(labels), int(labels.sum()))
