"""The sites of a contrast and their reduced activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..channels import NO_MOMENTS, Floats, Moments, check_finite, check_inputs, check_leaves_channels, recorded, rows
from ..engine.state import undisturbed
from ..errors import ContrastError, SiteError
from ..patching.reductions import Reduce, reduced_axes
from ..registry.points import HookPoints, sites_of
from ..registry.sites import Site


def searched(points: HookPoints, sites: Any, reduce: Reduce) -> tuple[list[Site], dict[str, str]]:
    """Return the sites to compare, in execution order, and why a search left out hook points."""
    if not (isinstance(sites, str) and sites == "all"):
        order = [*points]
        chosen = sorted(sites_of(points, sites), key=lambda site: order.index(site.name))
        for site in chosen:
            _check_reducible(site, reduce)
        return [part for site in chosen for part in _by_layer(points, site, reduce)], {}
    found: list[Site] = []
    skipped = {}
    for point in points.values():
        if point.side == "in":
            continue
        try:
            _check_reducible(points.site(point.name), reduce)
            found += _by_layer(points, points.site(point.name), reduce)
        except SiteError as fault:
            skipped[point.name] = str(fault)
    if not found:
        why = f" Of the first: {next(iter(skipped.values()))}" if skipped else ""
        raise ContrastError(f"Nothing can be compared at any of the {len(points)} hook points.{why}")
    return found, skipped


def _by_layer(points: HookPoints, site: Site, reduce: Reduce) -> list[Site]:
    """Return a site per layer and direction of a recurrent state: feature 2 of one is not feature 2 of another."""
    split = isinstance(reduce, str) and "layer" in points[site.name].axes
    return [points.bind(part) for part in site.split("layer")] if split else [site]


def distinct(sites: list[Site], samples: list[dict[Site, Floats]]) -> tuple[list[Site], dict[str, str]]:
    """Return the sites with activations of their own, and why the others, which would be tested again, are left out."""
    first: dict[tuple[bytes, ...], Site] = {}
    repeated = {}
    for site in sites:
        known = first.setdefault(tuple(sample[site].tobytes() for sample in samples), site)
        if known is not site:
            repeated[repr(site) if site.indices else site.name] = f"{site!r} has the same activations as {known!r}."
    return list(first.values()), repeated


def _check_reducible(site: Site, reduce: Reduce) -> None:
    point = site.point
    assert point is not None  # sites_of binds sites to their points
    if not point.dtype.is_floating_point:
        raise SiteError(f"{site!r} is {point.dtype}: there is nothing to subtract.")
    if point.batch_axis is None:
        raise SiteError(f"{site!r} has no batch axis that is proved, so its rows cannot be paired.")
    check_leaves_channels(site, reduce)


def channels_of(site: Site, count: int, reduce: Reduce) -> Sequence[Site]:
    """Return a site per channel of a site; the site itself where it has none."""
    point = site.point
    assert point is not None
    kept = [axis for axis in reduced_axes(site, point.axes, reduce) if axis != "batch"]
    return site.split(kept[0]) if kept and kept[0] in point.axes else [site] * count


def gathered(
    run: undisturbed,
    points: HookPoints,
    named: tuple[str, Any],
    sites: Sequence[Site],
    reduce: Reduce,
    batch_size: int,
) -> dict[Site, Floats]:
    """Return the reduced activations of all inputs, which messages call by a name: `(input, channel)` per site."""
    name, inputs = named
    parts: dict[Site, list[Floats]] = {site: [] for site in sites}
    for cache in run.apart(recorded(points, inputs, sites, reduce, batch_size)):
        for site in sites:
            parts[site].append(rows(cache, site))
    samples = {site: np.concatenate(arrays) for site, arrays in parts.items()}
    for site, sample in samples.items():
        check_finite(name, sample, site, 0, ContrastError)
    return samples


def spread_over(
    run: undisturbed, points: HookPoints, background: Any, sites: Sequence[Site], reduce: Reduce, batch_size: int
) -> tuple[int, dict[Site, Floats]]:
    """Return the number of background inputs and, per site, `(2, channel)`: what a channel varies by, and the unit.

    The unit is NaN where a channel varies by no more than rounding.
    """
    if background is None:
        return 0, {}
    check_inputs(points, background, batch_size, ContrastError)
    moments = dict.fromkeys(sites, NO_MOMENTS)
    for cache in run.apart(recorded(points, background, sites, reduce, batch_size)):
        for site in sites:
            sample = rows(cache, site)
            check_finite("background", sample, site, moments[site].count, ContrastError)
            moments[site] += Moments.of(sample)
    count = moments[sites[0]].count
    if count < 2:
        raise ContrastError(
            f"background holds {count} inputs: at least two are needed to tell what varies. Leave it out to compare "
            "differences as they are."
        )
    varies = {site: each.varies(torch.finfo(points[site.name].dtype).eps) for site, each in moments.items()}
    return count, {
        site: np.stack([each.std, np.where(varies[site], each.std, np.nan)]) for site, each in moments.items()
    }
