"""Find the sites of a contrast and reduce their activations."""

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
    """Return the sites to compare, in execution order, and the hook points that a search skipped, with reasons."""
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
        why = f" The first was skipped because: {next(iter(skipped.values()))}" if skipped else ""
        raise ContrastError(f"None of the {len(points)} hook points can be compared.{why}")
    return found, skipped


def _by_layer(points: HookPoints, site: Site, reduce: Reduce) -> list[Site]:
    """Return one site per layer and direction of a recurrent state, because their features are unrelated."""
    split = isinstance(reduce, str) and "layer" in points[site.name].axes
    return [points.bind(part) for part in site.split("layer")] if split else [site]


def distinct(sites: list[Site], samples: list[dict[Site, Floats]]) -> tuple[list[Site], dict[str, str]]:
    """Return the sites with distinct activations, and the reason why each duplicate was skipped."""
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
        raise SiteError(f"{site!r} has dtype {point.dtype}, which does not support subtraction.")
    if point.batch_axis is None:
        raise SiteError(f"{site!r} has no known batch axis, so its rows cannot be paired.")
    check_leaves_channels(site, reduce)


def channels_of(site: Site, count: int, reduce: Reduce) -> Sequence[Site]:
    """Return one site per channel of the given site, or the site itself if it has no channels."""
    point = site.point
    assert point is not None  # sites_of binds sites to their points
    kept = [axis for axis in reduced_axes(site, point.axes, reduce) if axis != "batch"]
    return site.split(kept[0]) if kept and kept[0] in point.axes else [site] * count


def spread_over(
    run: undisturbed, points: HookPoints, background: Any, sites: Sequence[Site], reduce: Reduce, batch_size: int
) -> tuple[int, dict[Site, Floats]]:
    """Return the number of background inputs and, per site, `(2, channel)`: standard deviations, and effect units.

    A unit is the standard deviation, or NaN if the channel's variation is within rounding error.
    """
    if background is None:
        return 0, {}
    moments = background_moments(run, points, background, sites, reduce, batch_size, ContrastError)
    varies = {site: each.varies(torch.finfo(points[site.name].dtype).eps) for site, each in moments.items()}
    return moments[sites[0]].count, {
        site: np.stack([each.std, np.where(varies[site], each.std, np.nan)]) for site, each in moments.items()
    }
