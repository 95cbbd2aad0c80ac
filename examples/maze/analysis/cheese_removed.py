"""The policy on decision squares with the cheese in the picture ("shown") and without it ("removed").

seen = without_cheese(points, study.levels("purpose", size=25, cheese=SPLITS[1], mouse="decision square"))
seen.odds(seen.shown), seen.odds(mixed(seen.shown, seen.removed, channels))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from chanpatch import HookPoints
from maze.analysis.cells import Integers, Values
from maze.analysis.forwards import BATCH, SITE, activations
from maze.analysis.tables import suffix
from maze.paths import first_steps, top_right
from maze.policy.network import ACTIONS
from maze.states import read_mazes, write_mazes


@dataclass(frozen=True, eq=False)
class CheeseRemoved:
    """Activations at relu3 on decision squares, and the first steps to the cheese and to the corner."""

    policy: nn.Module  # the policy from relu3 on
    cheese: Integers  # int (level,): the `Direction` of the first step to the cheese
    corner: Integers  # int (level,): the same for the top right corner; differs from `cheese`
    shown: Tensor  # (level, channel, row, col)
    removed: Tensor  # (level, channel, row, col)

    @property
    def sums(self) -> tuple[Values, Values]:
        """Channel sums with the cheese shown and removed: (level, channel) each."""
        return tuple(each.double().sum(dim=(2, 3)).numpy() for each in (self.shown, self.removed))

    @torch.no_grad()
    def odds(self, activation: Tensor) -> Values:
        """The log odds of the first step to the cheese against the first step to the corner: (level,)."""
        device = next(self.policy.parameters()).device
        parts = [self.policy(batch.to(device))[0].probs.cpu().double() for batch in activation.split(BATCH)]
        moves = np.stack([torch.cat(parts).numpy()[:, list(ACTIONS[move])].sum(axis=1) for move in ACTIONS], axis=1)
        every, logs = np.arange(len(moves)), np.log(np.maximum(moves, np.finfo(np.float32).tiny))
        return logs[every, self.cheese] - logs[every, self.corner]


def mixed(shown: Tensor, removed: Tensor, channels: Sequence[int]) -> Tensor:
    """The first activation, (batch, channel, row, col), with some channels of the second."""
    activation = shown.clone()
    activation[:, list(channels)] = removed[:, list(channels)]
    return activation


def without_cheese(points: HookPoints, levels: Sequence[bytes]) -> CheeseRemoved:
    """Record relu3 with and without the cheese, on levels whose mouse stands on the decision square."""
    mazes = read_mazes(levels)
    shown, removed = (
        activations(points, write_mazes(each, levels), SITE)[SITE].cpu() for each in (mazes, mazes.without_cheese())
    )
    steps = [first_steps(mazes, target).argmax(axis=1) for target in (mazes.cheese, top_right(mazes))]
    return CheeseRemoved(suffix(points, SITE), *steps, shown, removed)
