"""Compare pairs of inputs, channel by channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from ..channels import gathered, rounding
from ..engine.inputs import Inputs, first_batch, input_count
from ..engine.state import undisturbed
from ..errors import ContrastError
from ..patching.recording import Reduce
from ..registry.points import HookPoints, traced
from ..registry.sites import HookPoint, Site
from ..statistics.flips import max_t_test
from ..statistics.interval import FEWEST
from ..statistics.means import Rows, cluster_numbers, snapped
from .result import Contrast
from .search import channels_of, distinct, searched, spread_over


def contrast(
    points_or_model: HookPoints | nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    sites: str | Site | HookPoint | Iterable[str | Site | HookPoint] = "all",
    *,
    reduce: Reduce = "sum",
    background: Inputs | Iterable[Inputs] | None = None,
    absolute: bool = False,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Contrast:
    """Measure how much each channel differs between clean and corrupted inputs.

    Args:
        points_or_model: Model, which is traced with clean inputs, or its HookPoints.
        clean: Clean input of each pair: a tensor `(pair, ...)`, or a tuple or dict of such tensors.
        corrupted: Corrupted input of each pair, in the same format.
        sites: Sites or patterns, as in `recording`. `"all"` searches all outputs and taps, without duplicates.
        reduce: Reduction as in `recording` that leaves the batch and at most one other axis. Layers of a recurrent
            state are compared separately, unless an einops pair combines them.
        background: At least two inputs for measuring each channel's usual variation, in the same format as `clean` or
            as an iterable of batches.
        absolute: Whether to rank by the mean absolute difference, if the feature can have either sign. P-values and
            intervals are then omitted, because noise alone makes an absolute difference positive.
        clusters: One label per pair. Pairs with the same label, such as rotations of one maze, are not independent.
        seed: Random seed for the sign flips.
        batch_size: Number of inputs per forward pass.

    Raises:
        HookPointError, SiteError: If sites do not exist or cannot be reduced; one error lists all of them.
        ContrastError: If there are no pairs, clean and corrupted differ in length, clusters do not match the pairs,
            the background is too small, or an activation is not finite.

    Example:
        >>> import torch
        >>> from chanpatch import hook_points
        >>> model = torch.nn.Linear(3, 2)
        >>> clean, corrupted = torch.ones(8, 3), torch.zeros(8, 3)
        >>> result = contrast(hook_points(model, clean), clean, corrupted, ".out")
        >>> len(result), result.pairs
        (2, 8)

    References:
        Turner et al. 2023, "Steering language models with activation engineering", for paired differences;
        Westfall and Young 1993, "Resampling-based multiple testing", for the p-values and intervals.
    """
    points = traced(points_or_model, first_batch(clean, batch_size)[0])
    labels = _checked_pairs(clean, corrupted, clusters)
    chosen, skipped = searched(points, sites, reduce)
    with undisturbed(points.model) as run:
        one = gathered(run, points, ("clean", clean), chosen, reduce, batch_size, ContrastError)
        run.put_back()  # both sides use the same initial state and random draws
        other = gathered(run, points, ("corrupted", corrupted), chosen, reduce, batch_size, ContrastError)
        run.put_back()
        count, spread = spread_over(run, points, background, chosen, reduce, batch_size)
    if isinstance(sites, str) and sites == "all":
        chosen, repeated = distinct(chosen, [one, other, *([spread] if count else [])])
        skipped |= repeated
    differences = np.concatenate([one[site] - other[site] for site in chosen], axis=1)
    channels = tuple(row for site in chosen for row in channels_of(site, one[site].shape[1], reduce))
    std, scale = np.full(len(channels), np.nan), np.ones(len(channels))
    if count:
        std, scale = np.concatenate([spread[site] for site in chosen], axis=1)
    measured = np.abs(differences) if absolute else differences
    independent = len(np.unique(labels))
    no_p = _no_p(absolute, independent)
    p, low, high, note = *np.full((3, len(channels)), np.nan), np.full(len(channels), no_p)
    if not no_p:
        size = np.concatenate([np.maximum(np.abs(one[site]), np.abs(other[site])) for site in chosen], axis=1)
        found = max_t_test(snapped(differences, size, rounding(chosen)), clusters=labels, seed=seed)
        p, note = found.p, found.interval.note
        low, high = found.interval.low / scale, found.interval.high / scale
    return Contrast(
        sites=channels,
        difference=differences.mean(axis=0),
        absolute=np.abs(differences).mean(axis=0),
        std=std,
        low=low,
        high=high,
        p=p,
        note=note,
        no_p=no_p,
        pairs=len(labels),
        clusters=independent,
        background=count,
        skipped=skipped,
        effect_label=_effect_label(absolute, len(labels), count),
        _effect=measured.mean(axis=0) / scale,
        _points=points,
        _inputs=(clean, corrupted),
        _batch_size=batch_size,
    )


def _no_p(absolute: bool, independent: int) -> str:
    if absolute:
        return "noise alone makes a mean absolute difference positive; use signed differences."
    if independent < FEWEST:
        return f"{independent} independent pairs are too few for a sign-flip test: at least {FEWEST} are required."
    return ""


def _effect_label(absolute: bool, pairs: int, background: int) -> str:
    label = f"{'absolute ' * absolute}difference between clean and corrupted, n = {pairs} pairs"
    return label + f" (in standard deviations over {background} background inputs)" * bool(background)


def _checked_pairs(clean: Any, corrupted: Any, clusters: ArrayLike | None) -> Rows:
    """Return the number of each pair's cluster."""
    lengths = [input_count(inputs) for inputs in (clean, corrupted)]
    if lengths[0] != lengths[1] or not lengths[0]:
        raise ContrastError(f"clean has {lengths[0]} inputs and corrupted has {lengths[1]}. Pass one of each per pair.")
    labels = np.arange(lengths[0]) if clusters is None else np.asarray(clusters)
    if labels.shape != (lengths[0],):
        raise ContrastError(f"clusters has shape {labels.shape}, but there are {lengths[0]} pairs. Pass one per pair.")
    return cluster_numbers(labels, lengths[0], ContrastError)
