"""Collect reduced activations over many inputs in double precision, for contrasts, probes and controls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .engine.inputs import batches, copied_inputs, input_count
from .engine.state import undisturbed
from .engine.workers import cut, spread
from .errors import ChanpatchError, ContrastError, SiteError
from .patching.cache import ActivationCache
from .patching.edits import check_mask
from .patching.patch import Mask
from .patching.recording import Recorder, Reduce, reduced_axes
from .registry.points import HookPoints
from .registry.sites import HookPoint, Site
from .statistics.interval import Floats, whole

ROUNDING = 1e-6  # relative difference to expect between two runs in single precision


def rounding(sites: Iterable[Site]) -> float:
    """Return the relative difference that rounding can cause between two runs, given the sites' least precise dtype."""
    dtypes = {site.point.dtype for site in sites if site.point is not None}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=ROUNDING / 8)
    return eps if eps > ROUNDING else 8 * eps  # in single precision, 8 * eps is about ROUNDING


@dataclass(frozen=True)
class Moments:
    """Per-channel moments and extremes of a sample, in float64; `+` merges the moments of two samples.

    Attributes:
        count: Number of inputs.
        mean, lowest, highest: Mean, minimum and maximum, each with shape `(channel,)`.
        squares: Sum of squared deviations from the mean, with shape `(channel,)`.

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

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        fraction, apart = other.count / max(count, 1), other.mean - self.mean
        squares = self.squares + other.squares + np.square(apart) * (self.count * fraction)
        lowest, highest = np.minimum(self.lowest, other.lowest), np.maximum(self.highest, other.highest)
        return Moments(count, self.mean + apart * fraction, squares, lowest, highest)

    @property
    def std(self) -> Floats:
        """Standard deviation of each channel, with shape `(channel,)` and denominator count - 1."""
        spread: Floats = np.sqrt(self.squares / (self.count - 1))
        return spread

    def varies(self, precision: float = 0.0) -> NDArray[np.bool_]:
        """Return whether each channel's std, relative to its mean, exceeds both rounding error and `precision`."""
        beyond: NDArray[np.bool_] = self.std > max(ROUNDING, precision) * np.abs(self.mean)
        return beyond


NO_MOMENTS = Moments(0, np.zeros(()), np.zeros(()), np.array(np.inf), np.array(-np.inf))  # an empty sample


def point_at(site: Site) -> HookPoint:
    """Return the hook point of a bound site."""
    assert site.point is not None  # HookPoints.bind and sites_of bind sites to their points
    return site.point


def pair_count(clean: Any, corrupted: Any) -> int:
    """Return the number of pairs; raise ContrastError if there are no pairs or the numbers of inputs differ."""
    count, other = input_count(clean), input_count(corrupted)
    if count != other or not count:
        raise ContrastError(
            f"clean and corrupted must have the same number of inputs, at least 1; got {count} and {other}."
        )
    return count


def _refuse_rows(site: Site, error: type[ChanpatchError]) -> None:
    if "batch" in dict(site.indices):
        raise error(
            f"{site!r} selects rows of the batch, but every input is used. Omit batch= from the site, and pass only "
            "the inputs to use."
        )


def check_leaves_channels(site: Site, reduce: Reduce) -> None:
    """Raise SiteError unless a bound site and a reduction leave every input and at most one axis besides the batch."""
    _refuse_rows(site, SiteError)
    left = reduced_axes(site, point_at(site).axes, reduce)
    if "batch" not in left or len(left) > 2:
        raise SiteError(
            f"reduce={reduce!r} leaves axes ({', '.join(left)}) at {site!r}, but must keep the batch axis and at most "
            "one other axis."
        )


def channel_axis(site: Site, what: str, error: type[ChanpatchError]) -> str:
    """Return the name of a bound site's channel or feature axis; raise `error` if there is not exactly one.

    `what` is the plural noun, such as `"Controls"`, that error messages use for the caller's results.
    """
    point = point_at(site)
    _refuse_rows(site, error)
    kept = reduced_axes(site, point.axes, "sum")
    channels = [axis for axis in kept if axis != "batch"]
    if point.batch_axis is None or "batch" not in kept or len(channels) != 1:
        raise error(
            f"{site!r} has axes ({', '.join(point.axes)})"
            + (", and its batch axis is unknown" if point.batch_axis is None else "")
            + f". {what} need a batch axis and exactly one axis named channel or feature. "
            "Name axes with hook_points(..., axes={...})."
        )
    for axis in point.apart:
        if (count := len(site.split(axis))) > 1:
            first = next(iter(point.labels(axis)), 0)
            raise error(
                f"{site!r} has {count} {axis}s, each with its own {channels[0]}s. Select one {axis}, as in "
                f"{axis}={first!r}."
            )
    return channels[0]


def rows(cache: ActivationCache, site: Site) -> Floats:
    """Return a site's activations with shape `(input, channel)`; at most one axis besides the batch axis is allowed."""
    # Copy the array, because small tensors that outlive their forward pass would fragment memory.
    array: Floats = cache[site].double().movedim(cache.batch_axis(site) or 0, 0).numpy().copy()
    return array if array.ndim > 1 else array[:, None]


@dataclass(frozen=True)
class Collector:
    """Collects activations at sites over many inputs, and reduces the activations in double precision.

    `run` is the context that restores the model between forward passes, and `error` is the class of the exceptions that
    the methods raise. If `where` is a tensor, the tensor has one row for each input, or a single row for all inputs.
    `known` maps names of inputs (such as `"clean"`) to results that workers have already computed.
    """

    run: undisturbed
    points: HookPoints
    sites: Sequence[Site]
    reduce: Reduce | None
    batch_size: int
    error: type[ChanpatchError]
    where: Mask | None = None
    known: Mapping[str, Sequence[dict[Site, Floats]]] = field(default_factory=dict)

    def spread(
        self,
        executor: Executor | None,
        named: Mapping[str, Any],
        advance: Callable[[int], object] = lambda count: None,
        *,
        finite: bool = True,
    ) -> Collector:
        """Compute the results for the named inputs in workers, and return a collector that contains these results.

        The workers run the same batches as `caches` would, so the results are identical. Do not call this method inside
        the context `run`, because threads wait for `run` to end. If `executor` is None, return this collector.
        """
        if executor is None:
            return self
        parts: list[Any] = []
        for name, inputs in named.items():
            each = [copied_inputs(*batch) for batch in self._batches(inputs)]
            starts = [*itertools.accumulate(map(input_count, each), initial=0)]
            numbered = [*zip(starts, each, strict=False)]
            parts += [(name, part[0][0], [batch for _, batch in part]) for part in cut(numbered, executor)]
        labels = [[f"{name}[{start}:{start + sum(map(input_count, part))}]"] for name, start, part in parts]
        found: dict[int, list[dict[Site, Floats]]] = {}

        def add(number: int, part: list[dict[Site, Floats]]) -> None:
            found[number] = part
            advance(len(part))

        call = self.points, self.sites, self.reduce, self.batch_size, self.error, self.where, finite
        spread(executor, _collected, call, parts, labels, add, model=self.points.model)
        known = {
            name: [batch for number in range(len(parts)) if parts[number][0] == name for batch in found[number]]
            for name in named
        }
        return replace(self, known=known)

    def caches(self, inputs: Any) -> Iterator[ActivationCache]:
        """Run the model on each batch of inputs, and yield one cache per batch, with the activations on the CPU."""
        yield from self._caches(self._batches(inputs))

    def _batches(self, inputs: Any) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
        """Check the inputs, and return the arguments for each forward pass."""
        whole("batch_size", self.batch_size, 1, self.error)
        self._check_mask(inputs)
        taken = [each for each in self.points.values() if not each.module and each.side == "in" and each.axes]
        if isinstance(inputs, (Tensor, tuple, Mapping)) and taken and taken[0].batch_axis not in (None, 0):
            raise self.error(
                f"The batch axis of the model's first input is axis {taken[0].batch_axis}, but inputs are split into "
                "batches along axis 0. Wrap the model in a module whose inputs have the batch axis first."
            )
        proved = any(point.batch_axis is not None for point in taken)
        shared = {point.path: point.shape[0] or 0 for point in taken if proved and point.batch_axis is None}
        return batches(inputs, self.batch_size, shared)

    def _caches(self, forwards: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]], start: int = 0) -> Any:
        """Yield one cache per forward pass. `start` is the index of the first input."""
        options: dict[str, Any] = {"double": self.reduce is not None, "device": "cpu", "stop": True}
        for arguments, keywords in self.run.apart(forwards):
            recorder = Recorder(self.points, self.sites, self.reduce, where=self.where, first_row=start, **options)
            with torch.no_grad():
                recorder.run_once(arguments, keywords)
            start += recorder.rows
            yield recorder.result

    def _check_mask(self, inputs: Any) -> None:
        """Raise an error if `where` is a tensor with neither one row per input nor a single row for all inputs."""
        count = input_count(inputs) if isinstance(inputs, (Tensor, tuple, Mapping)) else "an unknown number of"
        for site in self.sites if isinstance(self.where, Tensor) else ():
            check_mask(self.where, site)
            axis = point_at(site).batch_axis
            rows = 1 if axis is None else self.where.shape[axis]  # type: ignore[union-attr]
            if rows not in (1, count):
                raise self.error(
                    f"`where` has {rows} rows, but there are {count} inputs. Pass a mask with one row per input, a "
                    "mask with a single row, or a function of the context, which is called for each batch."
                )

    def samples(self, name: str, inputs: Any) -> dict[Site, Floats]:
        """Return each site's activations with shape `(input, channel)`; error messages call the inputs `name`."""
        parts = [*self.parts(name, inputs, rows)]
        return {site: np.concatenate([part[site] for part in parts]) for site in self.sites}

    def moments(
        self, background: Any, sampled: Callable[[ActivationCache, Site], Floats] = rows
    ) -> dict[Site, Moments]:
        """Compute each site's moments over the background; raise `error` if there are fewer than two inputs."""
        moments = dict.fromkeys(self.sites, NO_MOMENTS)
        for part in self.parts("background", background, sampled):
            moments = {site: moments[site] + Moments.of(sample) for site, sample in part.items()}
        count = moments[self.sites[0]].count
        if count < 2:
            raise self.error(
                f"background must have at least 2 inputs, to measure how much activations vary; got {count}."
            )
        return moments

    def parts(
        self, name: str, inputs: Any, sampled: Callable[[ActivationCache, Site], Floats] = rows, *, finite: bool = True
    ) -> Iterator[dict[Site, Floats]]:
        """Yield one dict per batch, from sites to activations, which `sampled` reads from a cache.

        If `finite` is True, raise `error` if an activation is NaN or infinite.
        """
        if name in self.known:
            return iter(self.known[name])
        return self._sampled(name, self.caches(inputs), sampled, finite=finite)

    def _sampled(
        self,
        name: str,
        caches: Iterable[ActivationCache],
        sampled: Callable[[ActivationCache, Site], Floats],
        start: int = 0,
        *,
        finite: bool,
    ) -> Iterator[dict[Site, Floats]]:
        for cache in caches:
            part = {site: sampled(cache, site) for site in self.sites}
            for site, sample in part.items() if finite else ():
                empty = False if cache.counts is None else (sampled(cache.counts, site) == 0)
                for wrong in np.argwhere(empty)[:1].tolist():
                    raise self.error(
                        f"`where` selects nothing in {name}[{start + wrong[0]}] at {site!r}. Leave out that input, or "
                        "select at least one element in each channel."
                    )
                for wrong in np.argwhere(~np.isfinite(sample))[:1].tolist():
                    raise self.error(
                        f"{name}[{start + wrong[0]}] produces a non-finite activation at {site!r}. Leave out either "
                        "that input or that site."
                    )
            start += len(part[self.sites[0]])
            yield part


def _collected(call: Any, part: tuple[str, int, Any]) -> list[dict[Site, Floats]]:
    """Collect activations in a worker. `part` contains the inputs' name, the first input's index, and the batches."""
    (points, *settings, finite), (name, start, forwards) = call, part
    with undisturbed(points.model) as run:
        collector = Collector(run, points, *settings)
        found = [*collector._sampled(name, collector._caches(forwards, start), rows, start, finite=finite)]
        if start and run.has_drawn():
            raise collector.error(
                "The model draws random numbers, so the outputs for a batch depend on the batches that ran before, "
                "perhaps in other workers. Call model.eval(), or omit executor=."
            )
    return found
