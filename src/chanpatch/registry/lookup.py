"""From what a user names to the hook points meant, with a trace or by names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..errors import HookPointError, SiteError, TraceMismatchError
from .axes import axis_names
from .names import BarePoint, _parsed
from .points import HookPoints
from .sites import Axes, HookPoint, Site


def resolve(modules: Mapping[str, nn.Module], site: Site) -> HookPoint | BarePoint:
    """Return where a site listens: its traced hook point, or what its name alone says.

    Args:
        modules: Of the model, by all their names.
        site: Any.

    Raises:
        HookPointError: If no module of the model has that name.
    """
    point = site.point
    if point is not None and (point.side == "tap" or point.module in modules):
        return point
    return _parsed(modules, site.name)


def sites_of(
    points_or_model: HookPoints | nn.Module, sites: str | Site | HookPoint | Iterable[str | Site | HookPoint]
) -> tuple[Site, ...]:
    """Return sites from names, hook points or sites, in the order given, without duplicates.

    Raises:
        HookPointError, SiteError: If one of them does not exist, all faults at once, or if there are none.
    """
    each = [sites] if isinstance(sites, (str, Site, HookPoint)) else list(sites)
    named = [item if isinstance(item, Site) else Site(item.name).at(item) if isinstance(item, HookPoint)
             else Site(item) for item in each]  # fmt: skip
    if not named:
        raise SiteError("There are no sites to record: sites is empty. Name one or more, as in sites=['conv1'].")
    return tuple(dict.fromkeys(bound(points_or_model, named)))


def bound(points_or_model: HookPoints | nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Check sites against a trace, or names alone against a model, all faults at once."""
    found, faults = [], []
    model = model_of(points_or_model)
    modules = dict(model.named_modules(remove_duplicate=False)) if model is points_or_model else {}
    for site in sites:
        try:
            if isinstance(points_or_model, HookPoints):
                site = points_or_model.bind(site)
            else:
                resolve(modules, site)
            found.append(site)
        except (HookPointError, SiteError) as fault:
            faults.append(fault)
    if len(faults) > 1:
        raise type(faults[0])("\n".join([f"{len(faults)} faults:", *(f"- {fault}" for fault in faults)]))
    if faults:
        raise faults[0]
    return found


def model_of(points_or_model: HookPoints | nn.Module) -> nn.Module:
    """Return the model.

    Raises:
        TypeError: If it is neither HookPoints nor a module.
    """
    if isinstance(points_or_model, HookPoints):
        return points_or_model.model
    if isinstance(points_or_model, nn.Module):
        return points_or_model
    raise TypeError(f"Expected HookPoints or a torch.nn.Module, not {type(points_or_model).__name__}.")


def refuse_untraced(points: object) -> None:
    """Raise unless these are the HookPoints of a model.

    Raises:
        TypeError: If they are anything else, such as the model itself.
    """
    if not isinstance(points, HookPoints):
        raise TypeError(f"Expected HookPoints, not {type(points).__name__}: points = hook_points(model, *inputs).")


def no_batch(site: Site) -> str:
    """Say why a site has no rows, and what to do."""
    if site.point is None:
        return "Take the site from points.site(...) of hook_points(model, *inputs), which proves the batch axis."
    return (
        f"The trace could not prove which axis of '{site.name}' is the batch: no single axis grew when the model "
        "was run with one row more. Name it where the inputs have it: hook_points(..., axes={'.in[0]': (...)})."
    )


def check_shape_against_trace(leaf: Tensor, point: HookPoint) -> None:
    """Raise if a tensor differs from the traced one in anything but the batch and the device."""
    traced = [point.length(axis) for axis in point.axes]
    same = len(traced) == leaf.dim() and all(
        expected is None or axis == "batch" or expected == length
        for axis, expected, length in zip(point.axes, traced, leaf.shape, strict=True)
    )
    if not same:
        lengths = ", ".join("any" if length is None else str(length) for length in traced)
        raise TraceMismatchError(
            f"Hook point '{point.name}' has shape {tuple(leaf.shape)} in this forward, but axes "
            f"({', '.join(point.axes)}) = ({lengths}) in the trace. Trace inputs like these with "
            f"hook_points(); for inputs of many lengths, use a site that has no trace: Site('{point.name}')."
        )
    if leaf.dtype != point.dtype:
        raise TraceMismatchError(
            f"Hook point '{point.name}' is {leaf.dtype} in this forward, but {point.dtype} in the trace. Call "
            "hook_points() on the model as it is run: in the same dtype, inside the same torch.autocast."
        )


def bare_axes(point: BarePoint, module: nn.Module | None, leaf: Tensor) -> tuple[Axes, int | None]:
    """Return the axis names that the module's type alone gives, and which is the batch."""
    path = point.path
    names = (None,) * leaf.dim() if module is None else axis_names(module, point.side, path, leaf.dim(), None)
    axes = tuple(name or f"axis{number}" for number, name in enumerate(names))
    return axes, axes.index("batch") if "batch" in axes else None


def region_lengths(site: Site, point: HookPoint) -> list[int | None]:
    """Return the lengths of a traced site's region; None for the batch."""
    chosen = dict(site.indices)
    lengths = []
    for number, axis in enumerate(point.axes):
        indices = chosen.get(axis)
        length = len(indices) if isinstance(indices, tuple) else point.length(axis)
        lengths.append(None if number == point.batch_axis else length)
    return lengths


def root_of(points_or_model: HookPoints | nn.Module) -> tuple[nn.Module, str, dict[str, int] | None]:
    """Return the model, its method, and how often each module was called in the trace; None without a trace."""
    if isinstance(points_or_model, HookPoints):
        return points_or_model.model, points_or_model.method, points_or_model.calls
    return model_of(points_or_model), "__call__", None
