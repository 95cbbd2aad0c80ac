"""Create common patches: ablation, activation patching and steering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch

from ..errors import BatchAxisError, ChanpatchError, EditError, SiteError, did_you_mean
from ..registry.indices import most_positions
from ..registry.sites import Site, no_batch, read
from .donors import Donor, InputsOf
from .edits import Add, Edit, Per, Resample, Set, check_mask, fits, region_lengths, shape_error
from .patch import Mask, Patch
from .recording import reduced

Source: TypeAlias = Mapping[Any, torch.Tensor] | torch.Tensor


def zero_ablate(site: Site, *, where: Mask | None = None) -> Patch:
    """Return a patch that sets the region to zero.

    Args:
        site, where: Same as in Patch.

    Example:
        >>> zero_ablate(Site("fc", feature=1)).edit
        Set(value=0.0)
    """
    return Patch(site, Set(0.0), where)


def mean_ablate(
    site: Site,
    reference: Source,
    *,
    over: str | Sequence[str] = ("batch",),
    reference_where: torch.Tensor | None = None,
    where: Mask | None = None,
) -> Patch:
    """Return a patch that sets the region to the region's mean over a reference set. The site must have a trace.

    Args:
        site, where: Same as in Patch.
        reference: ActivationCache or tensor, with any number of rows. A tensor must have the axes of the region or of
            the whole hook point. Confidence intervals for the patch's effect treat the reference set as fixed.
        over: Axis or axes to average over.
        reference_where: Elements of the reference to average; None for all elements. Pass a bool tensor with as many
            axes as the reference's region, in which each axis has the region's length or length 1.

    Raises:
        SiteError: If the site has no trace, if `over` is empty, or if an axis in `over` does not exist.
        EditError: If the reference does not have the region's axes or is not floating-point; or if `reference_where`
            does not match the reference or selects nothing for an element of the mean.

    Example:
        >>> from chanpatch import hook_points
        >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(4, 2))
        >>> mean_ablate(points.site(".out", feature=1), torch.tensor([[1.0], [3.0]])).edit.value
        tensor([[2.]])

    References:
        Wang et al. 2023, "Interpretability in the wild", section 2.1.
    """
    region, pattern = _region(site, reference), mean_pattern("mean_ablate", site, over)
    if not region.is_floating_point():
        raise EditError(
            f"mean_ablate at {site!r}: the reference must be floating-point; got {region.dtype}. At a site with this "
            "dtype, use resample_ablate()."
        )
    mask, point = reference_where, site.point
    assert point is not None  # otherwise mean_pattern raises an error
    lengths, subject = region_lengths(site, point), f"mean_ablate at {site!r}"
    if region.dim() != len(lengths):
        raise shape_error(subject, "reference", region, point.axes, lengths, "varies")
    if mask is not None:
        check_mask(mask, site, point.axes, region.shape, name="reference_where")
        mask = mask.to(region.device).expand(region.shape)
    mean, counts = reduced(region, site, point.axes, (pattern, "mean"), mask)
    if counts is not None:
        check_selected(f"{subject}: `reference_where`", counts, EditError)
    return Patch(site, Set(mean.to(region.dtype)), where)


def mean_pattern(verb: str, site: Site, over: str | Sequence[str]) -> str:
    """Return the einops pattern that reduces the axes `over` of a traced site to length 1.

    `verb` is the name of the calling function, for error messages.
    """
    if site.point is None:
        raise SiteError(
            f"{verb} at {site!r} needs axis names. Create the site with hook_points(model, *inputs).site(...)."
        )
    axes = site.point.axes
    over = (over,) if isinstance(over, str) else tuple(over)
    if not over:
        raise SiteError(
            f"{verb} at {site!r}: the argument over= is empty. Pass at least one of the axes ({', '.join(axes)})."
        )
    if unknown := [axis for axis in over if axis not in axes]:
        raise SiteError(
            f"{verb} at {site!r}: the argument over= contains {unknown}, but the axes are ({', '.join(axes)})."
            + did_you_mean(str(unknown[0]), axes)
        )
    names = [f"axis{number}" for number in range(len(axes))]  # names from a user may not be valid in einops
    left = ["1" if axis in over else name for axis, name in zip(axes, names, strict=True)]
    return f"{' '.join(names)} -> {' '.join(left)}"


def check_selected(subject: str, counts: torch.Tensor, error: type[ChanpatchError]) -> None:
    """Raise an exception of class `error` if a mask selected nothing for at least one element of a mean.

    `counts` contains the number of selected elements for each element of the mean. `subject` names the mask.
    """
    if empty := int((counts == 0).sum()):
        raise error(
            f"{subject} selects nothing for {empty} of the {counts.numel()} elements in the mean. Select more "
            "elements, or pass more axes in over=."
        )


def resample_ablate(
    site: Site, reference: Source, *, seed: int = 0, per: Per = "episode", where: Mask | None = None
) -> Patch:
    """Return a patch that replaces each row with a random row from a reference set (see Resample).

    Args:
        site, where: Same as in Patch.
        reference: Same as in mean_ablate.
        seed: Random seed, an integer.
        per: In a rollout, whether to draw one reference row per `"episode"` or one reference row per `"step"`.

    Raises:
        BatchAxisError: If the hook point's batch axis is unknown.
        EditError: If the reference does not have the region's axes, or if `seed` or `per` is invalid.

    Example:
        >>> from chanpatch import hook_points
        >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(4, 2))
        >>> resample_ablate(points.site(".out", feature=1), torch.tensor([[1.0], [3.0]]))
        Patch(Site('.out', feature=1), Resample)

    References:
        Chan et al. 2022, "Causal scrubbing", section 2.
    """
    region = _region(site, reference)
    if site.point is None or site.point.batch_axis is None:
        raise BatchAxisError(f"resample_ablate at {site!r} needs a known batch axis. {no_batch(site)}")
    return Patch(site, Resample(region, seed, site.point.batch_axis, per), where)


def patch_in(
    site: Site, source: Source | float | None = None, *, donor: InputsOf | None = None, where: Mask | None = None
) -> Patch:
    """Return a patch that replaces the region with an activation from another run (activation patching).

    Args:
        site, where: Same as in Patch.
        source: A number; an ActivationCache; or a tensor with the axes of the region or of the whole hook point. The
            batch axis of an activation must have the same length as in the patched run, or length 1.
        donor: Function to use instead of `source`. The function maps the context to other inputs (a tensor, a tuple of
            positional arguments or a dict of keyword arguments), with one row for each row of `context.inputs`. In each
            call to the patched model, the traced method of the unpatched model also runs on these inputs, without
            gradients or side effects. The activation from this run is patched in. Patches with the same donor function
            share one run.

    Raises:
        EditError: If `source` and `donor` are both given or both omitted, or if the given argument has the wrong type.

    Example:
        >>> patch_in(Site(".out"), torch.tensor([[1.0, 2.0, 3.0]])).edit.value
        tensor([[1., 2., 3.]])

    References:
        Meng et al. 2022, "Locating and editing factual associations in GPT", section 2.1.
    """
    if (source is None) == (donor is None):
        raise EditError(
            f"patch_in at {site!r} needs exactly one of source and donor; got {'both' if donor else 'neither'}."
        )
    if donor is None:
        return Patch(site, Set(source if isinstance(source, Real) else _region(site, source)), where)
    if not callable(donor):
        raise EditError(
            f"The donor at {site!r} must be a function that maps the context to inputs; got {type(donor).__name__}. To "
            "patch in an activation, pass it as `source`. To use fixed inputs, pass lambda context: inputs."
        )
    return Patch(site, Donor(donor), where)


def steer(site: Site, vector: Source | float, coefficient: float = 1.0, *, where: Mask | None = None) -> Patch:
    """Return a patch that adds a steering vector to the region.

    Args:
        site, where: Same as in Patch.
        vector: Same as `source` in patch_in, except that each axis of a tensor may also have length 1.
        coefficient: Multiplier for the vector.

    Example:
        >>> steer(Site(".out"), torch.tensor([[1.0, 0.0]]), coefficient=-2.0).edit(torch.zeros(1, 2))
        tensor([[-2.,  0.]])

    References:
        Turner et al. 2023, "Steering language models with activation engineering", section 3.
    """
    return Patch(site, Add(vector if isinstance(vector, Real) else _region(site, vector), coefficient), where)


def edit(site: Site, function: Edit, *, where: Mask | None = None) -> Patch:
    """Return a patch that applies a custom function.

    Args:
        site, function, where: Same as `site`, `edit` and `where` in Patch.

    Example:
        >>> halve = edit(Site("fc", feature=3), lambda activation: activation / 2)
    """
    return Patch(site, function, where)


def _region(site: Site, source: Any) -> Any:
    """Return the activation in the region of `site` from `source`, a cache or a tensor.

    The source contains the activation either in the region or at the whole hook point. A tensor is returned unchanged
    unless the site has a trace and the tensor's shape matches only the whole hook point.
    """
    point, whole = site.point, site.indexed()
    if isinstance(source, torch.Tensor):
        if point is None or not fits(source, point.lengths):
            return source
        most = {point.axes.index(axis): most_positions(index) for axis, index in site.indices}
        short = all(axis == point.batch_axis or n <= most.get(axis, n) for axis, n in enumerate(source.shape))
        if short and fits(source, region_lengths(site, point), or_one=True):
            return source
        return read(source, site.positions(point.axes, source.shape))
    if not isinstance(source, Mapping):
        raise EditError(
            f"The activation for {site!r} must be a tensor with the region's axes or an ActivationCache; got "
            f"{type(source).__name__}."
        )
    if site in source:
        return source[site]
    if point is None or whole not in source:
        raise EditError(
            f"The cache contains neither {site!r} nor its whole hook point, so record one of the two. Sites in the "
            f"cache: {', '.join(map(repr, source))}."
        )
    if source[whole].dim() != len(point.axes):
        raise EditError(
            f"The cache contains {whole!r} with shape {tuple(source[whole].shape)}, but {site!r} needs axes "
            f"({', '.join(point.axes)}). Record the hook point without reduce."
        )
    return read(source[whole], site.positions(point.axes, source[whole].shape))
