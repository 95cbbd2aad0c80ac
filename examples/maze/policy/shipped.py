"""The shipped policies, and the part of the report on how their training differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from maze.analysis.cells import Tables

# Tables by policy, the one under study first, and by part.
Measured: TypeAlias = Mapping[str, Mapping[str, Tables]]

MAIN, CONTROL, REWARD = "imitation", "control", "reward"
_SEED = (
    "the training of the imitation policy with another seed, directions taught too, on fewer observations; a shorter "
    "run, so it shows only roughly how much depends on the seed"
)
POLICIES = {
    MAIN: "imitation of shortest paths; auxiliary losses taught its middle layers the field of directions and the "
    "mouse's cell",
    CONTROL: "imitation without the field of directions but with the mouse's cell, on as many observations, though in "
    "two stages; it shows how much remains without the field of directions",
    REWARD: "trained by reward (PPO) from the imitation policy, so its start was taught directions; it shows the "
    "effect of reward",
    "seed1": _SEED,
    "seed2": _SEED,
}


def introduction(measured: Measured) -> str:
    """How the policy under study was trained, and how the control without directions compares."""
    main, *others = measured
    if not others:
        return (
            "This run has one policy. If an auxiliary loss taught it directions, as for the shipped imitation policy, "
            "its direction signal was partly taught. A control policy would show how much."
        )
    taught = (
        f"The policy under study ({main}) was trained by imitation with an auxiliary loss that teaches directions to "
        "its middle layers, so its direction signal was partly taught."
    )
    if "sums" not in measured.get(CONTROL, {}):
        return f"{taught} This run did not measure the control without that loss, so it does not show how much."
    return (
        f"{taught} The {CONTROL} policy was trained without that loss. The differences below have other causes "
        "too: the control saw as many observations, but larger mazes and its own mistakes in the second half "
        "only, and the two find the cheese at different rates. The control keeps the loss for the mouse's cell."
    )


def described(measured: Measured) -> Iterator[tuple[str, str]]:
    """Yield each policy's name and description, if the run has several."""
    if len(measured) > 1:
        for name, parts in measured.items():
            yield name, POLICIES[name] + ("." if parts else "; not measured in this run.")
        if REWARD not in measured:
            yield REWARD, "a policy trained by reward is not part of this run."
