"""A logistic regression small enough to be fitted a thousand times, for bootstrap intervals of its coefficients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PENALTY = 1.0  # on half the squared coefficients, so that separable outcomes have finite ones; nothing on the intercept
_STEPS = 50  # of Newton's method; fewer than ten are usual


def fit_logistic(features: Floats, outcome: NDArray[np.bool_]) -> Floats:
    """The intercept and the coefficients of a logistic regression: (1 + feature,).

    Args:
        features: (level, feature), of variance near 1, or the penalty weighs them unequally.
        outcome: bool (level,).
    """
    design = np.column_stack([np.ones(len(features)), features])
    penalty = np.diag(
        [1e-6, *[PENALTY] * features.shape[1]]
    )  # the intercept's keeps an outcome that never varies finite
    coefficients = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        shares = _expit(design @ coefficients)
        gradient = design.T @ (outcome - shares) - penalty @ coefficients
        curvature = (design * (shares * (1 - shares))[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature, gradient)
        coefficients += np.clip(step, -2.0, 2.0)  # a whole step can overshoot where shares are near 0 or 1
        if np.abs(step).max() < 1e-8:
            break
    return coefficients


def predicted(coefficients: Floats, features: Floats) -> Floats:
    """The probability of the outcome on every level: (level,)."""
    return _expit(coefficients[0] + features @ coefficients[1:])


def _expit(logits: Floats) -> Floats:
    shares: Floats = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    return shares
