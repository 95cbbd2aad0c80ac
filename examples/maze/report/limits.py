"""The caps on the number of levels of each part.

This module imports nothing, so that `--help` works without any package.
"""

from __future__ import annotations

# By part; tests hold each against the constants of its part.
LIMITS = {
    "search": "background 500, pairs 48",
    "ablation": "a quarter of n, at least 50, with the cheese in the other two places, and 200 for random sets",
    "top16": "300",
    "cheese-vector": "500, and 100 for its rank",
    "corner-vector": "500, and 100 for its rank",
    "retarget": "400",
    "every part of a policy that stands beside the main one": "300",
}


def limits() -> str:
    """The meaning of n and its caps, in two sentences."""
    capped = "; ".join(f"{part} {limit}" for part, limit in LIMITS.items())
    return (
        f"n is the number of levels of each measurement, but at most: {capped}. Whatever n is, channels are chosen on "
        "1000 mazes (search 300, parity 500 per class, retarget 60), labels on 500, and thresholds on those of 1000 in "
        "which the direction is free, about half: one half of these fits, the other scores."
    )
