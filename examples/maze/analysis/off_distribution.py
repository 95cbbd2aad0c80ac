"""How far off distribution interventions push channels, to report alongside their effects.

The absolute z of a channel is the distance of its patched sum from the mean over other levels, in standard deviations.
A value of 0.8 is usual. The other levels are neither patched nor a source of means or donors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chanpatch import HookPoints
from chanpatch.controls import off_distribution
from maze.analysis.forwards import channel_of, frames
from maze.analysis.tables import Intervention
from maze.levels import random_squares
from maze.states import FREE, read_mazes, write_mazes

METERED = 200  # patched levels, and other levels to compare them with


def absolute_z(
    points: HookPoints, intervention: Intervention, levels: Sequence[bytes], usual: Sequence[bytes]
) -> dict[int, float]:
    """The absolute z of every channel that an intervention at one hook point patches; NaN for a dead channel.

    One observation of each level is patched, and compared with unpatched levels (`usual`).
    """
    patches = intervention(np.arange(len(levels))) if callable(intervention) else intervention
    meter = off_distribution(points, patches, frames(levels), frames(usual))
    return {channel_of(site): float(z) for site, z in zip(meter.sites, meter.absolute_z, strict=True)}


def background(size: int, cheese: str = "in distribution") -> str:
    """A description of the comparison levels for a table."""
    return f"{METERED} other levels of size {size}, cheese {cheese}, mouse anywhere, unpatched"


def mouse_anywhere(levels: Sequence[bytes], seed: int) -> list[bytes]:
    """The levels with the mouse on a random free square."""
    mazes = read_mazes(levels)
    return write_mazes(mazes.moved(mouse=random_squares(mazes.grid == FREE, np.random.default_rng(seed))), levels)
