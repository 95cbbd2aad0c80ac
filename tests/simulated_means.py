"""Simulated intervals and tests for means and other statistics of samples, and for many channels at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rates import GOOD, TEST, Case, Floats, Generator, Promise, Row, covers, each, excludes, grid, least, sizes
from torch import nn

import chanpatch.statistics as st
from chanpatch import contrast, hook_points
from chanpatch.statistics import Interval, max_t_test, mean_interval, sign_flip_test
from chanpatch.statistics.flips import ranked_interval

FLIPS = 1999
Draw = Callable[[Generator, tuple[int, ...]], Floats]


def sparse(generator: Generator, shape: tuple[int, ...]) -> Floats:
    return (generator.random(shape) < 0.1) * generator.exponential(size=shape)


NORMAL, T, EXPONENTIAL, LOGNORMAL = "normal", "Student's t, 3 degrees of freedom", "exponential", "lognormal"
DATA: dict[str, Draw] = {  # with mean 0
    NORMAL: lambda generator, shape: generator.normal(size=shape),
    T: lambda generator, shape: generator.standard_t(3, size=shape),
    EXPONENTIAL: lambda generator, shape: generator.exponential(size=shape) - 1,
    LOGNORMAL: lambda generator, shape: generator.lognormal(size=shape) - np.exp(0.5),
}
LEAST = {NORMAL: 10, T: 10, EXPONENTIAL: 30, LOGNORMAL: 30}  # rows from which coverage is promised


def mean(draw: Draw, truth: float) -> Row:
    return lambda n, g, trials: covers(mean_interval(draw(g, (n, trials))), truth)


def means() -> Iterator[Case]:
    rows = {name: (draw, 0.0, LEAST[name]) for name, draw in DATA.items()}
    rows["-1, 0 or 1"] = lambda g, shape: g.choice([-1.0, 0.0, 1.0], size=shape, p=[0.25, 0.5, 0.25]), 0.0, 30
    rows["0 in 90% of rows, otherwise exponential"] = sparse, 0.1, 100
    for name, (draw, truth, needs) in rows.items():
        yield from grid(name, mean(draw, truth), sizes(5, 6, 8, 10, 30, 100), 10_000, least(needs, GOOD))


def negligible(draw: Draw) -> Row:
    return lambda n, g, trials: st.equivalent(mean_interval(draw(g, (n, trials)) + 0.5), 0.5)


def flipped(draw: Draw) -> Row:
    return lambda n, g, trials: sign_flip_test(draw(g, (n, trials)), resamples=FLIPS) <= 0.05


def tests() -> Iterator[Case]:
    for title, row in (("`sign_flip_test`: p <= 0.05", flipped), ("`equivalent` returns True", negligible)):
        for name in (NORMAL, T, LOGNORMAL):
            promise = TEST if name != LOGNORMAL else None
            yield from grid(f"{title}; {name}", row(DATA[name]), sizes(5, 6, 10, 30, 100), 4000, promise)


def clustered(generator: Generator, count: int, channels: int, equal: bool) -> tuple[Floats, NDArray[np.int64]]:
    """Rows that share half of their variance within a cluster, four in each or one to seven."""
    labels = np.repeat(np.arange(count), 4 if equal else 1 + np.arange(count) % 7)
    common, own = generator.normal(size=(count, channels)), generator.normal(size=(len(labels), channels))
    return common[labels] + own, labels


CLUSTERED: dict[str, tuple[Callable[[Floats, Any], Any], Promise]] = {
    "`mean_interval` contains the mean": (lambda x, of: covers(mean_interval(x, clusters=of), 0.0), GOOD),
    "`share_interval` contains the fraction": (
        lambda x, of: covers(st.share_interval(x + x[:, ::-1] / 2 + 1, x[:, ::-1] + 2, clusters=of), 0.5), GOOD
    ),
    "`bootstrap_interval` contains the mean": (
        lambda x, of: covers(st.bootstrap_interval(x, MEAN, clusters=of, resamples=999), 0.0), (0.92, 1)
    ),
    "`sign_flip_test`: p <= 0.05": (lambda x, of: sign_flip_test(x, clusters=of, resamples=FLIPS) <= 0.05, TEST),
    "`max_t_test` for 20 means: any p <= 0.05": (
        lambda x, of: [(max_t_test(x[:, at : at + 20], clusters=of, resamples=FLIPS).p <= 0.05).any()
                       for at in range(0, x.shape[1], 20)], TEST
    ),
    "`mean_interval` without `clusters=` contains the mean": (lambda x, of: covers(mean_interval(x), 0.0), (0, 0.9)),
}  # fmt: skip


def clusters() -> Iterator[Case]:
    columns = {f"{n} clusters with {k} rows each": (n, k == "4") for n in (10, 30) for k in ("4", "1 to 7")}
    for name, (test, promise) in CLUSTERED.items():
        row = partial(lambda test, size, g, trials: test(*clustered(g, size[0], trials, size[1])), test)
        yield from grid(name, row, columns, 4000, promise)


def fraction(draw: Draw, spread: float) -> Row:
    """Coverage of `share_interval` for a part that is half of the total on average; the mean total is 1."""

    def row(n: int, generator: Generator, trials: int) -> Any:
        total, rest = 1 + spread * draw(generator, (n, trials)), spread / 2 * draw(generator, (n, trials))
        return covers(st.share_interval(total / 2 + rest, total), 0.5)

    return row


def fractions() -> Iterator[Case]:
    for name, std in ((NORMAL, 1.0), (T, 3**0.5), (LOGNORMAL, 2.16)):
        for spread, words in ((0.5, "half"), (2, "twice")):
            row = f"{name}, standard deviation {words} the mean"
            data = fraction(DATA[name], spread / std)
            yield from grid(row, data, sizes(5, 6, 8, 10, 30, 100), 2000, least(LEAST[name], GOOD))


def correlated(generator: Generator, shape: tuple[int, ...]) -> Floats:
    one, other = generator.normal(size=(2, *shape))
    return np.stack([one, 0.5 * one + 0.75**0.5 * other], axis=1)


def correlations(sample: Floats) -> Floats:
    apart = sample - sample.mean(axis=0)
    return (apart[:, 0] * apart[:, 1]).mean(axis=0) / np.sqrt((apart**2).mean(axis=0).prod(axis=0))


MEAN, MEDIAN = partial(np.mean, axis=0), partial(np.median, axis=0)
STATISTICS: dict[str, tuple[Any, Draw, float]] = {
    "median, normal": (MEDIAN, DATA[NORMAL], 0.0),
    "median, lognormal": (MEDIAN, DATA[LOGNORMAL], 1 - np.exp(0.5)),
    "standard deviation, normal": (partial(np.std, axis=0, ddof=1), DATA[NORMAL], 1.0),
    "ratio of means, exponential": (
        lambda x: x[:, 0].mean(axis=0) / x[:, 1].mean(axis=0),
        lambda generator, shape: generator.exponential(size=(shape[0], 2, *shape[1:])),
        1.0,
    ),
    "correlation of 0.5, normal": (correlations, correlated, 0.5),
}


def bootstrapped(statistic: Any, draw: Draw, truth: float) -> Row:
    return lambda n, g, trials: covers(st.bootstrap_interval(draw(g, (n, trials)), statistic, resamples=999), truth)


def spearman(n: int, generator: Generator) -> Any:
    interval = st.bootstrap_interval(correlated(generator, (n,)), lambda x: st.rank_correlation(*x.T), resamples=299)
    return covers(interval, 6 / np.pi * np.arcsin(0.25))


def bootstrap() -> Iterator[Case]:
    promise = least(30, (0.9, 1))
    for name, row in STATISTICS.items():
        yield from grid(name, bootstrapped(*row), sizes(5, 8, 10, 30, 100), 1000, promise)
    yield from grid("`rank_correlation` of 0.48, normal", each(spearman), sizes(10, 30, 100), 200, promise)


def shared(generator: Generator, shape: tuple[int, ...]) -> Floats:
    """Channels that share half of their variance and differ in scale."""
    scale = np.exp(generator.normal(size=shape[-1]))
    return (generator.normal(size=(*shape[:-1], 1)) + generator.normal(size=shape)) * scale


def largest(interval: Interval[Any]) -> bool:
    return excludes(interval, int(np.argmax(np.abs(interval.estimate))))


def contrasted(n: int, generator: Generator) -> bool:
    one, other = torch.from_numpy(generator.normal(size=(2, n, 50)).astype(np.float32))
    points = hook_points(nn.Identity(), one[:2], axes={".out": ("batch", "feature")})
    first = contrast(points, one, other, ".out").top(1)
    return excludes(Interval(first.effect(), first.low, first.high, 0.95), 0)


CLAIMS: dict[str, Callable[[Floats], Any]] = {
    "`max_t_test`: interval for the largest mean excludes 0": (
        lambda rows: largest(max_t_test(rows, resamples=FLIPS).interval)
    ),
    "`max_t_test`: any p <= 0.05": lambda rows: (max_t_test(rows, resamples=FLIPS).p <= 0.05).any(),
    "sweep or compared rollouts: any interval excludes 0": lambda rows: excludes(ranked_interval(rows, seed=0)),
    "`sign_flip_test` with `holm`: any p <= 0.05": (
        lambda rows: (st.holm(sign_flip_test(rows, resamples=FLIPS)) <= 0.05).any()
    ),
    "`sign_flip_test` with `benjamini_hochberg`: any p <= 0.05": (
        lambda rows: (st.benjamini_hochberg(sign_flip_test(rows, resamples=FLIPS)) <= 0.05).any()
    ),
    "`mean_interval`: interval for the largest mean excludes 0": lambda rows: largest(mean_interval(rows)),
}


def claimed(claim: Callable[[Floats], Any], draw: Draw, n: int, generator: Generator) -> bool:
    return bool(claim(draw(generator, (n, 50))))


def ranked() -> Iterator[Case]:
    yield from grid("`contrast(...).top(1)`: interval excludes 0; normal", each(contrasted), sizes(10, 30), 1000, TEST)
    data = {name: DATA[name] for name in (NORMAL, T)} | {"correlated normal": shared, EXPONENTIAL: DATA[EXPONENTIAL]}
    for title, claim in CLAIMS.items():
        for name, draw in data.items():
            promise = None if name == EXPONENTIAL or title.startswith("`mean_interval`") else TEST
            yield from grid(f"{title}; {name}", each(claimed, claim, draw), sizes(10, 30), 300, promise)


def joint(interval: Any, draw: Draw, channels: int, joined: Any, n: int, generator: Generator) -> Any:
    return joined(covers(interval(draw(generator, (n, channels)) + 0.5), 0.5))


def simultaneous() -> Iterator[Case]:
    intervals: dict[str, Callable[[Floats], Any]] = {
        "`max_t_test`": lambda rows: max_t_test(rows, resamples=FLIPS).interval,
        "sweep or compared rollouts": lambda rows: ranked_interval(rows, seed=0),
    }
    kinds = itertools.product(
        intervals.items(), (NORMAL, T, LOGNORMAL), (2, 50), (("each", np.asarray), ("all", np.min))
    )
    for (title, interval), name, channels, (which, joined) in kinds:
        row, promise = each(joint, interval, DATA[name], channels, joined), (0.9, 1.0) if name != LOGNORMAL else None
        yield from grid(f"{title}: {which} of {channels} intervals; {name}", row, sizes(10, 30), 300, promise)
