"""Sweeps beside the loop that they replace, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chanpatch import HookPoints, Site, patched
from chanpatch.engine.paths import leaves
from chanpatch.sweeps import SweepResult, sweep

ROWS = 12


def total(output: Any) -> Tensor:
    """All that an output holds, one number per row."""
    return torch.stack([leaf.reshape(len(leaf), -1).sum(1) for _, leaf in leaves(output)]).sum(0)


def by_hand(
    points: HookPoints | nn.Module,
    inputs: tuple[Any, ...],
    patches: dict[Any, Any],
    metric: Callable[..., Tensor] = total,
) -> np.ndarray[Any, Any]:
    """The loop that a sweep replaces."""
    model = points.model if isinstance(points, HookPoints) else points
    rows = []
    for each in patches.values():
        with torch.no_grad(), patched(points, each):
            rows.append(metric(model(*inputs)).double())
    return torch.stack(rows).numpy()


def assert_equals_the_loop(
    points: HookPoints | nn.Module, inputs: tuple[Any, ...], patches: dict[Any, Any], **options: Any
) -> SweepResult:
    result = sweep(points, *inputs, patches=patches, metric=total, **options)
    np.testing.assert_allclose(result.values["total"], by_hand(points, inputs, patches), rtol=1e-6, atol=1e-6)
    return result


def strategy_of(result: SweepResult) -> str:
    (strategy,) = {group.strategy for group in result.groups}
    return strategy


def parts(site: Site) -> tuple[Site, ...]:
    """One site per channel, feature or whatever the last axis is; the site itself where it has rows alone."""
    assert site.point is not None
    axes = [axis for axis in site.point.axes if axis != "batch"]
    return site.split("channel" if "channel" in axes else axes[-1]) if axes else (site,)


class Squashed(nn.Module):
    """Three layers with something in between that each test gives."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.between = between

    def forward(self, vector: Tensor) -> Tensor:
        return self.last(self.between(self.second(torch.relu(self.first(vector)))))
