"""Contrastive pairs: which channels notice a feature, against how much they vary anyway.

result = contrast(points, clean, corrupted, background=observations)
result.top(10)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ._batches import Inputs, batches, input_count
from ._lookup import sites_of
from ._moments import Moments
from ._optional import imported
from ._reductions import reduced_axes
from ._tables import table
from ._typing import Reduce
from .errors import ContrastError, SiteError
from .plots import effect_ranking
from .points import HookPoint, HookPoints
from .recording import ActivationCache, run_with_cache
from .sites import Site
from .statistics import benjamini_hochberg, bootstrap_interval, holm, sign_flip_test
from .tracing import undisturbed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST_CLUSTERS = 6  # with fewer, no sign-flip test can give a p below 0.05


@dataclass(frozen=True, repr=False, eq=False)
class Contrast:
    """How much each channel differs between the two inputs of a pair; one row per channel, largest effect first.

    All numbers are of the channel's reduced activation, its sum unless another reduction was asked for.

    Attributes:
        sites: Of each row, the channel as a site: `[zero_ablate(site) for site in result.top(16).sites]`.
        difference: Mean of clean minus corrupted.
        absolute: Mean of its absolute value.
        std: Standard deviation over the background inputs; NaN without any.
        effect: `difference`, or `absolute` where that was asked for, divided by `std`; undivided without a background.
            NaN for a channel that does not vary over the background.
        low: Lower end of the effect's 95% bootstrap interval over pairs, or over clusters of pairs.
        high: Its upper end.
        p: Two-sided sign-flip p-value that the mean difference is zero; NaN where there is none.
        p_holm: Corrected for the number of channels so that all claims below a level are right together.
        p_bh: Corrected so that the level is the share of false ones among the claims.
        no_p: Why there are no p-values, or nothing.
        pairs: Number of pairs.
        clusters: Number of independent clusters of pairs.
        background: Number of background inputs.
        skipped: Hook points that were left out of a search, with the reason.
        effect_label: What the effect is, in which unit, of how many pairs: the axis label of a figure.
    """

    sites: tuple[Site, ...]
    difference: NDArray[np.float64]
    absolute: NDArray[np.float64]
    std: NDArray[np.float64]
    effect: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]
    p_holm: NDArray[np.float64]
    p_bh: NDArray[np.float64]
    no_p: str
    pairs: int
    clusters: int
    background: int
    skipped: dict[str, str]
    effect_label: str
    _points: HookPoints = field(repr=False)
    _inputs: tuple[Any, Any] = field(repr=False)
    _batch_size: int = field(repr=False)

    def __len__(self) -> int:
        return len(self.sites)

    def top(self, count: int) -> Contrast:
        """Return the rows with the largest absolute effect."""
        return self._rows(slice(count))

    def steering_vector(self, site: str | Site) -> Tensor:
        """Return the mean difference of whole activations, clean minus corrupted, at a site.

        Args:
            site: Any site of the model, in the contrast or not.

        Returns:
            A tensor with the region's axes, its batch axis of length 1: what `steer` takes.

        References:
            Turner et al. 2023, "Steering language models with activation engineering", for one pair; Rimsky et al.
            2023, "Steering Llama 2 via contrastive activation addition", for the mean over many.
        """
        (bound,) = sites_of(self._points, site)
        point = self._points[bound.name]
        if point.batch_axis is None:
            raise SiteError(f"{bound!r} has no batch axis that is proved, so there is no mean over the pairs.")
        axis = point.batch_axis
        means = []
        for inputs in self._inputs:
            moments = None
            for cache in _activations(self._points, inputs, [bound], None, self._batch_size):
                part = Moments.of(cache[bound].double().movedim(axis, 0).numpy())
                moments = part if moments is None else moments + part
            means.append(moments.mean)  # type: ignore[union-attr]
        return torch.from_numpy(means[0] - means[1]).to(point.dtype).unsqueeze(axis)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Return a figure of the largest effects with their intervals, `chanpatch.plots.effect_ranking`.

        Args:
            ax: Where to draw; new axes if None.

        Raises:
            MissingPackageError: If matplotlib is not installed.
        """
        return effect_ranking(self, ax)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per channel: site, every number, and why there is no p."""
        names = ("difference", "absolute", "std", "effect", "low", "high", "p", "p_holm", "p_bh")
        columns = {name: getattr(self, name).tolist() for name in names}
        return [
            {"site": repr(site), **{name: columns[name][row] for name in names}, "no_p": self.no_p}
            for row, site in enumerate(self.sites)
        ]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        shown = [
            {
                "site": repr(self.sites[row]),
                "effect": f"{self.effect[row]:+.3g}",
                "95%": f"{self.low[row]:+.3g} to {self.high[row]:+.3g}",
                "difference": f"{self.difference[row]:+.3g}",
                "std": f"{self.std[row]:.3g}",
                **({} if self.no_p else {"p (Holm)": f"{self.p_holm[row]:.2g}", "p (BH)": f"{self.p_bh[row]:.2g}"}),
            }
            for row in range(min(len(self), _SHOWN))
        ]
        title = f"{len(self)} channels, {self.pairs} pairs in {self.clusters} clusters"
        title += f", {self.background} background inputs" if self.background else ", no background"
        more = [f"... {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        notes = [f"No p-values: {self.no_p}"] * bool(self.no_p)
        notes += [f"Left out: {len(self.skipped)} hook points (see .skipped)"] * bool(self.skipped)
        return "\n".join([title, *table(shown), *more, *notes])

    def _rows(self, rows: Any) -> Contrast:
        chosen = np.arange(len(self))[rows]
        arrays = ("difference", "absolute", "std", "effect", "low", "high", "p", "p_holm", "p_bh")
        picked = {name: getattr(self, name)[chosen] for name in arrays}
        return replace(self, sites=tuple(self.sites[row] for row in chosen), **picked)


_SHOWN = 20


def contrast(
    points: HookPoints,
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
    """Return how much each channel differs between clean and corrupted inputs.

    Args:
        points: Of the model.
        clean: One input of each pair: a tensor `(pair, ...)`, or a tuple or dict of such.
        corrupted: The other input of each pair.
        sites: Where to look; `"all"` searches what every module returns, and every tap.
        reduce: What is compared of each channel, as in `recording`; it leaves the batch and at most one axis.
        background: Inputs that tell how much a channel varies anyway: as `clean`, or any iterable of batches of it.
        absolute: Rank by the mean absolute difference, for pairs in which the feature may point either way.
        clusters: A label per pair; pairs of one label, such as rotations of one maze, are not independent.
        seed: Of the bootstrap and of the sign flips.
        batch_size: Inputs in one forward.

    Raises:
        HookPointError, SiteError: If a site does not exist or cannot be reduced so; all faults at once.
        ContrastError: If there are no pairs, the two sides have other numbers of inputs, or clusters do not fit.

    Example:
        >>> from chanpatch import hook_points
        >>> model = torch.nn.Linear(3, 2)
        >>> clean, corrupted = torch.ones(8, 3), torch.zeros(8, 3)
        >>> result = contrast(hook_points(model, clean), clean, corrupted, ".out")
        >>> len(result), result.pairs
        (2, 8)

    References:
        Turner et al. 2023, "Steering language models with activation engineering", for differences of paired inputs;
        Davison and Hinkley 1997, "Bootstrap methods and their application", for flips and intervals.
    """
    labels = _checked_pairs(points, clean, corrupted, clusters)
    chosen, skipped = _searched(points, sites, reduce)
    with undisturbed(points.model):
        one = _gathered(points, clean, chosen, reduce, batch_size)
        other = _gathered(points, corrupted, chosen, reduce, batch_size)
        count, spread = _spread(points, background, chosen, reduce, batch_size)
    differences = np.concatenate([one[site] - other[site] for site in chosen], axis=1)
    rows = tuple(row for site in chosen for row in _channels(site, one[site].shape[1], points, reduce))
    std = np.concatenate([spread[site] for site in chosen]) if count else np.full(len(rows), np.nan)
    scale = np.where(std > 0, std, np.nan) if count else np.ones(len(rows))
    measured = np.abs(differences) if absolute else differences
    interval = bootstrap_interval(measured / scale, clusters=labels, seed=seed)
    independent = len(np.unique(labels))
    no_p = _no_p(absolute, independent)
    p = np.full(len(rows), np.nan) if no_p else sign_flip_test(differences, clusters=labels, seed=seed)
    result = Contrast(
        sites=rows,
        difference=differences.mean(axis=0),
        absolute=np.abs(differences).mean(axis=0),
        std=std,
        effect=measured.mean(axis=0) / scale,
        low=interval.low,
        high=interval.high,
        p=p,
        p_holm=holm(p),
        p_bh=benjamini_hochberg(p),
        no_p=no_p,
        pairs=len(labels),
        clusters=independent,
        background=count,
        skipped=skipped,
        effect_label=_effect_label(absolute, len(labels), count),
        _points=points,
        _inputs=(clean, corrupted),
        _batch_size=batch_size,
    )
    order = np.argsort(-np.abs(result.effect), kind="stable")  # NaN, of channels that never vary, comes last
    return result._rows(order)


def _no_p(absolute: bool, independent: int) -> str:
    if absolute:
        return "a mean absolute difference is above zero also where nothing differs but noise; take signed differences."
    if independent < FEWEST_CLUSTERS:
        return f"{independent} independent pairs are too few for a sign-flip test; it needs {FEWEST_CLUSTERS}."
    return ""


def _effect_label(absolute: bool, pairs: int, background: int) -> str:
    label = f"{'absolute ' * absolute}difference of clean and corrupted, n = {pairs} pairs"
    return label + f" (in standard deviations over {background} background inputs)" * bool(background)


def _checked_pairs(points: HookPoints, clean: Any, corrupted: Any, clusters: ArrayLike | None) -> NDArray[Any]:
    """Return one cluster label per pair."""
    first = points.get(".in[0]")
    if first is not None and first.batch_axis not in (None, 0):
        raise ContrastError(
            f"The model takes its batch on axis {first.batch_axis} of its first input, but pairs stand on axis 0. "
            "Wrap the model in a module that takes the batch first."
        )
    lengths = [input_count(inputs) for inputs in (clean, corrupted)]
    if lengths[0] != lengths[1] or not lengths[0]:
        raise ContrastError(f"clean has {lengths[0]} inputs and corrupted {lengths[1]}: give one of each per pair.")
    labels = np.arange(lengths[0]) if clusters is None else np.asarray(clusters)
    if labels.shape != (lengths[0],):
        raise ContrastError(f"clusters has shape {labels.shape}, but there are {lengths[0]} pairs: give each a label.")
    return labels


def _searched(points: HookPoints, sites: Any, reduce: Reduce) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Return the sites to look at, and why hook points were left out of a search."""
    if not (isinstance(sites, str) and sites == "all"):
        chosen = sites_of(points, sites)
        for site in chosen:
            _check_reducible(site, reduce)
        return chosen, {}
    found, skipped = [], {}
    for point in points.values():
        if point.side == "in":
            continue
        try:
            _check_reducible(points.site(point.name), reduce)
            found.append(points.site(point.name))
        except SiteError as fault:
            skipped[point.name] = str(fault)
    return tuple(found), skipped


def _check_reducible(site: Site, reduce: Reduce) -> None:
    point = site.point
    assert point is not None  # sites_of binds sites to their points
    if not point.dtype.is_floating_point:
        raise SiteError(f"{site!r} is {point.dtype}: there is nothing to subtract.")
    if point.batch_axis is None:
        raise SiteError(f"{site!r} has no batch axis that is proved, so its rows cannot be paired.")
    left = reduced_axes(site, point.axes, reduce)
    if left[:1] != ("batch",) or len(left) > 2:
        raise SiteError(
            f"reduce={reduce!r} leaves ({', '.join(left)}) at {site!r}; it must leave the batch and one axis at most."
        )


def _channels(site: Site, count: int, points: HookPoints, reduce: Reduce) -> Iterator[Site]:
    """Yield a site per channel of a site; the site itself where it has none."""
    point = points[site.name]
    kept = [axis for axis in reduced_axes(site, point.axes, reduce) if axis != "batch"]
    if not kept or kept[0] not in point.axes:
        yield from [site] * count
        return
    yield from site.split(kept[0])


def _gathered(
    points: HookPoints, inputs: Any, sites: Sequence[Site], reduce: Reduce, batch_size: int
) -> dict[Site, NDArray[np.float64]]:
    """Return the reduced activations of all inputs: `(input, channel)` per site."""
    parts: dict[Site, list[NDArray[np.float64]]] = {site: [] for site in sites}
    for cache in _activations(points, inputs, sites, reduce, batch_size):
        for site in sites:
            parts[site].append(_matrix(cache[site]))
    return {site: np.concatenate(arrays) for site, arrays in parts.items()}


def _spread(
    points: HookPoints, background: Any, sites: Sequence[Site], reduce: Reduce, batch_size: int
) -> tuple[int, dict[Site, NDArray[np.float64]]]:
    """Return the number of background inputs and the standard deviation of every channel over them."""
    if background is None:
        return 0, {}
    moments: dict[Site, Moments] = {}
    for cache in _activations(points, background, sites, reduce, batch_size):
        for site in sites:
            part = Moments.of(_matrix(cache[site]))
            moments[site] = moments[site] + part if site in moments else part
    if not moments:
        raise ContrastError("background holds no inputs; leave it out to compare differences as they are.")
    return next(iter(moments.values())).count, {site: each.std for site, each in moments.items()}


def _activations(
    points: HookPoints, inputs: Inputs | Iterable[Inputs], sites: Sequence[Site], reduce: Reduce | None, batch_size: int
) -> Iterator[ActivationCache]:
    """Yield the recorded sites of each batch, on the CPU; nothing is kept from one batch to the next."""
    for arguments, keywords in batches(inputs, batch_size):
        with torch.no_grad():
            yield run_with_cache(points, *arguments, sites=sites, reduce=reduce, device="cpu", stop=True, **keywords)


def _matrix(activation: Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = activation.double().numpy()
    return values.reshape(len(values), -1)
