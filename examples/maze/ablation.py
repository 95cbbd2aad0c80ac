"""The causal experiment: the same levels and draws with and without one channel, counted.

Every policy is rolled out once, the original too, and its episodes are kept on disk until all are done, so that
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from chanpatch import HookPoints, PatchedPolicy, rollout, zero_ablate
from chanpatch.statistics import (
    Interval,
    PairedCounts,
    mcnemar_exact,
    paired_counts,
    paired_difference_interval,
    wilson_interval,
)
from maze.environment import MazeVectorEnv

STEPS = 256
ORIGINAL = "original"

_MOST_ENVS = 256  # sub-environments of one wave


@dataclass(frozen=True)
class Episodes:
    """What one policy did on every level.

    Attributes:
        found: bool (level,), whether the mouse got to the cheese.
        lengths: int (level,), steps until the cheese or the cut.
        actions: int8 (level, step), -1 after the end.
    """

    found: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    actions: NDArray[np.int8]


@dataclass(frozen=True)
class Comparison:
    """One modified policy against the original, over the same levels and draws.

    Attributes:
        channel: that was zeroed.
        control: whether the channel is a control.
        counts: levels on which the cheese was found by both, only the modified, only the original, neither.
        p: exact two-sided McNemar p-value.
        found: share of levels on which the modified policy found the cheese.
        difference: that share minus the original's.
    """

    channel: int
    control: bool
    counts: PairedCounts
    p: float
    found: Interval
    difference: Interval


def zeroed(points: HookPoints, site: str, channel: int) -> nn.Module:
    """The policy with one channel set to zero."""
    twin: nn.Module = PatchedPolicy(points, zero_ablate(points.site(site, channel=channel)))
    return twin


def play(
    policies: Mapping[str, nn.Module], levels: Sequence[bytes], *, sampling_seed: int, keep: Path
) -> dict[str, Episodes]:
    """What each policy does on every level, 256 steps at most, the draws behind the actions the same for all.

    Args:
        policies: by name.
        levels: procgen states.
        sampling_seed: of the draws.
        keep: folder where episodes that are done are kept; what is already there is not played again.
    """
    keep.mkdir(parents=True, exist_ok=True)
    envs = MazeVectorEnv(levels, num_envs=min(len(levels), _MOST_ENVS))
    try:
        return {
            name: _episodes(name, policy, envs, sampling_seed, keep / f"{name.replace(' ', '-')}.npz")
            for name, policy in policies.items()
        }
    finally:
        envs.close()


def compare(episodes: Mapping[str, Episodes], channels: Mapping[str, int], chosen: int) -> list[Comparison]:
    """Every modified policy against the original.

    Args:
        episodes: by policy name, the original's under `ORIGINAL`.
        channels: which channel each modified policy lacks.
        chosen: the channel under test; the others are controls.
    """
    original = episodes[ORIGINAL].found
    comparisons = []
    for name, channel in channels.items():
        counts = paired_counts(episodes[name].found, original)
        comparisons.append(
            Comparison(
                channel,
                channel != chosen,
                counts,
                mcnemar_exact(counts.only_first, counts.only_second),
                wilson_interval(int(episodes[name].found.sum()), len(original)),
                paired_difference_interval(*counts),
            )
        )
    return comparisons


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short name for settings: equal for equal settings only."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def _episodes(name: str, policy: nn.Module, envs: MazeVectorEnv, sampling_seed: int, file: Path) -> Episodes:
    if file.exists():
        print(f"  {name}: kept from before", flush=True)
        with np.load(file) as arrays:
            return Episodes(arrays["found"], arrays["lengths"], arrays["actions"])
    print(f"  {name}", flush=True)
    done = rollout(policy, envs, range(len(envs.levels)), max_steps=STEPS, sampling_seed=sampling_seed)
    actions = np.full((len(done), STEPS), -1, dtype=np.int8)
    for row, taken in zip(actions, done.actions, strict=True):
        row[: len(taken)] = taken
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, found=done.terminated, lengths=done.lengths, actions=actions)
    os.replace(partial, file)
    return Episodes(done.terminated, done.lengths, actions)
