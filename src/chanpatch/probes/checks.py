"""Checks of sums and labels, and their halves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ProbeError
from ..statistics.interval import booleans, whole

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Rows = NDArray[np.int64]


def checked_sums(sums: ArrayLike, axes: tuple[str, ...] | None = None) -> Floats:
    """Return finite sums with these axes, or with any axes if None; raise ProbeError otherwise."""
    array = np.asarray(sums, dtype=np.float64)
    if axes is not None and (array.ndim != len(axes) or not array.size):
        raise ProbeError(f"sums has shape {array.shape}, but its axes must be ({', '.join(axes)}), none of length 0.")
    if not np.isfinite(array).all():
        where = tuple(int(index) for index in np.argwhere(~np.isfinite(array))[0])
        raise ProbeError(f"sums[{', '.join(map(str, where))}] is not finite: leave that input out.")
    return array


def checked_booleans(labels: ArrayLike, inputs: int, fewest: int) -> Booleans:
    """Return labels as booleans; raise ProbeError unless one per input, with `fewest` positives and negatives."""
    array, positive = np.asarray(labels), booleans(labels)
    if array.shape != (inputs,) or positive is None:
        raise ProbeError(
            f"labels is {array.dtype} of shape {array.shape}: give one boolean for each of the {inputs} inputs, "
            "such as directions == 0."
        )
    positives = int(positive.sum())
    if min(positives, inputs - positives) < fewest:
        raise ProbeError(
            f"There are {positives} positives and {inputs - positives} negatives, but at least {fewest} of each are "
            "needed."
        )
    return positive


def halves(labels: NDArray[Any], seed: int) -> tuple[Rows, Rows]:
    """Return the rows of two random halves, stratified by the labels: `(input,)` or `(input, label)`."""
    generator = np.random.default_rng(whole("seed", seed))
    kinds = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    order = generator.permutation(len(labels))
    by_kind = order[np.argsort(kinds[order], kind="stable")]
    return np.sort(by_kind[::2]), np.sort(by_kind[1::2])
