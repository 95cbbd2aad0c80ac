"""What ablating the channels that push for one of two goals does on decision squares, beside sets of other channels.

controls = MatchedSets(points, observations, seed=0)
done = ablate_push(points, levels, seen, lambda cheese, corner: [7, 16], controls, reference)
done.towards, done.controls                  # bool (level,) and (control, level): the step to the cheese is likelier
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chanpatch import HookPoints, Patch, Site, mean_ablate, sweep
from chanpatch.controls import matched_channels
from chanpatch.errors import SiteError
from chanpatch.patching import ActivationCache
from maze.analysis.decision_squares import Decisions
from maze.analysis.tables import SITE
from maze.environment.levels import observe, policy_input
from maze.environment.paths import Direction
from maze.policy.network import ACTIONS

CONTROLS = 19  # sets: as many as a p-value takes

Channels = tuple[int, ...]


@dataclass(eq=False)
class MatchedSets:
    """For a set of channels, `CONTROLS` different sets of others of about the same mean activations.

    Attributes:
        points: of the policy.
        background: observations that the means are taken over, and on which dead channels do not vary.
        seed: of the draws.
        no_p: for each set of channels, why a rank among its sets has no p, or an empty text.
    """

    points: HookPoints
    background: Tensor
    seed: int
    no_p: dict[Channels, str] = field(default_factory=dict, repr=False)
    _known: dict[Channels, dict[Site, float]] = field(default_factory=dict, repr=False)

    def of(self, channels: Channels) -> dict[Site, float]:
        """The sets, and how far each is from the channels (see `MatchedChannels.apart`): fewer where no more are live.

        One draw of so many sets would be among nearly all channels, which matches nothing. So draw few among the
        nearest first, and more among more channels only until there are enough.
        """
        if channels not in self._known:
            found: dict[Site, float] = {}
            site = self.points.site(SITE, channel=list(channels))
            for count in range(1, CONTROLS + 1):
                try:
                    drawn = matched_channels(self.points, site, self.background, count=count, seed=self.seed + count)
                except SiteError:  # so many different sets there are not
                    break
                found |= dict(zip(drawn.sites, drawn.apart, strict=True))
                self.no_p[channels] = drawn.no_p  # of the largest draw
                if len(found) >= CONTROLS:
                    break
            self._known[channels] = dict(list(found.items())[:CONTROLS])
        return self._known[channels]


class Ablation(NamedTuple):
    """Whether the step to the cheese is likelier than that to the corner, with channels set to their mean.

    Attributes:
        towards: bool (level,), with the channels of the push ablated.
        controls: bool (control, level), with sets of others instead.
        affected: on how many levels there are such channels; the policy is left as it is on the others.
        apart: how far the controls are from the channels in mean activation, on average over these levels.
        no_p: why the rank among the controls has no p, or an empty text.
    """

    towards: NDArray[np.bool_]
    controls: NDArray[np.bool_]
    affected: int
    apart: float
    no_p: str = ""


def ablate_push(
    points: HookPoints,
    levels: Sequence[bytes],
    seen: Decisions,
    channels_of: Callable[[int, int], Sequence[int]],
    controls: MatchedSets,
    reference: ActivationCache,
) -> Ablation:
    """What ablating a push does; which channels these are depends on where the two ways lead.

    Args:
        points: of the policy.
        levels: procgen states, the mouse on the decision square.
        seen: what the policy does on them.
        channels_of: the channels for a direction of the cheese and one of the corner.
        controls: one set is drawn for each set of channels, and counts as one control on all levels.
        reference: activations at `SITE` that give the means.
    """
    before = _likelier(seen)
    after = np.tile(before, (1 + CONTROLS, 1))
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


def _likelier(seen: Decisions) -> NDArray[np.bool_]:
    every = np.arange(len(seen.cheese))
    likelier: NDArray[np.bool_] = seen.moves[every, seen.cheese] > seen.moves[every, seen.corner]
    return likelier


def _swept(
    points: HookPoints, levels: Sequence[bytes], patches: dict[str, Patch], cheese: int, corner: int
) -> NDArray[np.bool_]:
    """Under every patch, whether one direction is likelier than another: bool (patch, level)."""
    towards, away = (list(ACTIONS[Direction(direction)]) for direction in (cheese, corner))

    def more(output: Any) -> Tensor:
        probabilities: Tensor = output[0].probs
        return probabilities[:, towards].sum(dim=1) - probabilities[:, away].sum(dim=1)

    inputs = torch.from_numpy(policy_input(observe(levels)))
    result = sweep(points, inputs, patches=patches, metric={"more": more}, progress=False)
    return np.asarray(result.values["more"]) > 0
