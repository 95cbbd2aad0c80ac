"""Corrections for multiple tests, and a test for equivalence within a margin."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StatisticsError
from .interval import Interval, floats


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values to control the family-wise error rate (Holm-Bonferroni); return an array of the same shape.

    Args:
        p_values: P-values of any shape, one per test. NaN entries stay NaN and do not count as tests.

    Raises:
        StatisticsError: If a p-value is not between 0 and 1.

    Example:
        >>> holm([0.01, 0.04, 0.03, float("nan")])
        array([0.03, 0.06, 0.06,  nan])

    References:
        Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    p, tested = _checked(p_values)
    family = p[tested]
    order = np.argsort(family)
    family[order] = np.minimum(np.maximum.accumulate(family[order] * np.arange(family.size, 0, -1)), 1.0)
    p[tested] = family
    return p


def benjamini_hochberg(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values to control the false discovery rate, for independent or positively dependent tests.

    Arguments, result and errors are the same as for `holm`.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03, float("nan")])
        array([0.03, 0.04, 0.04,  nan])

    References:
        Benjamini and Hochberg, "Controlling the false discovery rate" (1995).
    """
    import scipy.stats

    p, tested = _checked(p_values)
    if tested.any():
        p[tested] = scipy.stats.false_discovery_control(p[tested], method="bh")
    return p


def equivalent(difference: Interval[Any], margin: float) -> Any:
    """Return whether a difference is negligible, that is, whether its whole interval lies between -margin and margin.

    A nonsignificant difference is not necessarily negligible. This function implements two one-sided tests (TOST) at
    level `(1 - confidence) / 2`: 0.025 for a 95% interval, or the usual 0.05 for a 90% interval. If the interval is
    withheld, the result is False.

    Args:
        difference: Interval for one difference, or for an array of differences. The result has the same shape.
        margin: Largest negligible difference, in the unit of `difference`. Choose the margin before seeing the data.

    Raises:
        StatisticsError: If the margin is not positive.

    Example:
        >>> equivalent(Interval(0.01, -0.02, 0.04, confidence=0.9), margin=0.05)
        True

    References:
        Schuirmann, "A comparison of the two one-sided tests procedure and the power approach" (1987).
    """
    if not margin > 0:
        raise StatisticsError(f"margin must be positive; got {margin!r}.")
    return (-margin < difference.low) & (difference.high < margin)


def _checked(p_values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return a copy of the p-values, and a mask of the entries that are not NaN."""
    p = np.array(floats(p_values))
    tested = ~np.isnan(p)
    outside = p[tested & ~((p >= 0) & (p <= 1))]
    if outside.size:
        raise StatisticsError(f"p_values must lie between 0 and 1; got {float(outside[0])}.")
    return p, tested
