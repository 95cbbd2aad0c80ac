"""The shipped policies: their files and descriptions."""

from __future__ import annotations

import hashlib
from functools import cache

from maze.policy.network import SHIPPED_WEIGHTS

_SEED = "as imitation, with another seed and fewer observations"
DESCRIPTIONS = {  # the main policy of a run on all of them first
    "width4": "imitation of shortest paths at the width of the post's network; an auxiliary loss taught directions",
    "imitation": "imitation of shortest paths at width 1; auxiliary losses taught directions and the mouse's cell",
    "control": "imitation without the loss that teaches directions, in two stages, on larger mazes in the second",
    "reward": "trained by reward (PPO) from the imitation policy",
    "seed1": _SEED,
    "seed2": _SEED,
}
FILES = {
    name: SHIPPED_WEIGHTS if name == "imitation" else SHIPPED_WEIGHTS.with_name(f"{name}.safetensors")
    for name in DESCRIPTIONS
}


@cache
def shipped_name(sha256: str) -> str | None:
    """The name of a shipped policy by the digest of its file; None for any other file."""
    digests = {hashlib.sha256(file.read_bytes()).hexdigest(): name for name, file in FILES.items()}
    return digests.get(sha256)
