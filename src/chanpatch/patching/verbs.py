"""Writing sites: the field's verbs for patches, and the context in which a model runs with them.

patch = zero_ablate(points.site("embedder.relu3", channel=55))
with patched(model, patch):
    model(observations)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ..engine.regions import read
from ..errors import BatchAxisError, EditError, SiteError
from ..registry.sites import Axes, Site, no_batch
from .checks import fits, region_lengths
from .edits import Add, Edit, Resample, Set
from .patch import Mask, Patch


def zero_ablate(site: Site, *, where: Mask | None = None) -> Patch:
    """Return a patch that sets the region to zero.

    Args:
        site: What to ablate.
        where: As in Patch.

    Raises:
        TypeError: If the site is none.
        EditError: If `where` is no bool tensor that fits the site, nor a function.

    Example:
        >>> import torch
        >>> from chanpatch import patched
        >>> model = torch.nn.Linear(2, 3)
        >>> with patched(model, zero_ablate(Site(".out", feature=1))):
        ...     output = model(torch.ones(4, 2))
        >>> output[:, 1]
        tensor([0., 0., 0., 0.], grad_fn=<SelectBackward0>)
    """
    return Patch(site, Set(0.0), where)


def mean_ablate(
    site: Site,
    reference: Mapping[Any, Tensor] | Tensor,
    *,
    over: str | Sequence[str] = ("batch",),
    where: Mask | None = None,
) -> Patch:
    """Return a patch that sets the region to its mean over a reference set.

    Args:
        site: What to ablate; taken from `HookPoints.site`, so that its axes have names.
        reference: Activations of that region, or of its whole hook point, over the reference inputs: an
            ActivationCache or a tensor with the region's axes, such as `(batch, channel, row, col)`; its batch may be
            of any length.
        over: Axis or axes to average over; the others keep a mean each.
        where: As in Patch.

    Raises:
        SiteError: If the site has no axis of that name, or `over` is empty.
        EditError: If the reference does not have the region's axes.

    Example:
        >>> import torch
        >>> from chanpatch import hook_points
        >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(4, 2))
        >>> patch = mean_ablate(points.site(".out", feature=1), torch.tensor([[1.0], [3.0]]))
        >>> patch.edit.value
        tensor([[2.]])

    References:
        Wang et al. 2023, "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small",
        section 2.1.
    """
    region = _reference(site, reference)
    axes = _named_axes(site, "mean_ablate")
    over = (over,) if isinstance(over, str) else tuple(over)
    if not over:
        raise SiteError(f"mean_ablate at {site!r} over no axis. Name one or more of ({', '.join(axes)}): over='batch'.")
    unknown = [axis for axis in over if axis not in axes]
    if unknown:
        raise SiteError(f"mean_ablate over {unknown} at {site!r}: its axes are ({', '.join(axes)}).")
    if not region.is_floating_point():
        raise EditError(f"mean_ablate at {site!r}: the reference is {region.dtype}, which has no mean.")
    return Patch(site, Set(region.mean(dim=[axes.index(axis) for axis in over], keepdim=True)), where)


def resample_ablate(
    site: Site, reference: Mapping[Any, Tensor] | Tensor, *, seed: int = 0, where: Mask | None = None
) -> Patch:
    """Return a patch that replaces each row by a row of a reference set, drawn at random.

    Args:
        site: What to ablate; taken from `HookPoints.site`, whose trace proves the batch axis.
        reference: Activations of that region, or of its whole hook point, over the reference inputs: an
            ActivationCache or a tensor with the region's axes, such as `(batch, channel, row, col)`.
        seed: Of the draw, which depends on it, the call index and the row's number only; a whole number.
        where: As in Patch.

    Raises:
        BatchAxisError: If the hook point's batch axis is not proved.
        EditError: If the reference does not have the region's axes, or the seed is no whole number.

    Example:
        >>> import torch
        >>> from chanpatch import hook_points
        >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(4, 2))
        >>> resample_ablate(points.site(".out", feature=1), torch.tensor([[1.0], [3.0]]), seed=0)
        Patch(Site('.out', feature=1), Resample)

    References:
        Chan et al. 2022, "Causal scrubbing: a method for rigorously testing interpretability hypotheses", section 2.
    """
    region = _reference(site, reference)
    if site.point is None or site.point.batch_axis is None:
        raise BatchAxisError(f"resample_ablate at {site!r} needs rows. {no_batch(site)}")
    return Patch(site, Resample(region, seed, site.point.batch_axis), where)


def patch_in(site: Site, source: Mapping[Any, Tensor] | Tensor | float, *, where: Mask | None = None) -> Patch:
    """Return a patch that puts the activation of another run in place of the region (activation patching).

    Args:
        site: Where to patch.
        source: Activations of that region, or of its whole hook point, in the other run: an ActivationCache or a
            tensor with the region's axes, such as `(batch, channel, row, col)`. Its batch has the length of the
            patched run's, or 1. Or one number.
        where: As in Patch.

    Raises:
        EditError: If the source does not have the region's axes.

    Example:
        >>> import torch
        >>> from chanpatch import patched
        >>> model = torch.nn.Linear(2, 3)
        >>> with patched(model, patch_in(Site(".out"), torch.tensor([[1.0, 2.0, 3.0]]))):
        ...     model(torch.ones(1, 2))
        tensor([[1., 2., 3.]])

    References:
        Meng et al. 2022, "Locating and editing factual associations in GPT", section 2.1.
    """
    return Patch(site, Set(_operand(site, source)), where)


def steer(
    site: Site, vector: Mapping[Any, Tensor] | Tensor | float, coefficient: float = 1.0, *, where: Mask | None = None
) -> Patch:
    """Return a patch that adds a steering vector to the region.

    Args:
        site: Where to add.
        vector: Tensor with one length per axis of the region, each equal or 1; the vector of the whole hook point; an
            ActivationCache that has either; or one number.
        coefficient: Multiplies the vector.
        where: As in Patch.

    Raises:
        EditError: If the vector does not fit the region, or the coefficient is no number.

    Example:
        >>> import torch
        >>> from chanpatch import patched
        >>> model = torch.nn.Linear(2, 3, bias=False)
        >>> with patched(model, steer(Site(".out"), torch.tensor([[1.0, 0.0, 0.0]]), coefficient=-2.0)):
        ...     model(torch.zeros(1, 2)).detach()
        tensor([[-2.,  0.,  0.]])

    References:
        Turner et al. 2023, "Steering language models with activation engineering", section 3.
    """
    return Patch(site, Add(_operand(site, vector), coefficient), where)


def edit(site: Site, function: Edit | Callable[..., Tensor], *, where: Mask | None = None) -> Patch:
    """Return a patch that applies a function of your own.

    Args:
        site: Where.
        function: `activation -> activation`, or with a keyword-only `context` as second parameter.
        where: As in Patch.

    Raises:
        EditError: If the function cannot be called; in the forward, if what it returns does not fit the region.

    Example:
        >>> halve = edit(Site("fc", feature=3), lambda activation: activation / 2)
    """
    return Patch(site, function, where)


def _operand(site: Site, source: Any) -> Any:
    """Return a number as it is, and the region's activation from anything else."""
    return source if isinstance(source, Real) else _reference(site, source)


def _reference(site: Site, source: Mapping[Any, Tensor] | Tensor) -> Tensor:
    """Return the region's activation from a tensor or a cache, of that site or of its whole hook point."""
    if isinstance(source, Tensor):
        point = site.point
        if point is None or fits(source, region_lengths(site, point), or_one=True):
            return source
        lengths = [point.length(axis) for axis in point.axes]
        return read(source, site.positions(point.axes, source.shape)) if fits(source, lengths) else source
    if not isinstance(source, Mapping):
        raise EditError(
            f"The activation for {site!r} is a {type(source).__name__}; it is a tensor with the region's axes, or an "
            "ActivationCache."
        )
    if site in source:
        return source[site]
    whole = Site(site.name)
    if site.point is not None and whole in source:
        activation = source[whole]
        if activation.dim() != len(site.point.axes):
            raise EditError(
                f"The cache holds {whole!r} with shape {tuple(activation.shape)}, of which {site!r} cannot be taken: "
                f"that has axes ({', '.join(site.point.axes)}). Record without reduce."
            )
        return read(activation, site.positions(site.point.axes, activation.shape))
    raise EditError(
        f"The cache holds neither {site!r} nor its whole hook point. It holds {', '.join(map(repr, source))}."
    )


def _named_axes(site: Site, verb: str) -> Axes:
    if site.point is None:
        raise SiteError(
            f"{verb} at {site!r} needs the names of its axes. Take the site from points.site(...) of "
            "hook_points(model, *inputs)."
        )
    return site.point.axes
