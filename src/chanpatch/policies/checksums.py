"""Compute checksums of observations, which are used to verify that two rollouts are paired."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def checksums(observations: Any, count: int) -> NDArray[np.uint64]:
    """Return a checksum of the observation in each of `count` sub-environments: uint64 with shape `(environment,)`.

    Observations may be arrays, tensors, strings or other objects, or dicts or tuples that contain such observations.
    """
    if not isinstance(observations, np.ndarray):
        if isinstance(observations, Mapping):
            return _of_parts([*observations.values()], count)
        if isinstance(observations, tuple) and not isinstance(observations[0], str):
            return _of_parts([*observations], count)
        observations = observations.numpy(force=True) if isinstance(observations, Tensor) else np.array(observations)
    if observations.dtype.kind in "OSU":
        return np.array([_of_object(each) for each in observations], np.uint64)
    if observations.dtype.kind in "fc":
        observations = observations + 0.0  # -0.0 equals 0.0
    data = np.ascontiguousarray(observations).reshape(count, -1)
    if rest := data.shape[1] * data.itemsize % 8:
        data = np.concatenate([data.view(np.uint8), np.zeros((count, 8 - rest), np.uint8)], axis=1)
    words = data.view(np.uint64)
    found: NDArray[np.uint64] = words @ _weights(words.shape[1])
    return found


def _of_parts(parts: list[Any], count: int) -> NDArray[np.uint64]:
    found = np.zeros(count, np.uint64)
    for weight, part in zip(_weights(len(parts)), parts, strict=True):
        found += weight * checksums(part, count)
    return found


def _of_object(each: Any) -> int:
    data = each.encode() if isinstance(each, str) else pickle.dumps(each)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=16)
def _weights(words: int) -> NDArray[np.uint64]:
    """Return odd numbers to use as weights of 64-bit words: uint64 with shape `(words,)`, from a fixed random seed.

    A checksum is the weighted sum of the words. Because the weights are odd, the sum changes whenever a single word
    changes. Because the weights are random, the sum almost always changes if several words change.
    """
    return np.random.Philox(0).random_raw(words) | np.uint64(1)
