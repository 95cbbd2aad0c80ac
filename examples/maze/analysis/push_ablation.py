"""Mean ablation of the channels that push for one of two goals on decision squares, beside matched other channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from chanpatch import HookPoints, Patch, Site, mean_ablate, sweep
from chanpatch.controls import matched_channels
from chanpatch.errors import SiteError
from chanpatch.patching import ActivationCache
from maze.analysis.cells import Flags
from maze.analysis.decision_squares import Decisions
from maze.analysis.forwards import SITE, frames
from maze.paths import Direction
from maze.policy.network import ACTIONS

CONTROLS = 19  # sets: as many as a p-value requires

Channels = tuple[int, ...]


@dataclass(eq=False)
class MatchedSets:
    """For a set of channels, `CONTROLS` different sets of other channels with about the same mean activations."""

    points: HookPoints
    background: Tensor
    seed: int
    no_p: dict[Channels, str] = field(default_factory=dict, repr=False)
    _known: dict[Channels, dict[Site, float]] = field(default_factory=dict, repr=False)

    def of(self, channels: Channels) -> dict[Site, float]:
        """The sets, each with its distance from the channels (`MatchedChannels.apart`); fewer if few channels are live.

        A single draw of all sets would use nearly all channels, so the match would be poor. Instead, draw a few sets
        from the nearest channels first, and then more sets from more channels until there are enough.
        """
        if channels not in self._known:
            found = {}
            site = self.points.site(SITE, channel=list(channels))
            for count in range(1, CONTROLS + 1):
                try:
                    drawn = matched_channels(self.points, site, self.background, count=count, seed=self.seed + count)
                except SiteError:  # no more different sets
                    break
                found |= dict(zip(drawn.sites, drawn.apart, strict=True))
                self.no_p[channels] = drawn.no_p  # from the largest draw
                if len(found) >= CONTROLS:
                    break
            self._known[channels] = dict(list(found.items())[:CONTROLS])
        return self._known[channels]


class Ablation(NamedTuple):
    """Whether the step to the cheese is likelier than the step to the corner after mean ablation."""

    towards: Flags  # bool (level,): with the channels of the push ablated
    controls: Flags  # bool (control, level): with matched sets ablated
    affected: int  # number of levels that have channels to ablate
    apart: float  # mean distance of the controls from the channels
    no_p: str = ""  # why the rank among the controls has no p-value, or an empty text


def ablate_push(
    points: HookPoints,
    levels: Sequence[bytes],
    seen: Decisions,
    channels_of: Callable[[int, int], Sequence[int]],
    controls: MatchedSets,
    reference: ActivationCache,
) -> Ablation:
    """Ablate a push, whose channels depend on the directions of cheese and corner, or matched sets instead.

    The mouse stands on the decision square. The first matched set of every push makes one control over all levels.
    """
    cheese_step, corner_step = seen.towards()
    after = np.tile(cheese_step > corner_step, (1 + CONTROLS, 1))
    fewest, affected, apart, no_p = CONTROLS, 0, 0.0, ""
    for cheese, corner in np.unique(np.stack([seen.cheese, seen.corner], axis=1), axis=0).tolist():
        rows = np.flatnonzero((seen.cheese == cheese) & (seen.corner == corner))
        if channels := tuple(channels_of(cheese, corner)):
            others = controls.of(channels)
            sites = [points.site(SITE, channel=list(channels)), *others]
            patches = {str(number): mean_ablate(site, reference) for number, site in enumerate(sites)}
            after[: len(sites), rows] = _swept(points, [levels[row] for row in rows], patches, cheese, corner)
            fewest, affected = min(fewest, len(others)), affected + len(rows)
            no_p = no_p or controls.no_p.get(channels, "")
            apart += len(rows) * float(np.mean(list(others.values()))) if others else 0.0
    apart = apart / affected if affected and fewest else np.nan
    return Ablation(after[0], after[1 : 1 + fewest], affected, apart, no_p)


def _swept(points: HookPoints, levels: Sequence[bytes], patches: dict[str, Patch], cheese: int, corner: int) -> Flags:
    """Whether one direction is likelier than another under every patch: bool (patch, level)."""
    towards, away = (list(ACTIONS[Direction(direction)]) for direction in (cheese, corner))

    def more(output: Any) -> Tensor:
        probabilities = output[0].probs
        return probabilities[:, towards].sum(dim=1) - probabilities[:, away].sum(dim=1)

    result = sweep(points, frames(levels), patches=patches, metric={"more": more}, progress=False)
    return np.asarray(result.values["more"]) > 0
