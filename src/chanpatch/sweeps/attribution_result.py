"""What an attribution returns: estimated effects, a part of them beside the exact ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SweepError
from ..patching.patch import Patch
from ..results import imported, table


@dataclass(frozen=True, repr=False, eq=False)
class Attribution:
    """The estimated effect of each patch on a metric, largest first; a part of them beside the exact one.

    Attributes:
        labels: Of the patches.
        patches: What is estimated, one patch a row.
        effect: Estimate of the mean over inputs of the metric with the patch minus without it.
        exact: The same by real forwards; NaN where none was run.
        drawn: Which rows are in the random sample.
        rank_correlation: Spearman's, between estimates and exact effects over the random sample, which stands for all
            the patches; the largest estimates alone would not. NaN where fewer than three, or only equal ones, were
            drawn.
        sample: How many patches the random sample holds.
        inputs: Number of inputs.
        steps: At how many points of the line between clean and patched the gradient was taken.
    """

    labels: tuple[Any, ...]
    patches: tuple[Patch, ...]
    effect: NDArray[np.float64]
    exact: NDArray[np.float64]
    drawn: NDArray[np.bool_]
    rank_correlation: float
    sample: int
    inputs: int
    steps: int

    def __len__(self) -> int:
        return len(self.labels)

    def top(self, count: int) -> Attribution:
        """Return the rows with the largest absolute estimates.

        Args:
            count: How many.

        Raises:
            SweepError: If the count is below 0.
        """
        if count < 0:
            raise SweepError(f"top({count}): the count is a number of rows, from 0 on.")
        return self._rows(np.arange(len(self))[:count])

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch: label, effect (the estimate), exact (None where it was not run), drawn."""
        return [
            {"label": label, "effect": effect, "exact": None if np.isnan(exact) else exact, "drawn": drawn}
            for label, effect, exact, drawn in zip(
                self.labels, self.effect.tolist(), self.exact.tolist(), self.drawn.tolist(), strict=True
            )
        ]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        where = "the gradient of the clean run" if self.steps == 1 else f"gradients at {self.steps} steps"
        lines = [f"{len(self)} patches estimated by {where}, {self.inputs} inputs", *table(self.to_records()[:_SHOWN])]
        lines += [f"... {len(self) - _SHOWN} more"] * (len(self) > _SHOWN)
        if self.sample:
            lines.append(
                f"Rank correlation with the exact effects: {self.rank_correlation:.2f} (Spearman, over {self.sample} "
                "patches drawn at random)"
            )
        return "\n".join(lines)

    def _rows(self, rows: NDArray[np.int64]) -> Attribution:
        return replace(
            self,
            labels=tuple(self.labels[row] for row in rows),
            patches=tuple(self.patches[row] for row in rows),
            **{name: getattr(self, name)[rows] for name in ("effect", "exact", "drawn")},
        )


_SHOWN = 20
