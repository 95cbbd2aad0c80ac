"""The causal experiment: the same levels and draws with and without one channel, counted.

Every policy is rolled out once, the original too, and its episodes are kept on disk until all are done, so that
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from chanpatch import HookPoints, PatchedPolicy, rollout, zero_ablate
from chanpatch.statistics import (
    Interval,
    PairedCounts,
    Rank,
    mcnemar_exact,
    paired_counts,
    paired_difference_interval,
    rank_among,
    wilson_interval,
)
from maze.analysis.episodes import ORIGINAL, STEPS, Episodes, padded
from maze.environment.vector_env import MazeVectorEnv
from maze.results import read_arrays, replaced

_MOST_ENVS = 256  # sub-environments of one wave


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
        no_p: why the rank of its difference among the controls has no p, or an empty text.
    """

    channel: int
    control: bool
    counts: PairedCounts
    p: float
    found: Interval
    difference: Interval
    no_p: str = ""


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


def compare(
    episodes: Mapping[str, Episodes], channels: Mapping[str, int], chosen: int, no_p: str = ""
) -> list[Comparison]:
    """Every modified policy against the original.

    Args:
        episodes: by policy name, the original's under `ORIGINAL`.
        channels: which channel each modified policy lacks.
        chosen: the channel under test; the others are controls.
        no_p: why its rank among the controls has no p, or an empty text.
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
                no_p,
            )
        )
    return comparisons


def ranked(comparisons: Sequence[Comparison]) -> Rank | None:
    """Where the difference of the channel under test, which comes first, ranks among the controls; None without any."""
    first, *controls = (each.difference.estimate for each in comparisons)
    if not controls:
        return None
    rank, no_p = rank_among(first, controls), comparisons[0].no_p
    return replace(rank, p=None, no_p=no_p) if no_p else rank


def told_rank(rank: Rank) -> str:
    """A rank in words: "rank 1 of 4 (no p-value: fewer than 19 controls)"."""
    p = f"no p-value: {rank.no_p}" if rank.p is None else f"p = {rank.p:.2g}"
    return f"rank {rank.rank} of {rank.controls + 1} ({p})"


def _episodes(name: str, policy: nn.Module, envs: MazeVectorEnv, sampling_seed: int, file: Path) -> Episodes:
    if file.exists() and (kept := read_arrays(file)) is not None:
        print(f"  {name}: kept from before", flush=True)
        return Episodes(**kept)
    print(f"  {name}", flush=True)
    done = rollout(policy, envs, range(len(envs.levels)), max_steps=STEPS, sampling_seed=sampling_seed)
    actions = padded(done.actions)
    with replaced(file) as partial:
        np.savez_compressed(partial, found=done.terminated, lengths=done.lengths, actions=actions)
    return Episodes(done.terminated, done.lengths, actions)
