"""Result of a contrast: one row per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..channels import Collector
from ..engine.state import undisturbed
from ..errors import ContrastError, SiteError
from ..patching.patch import Mask
from ..patching.verbs import check_selected, mean_pattern
from ..registry.points import HookPoints, site_of
from ..registry.sites import Site
from ..results import Effects, columns, interval_notes, shown_effect, shown_p
from ..statistics.interval import Floats


@dataclass(frozen=True, repr=False, eq=False)
class Contrast(Effects):
    """Differences between clean and corrupted inputs: one row per channel, in execution order.

    All values refer to the channel's reduced activation (by default, the sum over positions), in double precision. The
    table and the figure show the largest effects first, as does `top`.

    Attributes:
        sites: Site of each row's channel, for use in patches: `[zero_ablate(site) for site in result.top(16).sites]`.
        difference: Mean of the clean minus the corrupted activation, over pairs.
        absolute: Mean absolute difference between the clean and the corrupted activation, over pairs.
        std: Standard deviation of the activation over the background inputs, or NaN if there is no background.
        low, high: Both endpoints of the 95% interval for the effect, over pairs or clusters of pairs; NaN if the
            interval is withheld. The intervals are simultaneous over all channels. An interval excludes 0 if and only
            if `p` is at most 0.05.
        p: Two-sided sign-flip p-value for the null hypothesis of zero mean difference, corrected for the number of
            channels by `chanpatch.statistics.max_t_test`, so the p-value is valid for `top(1)`. NaN if `no_p` is not
            empty.
        note: Reason why the interval is withheld; `"few"` if there are six to nine independent pairs; otherwise, an
            empty string.
        no_p: Reason why there are no p-values, or an empty string.
        pairs: Number of pairs.
        clusters: Number of independent clusters of pairs.
        background: Number of background inputs.
        skipped: Hook points that the search excluded, and the reason for each.
        effect_label: Axis label for figures: the meaning and unit of the effect, and the number of pairs.
    """

    sites: tuple[Site, ...]
    difference: Floats
    absolute: Floats
    std: Floats
    low: Floats
    high: Floats
    p: Floats
    note: NDArray[np.str_]
    no_p: str
    pairs: int
    clusters: int
    background: int
    skipped: dict[str, str]
    effect_label: str
    _effect: Floats
    _points: HookPoints
    _inputs: tuple[Any, Any]
    _batch_size: int
    _where: Mask | None
    _by_row = ("sites", "difference", "absolute", "std", "_effect", "low", "high", "p", "note")

    def effect(self) -> Floats:
        """Return each channel's mean difference, or its mean absolute difference after `contrast(absolute=True)`.

        With a background, the effect is divided by `std`, and is NaN for channels whose variation over the background
        is within rounding error.
        """
        return self._effect

    def steering_vector(
        self, site: str | Site, *, over: str | Sequence[str] = ("batch",), where: Mask | None = None
    ) -> Tensor:
        """Return the mean difference between clean and corrupted activations at a site, as a vector for `steer`.

        Args:
            site: Any site in the model, not necessarily part of the contrast.
            over: Axis or axes to average over, including the batch axis.
            where: Elements to average, as in `recording`; None for the elements that the contrast selected.

        Returns:
            Tensor with the same axes as the site's region, and size 1 along the axes in `over`.

        Raises:
            SiteError: If the batch axis is unknown or not in `over`, or `over` contains an unknown axis.
            ContrastError: If `where` selects no activations to average for an element of the vector.

        References:
            Turner et al. 2023, "Steering language models with activation engineering", for one pair; Rimsky et al.
            2023, "Steering Llama 2 via contrastive activation addition", for the mean over many pairs.
        """
        bound = site_of(self._points, site)
        point = self._points[bound.name]
        if point.batch_axis is None:
            raise SiteError(
                f"{bound!r} has no known batch axis, so a mean over pairs cannot be computed. Name axes with "
                "hook_points(..., axes={...})."
            )
        pattern = mean_pattern("steering_vector", bound, over)
        if (batch := point.axes[point.batch_axis]) not in over:
            raise SiteError(f"steering_vector at {bound!r}: over= must contain {batch!r}; got {over!r}.")
        where = self._where if where is None else where
        where = torch.ones((1,) * len(point.axes), dtype=torch.bool) if where is None else where
        means: list[Tensor] = []
        with undisturbed(self._points.model) as run:
            collect = Collector(run, self._points, [bound], (pattern, "sum"), self._batch_size, ContrastError, where)
            for inputs in self._inputs:
                run.put_back()
                total, counts = torch.zeros(()), torch.zeros((), dtype=torch.long)
                for cache in collect.caches(inputs):
                    found = cache.counts[bound]  # type: ignore[index]  # recorded with `where`
                    total, counts = total + torch.where(found > 0, cache[bound], 0.0), counts + found
                check_selected(f"steering_vector at {bound!r}: `where`", counts, ContrastError)
                means.append(total / counts)
        return (means[0] - means[1]).to(point.dtype)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per channel: its site, statistics and note, and the result's `no_p`."""
        numbers = {name.lstrip("_"): getattr(self, name) for name in self._by_row[1:]}
        return columns(site=map(repr, self.sites), **numbers, no_p=[self.no_p] * len(self))

    def _lines(self) -> list[dict[str, Any]]:
        return [
            {
                "site": each["site"],
                **shown_effect("effect", each),
                "difference": f"{each['difference']:+.3g}",
                "std": f"{each['std']:.3g}",
                **({} if self.no_p else {"p (corrected)": shown_p(each["p"])}),
            }
            for each in super()._lines()
        ]

    def _title(self) -> str:
        title = f"{len(self)} channels, {self.pairs} pairs in {self.clusters} clusters"
        return title + (f", {self.background} background inputs" if self.background else ", no background")

    def _notes(self) -> list[str]:
        notes = [f"No p-values: {self.no_p}"] * bool(self.no_p)
        notes += interval_notes(self.note) if not self.no_p else []
        return notes + [f"Skipped {len(self.skipped)} hook points (see .skipped)"] * bool(self.skipped)
