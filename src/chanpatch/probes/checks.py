"""Sums and labels as probes take them: checked, and cut into halves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ProbeError

Floats = NDArray[np.float64]


Rows = NDArray[np.int64]


def checked_sums(sums: ArrayLike, axes: tuple[str, ...]) -> Floats:
    """Return finite sums with the axes that were named.

    Raises:
        ProbeError: If there are other axes, no inputs, or a number that is not finite.
    """
    array = np.asarray(sums, dtype=np.float64)
    if array.ndim != len(axes) or not array.size:
        raise ProbeError(f"sums has shape {array.shape}, but its axes must be ({', '.join(axes)}), none of length 0.")
    return checked_finite(array)


def checked_finite(array: Floats) -> Floats:
    """Return sums in any shape.

    Raises:
        ProbeError: If one of them is not finite.
    """
    if not np.isfinite(array).all():
        where = tuple(int(index) for index in np.argwhere(~np.isfinite(array))[0])
        raise ProbeError(f"sums[{', '.join(map(str, where))}] is not finite: leave that input out.")
    return array


def checked_booleans(labels: ArrayLike, inputs: int, fewest: int) -> NDArray[np.bool_]:
    """Return one boolean per input, with so many of each at least.

    Raises:
        ProbeError: If they are no booleans, do not fit the inputs, or one of the two is too rare.
    """
    array = np.asarray(labels)
    if array.shape != (inputs,) or array.dtype != np.bool_:
        raise ProbeError(
            f"labels is {array.dtype} of shape {array.shape}: give one boolean for each of the {inputs} inputs, "
            "such as directions == 0."
        )
    positives = int(array.sum())
    if min(positives, inputs - positives) < fewest:
        raise ProbeError(
            f"There are {positives} positives and {inputs - positives} negatives, but at least {fewest} of each are "
            "needed."
        )
    return array


def halves(labels: NDArray[Any], seed: int) -> tuple[Rows, Rows]:
    """Return the rows of two random halves in which every label is equally frequent, but for one.

    Args:
        labels: `(input,)` or `(input, label)`.
        seed: Of the draw.

    Raises:
        ProbeError: If the seed is negative.
    """
    generator = np.random.default_rng(checked_seed(seed))
    kinds = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    order = generator.permutation(len(labels))
    by_kind = order[np.argsort(kinds[order], kind="stable")]
    return np.sort(by_kind[::2]), np.sort(by_kind[1::2])


def checked_seed(seed: int) -> int:
    """Return the seed.

    Raises:
        ProbeError: If it is no whole number from 0 on.
    """
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ProbeError(f"seed is {seed!r}, but it must be a whole number from 0 on.")
    return int(seed)
