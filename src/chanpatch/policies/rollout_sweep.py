"""Many interventions in one vector environment, each in rows of its own."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.sessions import Moment, published
from ..engine.state import training_modules
from ..errors import BatchAxisError, RolloutError
from ..patching.contexts import raise_nan
from ..patching.edits import Context
from ..patching.firing import Firing
from ..patching.patch import Patch, Patches, checked_patches, labelled, labelled_patches
from ..registry.points import HookPoints, model_of
from ..registry.sites import HookPoint, Site, no_batch
from .episodes import BatchAxes, InitialState, Log, check_environments, play, rows_of
from .results import ORIGINAL, SweptRollouts
from .twin import PatchedPolicy

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


def rollout_sweep(
    policy: nn.Module | HookPoints,
    envs: VectorEnv[Any, Any, Any],
    seeds: Iterable[int],
    patches: Patches | Patch,
    *,
    max_steps: int,
    controls: Patches | Patch | None = None,
    sampling_seed: int = 0,
    greedy: bool = False,
    initial_state: InitialState | None = None,
    check_nan: bool = True,
    progress: bool | None = None,
) -> SweptRollouts:
    """Return what a policy does in the same episodes without patches, and with those of each label.

    It is what `paired_rollouts` gives with a PatchedPolicy per label, in fewer forwards: the labels share the
    vector environment, one row for each label and episode, and one forward serves all rows of a step. A patch sees
    the rows of its own label alone: activations, inputs, and in `context.rows` the numbers of the episodes. These
    are not the numbers of sub-environments, of which one episode has one per label. Give the vector environment as
    many sub-environments as fit into a forward.

    The two are equal where the policy treats its rows one by one, and patches that draw do so by row, as
    `resample_ablate` does. A policy without a forward goes into a small module that has one.

    Args:
        policy: A module, or its HookPoints.
        envs: As for `rollout`.
        seeds: As for `rollout`.
        patches: One patch or more for each label: a mapping of labels to patches, or patches, which are labelled by
            their sites. The sites come from a trace, which proves the batch axis.
        max_steps: As for `rollout`.
        controls: Patches to rank the others among by their effect on the mean return, as `patches`; they are played
            in the same vector environment. From 19 on there are p-values.
        sampling_seed: As for `rollout`.
        greedy: As for `rollout`.
        initial_state: As for `rollout`.
        check_nan: Whether NaN that a patch brings in is an error.
        progress: As for `rollout`.

    Returns:
        One rollout per label, after that of the policy without patches, `"original"`. Its `comparisons()`, and what it
        prints, are the differences of mean return between each label and the original, with intervals and ranks.

    Raises:
        BatchAxisError: If the batch axis of a site is not proved, so that a patch has no rows to be kept to.
        ChanpatchError: As for `rollout` and PatchedPolicy, if there are no patches, or if the policy has batch norm or
            dropout in training mode, which would treat the rows of all labels together.

    Example:
        >>> import gymnasium, torch
        >>> from chanpatch import hook_points, zero_ablate
        >>> points = hook_points(torch.nn.Linear(4, 2), torch.zeros(2, 4))
        >>> patches = {f"no action {n}": zero_ablate(points.site(".out", feature=n)) for n in range(2)}
        >>> envs = gymnasium.make_vec("CartPole-v1", num_envs=12, vectorization_mode="sync")
        >>> list(rollout_sweep(points, envs, range(4), patches, max_steps=100))
        ['original', 'no action 0', 'no action 1']
    """
    check_environments(envs)
    asked = labelled_patches(patches, "patches", RolloutError)
    others = [] if controls is None else labelled_patches(controls, "controls", RolloutError)
    for what, each in (("patches", asked), ("controls", others)):
        if ORIGINAL in dict(each):
            raise RolloutError(f"{what} has the label '{ORIGINAL}', which is the policy without patches. Rename it.")
    together = training_modules(model_of(policy))
    if together:
        raise RolloutError(
            f"{', '.join(together)} in training mode would treat the rows of all labels together. Call eval() on the "
            "policy, or roll out a PatchedPolicy for each label with paired_rollouts."
        )
    log = Log(seeds, sampling_seed, times=1 + len(asked) + len(others))
    interventions = _Interventions(policy, [*asked, *others], log.episodes, check_nan=check_nan)
    play(
        interventions.twin,
        envs,
        log,
        max_steps=max_steps,
        greedy=greedy,
        initial_state=initial_state,
        progress=progress,
        around=interventions.forward,
    )
    played = iter(log.rollouts())
    rollouts = {label: next(played) for label in (ORIGINAL, *dict(asked))}
    return SweptRollouts(rollouts, {label: next(played) for label in dict(others)} or None)


class _Interventions:
    """A policy with the patches of every intervention inside, each kept to its own rows.

    Interventions are numbered from 1 on; 0 is the policy without patches.

    Args:
        policy: As in rollout_sweep.
        patches: Those of each intervention, after its label.
        episodes: How many episodes each is played in.
        check_nan: Whether to look for NaN that they bring in.
    """

    def __init__(
        self,
        policy: nn.Module | HookPoints,
        patches: Sequence[tuple[Any, tuple[Patch, ...]]],
        episodes: int,
        *,
        check_nan: bool,
    ) -> None:
        self.labels = (ORIGINAL, *(label for label, _ in patches))
        self._episodes = episodes
        self.lengths: list[int] = []  # for each intervention in the forward under way, the number of its rows
        self.inputs: dict[int, tuple[Any, ...]] = {}  # and what the policy takes in them
        points: dict[str, tuple[HookPoint, int]] = {}
        firings: dict[str, dict[int, list[Firing]]] = {}
        self.firings: dict[int, list[Firing]] = {}
        for number, (_, each) in enumerate(patches, start=1):
            for patch in checked_patches(policy, each):
                point, axis = _point_with_rows(patch.site)
                points[point.name] = point, axis
                firing = Firing(patch, point, check_nan=check_nan)
                firings.setdefault(point.name, {}).setdefault(number, []).append(firing)
                self.firings.setdefault(number, []).append(firing)
        edits = {name: _ByRows(self, axis, firings[name]) for name, (_, axis) in points.items()}
        shared = [Patch(Site(name).at(point), edits[name]) for name, (point, _) in points.items()]
        self.twin: Any = PatchedPolicy(policy, shared, check_nan=False)

    @contextmanager
    def forward(self, plays: NDArray[np.int64], inputs: tuple[Any, ...], batch_axes: BatchAxes) -> Iterator[None]:
        """Say whose rows are whose in a forward, and look for NaN at its end."""
        numbers, lengths = np.unique(plays // self._episodes, return_counts=True)
        ends = lengths.cumsum().tolist()
        cuts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self.lengths = lengths.tolist()
        self.inputs = {number: rows_of(inputs, batch_axes, cut) for number, cut in zip(numbers, cuts, strict=True)}
        try:
            yield
        except Exception as error:
            self._raise_nan(error)
            raise
        self._raise_nan()

    def _raise_nan(self, cause: Exception | None = None) -> None:
        for number in self.inputs:
            with labelled(self.labels[number]):
                raise_nan(self.firings.get(number, ()), cause)


class _ByRows:
    """The patches of all interventions at one hook point, as one edit that gives each the rows of its own."""

    def __init__(self, interventions: _Interventions, axis: int, firings: Mapping[int, Sequence[Firing]]) -> None:
        self._interventions, self._axis, self._firings = interventions, axis, firings
        self.__name__ = "rollout_sweep"

    def __call__(self, activation: Tensor, *, context: Context) -> Tensor:
        """Return the activation with the rows of each intervention patched."""
        lengths, numbers = self._interventions.lengths, self._interventions.inputs
        rows = context.rows.split_with_sizes(lengths)  # refuses a forward with other rows
        parts = activation.split_with_sizes(lengths, self._axis)
        new = [
            self._patched(number, part, own, context.call) if number in self._firings else part
            for number, part, own in zip(numbers, parts, rows, strict=True)
        ]
        return activation if all(map(operator.is_, new, parts)) else torch.cat(new, self._axis)

    def _patched(self, number: int, part: Tensor, rows: Tensor, call: int) -> Tensor:
        with labelled(self._interventions.labels[number]):
            moment = Moment(self._interventions.inputs[number], call, published.step, rows, "__call__")
            for firing in self._firings[number]:
                part = firing(part, moment)
        return part


def _point_with_rows(site: Site) -> tuple[HookPoint, int]:
    point = site.point
    if point is None or point.batch_axis is None:
        raise BatchAxisError(f"rollout_sweep keeps the patch at {site!r} to rows of its own. {no_batch(site)}")
    return point, point.batch_axis
