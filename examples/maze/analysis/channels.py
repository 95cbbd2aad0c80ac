"""The channel of a direction: its sums on contrastive pairs, and how well its sum predicts the first step.

choice = choose_channel(points, "embedder.relu3", levels, Direction.UP)
choice.channel, choice.auc
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chanpatch import HookPoints, Site
from maze.analysis.forwards import level_sums
from maze.environment.pairs import contrastive_pairs, rotations
from maze.levels import draw_levels
from maze.states import Mazes, write_mazes


def channel_of(site: Site) -> int:
    """The index of a site's only channel."""
    (channel,) = dict(site.indices)["channel"]
    return int(channel)


def pair_sums(points: HookPoints, name: str) -> tuple[list[Mazes], NDArray[np.float64]]:
    """The post's pair in its four rotations, and the sums of every channel: (rotation, maze=2, channel)."""
    pairs = rotations(contrastive_pairs()[0])
    base = draw_levels(1, size=int(pairs[0].size[0]), seed=0)[0]  # gives the textures
    sums = [level_sums(points, name, write_mazes(pair, base)) for pair in pairs]
    return pairs, np.stack(sums)
