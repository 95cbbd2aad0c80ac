"""The policy as a table: its action probabilities in every state of a batch of levels, for many interventions at once.

Everything before the hook point runs once per state and is recorded; only what comes after it runs again for each
intervention. On the IMPALA policy at `embedder.relu3` that is one matrix in place of fifteen convolutions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from chanpatch import HookPoint, HookPoints, Patch, PatchedPolicy, run_with_cache
from maze.episodes import ORIGINAL
from maze.exact import Chains
from maze.levels import policy_input

SITE = "embedder.relu3"
TOLERANCE = 1e-6  # between probabilities from the suffix and from the whole policy

_RENDERED = 1024  # states in memory at once: their procgen bytes take 23 kB each
_BATCH = 64  # observations in one forward, which is where one core is fastest
_COMPARED = 4  # states on which every suffix is compared with the whole policy


class SuffixError(ValueError):
    """A policy that cannot be run from a hook point on, or a patch before that hook point."""


def action_tables(
    points: HookPoints,
    chains: Chains,
    interventions: Mapping[str, Sequence[Patch]] | None = None,
    *,
    site: str = SITE,
) -> dict[str, NDArray[np.float32]]:
    """The action probabilities in every state under every intervention.

    Every intervention is compared with the whole patched policy on some states first.

    Args:
        points: of the policy, in eval mode.
        chains: of the levels.
        interventions: patches by name, at `site` or after it; what they do may depend on the activation alone.
            Without any, the policy as it is, under `ORIGINAL`.
        site: name of the hook point at which activations are recorded.

    Returns:
        (state, action=15) by name.

    Raises:
        SuffixError: the policy cannot be run from `site` on, or a patch comes before it.
    """
    interventions = {ORIGINAL: ()} if interventions is None else interventions
    _check_order(points, interventions, site)
    rest = suffix(points, site)
    policies = {name: PatchedPolicy(rest, patches) for name, patches in interventions.items()}
    some = _tensor(chains.observations(slice(_COMPARED)), points)
    for name, patches in interventions.items():
        _compare(name, PatchedPolicy(points, patches), policies[name], some, points, site)
    tables: dict[str, list[NDArray[np.float32]]] = {name: [] for name in interventions}
    with torch.no_grad(), tqdm(total=len(chains), desc="states", unit="state", delay=2, leave=False) as progress:
        for first in range(0, len(chains), _RENDERED):
            frames = chains.observations(slice(first, first + _RENDERED))
            for batch in range(0, len(frames), _BATCH):
                observations = _tensor(frames[batch : batch + _BATCH], points)
                activation = run_with_cache(points, observations, sites=site, stop=True)[site]
                for name, policy in policies.items():
                    tables[name].append(_probabilities(policy, activation).cpu().numpy())
                progress.update(len(observations))
    return {name: np.concatenate(parts) for name, parts in tables.items()}


def suffix(points: HookPoints, site: str) -> nn.Module:
    """The policy from a hook point on: it takes that activation, and shares the weights.

    It is the policy's own code, in which whatever ran up to the hook point passes on what it gets. Every name
    stays, so patches at the hook point and after it fit. This is right where the modules up to the hook point
    are a chain, each fed by the one before alone; `action_tables` compares before it relies on it.

    Args:
        points: of the policy.
        site: name of the output of a module.
    """
    ran = {point.module for point in _until(points, site) if point.side == "out"}
    outermost = [module for module in ran if not any(module.startswith(f"{other}.") for other in ran)]
    shared = {id(tensor): tensor for tensor in (*points.model.parameters(), *points.model.buffers())}
    rest = copy.deepcopy(points.model, shared)
    for module in outermost:
        parent, _, child = module.rpartition(".")
        setattr(rest.get_submodule(parent), child, nn.Identity())
    return rest


def _until(points: HookPoints, site: str) -> list[HookPoint]:
    """The hook points up to `site`, in execution order."""
    names = list(points)
    return [points[name] for name in names[: names.index(points[site].name) + 1]]


def _check_order(points: HookPoints, interventions: Mapping[str, Sequence[Patch]], site: str) -> None:
    before = {point.name for point in _until(points, site)[:-1]}
    for name, patches in interventions.items():
        for patch in patches:
            if points.bind(patch.site).name in before:
                raise SuffixError(
                    f"{name}: the patch at {patch.site!r} comes before '{site}', where the activations are recorded. "
                    "Give an earlier hook point: site=..."
                )


def _compare(
    name: str, whole: PatchedPolicy, rest: PatchedPolicy, observations: Tensor, points: HookPoints, site: str
) -> None:
    """Raise unless the suffix does with the activation what the whole policy does with the observations."""
    with torch.no_grad():
        expected = _probabilities(whole, observations)
        activation = run_with_cache(points, observations, sites=site, stop=True)[site]
        try:
            given = _probabilities(rest, activation)
            reordered = _probabilities(rest, activation.flip(0)).flip(0)
        except (RuntimeError, TypeError, ValueError) as error:
            raise SuffixError(f"{name}: the policy cannot be run from '{site}' on: {error}") from error
    for apart, why in (
        (given - expected, "differ from those of the whole policy: what runs up to there is no chain"),
        (given - reordered, "depend on the order of the states: a patch depends on more than the activation"),
    ):
        if not float(apart.abs().max()) <= TOLERANCE:
            raise SuffixError(f"{name}: run from '{site}' on, the policy's action probabilities {why}.")


def _probabilities(policy: PatchedPolicy, inputs: Tensor) -> Tensor:
    categorical: Any = policy.distribution(inputs)
    probabilities: Tensor = categorical.probs
    return probabilities


def _tensor(frames: NDArray[np.uint8], points: HookPoints) -> Tensor:
    device = next(points.model.parameters()).device
    return torch.from_numpy(policy_input(frames)).to(device)
