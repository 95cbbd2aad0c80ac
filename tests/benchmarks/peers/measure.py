"""Measuring: CPU time of interleaved variants, intervals of ratios, and peak memory."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)

REPEATS = 15
FEWEST, PATIENCE = 5, 400.0  # a task stops after 400 CPU seconds, but not before five rounds


class Interval(NamedTuple):
    """An estimate with the ends of its 95% bootstrap interval."""

    estimate: float
    low: float
    high: float


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, no gradients, no garbage collector."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def interleaved(
    variants: Mapping[Name, Callable[[], object]],
    *,
    title: str,
    repeats: int,
    calls: int = 1,
    warm: bool = False,
) -> dict[Name, list[float]]:
    """Return the CPU seconds of one call of each variant, measured in rounds in which each has its turn.

    Args:
        variants: By name.
        title: Of the progress bar.
        repeats: How many rounds at most.
        calls: How many calls are timed together.
        warm: Whether they have been called before; otherwise each is, once.
    """

    def timed(variant: Callable[[], object]) -> float:
        start = time.process_time()
        for _ in range(calls):
            variant()
        return (time.process_time() - start) / calls

    samples: dict[Name, list[float]] = {name: [] for name in variants}
    with quiet():
        for variant in () if warm else variants.values():
            timed(variant)
        for number in tqdm(range(repeats), desc=title, unit="round"):
            if number >= FEWEST and sum(map(sum, samples.values())) * calls > PATIENCE:
                break
            for name, variant in variants.items():
                samples[name].append(timed(variant))
                gc.collect()
    return samples


def ratio(samples: Sequence[float], base: Sequence[float]) -> Interval:
    """Return the ratio of the medians."""
    return _bootstrapped(samples, base, np.divide)


def difference(samples: Sequence[float], base: Sequence[float]) -> Interval:
    """Return the difference of the medians."""
    return _bootstrapped(samples, base, np.subtract)


def peak_memory() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux includes the process that started this one
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bootstrapped(
    samples: Sequence[float], base: Sequence[float], compare: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Interval:
    rng = np.random.default_rng(0)

    def resampled(values: Sequence[float]) -> np.ndarray:
        return np.median(rng.choice(values, (2000, len(values))), axis=1)

    low, high = np.percentile(compare(resampled(samples), resampled(base)), [2.5, 97.5])
    return Interval(float(compare(np.median(samples), np.median(base))), float(low), float(high))
