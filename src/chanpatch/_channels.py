"""Reduced activations of many inputs in double precision: what contrasts, probes and controls are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._batches import Inputs, batches
from ._reductions import InDouble, reduced_axes
from ._tree import Path
from ._typing import Reduce
from .errors import ChanpatchError, SiteError
from .points import HookPoints
from .recording import ActivationCache, run_with_cache
from .sites import Site

Floats = NDArray[np.float64]


def check_inputs(
    points: HookPoints, inputs: Inputs | Iterable[Inputs], batch_size: int, error: type[ChanpatchError]
) -> None:
    """Raise the error if a batch would be empty, or if inputs would be cut along another axis than the batch."""
    if batch_size < 1:
        raise error(f"batch_size is {batch_size}, but a batch has at least one input.")
    whole = isinstance(inputs, (Tensor, tuple, Mapping))
    first = next((point for point in points.values() if not point.module and point.side == "in" and point.axes), None)
    if whole and first is not None and first.batch_axis not in (None, 0):
        raise error(
            f"The model takes its batch on axis {first.batch_axis} of its first input, but inputs stand on axis 0. "
            "Wrap the model in a module that takes the batch first."
        )


def check_leaves_channels(site: Site, reduce: Reduce) -> None:
    """Raise unless a reduction leaves the batch of a bound site and one axis at most.

    Raises:
        SiteError: If it leaves others.
    """
    point = site.point
    assert point is not None  # sites_of binds sites to their points
    left = reduced_axes(site, point.axes, reduce)
    if "batch" not in left or len(left) > 2:
        raise SiteError(
            f"reduce={reduce!r} leaves ({', '.join(left)}) at {site!r}; it must leave the batch and one axis at most."
        )


def channel_axis(site: Site, what: str, error: type[ChanpatchError]) -> str:
    """Return the name of the channel or feature axis of a bound site; `what` needs it, else the error is raised."""
    point = site.point
    assert point is not None  # sites_of binds sites to their points
    if "batch" in dict(site.indices):
        raise error(f"{site!r} names rows. {what} take all inputs: leave batch= out, and give those inputs alone.")
    kept = reduced_axes(site, point.axes, "sum")
    channels = [axis for axis in kept if axis != "batch"]
    if point.batch_axis is None or "batch" not in kept or len(channels) != 1:
        raise error(
            f"{site!r} has axes ({', '.join(point.axes)})"
            + (", and its batch axis is not proved" if point.batch_axis is None else "")
            + f". {what} need the batch and one axis named channel or feature; "
            "hook_points(..., axes={...}) names axes."
        )
    layers = len(site.split("layer")) if "layer" in point.axes else 1
    if layers > 1:
        raise error(f"{site!r} has {layers} layers, each with {channels[0]}s of its own: name one, as in layer=0.")
    return channels[0]


def recorded(
    points: HookPoints, inputs: Inputs | Iterable[Inputs], sites: Sequence[Site], reduce: Reduce | None, batch_size: int
) -> Iterator[ActivationCache]:
    """Yield the sites of each batch on the CPU, reduced in double precision; nothing is kept from batch to batch."""
    wide = None if reduce is None else cast("Reduce", InDouble(reduce))  # no reduction of a user's
    for arguments, keywords in batches(inputs, batch_size, _shared(points)):
        with torch.no_grad():
            cache = run_with_cache(points, *arguments, sites=sites, reduce=wide, device="cpu", stop=True, **keywords)
        yield cache


def _shared(points: HookPoints) -> dict[Path, int]:
    """Return the lengths of the model's inputs that stay as they are when the batch grows, by path."""
    taken = [point for point in points.values() if not point.module and point.side == "in" and point.shape]
    proved = any(point.batch_axis is not None for point in taken)
    return {point.path: point.shape[0] for point in taken if proved and point.batch_axis is None}


def rows(cache: ActivationCache, site: Site) -> Floats:
    """Return what was recorded at a site that was reduced to the batch and one axis at most: `(input, channel)`."""
    # A copy: what was made in the middle of a forward would keep apart, if it stayed, what the forward gives back.
    array: Floats = cache[site].double().movedim(cache.batch_axis(site) or 0, 0).numpy().copy()
    return array if array.ndim > 1 else array[:, None]


def check_finite(name: str, sample: Floats, site: Site, start: int, error: type[ChanpatchError]) -> None:
    """Raise the error if an input, the first of them number `start`, leads to NaN or an infinity at a site."""
    finite = np.isfinite(sample).all(axis=tuple(range(1, sample.ndim)))
    if not finite.all():
        raise error(
            f"{name}[{start + int(np.argmin(finite))}] leads to a number that is not finite at {site!r}: leave that "
            "input out, or that site."
        )
