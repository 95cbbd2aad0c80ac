"""Collect reduced activations over many inputs in double precision, for contrasts, probes and controls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .engine.inputs import batches
from .engine.state import undisturbed
from .errors import ChanpatchError, SiteError
from .patching.cache import ActivationCache
from .patching.recording import Recorder, Reduce, reduced_axes
from .registry.points import HookPoints
from .registry.sites import Site

Floats = NDArray[np.float64]
Fault = type[ChanpatchError]  # the error class of the caller's subpackage

ROUNDING = 1e-6  # relative difference to expect between two runs in single precision


def rounding(sites: Iterable[Site]) -> float:
    """Return the relative difference between two runs that rounding can cause, for the least precise dtype at sites."""
    dtypes = {site.point.dtype for site in sites if site.point is not None}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=ROUNDING / 8)
    return eps if eps > ROUNDING else 8 * eps  # ROUNDING, rounded to a power of two, in single precision


@dataclass(frozen=True)
class Moments:
    """Per-channel moments and extremes of a sample, in float64; `+` merges two samples.

    Attributes:
        count: Number of inputs.
        mean, lowest, highest: Mean, minimum and maximum, `(channel,)`.
        squares: Sum of squared deviations from the mean, `(channel,)`.

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), equation 2.1.
    """

    count: int
    mean: Floats
    squares: Floats
    lowest: Floats
    highest: Floats

    @staticmethod
    def of(sample: ArrayLike) -> Moments:
        """Compute the moments of a sample with shape `(input, channel)`."""
        values = np.asarray(sample, dtype=np.float64)
        mean = values.mean(axis=0)
        return Moments(len(values), mean, np.square(values - mean).sum(axis=0), values.min(axis=0), values.max(axis=0))

    @staticmethod
    def side_by_side(parts: Sequence[Moments]) -> Moments:
        """Concatenate the channels of several samples, which must have the same inputs."""
        arrays = zip(*((each.mean, each.squares, each.lowest, each.highest) for each in parts), strict=True)
        return Moments(parts[0].count, *map(np.concatenate, arrays))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share, apart = other.count / max(count, 1), other.mean - self.mean
        squares = self.squares + other.squares + np.square(apart) * (self.count * share)
        lowest, highest = np.minimum(self.lowest, other.lowest), np.maximum(self.highest, other.highest)
        return Moments(count, self.mean + apart * share, squares, lowest, highest)

    @property
    def std(self) -> Floats:
        """Standard deviation per channel, `(channel,)`, with denominator count - 1; NaN for fewer than two inputs."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        spread: Floats = np.sqrt(self.squares / (self.count - 1))
        return spread

    def varies(self, precision: float = 0.0) -> NDArray[np.bool_]:
        """Return which channels vary by more than both rounding error and `precision`, relative to their mean."""
        beyond: NDArray[np.bool_] = self.std > max(ROUNDING, precision) * np.abs(self.mean)
        return beyond


NO_MOMENTS = Moments(0, np.zeros(()), np.zeros(()), np.array(np.inf), np.array(-np.inf))  # an empty sample


def check_leaves_channels(site: Site, reduce: Reduce) -> None:
    """Raise SiteError unless the reduction leaves the batch axis and at most one other axis of a bound site."""
    point = site.point
    assert point is not None  # sites_of binds sites to their points
    left = reduced_axes(site, point.axes, reduce)
    if "batch" not in left or len(left) > 2:
        raise SiteError(
            f"reduce={reduce!r} leaves axes ({', '.join(left)}) at {site!r}; it must leave batch and at most one more."
        )


def channel_axis(site: Site, what: str, error: Fault) -> str:
    """Return the name of a bound site's channel or feature axis; raise `error` unless there is exactly one."""
    point = site.point
    assert point is not None  # sites_of binds sites to their points
    if "batch" in dict(site.indices):
        raise error(f"{site!r} selects rows. {what} use all inputs: omit batch=, and pass only those inputs.")
    kept = reduced_axes(site, point.axes, "sum")
    channels = [axis for axis in kept if axis != "batch"]
    if point.batch_axis is None or "batch" not in kept or len(channels) != 1:
        raise error(
            f"{site!r} has axes ({', '.join(point.axes)})"
            + (", and its batch axis is unknown" if point.batch_axis is None else "")
            + f". {what} need a batch axis and exactly one axis named channel or feature; "
            "name axes with hook_points(..., axes={...})."
        )
    layers = len(site.split("layer")) if "layer" in point.axes else 1
    if layers > 1:
        raise error(f"{site!r} has {layers} layers, each with its own {channels[0]}s. Select one, as in layer=0.")
    return channels[0]


def recorded(
    points: HookPoints, inputs: Any, sites: Sequence[Site], reduce: Reduce | None, batch_size: int, error: Fault
) -> Iterator[ActivationCache]:
    """Yield one cache per batch with the sites' activations, on the CPU and reduced in double precision."""
    if batch_size < 1:
        raise error(f"batch_size must be at least 1; got {batch_size}.")
    taken = [point for point in points.values() if not point.module and point.side == "in" and point.axes]
    if isinstance(inputs, (Tensor, tuple, Mapping)) and taken and taken[0].batch_axis not in (None, 0):
        raise error(
            f"The batch axis of the model's first input is axis {taken[0].batch_axis}, but inputs are split into "
            "batches along axis 0. Wrap the model in a module whose inputs have the batch axis first."
        )
    proved = any(point.batch_axis is not None for point in taken)
    shared = {point.path: point.shape[0] for point in taken if proved and point.batch_axis is None}
    for arguments, keywords in batches(inputs, batch_size, shared):
        recorder = Recorder(points, sites, reduce, double=reduce is not None, device="cpu", stop=True)
        with torch.no_grad():
            recorder.run_once(arguments, keywords)
        yield recorder.result


def rows(cache: ActivationCache, site: Site) -> Floats:
    """Return a site's activations as `(input, channel)`; they must have the batch and at most one other axis."""
    # Copied, because small tensors that outlive their forward pass fragment the memory that it frees.
    array: Floats = cache[site].double().movedim(cache.batch_axis(site) or 0, 0).numpy().copy()
    return array if array.ndim > 1 else array[:, None]


def _check_finite(name: str, sample: Floats, site: Site, start: int, error: Fault) -> None:
    """Raise `error` if an input leads to NaN or infinity at a site; `start` is the index of the first input."""
    for wrong in np.argwhere(~np.isfinite(sample))[:1].tolist():
        raise error(
            f"{name}[{start + wrong[0]}] produces a non-finite activation at {site!r}. Leave out either that input or "
            "that site."
        )


def gathered(
    run: undisturbed,
    points: HookPoints,
    named: tuple[str, Any],
    sites: Sequence[Site],
    reduce: Reduce,
    batch_size: int,
    error: Fault,
) -> dict[Site, Floats]:
    """Return each site's reduced activations, `(input, channel)`, for named inputs; raise `error` if not finite."""
    name, inputs = named
    caches = run.apart(recorded(points, inputs, sites, reduce, batch_size, error))
    parts = [[rows(cache, site) for site in sites] for cache in caches]
    samples = {site: np.concatenate(arrays) for site, arrays in zip(sites, zip(*parts, strict=True), strict=True)}
    for site, sample in samples.items():
        _check_finite(name, sample, site, 0, error)
    return samples


def background_moments(
    run: undisturbed,
    points: HookPoints,
    background: Any,
    sites: Sequence[Site],
    reduce: Reduce | None,
    batch_size: int,
    error: Fault,
    sampled: Callable[[ActivationCache, Site], Floats] = rows,
) -> dict[Site, Moments]:
    """Compute each site's moments over the background inputs; raise `error` for fewer than two inputs."""
    moments = dict.fromkeys(sites, NO_MOMENTS)
    for cache in run.apart(recorded(points, background, sites, reduce, batch_size, error)):
        for site in sites:
            sample = sampled(cache, site)
            _check_finite("background", sample, site, moments[site].count, error)
            moments[site] += Moments.of(sample)
    count = moments[sites[0]].count
    if count < 2:
        raise error(f"background has {count} inputs, but at least 2 are needed to measure how much activations vary.")
    return moments
