"""Halves of the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..statistics.interval import whole

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Rows = NDArray[np.int64]


def halves(labels: NDArray[Any], seed: int) -> tuple[Rows, Rows]:
    """Return the rows of two random halves, stratified by the labels: `(input,)` or `(input, label)`."""
    generator = np.random.default_rng(whole("seed", seed))
    kinds = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    order = generator.permutation(len(labels))
    by_kind = order[np.argsort(kinds[order], kind="stable")]
    return np.sort(by_kind[::2]), np.sort(by_kind[1::2])
