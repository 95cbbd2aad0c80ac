"""Estimates of the effects of many patches, and the real forwards that verify some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.regions import Positions, read, written
from ..errors import SiteError, SweepError
from ..metrics.measured import Metric, compares
from ..patching.patch import Patch, label_of
from ..registry.points import HookPoints, bound
from ..registry.trace import traced
from ..results import largest_first, progress_bar
from .attribution_result import Attribution
from .flatness import warn_of_cut_gradients, warn_of_flat_inputs
from .gradients import Runs


@torch.inference_mode(mode=False)  # in which no gradient could be taken
def attribution(
    points_or_model: HookPoints | nn.Module,
    *inputs: Any,
    patches: Mapping[Any, Patch] | Iterable[Patch] | Patch,
    metric: Metric,
    steps: int = 1,
    verify: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    **keywords: Any,
) -> Attribution:
    """Return estimates of how much each of many patches, alone, changes a metric.

    The estimate is the change that the patch makes to its region times the gradient of the metric there, summed over
    the region: for all patches together a forward, one that applies and takes back each patch, one forward more and
    one backward. It is exact where the metric is linear in the activation.

    With `steps` above 1 the gradient is the mean of those in the middle of so many equal parts of the straight line
    between the clean and the patched activation (integrated gradients). Patches of one hook point whose regions do not
    overlap go along the line together, a forward and a backward per step and hook point: with many steps their
    estimates add up to the exact effect of all of them together, and a patch that is alone has its exact effect.

    The receipt: the patches with the largest estimates, and as many drawn at random, are also run.

    What each patch changes in its region is kept until the end, so that memory grows by one region per patch: all
    channels of a hook point, each by itself, take as much as one activation, but as many patches of the whole hook
    point take as many activations. Give such patches in parts.

    Args:
        points_or_model: The model, which is traced with the inputs, or its HookPoints.
        inputs: What the model takes.
        patches: One site each: a mapping of labels to patches, or patches, which are labelled by their site.
        metric: A differentiable function of the output, or of the output and a keyword-only `baseline`, the unpatched
            output; such as those in `chanpatch.metrics`.
        steps: At how many points of the line the gradient is taken; 1 takes it at the clean activation itself.
        verify: How many of the largest estimates, and how many patches drawn at random, are verified by real forwards.
        seed: Of the draw.
        progress: Whether to show a bar of the steps and of the verifying forwards; None for one on a terminal, after
            two seconds, where tqdm is installed.
        keywords: Keyword inputs of the model.

    Raises:
        SweepError: If there are no patches, two have one label, or one has several sites.
        HookPointError, SiteError: If a site does not exist, or is not of a floating dtype; all faults at once.
        MetricError: If the metric has no gradient, or does not return `(batch,)`.

    Warns:
        RuntimeWarning: If the gradient is numerically nothing for some inputs, because the probability of an action is
            almost 1 there, or because a metric that compares with the clean output is at its minimum; or if it is zero
            at a hook point where patches were verified to have effects; or if a module writes in place into an
            activation that is patched and read elsewhere too.

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
    run = Runs(points, inputs, keywords, metric)
    differences = run.differences(chosen)
    watched = {patch.site.name: points[patch.site.name] for patch in chosen}
    clean, gradients, slopes = run.gradients(watched)
    lines = [*_lines(chosen, clean)]
    effect, exact, drawn = np.zeros(len(chosen)), np.full(len(chosen), np.nan), np.zeros(len(chosen), bool)
    drawn[np.random.default_rng(seed).choice(len(chosen), min(verify, len(chosen)), replace=False)] = True
    verified, stepped = min(2 * verify, len(chosen)), 0 if steps == 1 else steps * len(lines)
    used = []
    with progress_bar(progress, stepped + verified, "forward") as advance:
        for name, rows in lines:
            changes = [(_positions(chosen[row], clean[name]), differences[row]) for row in rows]
            gradient = gradients[name]
            if steps > 1:
                gradient = run.mean_gradient(name, clean[name], changes, steps, advance)
            used.append((watched[name], gradient))
            for row, (positions, difference) in zip(rows, changes, strict=True):
                effect[row] = float((difference * read(gradient, positions)).double().sum()) / run.inputs
        steep = [(watched[name], slope) for name, slope in slopes.items()]
        warn_of_flat_inputs(used, steep, run.baseline, compares=compares(metric))
        to_verify = {*largest_first(effect)[:verify], *np.flatnonzero(drawn)}
        advance(verified - len(to_verify))  # some of those drawn are among the largest
        for row in to_verify:
            exact[row] = run.exact(chosen[row])
            advance(1)
    reached = {point.name for point, gradient in [*used, *steep] if gradient.any()}
    changing = {patch.site.name for patch, found in zip(chosen, exact, strict=True) if abs(found) > run.rounding}
    warn_of_cut_gradients(changing - reached)
    return Attribution(
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


def _labelled(points: HookPoints, patches: Any) -> tuple[tuple[Any, ...], tuple[Patch, ...]]:
    """Return labels, each once, and patches whose sites are checked against the trace."""
    patches = patches if isinstance(patches, Iterable) else [patches]
    named = list(patches.items()) if isinstance(patches, Mapping) else [(None, patch) for patch in patches]
    if not named:
        raise SweepError("There are no patches: the mapping or the sequence is empty.")
    for _, patch in named:
        if not isinstance(patch, Patch):
            raise SweepError(
                f"Expected a Patch, not {type(patch).__name__}. The effects of single patches are estimated; sweep() "
                "runs patches of several sites together."
            )
    sites = bound(points, [patch.site for _, patch in named])
    whole = [site.name for site in sites if not points[site.name].dtype.is_floating_point]
    if whole:
        raise SiteError(f"'{whole[0]}' is {points[whole[0]].dtype}, which has no gradient. Patch where it is embedded.")
    labels = tuple(
        label_of(site) if label is None and not isinstance(patches, Mapping) else label
        for (label, _), site in zip(named, sites, strict=True)
    )
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise SweepError(
            f"Two patches are at {twice[0]}, which makes one label for both. Give a mapping of labels to patches."
        )
    return labels, tuple(Patch(site, patch.edit, patch.where) for (_, patch), site in zip(named, sites, strict=True))


def _lines(patches: Sequence[Patch], clean: Mapping[str, Tensor]) -> Iterator[tuple[str, list[int]]]:
    """Yield a hook point and numbers of patches there whose regions do not overlap, until every patch had its turn."""
    waiting = list(range(len(patches)))
    while waiting:
        name = patches[waiting[0]].site.name
        taken = torch.zeros_like(clean[name], dtype=torch.bool)
        line, others = [], []
        for row in waiting:
            positions = _positions(patches[row], taken) if patches[row].site.name == name else None
            if positions is None or read(taken, positions).any():
                others.append(row)
            else:
                line.append(row)
                taken = written(taken, positions, torch.ones_like(read(taken, positions)))
        yield name, line
        waiting = others


def _positions(patch: Patch, activation: Tensor) -> Positions:
    assert patch.site.point is not None  # the sites are bound
    return patch.site.positions(patch.site.point.axes, activation.shape)


def _rank_correlation(estimates: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    if len(exact) < 3 or np.ptp(estimates) == 0 or np.ptp(exact) == 0:
        return float("nan")
    import scipy.stats

    return float(scipy.stats.spearmanr(estimates, exact).statistic)
