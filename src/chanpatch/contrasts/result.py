"""What a contrast returns: one row per channel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..channels import Floats, Moments, recorded
from ..engine.state import undisturbed
from ..errors import ContrastError, SiteError
from ..plots import effect_ranking
from ..registry.points import HookPoints, sites_of
from ..registry.sites import Site
from ..results import imported, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


LEVEL = 0.05  # that the strongest channel can reach after the correction, if the pairs are enough


_SHOWN = 20


@dataclass(frozen=True, repr=False, eq=False)
class Contrast:
    """How much each channel differs between the two inputs of a pair; one row per channel, largest effect first.

    All numbers are of the channel's reduced activation, its sum unless another reduction was asked for, taken in
    double precision.

    Attributes:
        sites: Of each row, the channel as a site: `[zero_ablate(site) for site in result.top(16).sites]`.
        difference: Mean of clean minus corrupted.
        absolute: Mean of its absolute value.
        std: Standard deviation over the background inputs; NaN without any.
        effect: `difference`, or `absolute` where that was asked for, divided by `std`; undivided without a background.
            NaN for a channel that does not vary over the background by more than rounding.
        low: Lower end of the effect's 95% bootstrap interval over pairs, or over clusters of pairs.
        high: Its upper end.
        p: Two-sided sign-flip p-value that the mean difference is zero; NaN where there is none.
        p_holm: Corrected for the number of channels so that all claims below a level are right together.
        p_bh: Corrected so that the level is the share of false ones among the claims.
        no_p: Why there are no p-values, or nothing.
        no_holm: Why no `p_holm` can reach 0.05, or nothing.
        pairs: Number of pairs.
        clusters: Number of independent clusters of pairs.
        background: Number of background inputs.
        skipped: Hook points that were left out of a search, with the reason.
        effect_label: What the effect is, in which unit, of how many pairs: the axis label of a figure.
    """

    sites: tuple[Site, ...]
    difference: Floats
    absolute: Floats
    std: Floats
    effect: Floats
    low: Floats
    high: Floats
    p: Floats
    p_holm: Floats
    p_bh: Floats
    no_p: str
    no_holm: str
    pairs: int
    clusters: int
    background: int
    skipped: dict[str, str]
    effect_label: str
    _points: HookPoints = field(repr=False)
    _inputs: tuple[Any, Any] = field(repr=False)
    _batch_size: int = field(repr=False)

    def __len__(self) -> int:
        return len(self.sites)

    def top(self, count: int) -> Contrast:
        """Return the rows with the largest absolute effect.

        Raises:
            ContrastError: If the count is negative.
        """
        if count < 0:
            raise ContrastError(f"count is {count}, but rows are counted from 0 on.")
        return self._rows(slice(count))

    def steering_vector(self, site: str | Site) -> Tensor:
        """Return the mean difference of whole activations, clean minus corrupted, at a site.

        Args:
            site: Any site of the model, in the contrast or not.

        Returns:
            A tensor with the region's axes, its batch axis of length 1: what `steer` takes.

        References:
            Turner et al. 2023, "Steering language models with activation engineering", for one pair; Rimsky et al.
            2023, "Steering Llama 2 via contrastive activation addition", for the mean over many.
        """
        (bound,) = sites_of(self._points, site)
        point = self._points[bound.name]
        if point.batch_axis is None:
            raise SiteError(f"{bound!r} has no batch axis that is proved, so there is no mean over the pairs.")
        axis = point.batch_axis
        means = []
        with undisturbed(self._points.model) as run:
            for inputs in self._inputs:
                run.put_back()
                moments = None
                for cache in run.apart(recorded(self._points, inputs, [bound], None, self._batch_size)):
                    part = Moments.of(cache[bound].double().movedim(axis, 0).numpy())
                    moments = part if moments is None else moments + part
                means.append(moments.mean)  # type: ignore[union-attr]
        return torch.from_numpy(means[0] - means[1]).to(point.dtype).unsqueeze(axis)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Return a figure of the largest effects with their intervals, `chanpatch.plots.effect_ranking`.

        Args:
            ax: Where to draw; new axes if None.

        Raises:
            MissingPackageError: If matplotlib is not installed.
        """
        return effect_ranking(self, ax)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per channel: site, every number, and why there is no p."""
        names = ("difference", "absolute", "std", "effect", "low", "high", "p", "p_holm", "p_bh")
        columns = {name: getattr(self, name).tolist() for name in names}
        return [
            {"site": repr(site), **{name: columns[name][row] for name in names}, "no_p": self.no_p}
            for row, site in enumerate(self.sites)
        ]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        shown = [
            {
                "site": repr(self.sites[row]),
                "effect": f"{self.effect[row]:+.3g}",
                "95%": f"{self.low[row]:+.3g} to {self.high[row]:+.3g}",
                "difference": f"{self.difference[row]:+.3g}",
                "std": f"{self.std[row]:.3g}",
                **({} if self.no_p else {"p (Holm)": f"{self.p_holm[row]:.2g}", "p (BH)": f"{self.p_bh[row]:.2g}"}),
            }
            for row in range(min(len(self), _SHOWN))
        ]
        title = f"{len(self)} channels, {self.pairs} pairs in {self.clusters} clusters"
        title += f", {self.background} background inputs" if self.background else ", no background"
        more = [f"... {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        notes = [f"No p-values: {self.no_p}"] * bool(self.no_p)
        notes += [f"No p (Holm) can reach {LEVEL}: {self.no_holm}"] * bool(self.no_holm)
        notes += [f"Left out: {len(self.skipped)} hook points (see .skipped)"] * bool(self.skipped)
        return "\n".join([title, *table(shown), *more, *notes])

    def _rows(self, rows: Any) -> Contrast:
        chosen = np.arange(len(self))[rows]
        arrays = ("difference", "absolute", "std", "effect", "low", "high", "p", "p_holm", "p_bh")
        picked = {name: getattr(self, name)[chosen] for name in arrays}
        return replace(self, sites=tuple(self.sites[row] for row in chosen), **picked)
