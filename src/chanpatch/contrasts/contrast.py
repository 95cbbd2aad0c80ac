"""Compare activations on pairs of inputs, channel by channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from ..channels import Collector, check_leaves_channels, pair_count, point_at, rounding
from ..engine.inputs import Inputs, first_batch
from ..engine.state import undisturbed
from ..errors import ContrastError, EditError, SiteError
from ..patching.edits import check_mask
from ..patching.patch import Mask
from ..patching.recording import Reduce, reduced_axes
from ..registry.points import HookPoints, sites_of, traced
from ..registry.sites import HookPoint, Site
from ..statistics.flips import max_t_test
from ..statistics.interval import FEWEST, Floats
from ..statistics.means import cluster_numbers, snapped
from .result import Contrast


def contrast(
    points_or_model: HookPoints | nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    sites: str | Site | HookPoint | Iterable[str | Site | HookPoint] = "all",
    *,
    reduce: Reduce = "sum",
    where: Mask | None = None,
    background: Inputs | Iterable[Inputs] | None = None,
    absolute: bool = False,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    batch_size: int = 64,
    executor: Executor | None = None,
) -> Contrast:
    """Measure how much each channel's activation differs between clean and corrupted inputs.

    Args:
        points_or_model: Model (which is then traced with clean inputs) or its HookPoints.
        clean: The clean input of each pair: a tensor with shape `(pair, ...)`, or a tuple or dict of such tensors.
        corrupted: The corrupted input of each pair, in the same format as `clean`.
        sites: Sites or patterns, as in `recording`. `"all"` searches all outputs and taps, and skips sites with the
            same activations as an earlier site.
        reduce: Reduction, as in `recording`, that keeps the batch axis and at most one other axis. Recurrent layers,
            heads and other parts of a split axis are compared separately unless an einops pattern combines them.
        where: Elements to reduce, as in `recording`; a mask has one row per pair or a single row. At least one element
            of each input and channel must be selected.
        background: At least two inputs from which to measure each channel's usual variation, in the same format as
            `clean` or as an iterable of batches.
        absolute: Whether to rank channels by the mean absolute difference, for features that can have either sign. With
            `absolute`, p-values and intervals are omitted, because noise alone makes an absolute difference positive.
        clusters: One label per pair. Pairs with the same label, such as rotations of one maze, are not independent.
        seed: Random seed for the sign flips.
        batch_size: Number of inputs per forward pass.
        executor: Executor whose workers share the batches, as for `sweep`. The result is the same as without an
            executor. A background that is an iterable is read in full first.

    Raises:
        HookPointError, SiteError: If sites do not exist or cannot be reduced; one error lists all such sites.
        EditError: If `where` does not match a site's region.
        ContrastError: If clean and corrupted inputs do not form pairs, clusters do not match the pairs, the background
            is too small, an activation is not finite, or `where` selects nothing in an input.
        ExecutorError: For the same reasons as in `sweep`. The attribute `partial` is None.

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
    labels = cluster_numbers(clusters, pair_count(clean, corrupted), ContrastError)
    chosen, skipped = _searched(points, sites, reduce, where)
    run = undisturbed(points.model)
    collect = Collector(run, points, chosen, reduce, batch_size, ContrastError, where)
    named = {"clean": clean, "corrupted": corrupted} | ({} if background is None else {"background": background})
    collect = collect.spread(executor, named)
    with run:
        one = collect.samples("clean", clean)
        run.put_back()  # the clean and the corrupted run use the same initial state and random draws
        other = collect.samples("corrupted", corrupted)
        run.put_back()
        usual = {} if background is None else collect.moments(background)
    stds = {site: each.std for site, each in usual.items()}
    if isinstance(sites, str) and sites == "all":
        chosen, repeated = _distinct(chosen, [one, other, *([stds] if usual else [])])
        skipped |= repeated
    differences = np.concatenate([one[site] - other[site] for site in chosen], axis=1)
    channels = tuple(row for site in chosen for row in _channels_of(site, one[site].shape[1], reduce))
    std, scale = np.full(len(channels), np.nan), np.ones(len(channels))
    if usual:
        std = np.concatenate([stds[site] for site in chosen])
        varies = [usual[site].varies(torch.finfo(point_at(site).dtype).eps) for site in chosen]
        scale = np.where(np.concatenate(varies), std, np.nan)  # never divide by rounding error
    measured = np.abs(differences) if absolute else differences
    independent = len(np.unique(labels))
    no_p = _no_p(absolute, independent)
    p, low, high, note = *np.full((3, len(channels)), np.nan), np.full(len(channels), no_p)
    if not no_p:
        size = np.concatenate([np.maximum(np.abs(one[site]), np.abs(other[site])) for site in chosen], axis=1)
        found = max_t_test(snapped(differences, size, rounding(chosen)), clusters=labels, seed=seed)
        p, note = found.p, found.interval.note
        low, high = found.interval.low / scale, found.interval.high / scale
    count = usual[chosen[0]].count if usual else 0
    label = f"{'absolute ' * absolute}difference between clean and corrupted, n = {len(labels)} pairs"
    label += f" (in standard deviations over {count} background inputs)" * bool(count)
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
        effect_label=label,
        _effect=measured.mean(axis=0) / scale,
        _points=points,
        _inputs=(clean, corrupted),
        _batch_size=batch_size,
        _where=where,
    )


def _no_p(absolute: bool, independent: int) -> str:
    """Return the reason why a contrast has no p-values, or an empty string if the contrast has p-values."""
    if absolute:
        return "noise alone makes a mean absolute difference positive; use signed differences."
    if independent < FEWEST:
        return f"{independent} independent pairs are too few for a sign-flip test: at least {FEWEST} are required."
    return ""


def _searched(points: HookPoints, sites: Any, reduce: Reduce, where: Mask | None) -> tuple[list[Site], dict[str, str]]:
    """Return the sites to compare, in execution order, and the reason for each skipped hook point, by name."""
    order, is_search = [*points], isinstance(sites, str) and sites == "all"
    outputs = [points.site(point.name) for point in points.values() if point.side != "in"]
    found: list[Site] = []
    skipped = {}
    for site in sorted(outputs if is_search else sites_of(points, sites), key=lambda site: order.index(site.name)):
        point = point_at(site)
        try:
            if not point.dtype.is_floating_point:
                raise SiteError(f"{site!r} must have a floating-point dtype to be compared; got {point.dtype}.")
            if point.batch_axis is None:
                raise SiteError(
                    f"{site!r} has no known batch axis, so activations cannot be compared pair by pair. Name axes with "
                    "hook_points(..., axes={...})."
                )
            check_leaves_channels(site, reduce)
            if where is not None and not callable(where):
                check_mask(where, site)
            parts = [site]
            for axis in point.apart if isinstance(reduce, str) else ():
                parts = [points.bind(part) for each in parts for part in each.split(axis)]
            found += parts
        except (SiteError, EditError) as fault:
            if not is_search:
                raise
            skipped[site.name] = str(fault)
    if not found:
        why = f" The first one was skipped because: {next(iter(skipped.values()))}" if skipped else ""
        raise ContrastError(f"No hook point can be compared (number of hook points: {len(points)}).{why}")
    return found, skipped


def _distinct(sites: list[Site], samples: list[dict[Site, Floats]]) -> tuple[list[Site], dict[str, str]]:
    """Return the sites with distinct activations, and a dict from each skipped duplicate to the reason for skipping."""
    first: dict[tuple[bytes, ...], Site] = {}
    repeated = {}
    for site in sites:
        known = first.setdefault(tuple(sample[site].tobytes() for sample in samples), site)
        if known is not site:
            repeated[repr(site) if site.indices else site.name] = f"{site!r} has the same activations as {known!r}."
    return list(first.values()), repeated


def _channels_of(site: Site, count: int, reduce: Reduce) -> Sequence[Site]:
    """Return one site per channel, or `count` copies of `site` if the site's channels cannot be separated."""
    axes = point_at(site).axes
    kept = [axis for axis in reduced_axes(site, axes, reduce) if axis != "batch"]
    return site.split(kept[0]) if kept and kept[0] in axes else [site] * count
