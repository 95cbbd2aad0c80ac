"""How far interventions lead from activations that occur, beside what they do.

A number of a channel is its absolute z: how many standard deviations its sum lies from the mean over other levels,
on average over the patched ones. 0.8 is usual. The other levels are neither the patched ones nor those that means or
donors are from, as these would be near themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chanpatch import HookPoints
from chanpatch.controls import off_distribution
from maze.analysis.channels import channel_of
from maze.analysis.tables import Intervention
from maze.environment.levels import observe, policy_input, random_squares
from maze.environment.states import FREE, read_mazes, write_mazes

METERED = 200  # levels that an intervention is tried on, and others that tell what is usual


def absolute_z(
    points: HookPoints, intervention: Intervention, levels: Sequence[bytes], usual: Sequence[bytes]
) -> dict[int, float]:
    """The absolute z of every channel that an intervention patches; NaN for a dead one.

    Args:
        points: of the policy.
        intervention: as in `action_tables`, at one hook point; its levels are counted from the first of `levels`.
        levels: that it is tried on, one observation of each.
        usual: other levels, whose sums without it tell what is usual; none of them gave it a mean or a donor.
    """
    patches = intervention(np.arange(len(levels))) if callable(intervention) else intervention
    patched, background = (torch.from_numpy(policy_input(observe(each))) for each in (levels, usual))
    meter = off_distribution(points, patches, patched, background)
    return {channel_of(site): float(z) for site, z in zip(meter.sites, meter.absolute_z, strict=True)}


def background(size: int, cheese: str = "in distribution") -> str:
    """What tells which sums are usual, in words for a table."""
    return f"{METERED} other levels of size {size}, cheese {cheese}, mouse anywhere, unpatched"


def mouse_anywhere(levels: Sequence[bytes], seed: int) -> list[bytes]:
    """The levels with the mouse on a random free square."""
    mazes = read_mazes(levels)
    return write_mazes(mazes.moved(mouse=random_squares(mazes.grid == FREE, np.random.default_rng(seed))), levels)
