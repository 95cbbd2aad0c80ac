"""Compute channel sums for many inputs. The sums are computed inside the hook, so full activations are not stored."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..channels import Collector, channel_axis, check_leaves_channels
from ..engine.inputs import Inputs, first_batch
from ..engine.state import undisturbed
from ..errors import ProbeError
from ..patching.patch import Mask
from ..patching.recording import Reduce
from ..registry.points import HookPoints, site_of, traced
from ..registry.sites import HookPoint, Site
from ..results import progress_bar


def channel_sums(
    points_or_model: HookPoints | nn.Module,
    inputs: Inputs | Iterable[Inputs],
    site: str | Site | HookPoint,
    *,
    reduce: Reduce = "sum",
    where: Mask | None = None,
    batch_size: int = 64,
    executor: Executor | None = None,
) -> NDArray[np.float64]:
    """Sum each channel over its positions, for every input; the result has shape `(input, channel)`.

    The model runs without gradients or side effects, and only up to the site. Sums are computed in double precision.

    Args:
        points_or_model: Model (which is then traced with the first batch) or its HookPoints.
        inputs: All inputs, with shape `(input, ...)`: a tensor, a tuple of positional arguments, a dict of keyword
            arguments, or an iterable of batches in any of these forms.
        site: Site with a channel or feature axis.
        reduce: Reduction over positions, as in `recording`: `"sum"`, `"mean"`, `"max"`, `"norm"` (Euclidean), or an
            einops pattern and a reduction, such as `("b c h w -> b c", "sum")`. The pattern must keep the batch axis
            and at most one other axis.
        where: Elements to reduce, as in `recording`; a mask has one row per input or a single row. A sum over no
            elements is NaN.
        batch_size: Number of inputs per forward pass. Batches from an iterable are not split.
        executor: Executor whose workers share the batches, as for `sweep`. The sums are identical to those without an
            executor. If `inputs` is an iterable, all batches are read before the first one is sent.

    Raises:
        HookPointError, SiteError: If the site does not exist, has unnamed axes, or cannot be reduced.
        EditError: If `where` does not match the site's region.
        ProbeError: If the site has no channels or an unknown batch axis, there are no inputs, or the first axis of the
            inputs is not the batch axis.
        ExecutorError: For the same reasons as in `sweep`. The attribute `partial` is None.

    Example:
        >>> import torch
        >>> from chanpatch import hook_points
        >>> model = torch.nn.Conv2d(3, 8, 3)
        >>> points = hook_points(model, torch.zeros(2, 3, 6, 6))
        >>> channel_sums(points, torch.zeros(100, 3, 6, 6), ".out").shape
        (100, 8)
    """
    first, inputs = first_batch(inputs, batch_size)
    points = traced(points_or_model, first)
    bound = site_of(points, site)
    if isinstance(reduce, str):
        channel_axis(bound, "Channel sums", ProbeError)
    check_leaves_channels(bound, reduce)
    run = undisturbed(points.model)
    with progress_bar(None, None, "batch") as advance:
        collect = Collector(run, points, [bound], reduce, batch_size, ProbeError, where)
        collect = collect.spread(executor, {"inputs": inputs}, advance, finite=False)
        parts: list[NDArray[np.float64]] = []
        with run:
            for part in collect.parts("inputs", inputs, finite=False):
                parts.append(part[bound])
                advance(executor is None)
    if not parts:
        raise ProbeError("inputs is empty: pass at least one input.")
    return np.concatenate(parts)
