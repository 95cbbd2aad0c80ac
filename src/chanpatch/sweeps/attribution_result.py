"""The result of an attribution: estimated effects, some of them beside the exact ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..patching.patch import Patch
from ..results import Effects, columns


@dataclass(frozen=True, repr=False, eq=False)
class Attribution(Effects):
    """The estimated effect of each patch on a metric, in the order given; some of them beside the exact effect.

    The table and the figure show the largest estimates first; `top` returns them.

    Attributes:
        labels: Label of each patch.
        patches: One patch per row.
        exact: Effects measured by real forwards; NaN for patches that were not run.
        drawn: Which rows are in the random sample.
        rank_correlation: Spearman's, between estimates and exact effects over the random sample, which stands for all
            the patches; the largest estimates alone would not. NaN if fewer than three, or only equal ones, were
            drawn.
        sample: Number of patches in the random sample.
        inputs: Number of inputs.
        steps: Number of points of the line between clean and patched at which the gradient was taken.
    """

    labels: tuple[Any, ...]
    patches: tuple[Patch, ...]
    exact: NDArray[np.float64]
    drawn: NDArray[np.bool_]
    rank_correlation: float
    sample: int
    inputs: int
    steps: int
    _effect: NDArray[np.float64]
    _by_row = ("labels", "patches", "_effect", "exact", "drawn")

    def __len__(self) -> int:
        return len(self.labels)

    def effect(self) -> NDArray[np.float64]:
        """Return the estimates of the mean over inputs of the metric with the patch minus without it: `(patch,)`."""
        return self._effect

    @property
    def effect_label(self) -> str:
        """What the effects are, for a figure."""
        return f"estimated mean change, {self.inputs} inputs"

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch: label, effect (the estimate), exact (None if it was not run), drawn."""
        exact = [None if np.isnan(each) else each for each in self.exact.tolist()]
        return columns(label=self.labels, effect=self._effect, exact=exact, drawn=self.drawn)

    def _lines(self) -> list[dict[str, Any]]:
        return self.top(len(self)).to_records()

    def _title(self) -> str:
        how = "the gradient of the clean run" if self.steps == 1 else f"gradients at {self.steps} steps"
        return f"{len(self)} patches estimated by {how}, {self.inputs} inputs"

    def _notes(self) -> list[str]:
        if not self.sample:
            return []
        return [
            f"Rank correlation with the exact effects: {self.rank_correlation:.2f} (Spearman, over {self.sample} "
            "patches drawn at random)"
        ]
