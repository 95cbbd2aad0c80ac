"""The sites of a contrast and their reduced activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..channels import Floats, background_moments, check_leaves_channels
from ..engine.state import undisturbed
from ..errors import ContrastError, SiteError
from ..patching.recording import Reduce, reduced_axes
from ..registry.points import HookPoints, sites_of
from ..registry.sites import Site


def searched(points: HookPoints, sites: Any, reduce: Reduce) -> tuple[list[Site], dict[str, str]]:
    """Return the sites to compare, in execution order, and why a search left out hook points."""
    order, is_search = [*points], isinstance(sites, str) and sites == "all"
    outputs = [points.site(point.name) for point in points.values() if point.side != "in"]
    found: list[Site] = []
    skipped = {}
    for site in sorted(outputs if is_search else sites_of(points, sites), key=lambda site: order.index(site.name)):
        try:
            _check_reducible(site, reduce)
            found += _by_layer(points, site, reduce)
        except SiteError as fault:
            if not is_search:
                raise
            skipped[site.name] = str(fault)
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
    """Return a site per channel of a site; the site itself if it has none."""
    point = site.point
    assert point is not None  # sites_of binds sites to their points
    kept = [axis for axis in reduced_axes(site, point.axes, reduce) if axis != "batch"]
    return site.split(kept[0]) if kept and kept[0] in point.axes else [site] * count


def spread_over(
    run: undisturbed, points: HookPoints, background: Any, sites: Sequence[Site], reduce: Reduce, batch_size: int
) -> tuple[int, dict[Site, Floats]]:
    """Return the number of background inputs and, per site, `(2, channel)`: what a channel varies by, and the unit.

    The unit is NaN where a channel varies by no more than rounding.
    """
    if background is None:
        return 0, {}
    moments = background_moments(run, points, background, sites, reduce, batch_size, ContrastError)
    varies = {site: each.varies(torch.finfo(points[site.name].dtype).eps) for site, each in moments.items()}
    return moments[sites[0]].count, {
        site: np.stack([each.std, np.where(varies[site], each.std, np.nan)]) for site, each in moments.items()
    }
