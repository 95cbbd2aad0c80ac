"""Channel sums of many inputs, reduced inside the hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._batches import Inputs, batches
from .._lookup import sites_of
from .._reductions import reduced_axes
from .._typing import Axes
from ..errors import ProbeError
from ..points import HookPoint, HookPoints
from ..recording import run_with_cache
from ..sites import Site
from ..tracing import undisturbed

_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "max": torch.amax,
    "norm": torch.linalg.vector_norm,
}


def channel_sums(
    points: HookPoints,
    inputs: Inputs | Iterable[Inputs],
    site: str | Site | HookPoint,
    *,
    reduce: Literal["sum", "mean", "max", "norm"] = "sum",
    batch_size: int = 64,
) -> NDArray[np.float64]:
    """Return the sum of each channel over its positions, for every input: `(input, channel)`.

    The model runs without gradients, batch by batch and no further than the site; of each batch only the sums are
    kept, taken in double precision. Random number generators, buffers and training flags are put back afterwards.

    Args:
        points: Of the model.
        inputs: All inputs, `(input, ...)`: a tensor, a tuple of the model's arguments or a dict of its keywords; or
            any other iterable of batches of that kind.
        site: A hook point or a region of one, with a channel or a feature axis.
        reduce: What is taken over the positions: their sum, mean, maximum or Euclidean norm.
        batch_size: How many inputs go into one forward; the batches of an iterable go as they are.

    Raises:
        HookPointError, SiteError: If the site does not exist, or its axes have no names.
        ProbeError: If the site has no channels or no proved batch axis, or there are no inputs.

    Example:
        >>> from chanpatch import hook_points
        >>> model = torch.nn.Conv2d(3, 8, 3)
        >>> points = hook_points(model, torch.zeros(2, 3, 6, 6))
        >>> channel_sums(points, torch.zeros(100, 3, 6, 6), ".out").shape
        (100, 8)
    """
    if not isinstance(points, HookPoints):
        raise ProbeError(
            f"points is a {type(points).__name__}: give the model's HookPoints, hook_points(model, inputs)."
        )
    if reduce not in _REDUCTIONS:
        raise ProbeError(f"reduce={reduce!r}: it is one of {', '.join(map(repr, _REDUCTIONS))}.")
    if batch_size < 1:
        raise ProbeError(f"batch_size is {batch_size}, but a batch has at least one input.")
    (bound,) = sites_of(points, site)
    axes = points[bound.name].axes
    channel = _channel_axis(bound, points[bound.name])

    def reduced(activation: Tensor, over: tuple[int, ...]) -> Tensor:
        wide = torch.float32 if activation.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
        return _REDUCTIONS[reduce](activation.to(wide), dim=over)

    pair = (f"{' '.join(axes)} -> batch {channel}", reduced)
    parts = []
    with undisturbed(points.model):
        for arguments, keywords in _watched(batches(inputs, batch_size)):
            cache = run_with_cache(points, *arguments, sites=bound, reduce=pair, device="cpu", stop=True, **keywords)
            parts.append(cache[bound].double().numpy())
    if not parts:
        raise ProbeError("inputs is empty: give at least one input.")
    sums: NDArray[np.float64] = np.concatenate(parts)
    # Where there was nothing to reduce, each number is its own sum, mean and maximum, but not its own norm.
    return abs(sums) if reduce == "norm" else sums


def _channel_axis(site: Site, point: HookPoint) -> str:
    kept: Axes = reduced_axes(site, point.axes, "sum")
    channels = [axis for axis in kept if axis != "batch"]
    if point.batch_axis is None or "batch" not in kept or len(channels) != 1:
        raise ProbeError(
            f"{site!r} has axes ({', '.join(point.axes)})"
            + (", and its batch axis is not proved" if point.batch_axis is None else "")
            + ". Channel sums need the batch and one axis named channel or feature; "
            "hook_points(..., axes={...}) names axes."
        )
    return channels[0]


def _watched(forwards: Iterable[Any]) -> Iterable[Any]:
    """Return the same behind a progress bar on a terminal, after two seconds, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return forwards
    watched: Iterable[Any] = tqdm(forwards, unit="batch", delay=2, disable=None)
    return watched
