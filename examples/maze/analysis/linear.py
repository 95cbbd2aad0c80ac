"""What all channels together tell of the way, by a linear readout, beside the one channel that tells it best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chanpatch.statistics import bootstrap_interval
from maze.analysis.logistic import fit_logistic, predicted
from maze.analysis.part import Cell, interval_cells
from maze.analysis.readings import area, areas, optional_cells
from maze.analysis.selection import Selection
from maze.environment.paths import Direction

RESAMPLES = 999


def readout(
    selection: Selection, direction: Direction, sums: NDArray[np.float64], labels: NDArray[np.bool_], *, seed: int
) -> dict[str, Cell]:
    """The AUC of a linear readout of all live channels, of the direction's channel, and how much the first is higher.

    A logistic regression, fitted on the mazes that the channel was chosen on. `chanpatch.probes.linear_probe` scores
    on the kind of mazes that it fits on; what is asked here is how a readout fares on others.

    Args:
        selection: the mazes to fit on, those in which the direction is legal.
        direction: to tell.
        sums: (level, channel), of other mazes.
        labels: bool (level,), whether the way starts in the direction.
        seed: of the bootstrap over these mazes.
    """
    live, rows = list(selection.live), selection.legal[:, direction]
    fit = selection.sums[rows][:, live]
    centre, spread = fit.mean(axis=0), fit.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    coefficients = fit_logistic((fit - centre) / spread, selection.first[rows] == direction)
    told = predicted(coefficients, (sums[:, live] - centre) / spread)
    both = np.column_stack([told, sums[:, selection.best[direction]]])
    linear, channel = (area(each, labels) for each in both.T)
    more = None
    if linear is not None:  # over the same mazes, so the two are paired
        sample = np.column_stack([labels, both])
        more = bootstrap_interval(sample, _gain, resamples=RESAMPLES, seed=seed)
    return {
        "channel": selection.best[direction],
        "live": len(live),
        "n_fit": int(rows.sum()),
        "n": len(labels),
        **optional_cells("linear", linear),
        **optional_cells("one", channel),
        **(optional_cells("more", None) if more is None else interval_cells("more", more)),
    }


def _gain(sample: NDArray[np.float64]) -> float:
    """How much the AUC of the second column for the first is above that of the third."""
    linear, channel = areas(sample[:, 1:], sample[:, 0] > 0)
    return float(linear - channel)
