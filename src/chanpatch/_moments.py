"""Means and standard deviations of any number of inputs, in memory for one of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDING = 1e-6  # what may differ between two runs in single precision, relative to the activation


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation per channel, in float64; `+` merges two samples.

    Attributes:
        count: Number of inputs.
        mean: `(channel,)`.
        squares: `(channel,)`, the sum of squared deviations from the mean.

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), equation 2.1.
    """

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @staticmethod
    def of(sample: ArrayLike) -> Moments:
        """Return the moments of a sample `(input, channel)`."""
        values = np.asarray(sample, dtype=np.float64)
        mean = values.mean(axis=0)
        return Moments(len(values), mean, np.square(values - mean).sum(axis=0))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        return Moments(
            count, mean, self.squares + other.squares + np.square(apart) * (self.count * other.count / count)
        )

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation per channel, `(channel,)`, with count - 1 in the denominator; NaN for fewer than two."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        spread: NDArray[np.float64] = np.sqrt(self.squares / (self.count - 1))
        return spread

    def varies(self, precision: float = 0.0) -> NDArray[np.bool_]:
        """Return which channels vary by more than rounding: in single precision, or relatively by `precision`."""
        beyond: NDArray[np.bool_] = self.std > max(ROUNDING, precision) * np.abs(self.mean)
        return beyond
