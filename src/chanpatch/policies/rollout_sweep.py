"""Roll out a policy with many sets of patches in one vector environment; each set has its own rows in the batch."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.hooks import Station
from ..engine.moments import publishing
from ..engine.paths import leaves
from ..engine.state import GENERATORS, Snapshot, generator_state, random_states
from ..engine.training import training_modules
from ..errors import BatchAxisError, RolloutError
from ..labels import Patches, labelled, labelled_patches, no_p_among, reference_notes, refuse_shared_state
from ..patching.contexts import checked_patches, raise_nan
from ..patching.donors import joined
from ..patching.edit_context import Context
from ..patching.firing import Firing
from ..patching.patch import Patch
from ..registry.points import HookPoints, model_of
from ..registry.sites import Coordinates, HookPoint, Site, no_batch
from .checks import SharedState, refuse_environments_by_rows
from .copies import functions_of, patches_inside, used_by
from .decisions import Masks, Outputs, method_of
from .episodes import BatchAxes, play, rows_of, state_batch_axes
from .log import InitialState, Options, by_repetition, checked_seeds
from .parts import opened, played_in_parts
from .results import ORIGINAL, Rollout, SweptRollouts
from .stable_baselines import as_in_predict, lstm_state, policy_of
from .twin import PatchedPolicy


def rollout_sweep(  # noqa: D417  # the arguments of rollout are documented there
    policy: nn.Module | HookPoints,
    envs: Any,
    seeds: Iterable[int],
    patches: Patches | Patch,
    *,
    max_steps: int,
    controls: Patches | Patch | None = None,
    sampling_seed: int = 0,
    greedy: bool = False,
    outputs: Outputs | None = None,
    masks: Masks | None = None,
    initial_state: InitialState | None = None,
    check_nan: bool = True,
    keep: Sequence[str] = (),
    executor: Executor | None = None,
    progress: bool | None = None,
) -> SweptRollouts:
    """Roll out a policy unpatched and with each of several labeled sets of patches, in the same episodes.

    The result equals the result of `paired_rollouts` with one PatchedPolicy per label, but requires fewer forward
    passes: each combination of label and episode has its own row in the batch. A patch receives activations, inputs and
    episode numbers (`context.rows`) only for the rows of the patch's own label. Use as many sub-environments as rows
    fit in one forward pass.

    The results are equal only if the policy treats each row independently, and patches draw random numbers only through
    `resample_ablate` and `context.uniform`. Wrap a policy without a `forward` method in a small module that has a
    `forward` method.

    Args:
        policy: Module, HookPoints of a module, or Stable-Baselines3 model.
        patches: Mapping from each label to one or more patches; or a sequence of patches, each of which is labeled by
            its site. Create the sites from traced HookPoints, so that the sites' batch axes are known.
        controls: Control patches, in the same format as `patches`. The effects are ranked among the effects of the
            controls. P-values require at least 19 controls.
        check_nan: Whether to raise an error if a patch introduces NaN.
        envs, seeds, max_steps, sampling_seed, greedy, outputs, masks, initial_state, keep, executor, progress: Same as
            in `rollout`. If workers are lost, ExecutorError's `partial` contains the rollouts of the labels whose
            episodes have all finished. `partial` is None if episodes of the unpatched policy are missing.

    Returns:
        Mapping from labels to rollouts. The first label is `"original"`, for the unpatched policy. `comparisons()`
        returns the difference in mean return between each label and `"original"`, with intervals and ranks.

    Raises:
        BatchAxisError: If the batch axis of a site is unknown.
        ChanpatchError: For the same reasons as `rollout` and PatchedPolicy; if there are no patches; if the policy
            has batch norm or dropout in training mode; or if an open context patches or records the policy.
        RolloutError: If the policy's output for a row depends on other rows; if the policy or a patch draws from a
            random number generator; or if patches with different labels share a module, list or other container that
            changes the episodes.

    Example:
        >>> import gymnasium, torch
        >>> from chanpatch import hook_points, zero_ablate
        >>> points = hook_points(torch.nn.Linear(4, 2), torch.zeros(2, 4))
        >>> patches = {f"no action {n}": zero_ablate(points.site(".out", feature=n)) for n in range(2)}
        >>> envs = gymnasium.make_vec("CartPole-v1", num_envs=12, vectorization_mode="sync")
        >>> list(rollout_sweep(points, envs, range(4), patches, max_steps=100, outputs="logits"))
        ['original', 'no action 0', 'no action 1']
    """
    policy = policy_of(policy)
    asked = labelled_patches(patches, "patches", RolloutError)
    others = [] if controls is None else labelled_patches(controls, "controls", RolloutError)
    both = [*asked, *others]
    for name, each in (("patches", asked), ("controls", others)):
        if ORIGINAL in dict(each):
            raise RolloutError(
                f"{name} has the label '{ORIGINAL}', which is reserved for the unpatched policy. Use a different label."
            )
    refuse_shared_state(both)
    _check_independent(model_of(policy))
    seeds = checked_seeds(seeds)
    options = Options(seeds, max_steps, sampling_seed, greedy, outputs, masks, initial_state, progress, keep)
    labels = (ORIGINAL, *(label for label, _ in both))
    parts, lost = played_in_parts(executor, _played, policy, envs, options, policy, both, check_nan, labels=labels)
    played = by_repetition(parts, len(seeds))
    if lost and 0 not in played:
        raise lost
    rollouts = {label: played[number] for number, label in enumerate(labels[: 1 + len(asked)]) if number in played}
    ranked = {labels[number]: played[number] for number in sorted(played) if number > len(asked)} or None
    remarks = reference_notes(patch for _, each in both for patch in each)
    result = SweptRollouts(rollouts, ranked, no_p_among(dict(others).values()), remarks=tuple(remarks))
    if lost:
        lost.partial = result
        raise lost
    return result


def _played(call: tuple[Any, Options, Any, Any, bool], part: range) -> Rollout:
    """Run a range of plays, which are numbered by label and then by episode."""
    envs, options, policy, both, check_nan = call
    if options.initial_state is None:
        options = options._replace(initial_state=lstm_state(model_of(policy)))
    state_axes = {} if options.initial_state is None else state_batch_axes(options.initial_state)
    with opened(envs) as vector:
        every = (patch for _, each in both for patch in each)
        refuse_environments_by_rows([*patches_inside(policy), *every], vector)
        interventions = _Interventions(policy, both, state_axes, check_nan=check_nan)
        twin = method_of(interventions.twin, policy)
        run, again = (
            functools.partial(play, twin, vector, options, part, times=1 + len(both), around=around)
            for around in (interventions.forward, functools.partial(interventions.forward, is_reversed=True))
        )
        shared = SharedState({ORIGINAL: [policy], **{label: functions_of(each) for label, each in both}}, vector)
        return shared.checked("of the sweep", run, again)


def _check_independent(model: nn.Module) -> None:
    """Raise an error if training mode would make rows depend on each other, or if a context is open on the model."""
    with as_in_predict(model):
        together = training_modules(model)
    if together:
        raise RolloutError(
            f"{', '.join(together)} in training mode would let patches with different labels affect each other. Call "
            "eval() on the policy, or use paired_rollouts with one PatchedPolicy per label."
        )
    stations = [station for module in model.modules() if (station := Station.of(module))]
    if any(listener.session.confined for station in stations for listener in station.listeners):
        raise RolloutError(
            "rollout_sweep runs a copy of the policy, which the open patched() or recording() context does not "
            "affect. Close the context. To apply the context's patches under every label, pass PatchedPolicy(policy, "
            "patches) as the policy."
        )


class _Interventions:
    """A policy that applies each label's patches only to that label's rows.

    An intervention is the set of patches with one label. Interventions are numbered from 1, in the order of the labels.
    Number 0 stands for the unpatched policy.
    """

    def __init__(
        self,
        policy: nn.Module | HookPoints,
        patches: Sequence[tuple[Any, tuple[Patch, ...]]],
        state_axes: BatchAxes,
        *,
        check_nan: bool,
    ) -> None:
        self._labels = (ORIGINAL, *(label for label, _ in patches))
        self._state_axes = state_axes
        self._cuts: dict[int, slice] = {}  # the rows of each intervention in the current forward pass
        self._is_reversed = False  # whether interventions are applied in reverse order
        self._firings: list[list[Firing]] = [[]]
        points: dict[str, HookPoint] = {}
        for _, each in patches:
            own = [(patch, _point_with_rows(patch.site)) for patch in joined(checked_patches(policy, each), Counter())]
            self._firings.append([Firing(patch, point, check_nan=check_nan) for patch, point in own])
            points |= {each.name: each.lens.base if isinstance(each.lens, Coordinates) else each for _, each in own}
        shared = [
            Patch(Site(name).at(point), functools.partial(self._patched, point)) for name, point in points.items()
        ]
        functions = [function for _, each in patches for function in functions_of(each)]
        self._generators = [each for each in used_by(*functions) if isinstance(each, GENERATORS)]
        repeated = {each for each in functions if isinstance(each, nn.Module) and functions.count(each) > 1}
        self._modules = Snapshot(module for each in repeated for module in each.modules())
        self._cuda = list({weight.device for weight in model_of(policy).parameters() if weight.is_cuda})
        self.twin: Any = PatchedPolicy(policy, shared, check_nan=False)

    @contextmanager
    def forward(self, interventions: NDArray[np.int64], *, is_reversed: bool = False) -> Iterator[None]:
        """Return a context for one forward pass, in which each row gets its own intervention.

        `interventions` contains the number of each row's intervention. With `is_reversed`, interventions are applied in
        reverse order. At the end of the context, an error is raised if a patch introduced NaN.
        """
        numbers, starts = np.unique(interventions, return_index=True)
        ends = [*starts[1:], len(interventions)]
        self._cuts = {number: slice(*cut) for number, *cut in zip(numbers, starts, ends, strict=True)}
        self._is_reversed = is_reversed
        try:
            yield
        except Exception as error:
            self._raise_nan(error)
            raise
        self._raise_nan()

    def _patched(self, point: HookPoint, activation: Tensor, *, context: Context) -> Tensor:
        """Apply each intervention's patches at a hook point to that intervention's rows of the activation."""
        axis: Any = point.tensor_batch_axis
        context.rows  # noqa: B018  # raises an error if the number of rows is wrong
        is_checked = context.step is not None and not context.step & (context.step - 1)  # 0, 1, 2, 4, 8, ...
        states = self._random_states() if is_checked else None
        self._modules.note()
        tensor = activation if point.lens is None else point.lens.merge(activation, activation)
        parts = tensor.split_with_sizes([cut.stop - cut.start for cut in self._cuts.values()], axis)
        new = dict(zip(self._cuts, parts, strict=True))
        for number, cut in [*self._cuts.items()][:: -1 if self._is_reversed else 1]:
            firings = [firing for firing in self._firings[number] if firing.site.name == point.name]
            if not firings:
                continue
            own = context.moment.published.cut(cut, self._labels[number])
            moment = replace(context.moment, inputs=self._inputs(context.inputs, cut), published=own)
            with labelled(self._labels[number]), publishing(own):  # an edit may call another patched model
                for firing in firings:
                    new[number] = firing(new[number], moment)
        if states and states != self._random_states():
            raise RolloutError(
                f"A patch at '{point.name}' draws random numbers from a generator. In a sweep, the numbers would "
                "differ between labels, so identical patches would have different effects. Use context.uniform(shape), "
                "whose numbers depend only on the episode and the step."
            )
        if self._modules.changed() or self._modules.rewritten():
            raise RolloutError(
                f"Patches with different labels use the same module as an edit at '{point.name}'. The module changes "
                "its own buffers or attributes, so the patches would affect each other. Use a separate module for each "
                "label."
            )
        same = all(map(operator.is_, new.values(), parts))
        return activation if same else point.seen(torch.cat([*new.values()], axis))

    def _random_states(self) -> list[object]:
        return [*random_states(self._cuda), *map(generator_state, self._generators)]

    def _inputs(self, inputs: tuple[Any, ...], rows: slice) -> tuple[Any, ...]:
        """Return the given rows of each of the policy's inputs: observations and, if recurrent, the recurrent state."""
        axes = (None, self._state_axes, None)  # None: the batch is the first axis
        each = zip(inputs, axes, strict=False)
        return tuple(
            rows_of(tree, dict.fromkeys(dict(leaves(tree)), 0) if own is None else own, rows) for tree, own in each
        )

    def _raise_nan(self, cause: Exception | None = None) -> None:
        for number in self._cuts:
            with labelled(self._labels[number]):
                raise_nan(self._firings[number], cause)


def _point_with_rows(site: Site) -> HookPoint:
    if site.point is None or site.point.tensor_batch_axis is None:
        raise BatchAxisError(
            f"rollout_sweep cannot limit the patch at {site!r} to the patch's own rows of the batch. {no_batch(site)}"
        )
    return site.point
