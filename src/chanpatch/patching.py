"""Writing sites: the field's verbs for patches, and the context in which a model runs with them.

patch = zero_ablate(points.site("embedder.relu3", channel=55))
with patched(model, patch):
    model(observations)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ._checks import no_batch, refuse_unhookable
from ._ledger import Ledger
from ._lookup import model_of
from ._patches import AppliedPatches, Patch
from ._regions import read
from ._typing import Axes, Mask
from .edits import Add, Edit, Resample, Set
from .errors import BatchAxisError, EditError, SiteError
from .points import HookPoints
from .sites import Site


def zero_ablate(site: Site, *, where: Mask | None = None) -> Patch:
    """Return a patch that sets the region to zero.

    Args:
        site: What to ablate.
        where: As in Patch.
    """
    return Patch(site, Set(0.0), where)


def mean_ablate(
    site: Site,
    reference: Mapping[Any, Tensor] | Tensor,
    *,
    over: Sequence[str] = ("batch",),
    where: Mask | None = None,
) -> Patch:
    """Return a patch that sets the region to its mean over a reference set.

    Args:
        site: What to ablate; taken from `HookPoints.site`, so that its axes have names.
        reference: Activations of that region, or of its whole hook point, over the reference inputs: an
            ActivationCache or a tensor with the region's axes.
        over: Axes to average over; the others keep a mean each.
        where: As in Patch.

    Raises:
        SiteError: If the site has no axis of that name.
        EditError: If the reference does not have the region's axes.
    """
    region = _reference(site, reference)
    axes = _named_axes(site, "mean_ablate")
    unknown = [axis for axis in over if axis not in axes]
    if unknown:
        raise SiteError(f"mean_ablate over {unknown} at {site!r}: its axes are ({', '.join(axes)}).")
    if not region.is_floating_point():
        raise EditError(f"mean_ablate at {site!r}: the reference is {region.dtype}, which has no mean.")
    return Patch(site, Set(region.mean(dim=[axes.index(axis) for axis in over], keepdim=True)), where)


def resample_ablate(
    site: Site, reference: Mapping[Any, Tensor] | Tensor, *, seed: int, where: Mask | None = None
) -> Patch:
    """Return a patch that replaces each row by a row of a reference set, drawn at random.

    Args:
        site: What to ablate; taken from `HookPoints.site`, whose trace proves the batch axis.
        reference: Activations of that region, or of its whole hook point, over the reference inputs.
        seed: Of the draw, which depends on it, the call index and the row's number only.
        where: As in Patch.

    Raises:
        BatchAxisError: If the hook point's batch axis is not proved.
        EditError: If the reference does not have the region's axes.

    References:
        Chan et al. 2022, "Causal scrubbing: a method for rigorously testing interpretability hypotheses".
    """
    region = _reference(site, reference)
    if site.point is None or site.point.batch_axis is None:
        raise BatchAxisError(f"resample_ablate at {site!r} needs rows. {no_batch(site)}")
    return Patch(site, Resample(region, seed, site.point.batch_axis), where)


def patch_in(site: Site, source: Mapping[Any, Tensor] | Tensor, *, where: Mask | None = None) -> Patch:
    """Return a patch that puts the activation of another run in place of the region (activation patching).

    Args:
        site: Where to patch.
        source: Activations of that region, or of its whole hook point, in the other run: an ActivationCache or a
            tensor with the region's axes. Its batch has the length of the patched run's, or 1.
        where: As in Patch.

    Raises:
        EditError: If the source does not have the region's axes.

    References:
        Meng et al. 2022, "Locating and editing factual associations in GPT", section 2.1.
    """
    return Patch(site, Set(_reference(site, source)), where)


def steer(
    site: Site, vector: Mapping[Any, Tensor] | Tensor, coefficient: float = 1.0, *, where: Mask | None = None
) -> Patch:
    """Return a patch that adds a steering vector to the region.

    Args:
        site: Where to add.
        vector: Tensor with one length per axis of the region, each equal or 1, or an ActivationCache that has it.
        coefficient: Multiplies the vector.
        where: As in Patch.

    References:
        Turner et al. 2023, "Steering language models with activation engineering".
    """
    return Patch(site, Add(_reference(site, vector), coefficient), where)


def edit(site: Site, function: Edit | Callable[..., Tensor], *, where: Mask | None = None) -> Patch:
    """Return a patch that applies a function of your own.

    Args:
        site: Where.
        function: `activation -> activation`, or with a keyword-only `context` as second parameter.
        where: As in Patch.

    Example:
        >>> halve = edit(Site("fc", feature=3), lambda activation: activation / 2)
    """
    return Patch(site, function, where)


@contextmanager
def patched(
    points_or_model: HookPoints | nn.Module,
    patches: Patch | Iterable[Patch],
    *,
    allow_unreached: Iterable[str] = (),
    check_nan: bool = True,
) -> Iterator[Ledger]:
    """Run the model with patches inside while the context is open.

    Args:
        points_or_model: The model, or its HookPoints: then every site is checked against the trace at once.
        patches: One or more, applied in the order given; contexts nest, outer patches first.
        allow_unreached: Names of hook points whose patches need not run.
        check_nan: Raise when a patch brings NaN into a region that had none.

    Yields:
        The ledger: what each patch has done so far.

    Raises:
        HookPointError, SiteError: At entry, if a site does not exist; all faults at once.
        EditError: In the forward, if an edit's result does not fit.
        NaNError: At the end of a root call.
        UnreachedError: At exit, if a patch never ran; it masks no exception in flight.
        UnsupportedModelError: At entry, if the model ignores hooks.
        ConcurrencyError: In the forward, if it runs in another thread.
    """
    model = model_of(points_or_model)
    refuse_unhookable(model)
    applied = AppliedPatches(points_or_model, patches, allow_unreached=allow_unreached, check_nan=check_nan)
    session = applied.session
    session.on_end = lambda opener: applied.raise_nan()
    session.confine_to_thread()
    with session.opened():
        try:
            yield applied.ledger
        except Exception as error:
            applied.raise_nan(cause=error)
            raise
    applied.raise_nan()
    applied.raise_unreached(applied.unreached(), "inside patched()")


def _reference(site: Site, source: Mapping[Any, Tensor] | Tensor) -> Tensor:
    """Return the region's activation from a tensor, or from a cache of that site or of its whole hook point."""
    if isinstance(source, Tensor):
        return source
    if site in source:
        return source[site]
    whole = Site(site.name)
    if site.point is not None and whole in source:
        activation = source[whole]
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
