"""From what a user names to the hook points meant, with a trace or by names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ._tree import Path, parse_path
from .errors import HookPointError, SiteError, did_you_mean
from .points import HookPoint, HookPoints
from .sites import Site


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


@dataclass(frozen=True)
class BarePoint:
    """What a name alone says of a hook point, where the model was not traced."""

    name: str
    module: str
    side: Literal["in", "out"]
    path: Path
    call: int | None


def _parsed(known: Mapping[str, nn.Module], name: str) -> BarePoint:
    if name and name in known:
        return BarePoint(name, name, "out", (), None)
    ends = [match.start() for match in re.finditer(r"\.(?:in|out)(?![^.\[])|$", name)]
    for end in reversed(ends):  # a module may itself be called "out": the longest module name wins
        module, _, call = name[:end].partition("#") if name[:end] not in known else (name[:end], "", "")
        tail = re.fullmatch(r"\.(in|out)(.*)|", name[end:], re.DOTALL)
        path = parse_path(tail[2] or "") if tail else None
        if module in known and path is not None and (not call or call.isdigit()) and (name[end:] or module):
            side: Literal["in", "out"] = "in" if tail and tail[1] == "in" else "out"
            if side == "out" or path:
                return BarePoint(name, module, side, path, int(call) if call else None)
    raise HookPointError(
        f"No hook point named '{name}'.{did_you_mean(name, known)} "
        f"({len(known)} modules; hook_points(model, *inputs) lists every hook point, taps included.)"
    )


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
