"""Functions that make the usual patches: ablation, activation patching, steering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch

from ..errors import BatchAxisError, EditError, SiteError
from ..registry.sites import Site, no_batch, read
from .edits import Add, Edit, Resample, Set, fits, region_lengths
from .patch import Mask, Patch

Source: TypeAlias = Mapping[Any, torch.Tensor] | torch.Tensor


def zero_ablate(site: Site, *, where: Mask | None = None) -> Patch:
    """Return a patch that sets the region to zero.

    Args:
        site, where: As in Patch.

    Example:
        >>> from chanpatch import patched
        >>> model = torch.nn.Linear(2, 3)
        >>> with patched(model, zero_ablate(Site(".out", feature=1))):
        ...     model(torch.ones(4, 2))[:, 1].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    return Patch(site, Set(0.0), where)


def mean_ablate(
    site: Site, reference: Source, *, over: str | Sequence[str] = ("batch",), where: Mask | None = None
) -> Patch:
    """Return a patch that sets the region of a traced site, from `HookPoints.site`, to its mean over a reference set.

    Args:
        site, where: As in Patch.
        reference: Activations over the reference set, in any number: an ActivationCache, or a tensor with the axes of
            the region or of its whole hook point.
        over: Axis or axes to average over.

    Raises:
        SiteError: If the site has no such axis, or `over` is empty.
        EditError: If the reference does not have the region's axes, or no mean.

    Example:
        >>> from chanpatch import hook_points
        >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(4, 2))
        >>> mean_ablate(points.site(".out", feature=1), torch.tensor([[1.0], [3.0]])).edit.value
        tensor([[2.]])

    References:
        Wang et al. 2023, "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small",
        section 2.1.
    """
    region = _region(site, reference)
    if site.point is None:
        raise SiteError(
            f"mean_ablate at {site!r} needs axis names. Take the site from hook_points(model, *inputs).site(...)."
        )
    axes = site.point.axes
    over = (over,) if isinstance(over, str) else tuple(over)
    if not over:
        raise SiteError(f"mean_ablate at {site!r} over no axis. Name one or more of ({', '.join(axes)}): over='batch'.")
    unknown = [axis for axis in over if axis not in axes]
    if unknown:
        raise SiteError(f"mean_ablate over {unknown} at {site!r}: its axes are ({', '.join(axes)}).")
    if not region.is_floating_point():
        raise EditError(f"mean_ablate at {site!r}: the reference is {region.dtype}, which has no mean.")
    return Patch(site, Set(region.mean(dim=[axes.index(axis) for axis in over], keepdim=True)), where)


def resample_ablate(site: Site, reference: Source, *, seed: int = 0, where: Mask | None = None) -> Patch:
    """Return a patch that replaces each row of a traced site by a random row of a reference set; see Resample.

    Args:
        site, where: As in Patch.
        reference: As in mean_ablate.
        seed: Random seed, a whole number.

    Raises:
        BatchAxisError: If the hook point's batch axis is not proved.
        EditError: If the reference does not have the region's axes, or the seed is not a whole number.

    Example:
        >>> from chanpatch import hook_points
        >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(4, 2))
        >>> resample_ablate(points.site(".out", feature=1), torch.tensor([[1.0], [3.0]]), seed=0)
        Patch(Site('.out', feature=1), Resample)

    References:
        Chan et al. 2022, "Causal scrubbing: a method for rigorously testing interpretability hypotheses", section 2.
    """
    region = _region(site, reference)
    if site.point is None or site.point.batch_axis is None:
        raise BatchAxisError(f"resample_ablate at {site!r} needs rows. {no_batch(site)}")
    return Patch(site, Resample(region, seed, site.point.batch_axis), where)


def patch_in(site: Site, source: Source | float, *, where: Mask | None = None) -> Patch:
    """Return a patch that replaces the region by its activation in another run (activation patching).

    Args:
        site, where: As in Patch.
        source: The activation: an ActivationCache, a tensor with the axes of the region or of its whole hook point, or
            a number. Its batch is as long as that of the patched run, or 1.

    Example:
        >>> from chanpatch import patched
        >>> model = torch.nn.Linear(2, 3)
        >>> with patched(model, patch_in(Site(".out"), torch.tensor([[1.0, 2.0, 3.0]]))):
        ...     model(torch.ones(1, 2))
        tensor([[1., 2., 3.]])

    References:
        Meng et al. 2022, "Locating and editing factual associations in GPT", section 2.1.
    """
    return Patch(site, Set(source if isinstance(source, Real) else _region(site, source)), where)


def steer(site: Site, vector: Source | float, coefficient: float = 1.0, *, where: Mask | None = None) -> Patch:
    """Return a patch that adds a steering vector to the region.

    Args:
        site, where: As in Patch.
        vector: As `source` in patch_in; every axis may also have length 1.
        coefficient: Factor of the vector.

    Example:
        >>> from chanpatch import patched
        >>> model = torch.nn.Linear(2, 3, bias=False)
        >>> with patched(model, steer(Site(".out"), torch.tensor([[1.0, 0.0, 0.0]]), coefficient=-2.0)):
        ...     model(torch.zeros(1, 2)).detach()
        tensor([[-2.,  0.,  0.]])

    References:
        Turner et al. 2023, "Steering language models with activation engineering", section 3.
    """
    return Patch(site, Add(vector if isinstance(vector, Real) else _region(site, vector), coefficient), where)


def edit(site: Site, function: Edit, *, where: Mask | None = None) -> Patch:
    """Return a patch that applies your own function; the same as `Patch(site, function, where)`.

    Args:
        site, where: As in Patch.
        function: The edit, as in Patch.

    Example:
        >>> halve = edit(Site("fc", feature=3), lambda activation: activation / 2)
    """
    return Patch(site, function, where)


def _region(site: Site, source: Any) -> Any:
    """Return the region's activation from a tensor or a cache, of the site or of its whole hook point."""
    point = site.point
    if isinstance(source, torch.Tensor):
        whole = point is not None and fits(source, [point.length(axis) for axis in point.axes])
        if point is None or not whole or fits(source, region_lengths(site, point), or_one=True):
            return source
        activation = source
    elif not isinstance(source, Mapping):
        raise EditError(
            f"The activation for {site!r} is a {type(source).__name__}; it is a tensor with the region's axes, or an "
            "ActivationCache."
        )
    elif site in source:
        return source[site]
    elif point is None or Site(site.name) not in source:
        raise EditError(
            f"The cache holds neither {site!r} nor its whole hook point. It holds {', '.join(map(repr, source))}."
        )
    else:
        activation = source[Site(site.name)]
        if activation.dim() != len(point.axes):
            raise EditError(
                f"The cache holds {Site(site.name)!r} with shape {tuple(activation.shape)}, of which {site!r} cannot "
                f"be taken: that has axes ({', '.join(point.axes)}). Record without reduce."
            )
    return read(activation, site.positions(point.axes, activation.shape))
