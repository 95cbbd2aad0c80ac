"""Reductions of a region to fewer axes, and the names of the axes that they leave."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import einops
import torch
from torch import Tensor

from ..errors import SiteError
from ..registry.sites import Axes, Site

Reduce: TypeAlias = 'Literal["sum", "mean", "max", "norm"] | tuple[str, str | Callable[..., Tensor]]'


_KEPT = ("batch", "channel", "feature")


@dataclass(frozen=True)
class InDouble:
    """A reduction that is taken in double precision, whatever the model computes in."""

    reduce: Reduce


def reduced_axes(site: Site, axes: Axes, reduce: Reduce | InDouble | None) -> Axes:
    """Return the axes that a reduction leaves.

    Raises:
        SiteError: If the reduction is none, or cannot tell which axes to leave.
    """
    if isinstance(reduce, InDouble):
        reduce = reduce.reduce
    if reduce is None:
        return axes
    if isinstance(reduce, tuple):
        left, _, right = reduce[0].partition("->")
        rest = len(axes) - len(_TOKEN.findall(left)) + 1
        tokens, remain = (_expanded(side, rest) for side in (left, right))
        named = dict(zip(tokens, axes, strict=True)) if len(tokens) == len(axes) else {}
        return tuple(named.get(token, token.strip("()")) for token in remain)
    if reduce not in _OPERATIONS:
        raise SiteError(
            f"reduce={reduce!r}: it is 'sum', 'mean', 'max', 'norm' or an einops pair ('b c h w -> b c', 'sum')."
        )
    unnamed = [axis for axis in axes if re.fullmatch(r"axis\d+", axis)]
    if unnamed:
        raise SiteError(
            f"reduce={reduce!r} at {site!r} keeps batch, channel and feature, but the axes ({', '.join(axes)}) have no "
            f"such names. Name them, hook_points(..., axes={{'{site.name}': (...)}}), or give an einops pair."
        )
    return tuple(axis for axis in axes if axis in _KEPT)


_OPERATIONS: dict[str, Any] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "max": torch.amax,
    "norm": torch.linalg.vector_norm,
}


_TOKEN = re.compile(r"\([^)]*\)|\S+")


def _expanded(side: str, rest: int) -> list[str]:
    """Return the tokens of one side of a pattern, with an ellipsis written out as one token per axis it stands for."""
    return [
        each
        for token in _TOKEN.findall(side)
        for each in ([f"...{number}" for number in range(rest)] if token == "..." else [token])
    ]


def reduced(region: Tensor, site: Site, axes: Axes, reduce: Reduce | InDouble | None) -> Tensor:
    """Return a region reduced.

    Args:
        region: With these axes; on the meta device to see only whether the reduction applies.
        site: What it is of.
        axes: Of the region.
        reduce: As in recording.

    Raises:
        SiteError: If the reduction does not apply to such a region.
    """
    if isinstance(reduce, InDouble):
        if region.is_complex():
            raise SiteError(
                f"{site!r} is {region.dtype}, and a double holds half of a complex number only. Give "
                "torch.view_as_real of it a name in the forward, tap('name', ...), and take that."
            )
        wide = torch.float32 if region.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
        return reduced(region.to(wide), site, axes, reduce.reduce)
    kept = reduced_axes(site, axes, reduce)
    if reduce is None or kept == axes:
        # Where there is nothing to reduce, each number is its own sum, mean and maximum, but not its own norm.
        return region.abs() if reduce == "norm" else region
    if region.dtype in (torch.float16, torch.bfloat16):
        region = region.float()  # a sum is soon beyond what half precision holds
    try:
        if isinstance(reduce, tuple):
            return einops.reduce(region, *reduce)
        over = [number for number, axis in enumerate(axes) if axis not in kept]
        result: Tensor = _OPERATIONS[reduce](region, dim=over)
        return result
    except (einops.EinopsError, RuntimeError, TypeError) as fault:
        raise SiteError(
            f"reduce={reduce!r} does not apply at {site!r}, a {region.dtype} region with axes ({', '.join(axes)}). "
            f"{str(fault).strip()}"
        ) from fault
