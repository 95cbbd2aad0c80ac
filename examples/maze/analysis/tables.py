"""The policy as a table: its action probabilities in every state of a batch of levels, under many interventions.

Everything before the hook point runs once per state. Only the rest runs for each intervention: at `embedder.relu3`, one
matrix instead of fifteen convolutions. If a patch sets a region there, only the region's part is recomputed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from chanpatch import HookPoints, Patch, Site, patched, run_with_cache
from chanpatch.patching import Set
from maze.analysis.cells import Integers
from maze.analysis.exact import ORIGINAL, Chains
from maze.analysis.forwards import BATCH, LINEAR, RENDERED, SITE, activations, frames

TOLERANCE = 1e-5  # between probabilities computed here and those of the whole policy

# Patches, or a function from the level of each row, int (batch,), to patches whose operands have one row per level.
Intervention: TypeAlias = Sequence[Patch] | Callable[[Integers], Sequence[Patch]]

_COMPARED = 4  # states on which every intervention is compared with the whole policy


class SuffixError(ValueError):
    """The policy cannot be run from a hook point on, or a patch comes before that hook point."""


def action_tables(
    points: HookPoints, chains: Chains, interventions: Mapping[str, Intervention] | None = None, *, site: str = SITE
) -> dict[str, NDArray[np.float32]]:
    """The action probabilities in every state under every intervention: (state, action=15) by name.

    Every intervention is compared with the whole patched policy on some states first.

    Args:
        points: hook points of the policy, in eval mode.
        chains: the levels.
        interventions: interventions by name, at or after `site`, that depend on the activation and the level alone;
            by default the unpatched policy, under `ORIGINAL`.
        site: the hook point at which activations are recorded.

    Raises:
        SuffixError: the policy cannot be run from `site` on, or a patch comes before `site`.
    """
    interventions = {ORIGINAL: ()} if interventions is None else interventions
    rest = _Rest(points, site)
    some = slice(0, None, -(-len(chains) // _COMPARED))  # of several levels
    levels, level = chains.as_levels(some), chains.level[some]
    inputs, recorded = frames(levels).to(next(points.model.parameters()).device), rest.record(levels)
    for name, intervention in interventions.items():
        patches = _patches(intervention, level)
        _check_order(name, points, patches, site)
        with patched(points, patches), torch.no_grad():
            expected = points.model(inputs)[0].probs
        _compare(name, rest, intervention, recorded, level, expected)
    tables = {name: [] for name in interventions}
    with tqdm(total=len(chains), desc="states", unit="state", delay=2, leave=False) as progress:
        for first in range(0, len(chains), RENDERED):
            rows = slice(first, first + RENDERED)
            recorded = rest.record(chains.as_levels(rows))
            for name, intervention in interventions.items():
                tables[name].append(rest.probabilities(intervention, recorded, chains.level[rows]).cpu().numpy())
            progress.update(len(chains.level[rows]))
    return {name: np.concatenate(parts) for name, parts in tables.items()}


def suffix(points: HookPoints, site: str) -> nn.Module:
    """The policy from the output of a module on, with shared weights and all names.

    Modules that ran before return their input. The result is correct if these modules form a chain, which
    `action_tables` checks.
    """
    names = list(points)
    before = names[: names.index(points[site].name) + 1]
    ran = {points[name].module for name in before if points[name].side == "out"}
    outermost = [module for module in ran if not any(module.startswith(f"{other}.") for other in ran)]
    shared = {id(tensor): tensor for tensor in (*points.model.parameters(), *points.model.buffers())}
    rest = copy.deepcopy(points.model, shared)
    for module in outermost:
        parent, _, child = module.rpartition(".")
        setattr(rest.get_submodule(parent), child, nn.Identity())
    return rest


class _Rest:
    """The policy after a hook point, under any intervention."""

    def __init__(self, points: HookPoints, site: str) -> None:
        self.site, self._points = site, points
        self._sites = [site, LINEAR] if site == SITE else [site]
        self._policies = {name: suffix(points, name) for name in self._sites}
        self._weights: dict[Site, tuple[Tensor, Tensor]] = {}

    def record(self, levels: Sequence[bytes]) -> dict[str, Tensor]:
        """The activations that the rest of the policy starts from: (level, ...) by hook point."""
        recorded = activations(self._points, levels, *self._sites)
        # Contiguous, so that flattening takes no copy per intervention.
        return {name: each.contiguous() if name == SITE else each for name, each in recorded.items()}

    @torch.no_grad()
    def probabilities(self, intervention: Intervention, recorded: Mapping[str, Tensor], level: Integers) -> Tensor:
        """Action probabilities, (batch, action), for records of `record` and the level of every row."""
        if self.site == SITE:
            patches = _patches(intervention, level)
            if _only_sets_a_region(patches):
                changes = (self._change(patch, recorded[SITE]) for patch in patches)
                return self._policies[LINEAR](sum(changes, recorded[LINEAR]))[0].probs
        policy, parts = self._policies[self.site], []
        for first in range(0, len(level), BATCH):
            rows = slice(first, first + BATCH)
            with patched(policy, _patches(intervention, level[rows])):
                parts.append(policy(recorded[self.site][rows])[0].probs)
        return torch.cat(parts)

    def _change(self, patch: Patch, activation: Tensor) -> Tensor:
        """The change in `LINEAR` by a patch that sets a region of `SITE`: (batch, feature)."""
        if patch.site not in self._weights:
            self._weights[patch.site] = self._columns(patch.site, activation.shape)
        columns, weights = self._weights[patch.site]
        region = activation.flatten(1)[:, columns.flatten()].view(-1, *columns.shape[1:])
        return (patch.edit(region) - region).flatten(1) @ weights

    def _columns(self, site: Site, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The inputs of `LINEAR` in a region of `SITE`, (1, channel, row, col), and their weights."""
        weight = self._points.model.get_submodule(LINEAR).weight
        numbered = torch.arange(shape[1:].numel(), dtype=weight.dtype, device=weight.device).view(1, *shape[1:])
        columns = run_with_cache(self._policies[SITE], numbered, sites=site, stop=True)[site].long()
        return columns, weight[:, columns.flatten()].T.contiguous()


def _only_sets_a_region(patches: Sequence[Patch]) -> bool:
    """Whether there is at most one patch, and the patch sets a region of `SITE` in every row."""
    every = all(each.site.name == SITE and isinstance(each.edit, Set) and each.where is None for each in patches)
    return every and len(patches) < 2  # the later of two patches may overwrite the earlier one


def _patches(intervention: Intervention, level: Integers) -> Sequence[Patch]:
    return intervention(level) if callable(intervention) else intervention


def _check_order(name: str, points: HookPoints, patches: Sequence[Patch], site: str) -> None:
    before = list(points)[: list(points).index(points[site].name)]
    for patch in patches:
        if points.bind(patch.site).name in before:
            raise SuffixError(
                f"{name}: the patch at {patch.site!r} comes before '{site}', the hook point of the record. "
                "Give an earlier hook point: site=..."
            )


def _compare(
    name: str,
    rest: _Rest,
    intervention: Intervention,
    recorded: Mapping[str, Tensor],
    level: Integers,
    expected: Tensor,
) -> None:
    """Raise if probabilities from the record differ from the whole policy's or depend on the order of the rows."""
    backwards = {site: activation.flip(0) for site, activation in recorded.items()}
    try:
        given = rest.probabilities(intervention, recorded, level)
        reordered = rest.probabilities(intervention, backwards, level[::-1].copy()).flip(0)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SuffixError(f"{name}: the policy cannot be run from '{rest.site}' on: {error}") from error
    for apart, why in (
        (given - expected, "differ from those of the whole policy: the modules up to there do not form a chain"),
        (given - reordered, "depend on the order of the states: a patch depends on more than activation and level"),
    ):
        if not float(apart.abs().max()) <= TOLERANCE:
            raise SuffixError(f"{name}: run from '{rest.site}' on, the policy's action probabilities {why}.")
