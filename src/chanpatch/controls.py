"""Controls for a patch: other channels, random sets, random vectors, and a check for off-distribution activations.

others = matched_channels(points, site, observations, count=19, seed=0)
sweep(points, inputs, patches=zero_ablate(site), controls=others.patches(zero_ablate), metric=metric)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from .channels import ROUNDING, Collector, channel_axis, point_at
from .engine.inputs import Inputs, first_batch, input_count
from .engine.state import undisturbed
from .errors import EditError, SiteError, StatisticsError
from .patching.cache import ActivationCache
from .patching.contexts import checked_patches, patched
from .patching.patch import Patch
from .registry.points import HookPoints, site_of, sites_of, traced
from .registry.sites import HookPoint, Site
from .results import Records, columns, largest_first
from .statistics.interval import Floats, whole
from .statistics.ranking import Alternative, Rank, rank_among, without_p

__all__ = [
    "MatchedChannels", "OffDistribution", "matched_channels", "off_distribution", "random_sets", "random_vectors",
]  # fmt: skip

_NEAR = 2  # number of nearest channels to draw from, per control; kept small, so that the means are similar
_EACH_SIDE = 0.15  # minimum fraction of controls with larger means than the site, and of controls with smaller means


@dataclass(frozen=True, repr=False)
class MatchedChannels(Records, Sequence[Site]):
    """Controls for a site, in the order in which they were drawn. A channel is live if it varies over the background.

    Attributes:
        sites: One site per control.
        apart: For each control, the mean absolute difference in mean activation between the control's channels and the
            site's channels. The difference is divided by the standard deviation of the mean activation over the other
            live channels, and is NaN if all of these channels have the same mean activation.
        pool: Number of candidates for each channel of a control: the channels nearest in mean to the site's channel.
        live: Number of live channels other than the site's own. If `pool` equals `live`, the controls are not matched.
        no_p: Reason why ranks among the controls have no p-values, or an empty string. For example, if nearly all
            controls have smaller means than the site, any effect that grows with the activation would rank first.
    """

    sites: tuple[Site, ...]
    apart: tuple[float, ...]
    pool: int
    live: int
    no_p: str

    def __getitem__(self, control: Any) -> Any:
        return self.sites[control]

    def __len__(self) -> int:
        return len(self.sites)

    def patches(self, verb: Callable[[Site], Patch]) -> list[Patch]:
        """Return one patch, `verb(site)`, for each control site. Pass the patches to a sweep as `controls=`.

        If `no_p` is not empty, the sweep omits p-values, even if you create the patches at these sites yourself.
        """
        return [*map(verb, self.sites)]

    def rank(self, effect: float, effects: ArrayLike, *, alternative: Alternative = "two-sided") -> Rank:
        """Rank the site's effect among the control effects. If `no_p` is not empty, the rank has no p-value.

        The arguments and errors are the same as in `chanpatch.statistics.rank_among`.
        """
        return without_p(rank_among(effect, effects, alternative=alternative), self.no_p)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per control, with the fields `site` and `apart`."""
        return columns(site=map(repr, self.sites), apart=self.apart)

    def _title(self) -> str:
        unmatched = ", so the controls are not matched; use a smaller count for closer controls"
        title = f"{len(self)} controls, drawn from the {self.pool} nearest of {self.live} other live channels"
        return title + unmatched * (self.pool == self.live)

    def _notes(self) -> list[str]:
        return [f"No p-values: {self.no_p}"] * bool(self.no_p)


def matched_channels(
    points_or_model: HookPoints | nn.Module,
    site: str | Site | HookPoint,
    background: Inputs | Iterable[Inputs],
    *,
    count: int,
    seed: int = 0,
    batch_size: int = 64,
) -> MatchedChannels:
    """Draw controls for a site from the other live channels at its hook point, matched by mean activation.

    Each control has as many channels as the site, but none of the site's own channels. For each of the site's channels,
    one channel is drawn from the `2 * count` channels nearest in mean activation. The match is therefore poor if
    `count` is large relative to the number of channels. All controls are different, but controls with several channels
    may overlap. Dead channels, which do not vary over the background, are never drawn, because patching them is
    uninformative.

    Args:
        points_or_model: Model, which is traced with the background, or its HookPoints.
        site: Site with the channel or channels to find controls for. The site's other indices, such as rows, also apply
            to the controls.
        background: At least two inputs over which the means are computed, with shape `(input, ...)`, as in
            `chanpatch.channel_sums`.
        count: Number of controls. A p-value requires at least 19 controls, of which at least 15% have larger means than
            the site and at least 15% have smaller means.
        seed: Random seed for drawing the controls.
        batch_size: Same as in `chanpatch.channel_sums`.

    Raises:
        HookPointError, SiteError: If the site does not exist or has no channels, or if too few other channels are live.
        StatisticsError: If an argument is invalid, or a background activation is not finite.

    Example:
        >>> from chanpatch import hook_points
        >>> model = torch.nn.Conv2d(3, 64, 3)
        >>> points = hook_points(model, torch.zeros(2, 3, 8, 8))
        >>> site = points.site(".out", channel=5)
        >>> len(matched_channels(points, site, torch.randn(32, 3, 8, 8), count=19, seed=0))
        19
    """
    first, background = first_batch(background, batch_size)
    points = traced(points_or_model, first)
    whole("count", count, least=1)
    bound = site_of(points, site)
    axis = channel_axis(bound, "Controls", SiteError)
    elsewhere = {name: index for name, index in bound.indices if name != axis}
    region = points.bind(bound.indexed(**elsewhere))
    mean, live = _channel_means(points, region, axis, background, batch_size)
    # A bound site has explicit indices.
    target = cast("tuple[int, ...]", dict(bound.indices).get(axis, tuple(range(len(mean)))))
    others = np.setdiff1d(np.flatnonzero(live), target)
    if math.comb(len(others), len(target)) < count:
        raise SiteError(
            f"{bound!r} has {len(others)} other live {axis}s ({int((~live).sum())} of {len(mean)} are dead: constant "
            f"over the background), too few for count={count}: each control must be a different set of size "
            f"{len(target)}. Use a smaller count, or a site that selects fewer {axis}s."
        )
    generator = np.random.default_rng(whole("seed", seed))
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    while len(found) < count:
        drawn = _drawn(mean, target, others, _NEAR * count, generator)
        found.setdefault(tuple(sorted(drawn)), drawn)
    unit = np.std(mean[others]) or np.nan
    no_p = _no_p(bound, float(mean[list(target)].mean()), np.array([mean[list(drawn)].mean() for drawn in found]))
    sites = tuple(points.bind(bound.indexed(**elsewhere, **{axis: channels})) for channels in found)
    for each in sites:
        vars(each).update(no_p=no_p)  # a sweep reads the reason from the sites
    return MatchedChannels(
        sites,
        tuple(float(np.abs(mean[list(drawn)] - mean[list(target)]).mean() / unit) for drawn in found.values()),
        pool=min(_NEAR * count, len(others)),
        live=len(others),
        no_p=no_p,
    )


def _no_p(site: Site, own: float, controls: Floats) -> str:
    """Return the reason why ranks among the controls have no p-values, or an empty string if the ranks have p-values.

    `own` is the mean activation of the site, and `controls` contains the mean activation of each control.
    """
    least = math.ceil(_EACH_SIDE * len(controls))
    for side, count in (("larger", int((controls >= own).sum())), ("smaller", int((controls <= own).sum()))):
        if count < least:
            return (
                f"at least {least} of the {len(controls)} controls must have a {side} mean activation than {site!r}, "
                f"but the number of such controls is {count}"
            )
    return ""


def _drawn(
    mean: Floats, target: Sequence[int], others: NDArray[np.int64], near: int, generator: np.random.Generator
) -> tuple[int, ...]:
    """Draw, for each target channel, one of the `near` undrawn channels in `others` that are nearest in mean."""
    free, drawn = others, []
    for channel in target:
        nearest = free[np.argsort(np.abs(mean[free] - mean[channel]), kind="stable")[:near]]
        drawn.append(int(generator.choice(nearest)))
        free = free[free != drawn[-1]]
    return tuple(drawn)


def random_sets(
    channels: Sequence[int], size: int, *, count: int, seed: int = 0, other_than: Iterable[Sequence[int]] = ()
) -> list[tuple[int, ...]]:
    """Draw distinct random sets of channels, all of the same size, as controls for a patch on several channels.

    Sets may overlap with each other and with the patch's own channels. For matched mean activations, use
    `matched_channels`.

    Args:
        channels: Channels to draw from. Pass only live channels, because patching dead channels is uninformative.
        size: Number of channels in each set.
        count: Number of sets. P-values from `chanpatch.statistics.rank_among` require at least 19 sets.
        seed: Random seed.
        other_than: Sets to exclude, such as the patch's own channels.

    Returns:
        `count` sets, each in ascending order, or fewer sets if too few distinct sets were found.

    Raises:
        StatisticsError: If `count`, `size` or `other_than` is invalid.

    Example:
        >>> len(random_sets(range(32), 16, count=19, other_than=[range(16)]))
        19
    """
    if whole("size", size, least=1) > len(channels):
        raise StatisticsError(f"size must be at most {len(channels)}, the number of channels to draw from; got {size}.")
    sets = [*other_than]
    if not all(isinstance(each, Iterable) for each in sets):
        raise StatisticsError(f"other_than must contain sets of channels, such as [(3, 4)]; got {sets}.")
    generator = np.random.default_rng(whole("seed", seed))
    draws = range(10 * whole("count", count, least=1))
    drawn = {tuple(sorted(generator.permutation(channels)[:size].tolist())): None for _ in draws}
    excluded = {tuple(sorted(each)) for each in sets}
    return [each for each in drawn if each not in excluded][:count]


def random_vectors(vector: Tensor, *, count: int, seed: int = 0) -> Tensor:
    """Draw vectors with random directions and the same norm as a steering vector, as controls for the steering vector.

    Args:
        vector: Floating-point tensor with the region's axes, such as `(batch, channel, row, col)`, as in `steer`.
        count: Number of controls.
        seed: Random seed.

    Returns:
        A tensor with shape `(control, *vector.shape)` and the vector's dtype and device. Directions are uniformly
        distributed. At each index along the vector's first axis, each control has the same norm as the vector.

    Raises:
        EditError: If the vector has no axes, is not a floating-point tensor, is not finite, or is zero.
        StatisticsError: If `count` is below 1, or the seed is invalid.

    Example:
        >>> controls = random_vectors(torch.tensor([[3.0, 4.0]]), count=19, seed=0)
        >>> controls.shape, controls[7].norm()
        (torch.Size([19, 1, 2]), tensor(5.))
    """
    if not isinstance(vector, Tensor):
        raise EditError(f"vector must be a tensor with the region's axes; got {type(vector).__name__}.")
    if not (vector.dim() and vector.is_floating_point() and vector.isfinite().all() and vector.any()):
        raise EditError(
            "vector must have at least one axis and be floating point, finite and nonzero; got "
            f"{vector.dtype} with shape {tuple(vector.shape)}. Use contrast(...).steering_vector(site), for example."
        )
    rows = vector.detach().cpu().double().reshape(len(vector), -1)
    generator = torch.Generator().manual_seed(whole("seed", seed))
    drawn = torch.randn(whole("count", count, 1), *rows.shape, generator=generator, dtype=torch.float64)
    scaled: Tensor = drawn * (rows.norm(dim=1) / drawn.norm(dim=2)).unsqueeze(2)
    return scaled.reshape(count, *vector.shape).to(vector)


@dataclass(frozen=True, repr=False, eq=False)
class OffDistribution(Records):
    """Measures of how far patches push activations off-distribution: one row per channel, in the order of the sites.

    All values refer to the sum of a channel's activations over the patched region. The printed table lists the largest
    `absolute_z` first.

    Attributes:
        sites: Site of the channel in each row.
        patched: Mean of the sums over the patched inputs.
        mean, std, lowest, highest: Mean, standard deviation, minimum and maximum of the sums over the unpatched
            background inputs.
        z: Mean z-score of the patched sums relative to the background sums; NaN for a channel that does not vary over
            the background.
        absolute_z: Mean absolute z-score of the patched sums; about 0.8 if the patched and the background sums have the
            same normal distribution.
        outside: Fraction of patched inputs whose sum is below `lowest` or above `highest`.
        inputs, background: Number of patched inputs and number of background inputs.
    """

    sites: tuple[Site, ...]
    patched: Floats
    mean: Floats
    std: Floats
    lowest: Floats
    highest: Floats
    z: Floats
    absolute_z: Floats
    outside: Floats
    inputs: int
    background: int

    def __len__(self) -> int:
        return len(self.sites)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per channel, with the channel's site and all of its values."""
        names = ("z", "absolute_z", "outside", "patched", "mean", "std", "lowest", "highest")
        return columns(site=map(repr, self.sites), **{name: getattr(self, name) for name in names})

    def _lines(self) -> list[dict[str, Any]]:
        records = self.to_records()
        return [records[row] for row in largest_first(self.absolute_z)]

    def _title(self) -> str:
        return f"{len(self)} channels: sums over {self.inputs} patched inputs and {self.background} background inputs"


def off_distribution(
    points_or_model: HookPoints | nn.Module,
    patches: Patch | Iterable[Patch],
    inputs: Inputs,
    background: Inputs | Iterable[Inputs],
    *,
    batch_size: int = 64,
) -> OffDistribution:
    """Measure how far patches push activations off-distribution, channel by channel, compared with background inputs.

    An off-distribution activation (for example, zero in a channel whose activation is never near 0) says little about
    the channel's normal role. Report this measure alongside the effect of the patch.

    Args:
        points_or_model: Model, which is traced with the inputs, or its HookPoints.
        patches: One or more patches, applied together.
        inputs: Inputs for one forward pass of the patched model: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments.
        background: Inputs for the unpatched model, as in `matched_channels`.
        batch_size: Number of background inputs per forward pass.

    Raises:
        HookPointError, SiteError: If a site does not exist or has no channels.
        StatisticsError: If there are no patches or inputs, if the background has fewer than two inputs, or if an
            activation is not finite.

    Example:
        >>> from chanpatch import hook_points, zero_ablate
        >>> model = torch.nn.Conv2d(1, 4, 1)
        >>> _ = torch.nn.init.ones_(model.weight), torch.nn.init.constant_(model.bias, 5.0)
        >>> images = torch.rand(50, 1, 3, 3)
        >>> points = hook_points(model, images)
        >>> meter = off_distribution(points, zero_ablate(points.site(".out", channel=2)), images, images)
        >>> meter.outside
        array([1.])
    """
    points = traced(points_or_model, inputs)
    if not (chosen := checked_patches(points, patches)):
        raise StatisticsError("The argument patches= is empty. Pass at least one patch.")
    sites = sites_of(points, [patch.site for patch in chosen])
    parts = tuple(part for site in sites for part in site.split(channel_axis(site, "Controls", SiteError)))
    if not (count := input_count(inputs)):
        raise StatisticsError("The argument inputs= is empty. Pass at least one input.")
    with undisturbed(points.model) as run:
        with patched(points, chosen):
            samples = Collector(run, points, sites, "sum", count, StatisticsError).samples("inputs", inputs)
        run.put_back()
        found = Collector(run, points, sites, "sum", batch_size, StatisticsError).moments(background).values()
    sums = np.concatenate([*samples.values()], axis=1)
    mean, std, lowest, highest = (
        np.concatenate([getattr(each, name) for each in found]) for name in ("mean", "std", "lowest", "highest")
    )
    slack = ROUNDING * np.maximum(np.abs(lowest), np.abs(highest))
    z = (sums - mean) / np.where(np.concatenate([each.varies() for each in found]), std, np.nan)
    return OffDistribution(
        parts,
        sums.mean(axis=0),
        *(mean, std, lowest, highest),
        z=z.mean(axis=0),
        absolute_z=np.abs(z).mean(axis=0),
        outside=((sums < lowest - slack) | (sums > highest + slack)).mean(axis=0),
        inputs=count,
        background=next(iter(found)).count,
    )


def _channel_means(
    points: HookPoints, region: Site, axis: str, background: Any, batch_size: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return each channel's mean activation in a region, and whether the channel varies at any position of the region.

    Both are computed over the background inputs.
    """
    point = point_at(region)
    in_front = (point.batch_axis or 0, point.axes.index(axis))

    def sampled(cache: ActivationCache, site: Site) -> Floats:
        array = cache[site].double().movedim(in_front, (0, 1)).numpy()
        return array.reshape(*array.shape[:2], -1)

    with undisturbed(points.model) as run:
        collect = Collector(run, points, [region], None, batch_size, StatisticsError)
        found = collect.moments(background, sampled)[region]
    return found.mean.mean(axis=1), found.varies().any(axis=1)
