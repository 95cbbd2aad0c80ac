"""Gradient estimates of the effects of many patches, and real forwards that verify some of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.regions import Positions, read, written
from ..errors import MetricError, SiteError, SweepError
from ..labels import Patches, labelled_patches
from ..metrics.measured import Metric, measured
from ..patching.contexts import nan_error, patched
from ..patching.patch import Patch, checked_patches
from ..patching.recording import recording
from ..patching.verbs import edit, patch_in
from ..registry.points import HookPoints
from ..registry.trace import traced
from ..results import largest_first, progress_bar
from .forward import Forward
from .result import Attribution


@torch.inference_mode(mode=False)  # in which no gradient could be taken
def attribution(
    points_or_model: HookPoints | nn.Module,
    *inputs: Any,
    patches: Patches | Patch,
    metric: Metric,
    steps: int = 1,
    verify: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    **keywords: Any,
) -> Attribution:
    """Return estimates of how much each of many patches, alone, changes a metric.

    The estimate is the change that the patch makes to its region times the gradient of the metric there, summed over
    the region. It takes three forwards and one backward for all patches together, and is exact if the metric is linear
    in the activation.

    With `steps` above 1 the gradient is a mean over the straight line between the clean and the patched activation
    (integrated gradients): the line is cut into that many equal parts, and the gradient taken in the middle of each.
    Patches of one hook point whose regions do not overlap go along the line together, with a forward and a backward
    per step and hook point. With many steps their estimates add up to the exact effect of all of them together, and a
    patch that is alone has its exact effect.

    The receipt: the patches with the largest estimates, and as many drawn at random, are also run.

    Memory grows by one region per patch: all channels of a hook point, each by itself, take as much as one activation,
    but as many patches of the whole hook point take as many activations. Give such patches in parts.

    Args:
        points_or_model: The model, which is traced with the inputs, or its HookPoints.
        inputs: Inputs of the model.
        patches: A mapping of labels to patches, or a sequence of patches, labeled by their sites.
        metric: A differentiable function of the output, or of the output and a keyword-only `baseline`, the unpatched
            output; such as those in `chanpatch.metrics`.
        steps: Number of points of the line at which the gradient is taken; 1 takes it at the clean activation itself.
        verify: How many of the largest estimates, and how many patches drawn at random, are verified by real forwards.
        seed: Random seed of the draw.
        progress: Whether to show a bar of the steps and of the verifying forwards; None for one on a terminal, after
            two seconds, if tqdm is installed.
        keywords: Keyword inputs of the model.

    Raises:
        SweepError: If there are no patches, two have one label, or one label has several.
        HookPointError, SiteError: If a site does not exist, or is not of a floating dtype; all faults at once.
        MetricError: If the metric has no gradient, or does not return `(batch,)`.

    Warns:
        RuntimeWarning: If a module writes in place into an activation that is patched and read elsewhere too; or if the
            receipt shows that the estimates are poor: about zero at a hook point where verified patches have effects,
            or ranked unlike the exact effects in the random sample. With `verify=0` there is no receipt.

    Example:
        >>> from chanpatch import hook_points, zero_ablate
        >>> from chanpatch.metrics import logit_difference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> x = torch.randn(8, 4)
        >>> points = hook_points(model, x)
        >>> patches = map(zero_ablate, points.site("1").split("feature"))
        >>> result = attribution(points, x, patches=patches, metric=logit_difference(0, 1))
        >>> bool(abs(result.effect() - result.exact).max() < 1e-6)  # linear from there on
        True

    References:
        Nanda 2023, "Attribution patching: activation patching at industrial scale"; Syed, Rager and Conmy 2023,
        "Attribution patching outperforms automated circuit discovery"; Sundararajan, Taly and Yan 2017, "Axiomatic
        attribution for deep networks", for the integrated version.
    """
    points = traced(points_or_model, inputs, keywords)
    if type(steps) is not int or type(verify) is not int or steps < 1 or verify < 0:
        raise SweepError(
            f"steps={steps!r} and verify={verify!r}: take one step at least and verify none at least, in whole numbers."
        )
    labels, chosen = _labelled(points, patches)
    run = _Runs(points, inputs, keywords, metric)
    clean, gradients = run.gradients([*dict.fromkeys(map(_name, chosen))])
    changes = run.changes(chosen, clean)
    lines = [*_lines(chosen, changes, clean)]
    effect, exact, drawn = np.zeros(len(chosen)), np.full(len(chosen), np.nan), np.zeros(len(chosen), bool)
    drawn[np.random.default_rng(seed).choice(len(chosen), min(verify, len(chosen)), replace=False)] = True
    verified, stepped = min(2 * verify, len(chosen)), 0 if steps == 1 else steps * len(lines)
    with progress_bar(progress, stepped + verified, "forward") as advance:
        for name, rows in lines:
            gradient = gradients[name]
            if steps > 1:
                gradient = run.mean_gradient(name, clean[name], [changes[row] for row in rows], steps, advance)
            for row in rows:
                positions, difference = changes[row]
                effect[row] = float((difference * read(gradient, positions)).double().sum()) / run.inputs
        to_verify = {*largest_first(effect)[:verify], *np.flatnonzero(drawn)}
        advance(verified - len(to_verify))  # some of those drawn are among the largest
        for row in to_verify:
            exact[row] = run.exact(chosen[row])
            advance(1)
    found = Attribution(
        labels=labels,
        patches=chosen,
        exact=exact,
        drawn=drawn,
        rank_correlation=_rank_correlation(effect[drawn], exact[drawn]),
        sample=int(drawn.sum()),
        inputs=run.inputs,
        steps=steps,
        _effect=effect,
    )
    _warn_of_poor_estimates(found, run)
    return found


def _labelled(points: HookPoints, patches: Patches | Patch) -> tuple[tuple[Any, ...], tuple[Patch, ...]]:
    """Return labels, and one patch for each, bound to the trace."""
    named = labelled_patches(patches, "patches", SweepError)
    for label, each in named:
        if len(each) != 1:
            raise SweepError(
                f"{label!r} has {len(each)} patches, but an attribution estimates the effects of single patches: give "
                "each a label of its own, or sweep() several patches together."
            )
    chosen = checked_patches(points, [patch for _, each in named for patch in each])
    whole = [patch.site.name for patch in chosen if not points[patch.site.name].dtype.is_floating_point]
    if whole:
        raise SiteError(f"'{whole[0]}' is {points[whole[0]].dtype}, which has no gradient. Patch where it is embedded.")
    return tuple(label for label, _ in named), chosen


def _lines(
    patches: Sequence[Patch], changes: Sequence[_Change], clean: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[int]]]:
    """Yield a hook point and numbers of patches there whose regions do not overlap, until all patches are done."""
    waiting = list(range(len(patches)))
    while waiting:
        name = _name(patches[waiting[0]])
        taken = torch.zeros_like(clean[name], dtype=torch.bool)
        line, others = [], []
        for row in waiting:
            positions, _ = changes[row]
            if _name(patches[row]) != name or read(taken, positions).any():
                others.append(row)
            else:
                line.append(row)
                taken = written(taken, positions, torch.ones_like(read(taken, positions)))
        yield name, line
        waiting = others


def _rank_correlation(estimates: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    if len(exact) < 3 or np.ptp(estimates) == 0 or np.ptp(exact) == 0:
        return float("nan")
    import scipy.stats

    return float(scipy.stats.spearmanr(estimates, exact).statistic)


_Change: TypeAlias = tuple[Positions, Tensor]  # a region, and the difference that a patch makes there
_INSTEAD = "Take more steps (steps=20), a metric of logits (logit_difference), or sweep() the patches."
_FEWEST_RANKED = 10  # patches in the random sample; the rank correlation of fewer is often low by chance


def _warn_of_poor_estimates(found: Attribution, run: _Runs) -> None:
    """Warn if the estimates are of another model, or if the receipt shows that they are poor."""
    names = sorted({*map(_name, found.patches)})
    verified = ~np.isnan(found.exact)
    missed = {}
    for name in names:
        here = verified & [_name(patch) == name for patch in found.patches]
        largest = np.abs(found.exact[here]).max(initial=0)
        if largest > run.rounding and np.abs(found.effect()[here]).max() < 1e-3 * largest:
            missed[name] = largest
    if run.shares_memory:
        what = (
            "The model gives another output when an activation is replaced by its equal: a module writes in place into "
            f"its input, which is read elsewhere too. One of {', '.join(map(repr, names))} is such an input, and the "
            "estimates are off; the exact effects are not. Patch what the module returns, or build it without "
            "inplace=True."
        )
    elif missed:
        what = (
            f"The estimates are about zero at {', '.join(map(repr, missed))}, but verified patches there change the "
            f"metric by up to {max(missed.values()):.2g}. The metric is flat at the clean activations (a probability "
            "near 0 or 1, a divergence from the clean output), or something in between has no gradient (.detach(), "
            f"argmax, rounding). {_INSTEAD}"
        )
    elif (
        found.sample >= _FEWEST_RANKED
        and found.rank_correlation < 0.5
        and np.abs(found.exact[found.drawn]).max() > run.rounding
    ):
        what = (
            "The estimates rank the patches unlike the exact effects: the rank correlation is "
            f"{found.rank_correlation:.2f} over {found.sample} patches drawn at random. {_INSTEAD}"
        )
    else:
        return
    warnings.warn(what, RuntimeWarning, stacklevel=4)  # at the caller of attribution(), past its decorator


def _name(patch: Patch) -> str:
    return patch.site.name


class _Runs:
    """The runs behind an attribution, all on the same inputs.

    Attributes:
        inputs: Number of inputs.
        rounding: The largest change in the metric that may be due to rounding.
        shares_memory: Whether a module writes in place into a patched activation that is read elsewhere too.
    """

    def __init__(self, points: HookPoints, inputs: tuple[Any, ...], keywords: dict[str, Any], metric: Metric) -> None:
        self._points, self._metric = points, metric
        self._forward = Forward(points, inputs, keywords)
        with self._forward.running() as run:
            self._baseline = run.kept(self._forward.output())
            self._clean = measured(metric, self._baseline, self._baseline)
        self._scale = float(self._clean.nan_to_num().abs().max())
        self.inputs, self.rounding = len(self._clean), 1e-6 * self._scale
        self.shares_memory = False

    def gradients(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the clean activations at hook points, and the gradients of the metric there."""
        watched = [edit(self._points.site(name), _differentiable) for name in names]
        with (
            self._forward.running(),
            torch.enable_grad(),
            patched(self._points, watched),
            recording(self._points, names, detach=False) as cache,  # which replaces activations by their equals
        ):
            values = self._measured(self._forward.output())
            clean = {name: cache[name] for name in names}
            cut = [name for name, activation in clean.items() if not activation.requires_grad]
            if cut:
                raise SiteError(
                    f"'{cut[0]}' is computed under torch.no_grad(), through which no gradient flows. sweep() its "
                    "patches, or patch what comes after it."
                )
            precision = 1e-2 if values.dtype in (torch.float16, torch.bfloat16) else 1e-4
            same = torch.allclose(values.detach(), self._clean, precision, precision * self._scale, equal_nan=True)
            self.shares_memory = not same
            gradients = _gradients(values, clean)
        return {name: activation.detach() for name, activation in clean.items()}, gradients

    def changes(self, patches: Sequence[Patch], clean: Mapping[str, Tensor]) -> list[_Change]:
        """Return the region of each patch, and the change that it alone makes there in the clean run."""
        changes: list[_Change] = []
        with self._forward.undisturbed as run:
            for patch in patches:
                point, before = self._points[_name(patch)], clean[_name(patch)]
                after, flags = self._forward.fire([patch], before)
                if any(flag for _, flag in flags):
                    raise nan_error(patch)
                positions = patch.site.positions(point.axes, before.shape)
                changes.append((positions, read(after, positions) - read(before, positions)))
                if not patch.runs_only_ours:
                    run.put_back()
        return changes

    def mean_gradient(
        self, name: str, clean: Tensor, changes: Sequence[_Change], steps: int, advance: Callable[[int], object]
    ) -> Tensor:
        """Return the mean of the metric's gradient along the line from the clean activation to the changed one."""
        moved = torch.zeros_like(clean)
        for positions, difference in changes:
            moved = written(moved, positions, difference)
        total = torch.zeros_like(clean)
        for step in range(steps):
            there = (clean + moved * ((step + 0.5) / steps)).requires_grad_()
            replaced = patch_in(self._points.site(name), there)
            with self._forward.running(), torch.enable_grad(), patched(self._points, replaced):
                total += _gradients(self._measured(self._forward.output()), {name: there})[name]
            advance(1)
        return total / steps

    def exact(self, patch: Patch) -> float:
        """Return the effect of the patch on the metric, by a real forward."""
        with self._forward.running(), patched(self._points, patch):
            return float((self._measured(self._forward.output()) - self._clean).double().mean())

    def _measured(self, output: Any) -> Tensor:
        return measured(self._metric, output, self._baseline)


def _differentiable(activation: Tensor) -> Tensor:
    return activation if activation.requires_grad else activation.detach().requires_grad_()


def _gradients(values: Tensor, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of the sum at each activation; zero if nothing depends on it."""
    if not values.requires_grad:
        raise MetricError(
            "The metric has no gradient: it counts (action_flip), or leaves the graph (.detach(), .item(), numpy). "
            "Take one that has a gradient, or sweep() the patches."
        )
    found = torch.autograd.grad(values.sum(), [*activations.values()], retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(activation) if gradient is None else gradient
        for (name, activation), gradient in zip(activations.items(), found, strict=True)
    }
