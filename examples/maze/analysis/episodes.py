"""Episodes of a policy on every level, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 256  # at which an episode is cut
ORIGINAL = "original"  # the name of the policy without a patch


@dataclass(frozen=True)
class Episodes:
    """Episodes of one policy.

    Attributes:
        found: bool (level,): whether the mouse reached the cheese.
        lengths: int (level,): steps until the cheese or the cut.
        actions: int8 (level, step), -1 after the end.
    """

    found: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    actions: NDArray[np.int8]


def padded(actions: Sequence[NDArray[Any]], steps: int = STEPS) -> NDArray[np.int8]:
    """Actions of episodes of different lengths in one array: int8 (episode, step), -1 after the end."""
    rows = np.full((len(actions), steps), -1, dtype=np.int8)
    for row, taken in zip(rows, actions, strict=True):
        row[: len(taken)] = taken
    return rows
