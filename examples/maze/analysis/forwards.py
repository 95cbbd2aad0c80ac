"""Run the policy on one observation of each level, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from chanpatch import HookPoints, Site, channel_sums, hook_points, recording, run_with_cache
from chanpatch.patching import ActivationCache
from maze.analysis.cells import Values
from maze.levels import draw_levels, observe, policy_input
from maze.policy.network import load_policy, new_policy

SITE = "embedder.relu3"
LINEAR = "embedder.fc"  # the policy is linear from SITE to here
BATCH = 64  # observations per forward pass, the fastest number on one core
RENDERED = 1024  # observations in memory at once; the procgen bytes of each take 23 kB


def load_points(
    file: Path | None = None, build: Callable[[int], nn.Module] = new_policy
) -> tuple[HookPoints, dict[str, Any]]:
    """Return the hook points of the policy in a weights file, and facts; arguments as in `load_policy`."""
    policy, facts = load_policy(file, build)
    policy = policy.to(memory_format=torch.channels_last)  # makes convolutions about twice as fast on a CPU
    return hook_points(policy, frames(draw_levels(2, size=9, seed=0))), facts


def frames(levels: Sequence[bytes]) -> Tensor:
    """The policy's inputs, one observation of each level: (level, channel, row, col)."""
    return torch.from_numpy(policy_input(observe(levels)))


def _batches(points: HookPoints, levels: Sequence[bytes]) -> Iterator[Tensor]:
    """Yields the policy's inputs on its device, `BATCH` levels at a time."""
    device = next(points.model.parameters()).device
    with tqdm(total=len(levels), desc="levels", unit="level", delay=2, leave=False) as progress:
        for start in range(0, len(levels), RENDERED):
            for batch in frames(levels[start : start + RENDERED]).to(device).split(BATCH):
                yield batch
                progress.update(len(batch))


@torch.no_grad()
def forward(
    points: HookPoints, levels: Sequence[bytes], sites: Any = SITE
) -> tuple[NDArray[np.float32], ActivationCache]:
    """The action probabilities on every level, (level, action), and the channel sums at sites."""
    with recording(points, sites, reduce="sum") as cache:
        probabilities = [points.model(batch)[0].probs.cpu().numpy() for batch in _batches(points, levels)]
    return np.concatenate(probabilities), cache


@torch.no_grad()
def activations(points: HookPoints, levels: Sequence[bytes], *sites: str) -> dict[str, Tensor]:
    """The activations at hook points on every level, (level, ...) by name. The policy runs up to the last of these."""
    caches = [run_with_cache(points, batch, sites=sites, stop=True) for batch in _batches(points, levels)]
    return {site: torch.cat([cache[site] for cache in caches]) for site in sites}


def level_sums(points: HookPoints, name: str, levels: Sequence[bytes]) -> Values:
    """The sum of every channel at a hook point on every level: (level, channel)."""
    batches = (frames(levels[start : start + BATCH]) for start in range(0, len(levels), BATCH))
    return channel_sums(points, batches, name)


def channel_of(site: Site) -> int:
    """The index of a site's only channel."""
    (channel,) = dict(site.indices)["channel"]
    return int(channel)
