"""Estimate the effects of many patches from gradients, and verify some of the estimates with forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.inputs import Inputs
from ..engine.workers import cut, spread
from ..errors import ExecutorError, MetricError, SiteError, SweepError, UnsupportedModelError
from ..labels import Patches
from ..metrics.measured import Metric, measured
from ..patching.contexts import nan_error, patched
from ..patching.patch import Patch
from ..patching.recording import recording
from ..patching.verbs import edit, patch_in
from ..registry.points import HookPoints, traced
from ..registry.sites import Positions, read, written
from ..results import largest_first, progress_bar
from ..statistics.comparisons import rank_correlation
from ..statistics.interval import whole
from .path_patching import Paths, Place, Places
from .plan import Entry, Forward, entries_of
from .result import Attribution


@torch.inference_mode(mode=False)  # inference mode disables gradients
def attribution(  # noqa: D417  # the arguments of sweep are documented there
    points_or_model: HookPoints | nn.Module,
    *inputs: Any,
    patches: Patches | Patch,
    metric: Metric,
    steps: int = 1,
    verify: int = 16,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool | None = None,
    **keywords: Any,
) -> Attribution:
    """Estimate from gradients how much each of many patches changes a metric.

    The estimate for a patch is the product of two tensors, summed over the patched region: the change that the patch
    makes in the region, and the metric's gradient with respect to the region's activation. The estimate is exact if the
    metric is linear in this activation. All patches together require three forward passes, one backward pass, and
    memory for one region per patch.

    With `steps` above 1, the gradient is averaged along the straight line from the clean to the patched activation
    (integrated gradients, midpoint rule). Patches at one hook point whose regions do not overlap move along the line
    together, with one forward and one backward pass per step. With many steps, the sum of the estimates for these
    patches approaches the joint effect of the patches.

    Args:
        points_or_model, inputs, keywords, progress: Same as in `sweep`.
        patches: A mapping from labels to patches, or a sequence of patches, each of which is labeled by its site.
        metric: A differentiable function of the model's output, as in `sweep`.
        steps: Number of points on the line at which the gradient is computed. With 1, only the gradient at the
            clean activation is used.
        verify: Number of patches to verify by forward passes, starting with the largest absolute estimates. The same
            number of randomly drawn patches is also verified.
        seed: Random seed for drawing the patches to verify.
        executor: Executor whose workers verify the patches, as in `sweep`. The estimates are computed in your process.

    Raises:
        SweepError: If there are no patches, if two patches share a label, or if one label has several patches.
        HookPointError, SiteError: If a site does not exist, or if the activation at a site is not floating-point.
        MetricError: If the metric has no gradient, or does not return a tensor with shape `(batch,)`.
        ExecutorError: Same as in `sweep`. In `partial`, the exact effects that were not measured are NaN.

    Warns:
        RuntimeWarning: If the model modifies a patched activation in place and also reads this activation elsewhere, or
            if the verified effects contradict the estimates.

    Example:
        >>> from chanpatch import hook_points, zero_ablate
        >>> from chanpatch.metrics import logit_difference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> x = torch.randn(8, 4)
        >>> points = hook_points(model, x)
        >>> patches = map(zero_ablate, points.site("1").split("feature"))
        >>> result = attribution(points, x, patches=patches, metric=logit_difference(0, 1))
        >>> bool(abs(result.effect() - result.exact).max() < 1e-6)  # the model is linear after "1"
        True

    References:
        Nanda 2023, "Attribution patching: activation patching at industrial scale"; Syed, Rager and Conmy 2023,
        "Attribution patching outperforms automated circuit discovery"; Sundararajan, Taly and Yan 2017, "Axiomatic
        attribution for deep networks", for integrated gradients.
    """
    points = traced(points_or_model, inputs, keywords)
    return _attributed(points, (inputs, keywords), patches, None, metric, steps, verify, seed, executor, progress)


@torch.inference_mode(mode=False)
def edge_attribution(  # noqa: D417  # the arguments of path_patch and attribution are documented there
    points_or_model: HookPoints | nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    senders: Places,
    receivers: Places,
    *,
    metric: Metric,
    frozen: Place | Iterable[Place] | None = None,
    steps: int = 1,
    verify: int = 16,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool | None = None,
) -> Attribution:
    """Estimate from gradients the effect along the edge from each sender to each receiver (edge attribution patching).

    The estimate for an edge is the change that arrives at the receiver along the direct path from the sender, as in
    `path_patch`, times the metric's gradient at the receiver, summed over the receiver's region. The model runs about
    once per sender instead of once per edge. Some estimates are verified with exact path patches. In the result, labels
    are pairs `(sender, receiver)`, and `.grid()` returns the estimates as a matrix.

    If `steps` is above 1, the gradient is averaged along the line from the receiver's clean activation to the
    receiver's corrupted activation (integrated gradients). This takes `steps` forward passes and `steps` backward
    passes per receiver. If the changes from all senders add up to the difference between the two activations, the
    estimates add up approximately to the effect of patching in the corrupted activation.

    Args:
        points_or_model, clean, corrupted, senders, receivers, frozen: Same as in `path_patch` with many senders, except
            that each label in `receivers` must map to a single hook point.
        metric, steps, verify, seed, executor, progress: Same as in `attribution`.

    References:
        Syed, Rager and Conmy 2023, "Attribution patching outperforms automated circuit discovery"; Hanna, Pezzelle and
        Belinkov 2024, "Have faith in faithfulness", for integrated gradients over edges.
    """
    points = traced(points_or_model, clean)
    paths = Paths(points, clean, corrupted, senders, receivers, frozen)
    patches = {pair: paths.patches(pair[1], cache) for pair, cache in paths.received().items()}
    ends = paths.corrupted.until([points.site(patch.site.name) for each in patches.values() for patch in each])
    inputs = paths.forward.inputs
    return _attributed(points, inputs, patches, ends, metric, steps, verify, seed, executor, progress)


def _attributed(points: HookPoints, inputs: Any, patches: Any, ends: Any, metric: Any, *options: Any) -> Attribution:
    """Estimate the effects of patches from gradients.

    `inputs` is a pair (args, kwargs). If `ends` is a cache, average the gradients along the lines from the clean
    activations to the activations in `ends`, instead of to the patched activations. `options` contains the arguments of
    `attribution` from `steps` to `progress`.
    """
    steps, verify, seed, executor, bar = options
    whole("steps", steps, 1, SweepError)
    whole("verify", verify, 0, SweepError)
    entries = entries_of(points, patches, "patches")
    chosen = [_only_patch(entry, points) for entry in entries]
    run = _Runs(points, inputs, metric)
    clean, gradients = run.gradients([*dict.fromkeys(patch.site.name for patch in chosen)])
    if ends is not None and run.shares_memory:
        raise SiteError(
            "A module modifies a receiver's activation in place, and the original activation is also read elsewhere, "
            "so the gradient is wrong. Use path_patch(), choose the module's output as the receiver, or build the "
            "module with inplace=False."
        )
    changes = run.changes(chosen, clean)
    at = {name: [row for row, patch in enumerate(chosen) if patch.site.name == name] for name in clean}
    lines = [*_lines(chosen, changes, clean)] if ends is None else [*at.items()]
    count = len(chosen)
    effect, exact, drawn = np.zeros(count), np.full(count, np.nan), np.zeros(count, bool)
    drawn[np.random.default_rng(seed).choice(count, min(verify, count), replace=False)] = True
    verified, stepped = min(2 * verify, count), 0 if steps == 1 else steps * len(lines)
    with progress_bar(bar, stepped + verified, "pass") as advance:
        for name, rows in lines:
            gradient = gradients[name]
            if steps > 1:
                line = [changes[row] for row in rows] if ends is None else [({}, ends[name] - clean[name])]
                gradient = run.mean_gradient(name, clean[name], line, steps, advance)
            for row in rows:
                positions, difference = changes[row]
                effect[row] = float((difference * read(gradient, positions)).double().sum()) / run.input_count
        to_verify = {*largest_first(effect)[:verify].tolist(), *np.flatnonzero(drawn).tolist()}
        advance(verified - len(to_verify))  # drawn patches may also be among the largest
        lost = _verify(run, [entries[row] for row in to_verify], exact, executor, advance)
    labels = tuple(entry.label for entry in entries)
    known = drawn.any() and np.isfinite([effect[drawn], exact[drawn]]).all()
    correlation = rank_correlation(effect[drawn], exact[drawn]) if known else np.nan
    sample, zeros = int(drawn.sum()), int((exact[drawn] == 0).sum())
    found = Attribution(
        labels, tuple(chosen), exact, drawn, correlation, sample, zeros, run.input_count, steps, _effect=effect
    )
    if lost:
        lost.partial = found
        raise lost
    if fault := _poor_estimates(found, run):
        warnings.warn(fault, RuntimeWarning, stacklevel=4)  # so the warning points to the caller, not to the decorator
    return found


def _verify(
    run: _Runs, entries: Sequence[Entry], exact: Any, executor: Executor | None, advance: Callable[[int], object]
) -> ExecutorError | None:
    """Measure the entries' exact effects, and write them to `exact`. If workers are lost, return the error to raise."""
    if executor is None:
        for entry in entries:
            exact[entry.number] = run.exact(entry.patches[0])
            advance(1)
        return None
    parts = cut(entries, executor)

    def add(number: int, found: list[float]) -> None:
        exact[[entry.number for entry in parts[number]]] = found
        advance(len(found))

    labels = [[entry.label for entry in part] for part in parts]
    try:
        spread(executor, _exact, (run.points, run.inputs, run.metric), parts, labels, add, model=run.points.model)
    except ExecutorError as error:
        return error
    return None


def _exact(call: tuple[HookPoints, Any, Metric], entries: Sequence[Entry]) -> list[float]:
    run = _Runs(*call)
    return [run.exact(entry.patches[0]) for entry in entries]


def _only_patch(entry: Entry, points: HookPoints) -> Patch:
    if len(entry.patches) > 1:
        raise SweepError(
            f"The label {entry.label!r} has {len(entry.patches)} patches, but estimates need one patch per label. Give "
            "each patch or receiver its own label, or use sweep() or path_patch() to patch several sites together."
        )
    point = points[entry.patches[0].site.name]
    if not point.dtype.is_floating_point:
        raise SiteError(f"'{point.name}' has dtype {point.dtype}, so it has no gradient. Patch a later hook point.")
    return entry.patches[0]


def _lines(
    patches: Sequence[Patch], changes: Sequence[_Change], clean: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[int]]]:
    """Group the patches. In each group, all patches are at one hook point, and their regions do not overlap.

    Yield (name of the hook point, indices of the patches) for each group.
    """
    waiting = list(range(len(patches)))
    while waiting:
        name, line, others = patches[waiting[0]].site.name, [], []
        taken = torch.zeros_like(clean[name], dtype=torch.bool)
        for row in waiting:
            positions, _ = changes[row]
            if patches[row].site.name != name or read(taken, positions).any():
                others.append(row)
            else:
                line.append(row)
                taken = written(taken, positions, torch.ones_like(read(taken, positions)))
        yield name, line
        waiting = others


_Change: TypeAlias = tuple[Positions, Tensor]  # a region, and the change that a patch makes there
_INSTEAD = "Use more steps (steps=20), a metric based on logits (logit_difference), or sweep()."
_FEWEST_RANKED = 10  # if fewer random patches are ranked, the rank correlation is often low by chance


def _poor_estimates(found: Attribution, run: _Runs) -> str:
    """Return the text of a warning if the estimates are known to be wrong; otherwise, return an empty string."""
    names = sorted({patch.site.name for patch in found.patches})
    if run.shares_memory:
        return (
            "Replacing an activation with an equal copy changes the model's output: a module modifies its input in "
            "place, and that input is also read elsewhere. This input is among the patched hook points "
            f"({', '.join(map(repr, names))}), so the estimates are wrong; the exact effects are correct. Patch the "
            "module's output, or build the module with inplace=False."
        )
    missed = {}
    for name in names:
        here = ~np.isnan(found.exact) & [patch.site.name == name for patch in found.patches]
        largest = np.abs(found.exact[here]).max(initial=0)
        if largest > run.rounding and np.abs(found.effect()[here]).max() < 1e-3 * largest:
            missed[name] = largest
    if missed:
        return (
            f"The estimates are about zero at {', '.join(map(repr, missed))}, but verified patches there change the "
            f"metric by up to {max(missed.values()):.2g}. Either the metric is flat at the clean activations (for "
            "example, a probability near 0 or 1, or a divergence from the clean output), or a later operation blocks "
            f"gradients (.detach(), argmax or rounding). {_INSTEAD}"
        )
    changed = np.abs(found.exact[found.drawn]).max(initial=0) > run.rounding
    if changed and found.sample >= _FEWEST_RANKED and found.rank_correlation < 0.5:
        return (
            "The estimates rank the patches differently from the exact effects: the rank correlation is "
            f"{found.rank_correlation:.2f} over {found.sample} random patches. {_INSTEAD}"
        )
    return ""


class _Runs(Forward):
    """Run the forward passes of an attribution, and compute the metric and the metric's gradients."""

    def __init__(self, points: HookPoints, inputs: tuple[Any, Any], metric: Metric) -> None:
        super().__init__(points, *inputs)
        self.metric = metric
        with self.running() as run:
            self._baseline = run.kept(self.output())
            self._clean = measured(metric, self._baseline, self._baseline)
        self._scale = float(self._clean.nan_to_num().abs().max())
        self.input_count = len(self._clean)
        self.rounding = 1e-6 * self._scale  # smaller changes in the metric may be rounding error
        self.shares_memory = False  # whether a patched activation is modified in place and also read elsewhere

    def gradients(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the model once, and return two dicts with the names of hook points as keys.

        The first dict contains the clean activations. The second dict contains the metric's gradients with respect to
        these activations.
        """
        watched = [edit(self.points.site(name), _differentiable) for name in names]
        with (
            self.running(),
            torch.enable_grad(),
            patched(self.points, watched),
            recording(self.points, names, detach=False) as cache,
        ):
            values = self._measured()  # in this run, each activation is replaced by an equal copy
            clean = {name: cache[name] for name in names}
            for name, activation in clean.items():
                if not activation.requires_grad:
                    raise SiteError(
                        f"'{name}' is computed under torch.no_grad(), so it has no gradient. Use sweep(), or patch a "
                        "later hook point."
                    )
            bound = 1e-2 if values.dtype in (torch.float16, torch.bfloat16) else 1e-4
            self.shares_memory = not torch.allclose(values, self._clean, bound, bound * self._scale, equal_nan=True)
            return {name: activation.detach() for name, activation in clean.items()}, _gradients(values, clean)

    def changes(self, patches: Sequence[Patch], clean: Mapping[str, Tensor]) -> list[_Change]:
        """Return one pair (positions, change) per patch: the patched region, and the change in the activation there.

        `clean` maps names of hook points to clean activations. Patches are applied to these activations.
        """
        changes: list[_Change] = []
        with self.undisturbed as run:
            for patch in patches:
                point, before = self.points[patch.site.name], clean[patch.site.name]
                after, flags = self.fire([patch], before if point.lens is None else point.lens.merge(before, before))
                if any(flag for _, flag in flags):
                    raise nan_error(patch)
                # If coordinates in a basis change, the whole activation may change.
                positions = {} if patch.site.basis else patch.site.positions(point.axes, before.shape)
                changes.append((positions, read(point.seen(after), positions) - read(before, positions)))
                if not patch.runs_only_ours:
                    run.put_back()
        return changes

    def mean_gradient(
        self, name: str, clean: Tensor, changes: Sequence[_Change], steps: int, advance: Callable[[int], object]
    ) -> Tensor:
        """Return the metric's gradient at the hook point `name`, averaged over `steps` points on a line.

        The line goes from the activation `clean` to the same activation with all `changes` made.
        """
        moved, total = torch.zeros_like(clean), torch.zeros_like(clean)
        for positions, difference in changes:
            moved = written(moved, positions, difference)
        for step in range(steps):
            there = (clean + moved * ((step + 0.5) / steps)).requires_grad_()
            with self.running(), torch.enable_grad(), patched(self.points, patch_in(self.points.site(name), there)):
                total += _gradients(self._measured(), {name: there})[name]
            advance(1)
        return total / steps

    def exact(self, patch: Patch) -> float:
        """Run the model with a patch, and return the change in the metric, averaged over the inputs."""
        with self.running(), patched(self.points, patch):
            return float((self._measured() - self._clean).double().mean())

    def _measured(self) -> Tensor:
        return measured(self.metric, self.output(), self._baseline)


def _differentiable(activation: Tensor) -> Tensor:
    if torch._C._functorch.is_batchedtensor(activation):
        return activation  # recording raises the error
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedModelError("Sites inside torch.func.grad or similar calls have no estimates. Use sweep().")
    return activation if activation.requires_grad else activation.detach().requires_grad_()


def _gradients(values: Tensor, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of the sum of `values` with respect to each activation, as a dict with the same keys.

    If the values do not depend on an activation, the gradient is zero.
    """
    if not values.requires_grad:
        raise MetricError(
            "The metric has no gradient, because it is a count (such as action_flip) or leaves the autograd graph (for "
            "example, through .detach(), .item() or numpy). Use a differentiable metric, or sweep()."
        )
    found = torch.autograd.grad(values.sum(), [*activations.values()], retain_graph=True, materialize_grads=True)
    return dict(zip(activations, found, strict=True))
