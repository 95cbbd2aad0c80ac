"""Simulations of every interval and test on data whose truth is known, for docs/statistics.md.

python tests/simulations.py [PART ...]    prints the tables
python tests/simulations.py --write-docs  writes them into docs/statistics.md; ten minutes
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import nn

from chanpatch import ThresholdProbe, contrast, hook_points, label_channels
from chanpatch.controls import matched_channels
from chanpatch.errors import ProbeError
from chanpatch.statistics import (
    Interval,
    auc,
    benjamini_hochberg,
    bootstrap_interval,
    difference_interval,
    holm,
    max_t_test,
    mcnemar_exact,
    mean_interval,
    paired_difference_interval,
    rank_among,
    reweighted_precision,
    sign_flip_test,
    wilson_interval,
)
from chanpatch.statistics.flips import ranked_interval

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
FLIPS = 1999
Floats = NDArray[np.float64]
Generator = np.random.Generator
Draw = Callable[[Generator, tuple[int, ...]], Floats]  # data with mean 0


class Case(NamedTuple):
    """One cell of a table: `simulate(generator, trials)` returns one number per trial, NaN if nothing was claimed."""

    row: str
    column: str
    simulate: Callable[[Generator, int], Any]
    trials: int
    promise: tuple[float, float] | None  # between which the rate must lie; None promises nothing


class Rate(NamedTuple):
    """How many of the trials with a result were hits."""

    hits: int
    n: int
    trials: int

    def __str__(self) -> str:
        if not self.n:
            return "withheld"
        rate = wilson_interval(self.hits, self.n)
        shown = f"{rate.estimate:.1%} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
        return shown + f", {1 - self.n / self.trials:.0%} withheld" * (self.n < 0.995 * self.trials)

    def keeps(self, promise: tuple[float, float]) -> bool:
        """Whether the promise is within the 99.9% interval of the rate."""
        if not self.n:
            return True
        rate = wilson_interval(self.hits, self.n, confidence=0.999)
        return rate.low <= promise[1] and rate.high >= promise[0]


def rate_of(part: str, case: Case, scale: float = 1.0) -> Rate:
    """The rate of a case, from a seed of its own."""
    trials = max(round(case.trials * scale), 1)
    generator = np.random.default_rng(zlib.crc32(f"{part} {case.row} {case.column}".encode()))
    found = np.asarray(case.simulate(generator, trials), dtype=np.float64)
    known = ~np.isnan(found)
    return Rate(int(found[known].sum()), int(known.sum()), found.size)


def covers(interval: Interval[Any], truth: Any) -> Floats:
    """1 if an interval holds the truth, NaN if it is withheld."""
    inside = (interval.low <= truth) & (truth <= interval.high)
    return np.where(np.isnan(interval.low), np.nan, inside)


def sparse(generator: Generator, shape: tuple[int, ...]) -> Floats:
    return (generator.random(shape) < 0.1) * generator.exponential(size=shape) - 0.1


DATA: dict[str, Draw] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "t, 3 degrees of freedom": lambda generator, shape: generator.standard_t(3, size=shape),
    "exponential": lambda generator, shape: generator.exponential(size=shape) - 1,
    "lognormal": lambda generator, shape: generator.lognormal(size=shape) - np.exp(0.5),
    "-1, 0 or 1": lambda generator, shape: generator.choice([-1.0, 0.0, 1.0], size=shape, p=[0.25, 0.5, 0.25]),
    "90% zeros": lambda generator, shape: sparse(generator, shape) + 0.1,  # zeros stay zeros
}
GOOD, TEST = (0.93, 1.0), (0.0, 0.05)


def means() -> Iterator[Case]:
    for name, draw in DATA.items():
        truth = 0.1 if name == "90% zeros" else 0.0
        for n in (5, 6, 8, 10, 30, 100):
            needs = {"exponential": 30, "lognormal": 30, "90% zeros": 100, "-1, 0 or 1": 30}.get(name, 10)

            def simulate(generator: Generator, trials: int, draw: Draw = draw, n: int = n, truth: float = truth) -> Any:
                return covers(mean_interval(draw(generator, (n, trials))), truth)

            yield Case(name, f"n = {n}", simulate, 10_000, GOOD if n >= needs else None)


def clustered(generator: Generator, clusters: int, channels: int, equal: bool) -> tuple[Floats, NDArray[np.int64]]:
    """Rows that share half of their variance within a cluster, four in each or one to seven."""
    labels = np.repeat(np.arange(clusters), 4 if equal else 1 + np.arange(clusters) % 7)
    shared, own = generator.normal(size=(clusters, channels)), generator.normal(size=(len(labels), channels))
    return shared[labels] + own, labels


def clusters() -> Iterator[Case]:
    tests: dict[str, tuple[Callable[[Floats, Any], Any], tuple[float, float]]] = {
        "`mean_interval` covers": (lambda rows, labels: covers(mean_interval(rows, clusters=labels), 0.0), (0.92, 1)),
        "`bootstrap_interval` of the mean covers": (
            lambda rows, labels: covers(
                bootstrap_interval(rows, lambda sample: sample.mean(axis=0), clusters=labels, resamples=999), 0.0
            ),
            (0.92, 1),
        ),
        "`sign_flip_test` gives p <= 0.05": (
            lambda rows, labels: sign_flip_test(rows, clusters=labels, resamples=FLIPS) <= 0.05,
            TEST,
        ),
        "`mean_interval` without `clusters=` covers": (lambda rows, labels: covers(mean_interval(rows), 0.0), (0, 0.9)),
    }
    for name, (test, promise) in tests.items():
        for count in (10, 30):
            for equal in (True, False):

                def simulate(generator: Generator, trials: int, test: Any = test, count: int = count,
                             equal: bool = equal) -> Any:  # fmt: skip
                    return test(*clustered(generator, count, trials, equal))

                sizes = "of 4 rows" if equal else "of 1 to 7 rows"
                yield Case(name, f"{count} clusters {sizes}", simulate, 4000, promise)


def ratios(sample: Floats) -> Floats:
    return sample[:, 0].mean(axis=0) / sample[:, 1].mean(axis=0)


def correlations(sample: Floats) -> Floats:
    apart = sample - sample.mean(axis=0)
    return (apart[:, 0] * apart[:, 1]).mean(axis=0) / np.sqrt((apart**2).mean(axis=0).prod(axis=0))


STATISTICS: dict[str, tuple[Callable[[Floats], Any], Draw, float]] = {
    "median, normal": (lambda sample: np.median(sample, axis=0), DATA["normal"], 0.0),
    "median, lognormal": (
        lambda sample: np.median(sample, axis=0),
        lambda generator, shape: generator.lognormal(size=shape),
        1.0,
    ),
    "standard deviation, normal": (lambda sample: sample.std(axis=0, ddof=1), DATA["normal"], 1.0),
    "ratio of means, exponential": (
        ratios,
        lambda generator, shape: generator.exponential(size=(shape[0], 2, *shape[1:])),
        1.0,
    ),
    "correlation of 0.5, normal": (
        correlations,
        lambda generator, shape: np.stack(
            [
                shared := generator.normal(size=shape),
                0.5 * shared + 0.75**0.5 * generator.normal(size=shape),
            ],
            axis=1,
        ),
        0.5,
    ),
}


def bootstrap() -> Iterator[Case]:
    for name, (statistic, draw, truth) in STATISTICS.items():
        for n in (10, 30, 100):

            def simulate(generator: Generator, trials: int, draw: Draw = draw, n: int = n, statistic: Any = statistic,
                         truth: float = truth) -> Any:  # fmt: skip
                return covers(bootstrap_interval(draw(generator, (n, trials)), statistic, resamples=999), truth)

            yield Case(name, f"n = {n}", simulate, 1000, (0.9, 1) if n > 10 else None)


def shared(generator: Generator, shape: tuple[int, ...]) -> Floats:
    """Channels that share half of their variance and differ in scale."""
    scale = np.exp(generator.normal(size=shape[-1]))
    return (generator.normal(size=(*shape[:-1], 1)) + generator.normal(size=shape)) * scale


def excludes(interval: Interval[Any], row: int) -> bool:
    return bool(interval.low[row] > 0 or interval.high[row] < 0)


def claim(test: str, rows: Floats) -> float:
    """Whether a test makes a claim about any channel, which is wrong if nothing differs."""
    if test == "`max_t_test`, interval of the largest":
        interval = max_t_test(rows, resamples=FLIPS).interval
        return excludes(interval, int(np.argmax(np.abs(interval.estimate))))
    if test == "`max_t_test`, any p <= 0.05":
        return bool((max_t_test(rows, resamples=FLIPS).p <= 0.05).any())
    if test == "sweeps and rollouts, any interval":
        interval = ranked_interval(rows, seed=0)
        return any(excludes(interval, row) for row in range(rows.shape[1]))
    if test == "`mean_interval` of the largest":
        interval = mean_interval(rows)
        return excludes(interval, int(np.argmax(np.abs(interval.estimate))))
    adjust = holm if test.startswith("`holm`") else benjamini_hochberg
    return bool((adjust(sign_flip_test(rows, resamples=9999)) <= 0.05).any())


def contrasted(generator: Generator, trials: int, n: int) -> list[bool]:
    """Whether the interval of `top(1)` excludes 0, of contrasts of 64 channels in which nothing differs."""
    wrong = []
    for _ in range(trials):
        one, other = torch.from_numpy(generator.normal(size=(2, n, 64)).astype(np.float32))
        points = hook_points(nn.Identity(), one[:2], axes={".out": ("batch", "feature")})
        first = contrast(points, one, other, ".out").top(1)
        wrong.append(excludes(Interval(first.effect(), first.low, first.high, 0.95), 0))
    return wrong


def ranked() -> Iterator[Case]:
    data = {"normal": DATA["normal"], "t, 3": DATA["t, 3 degrees of freedom"], "correlated": shared}
    data["exponential"] = DATA["exponential"]
    for n in (10, 30):

        def one(generator: Generator, trials: int, n: int = n) -> Any:
            return contrasted(generator, trials, n)

        yield Case("`contrast(...).top(1)`, its interval: normal", f"n = {n}", one, 1000, (0.0, 0.07))
    for test, promise in (
        ("`max_t_test`, interval of the largest", TEST),
        ("`max_t_test`, any p <= 0.05", TEST),
        ("sweeps and rollouts, any interval", TEST),
        ("`holm` of `sign_flip_test`, any", TEST),
        ("`benjamini_hochberg` of `sign_flip_test`, any", TEST),
        ("`mean_interval` of the largest", None),
    ):
        for name, draw in data.items():
            for n in (10, 30):

                def simulate(generator: Generator, trials: int, test: str = test, draw: Draw = draw, n: int = n) -> Any:
                    return [claim(test, draw(generator, (n, 50))) for _ in range(trials)]

                trials = 500 if test.startswith(("sweeps", "`holm`", "`benjamini")) else 1000
                yield Case(f"{test}: {name}", f"n = {n}", simulate, trials, None if name == "exponential" else promise)


def simultaneous() -> Iterator[Case]:
    intervals: dict[str, Callable[[Floats], Any]] = {
        "`max_t_test`": lambda rows: max_t_test(rows, resamples=FLIPS).interval,
        "sweeps and rollouts": lambda rows: ranked_interval(rows, seed=0),
    }
    for kind, interval in intervals.items():
        for name in ("normal", "t, 3 degrees of freedom", "lognormal"):
            for channels in (2, 50):
                for n in (10, 30):
                    for which, joined in (("each of", np.asarray), ("all", np.min)):

                        def simulate(
                            generator: Generator,
                            trials: int,
                            draw: Draw = DATA[name],
                            n: int = n,
                            channels: int = channels,
                            interval: Any = interval,
                            joined: Any = joined,
                        ) -> Any:
                            found = (interval(draw(generator, (n, channels)) + 0.5) for _ in range(trials))
                            return [joined(covers(each, 0.5)) for each in found]

                        promise = (0.9, 1.0) if name != "lognormal" else None
                        yield Case(
                            f"{kind} covers {which} {channels} means: {name}", f"n = {n}", simulate, 500, promise
                        )


def proportions() -> Iterator[Case]:
    for n in (5, 6, 10, 20, 50):
        for rate in (0.1, 0.5, 0.9):

            def one(generator: Generator, trials: int, n: int = n, rate: float = rate) -> Any:
                return [covers(wilson_interval(each, n), rate) for each in generator.binomial(n, rate, trials)]

            def pairs(generator: Generator, trials: int, n: int = n, rate: float = rate) -> Any:
                cells = (0.7 * rate, 0.3 * rate, 0.2 * (1 - rate), 0.8 * (1 - rate))
                drawn = generator.multinomial(n, cells, size=trials)
                return [covers(paired_difference_interval(*each), cells[1] - cells[2]) for each in drawn]

            def two(generator: Generator, trials: int, n: int = n, rate: float = rate) -> Any:
                drawn = zip(generator.binomial(n, rate, trials), generator.binomial(n, 0.5, trials), strict=True)
                intervals = [difference_interval(wilson_interval(a, n), wilson_interval(b, n)) for a, b in drawn]
                return [covers(each, rate - 0.5) for each in intervals]

            def precision(generator: Generator, trials: int, n: int = n, rate: float = rate) -> Any:
                truth = 0.25 * rate / (0.25 * rate + 0.75 * 0.2)
                drawn = zip(generator.binomial(n, rate, trials), generator.binomial(3 * n, 0.2, trials), strict=True)
                rates = [(wilson_interval(hits, n), wilson_interval(alarms, 3 * n)) for hits, alarms in drawn]
                return [covers(reweighted_precision(*each, base_rate=0.25), truth) for each in rates]

            def equal(generator: Generator, trials: int, n: int = n, rate: float = rate) -> Any:
                drawn = generator.multinomial(n, (rate / 2, rate / 2, 1 - rate), size=trials)
                return [mcnemar_exact(each[0], each[1]) <= 0.05 for each in drawn]

            column, of = f"n = {n}", f"{rate:.0%}"
            good = (0.9, 1.0) if n >= 10 else (0.85, 1.0)
            wilson = good if n >= 10 or rate == 0.5 else None
            yield Case(f"`wilson_interval` covers, {of}", column, one, 2000, wilson)
            yield Case(f"`paired_difference_interval` covers, {of}", column, pairs, 2000, good)
            yield Case(f"`difference_interval` covers, {of} and 50%", column, two, 2000, good)
            yield Case(f"`reweighted_precision` covers, {of} and 20%", column, precision, 2000, good)
            yield Case(f"`mcnemar_exact` gives p <= 0.05, {of} differ", column, equal, 2000, TEST)


def floor(generator: Generator, center: float, n: int) -> Floats:
    return np.maximum(generator.normal(center - 1, 1, n), 0)


SCORES: dict[str, tuple[Callable[[Generator, int], Floats], Callable[[Generator, int], Floats]]] = {
    "normal, the same": (lambda g, n: g.normal(size=n), lambda g, n: g.normal(size=n)),
    "normal, 1.5 apart": (lambda g, n: g.normal(1.5, 1, n), lambda g, n: g.normal(size=n)),
    "normal, positives vary 3 times as much": (lambda g, n: g.normal(2, 3, n), lambda g, n: g.normal(size=n)),
    "t, 2 degrees of freedom, 2 apart": (lambda g, n: g.standard_t(2, n) + 2, lambda g, n: g.standard_t(2, n)),
    "five values": (lambda g, n: np.round(g.normal(1, 1, n)), lambda g, n: np.round(g.normal(size=n))),
    "84% zeros, the same": (lambda g, n: floor(g, 0, n), lambda g, n: floor(g, 0, n)),
    "zeros, 1.5 apart": (lambda g, n: floor(g, 1.5, n), lambda g, n: floor(g, 0, n)),
    "normal, 3 apart": (lambda g, n: g.normal(3, 1, n), lambda g, n: g.normal(size=n)),
}


def areas() -> Iterator[Case]:
    for name, (above, below) in SCORES.items():
        high, low = above(np.random.default_rng(0), 100_000), below(np.random.default_rng(1), 100_000)
        truth = auc(np.concatenate([high, low]), np.arange(200_000) < 100_000).estimate
        for positives, negatives in ((5, 50), (6, 50), (10, 10), (10, 50), (30, 30)):

            def simulate(generator: Generator, trials: int, name: str = name, positives: int = positives,
                         negatives: int = negatives, truth: float = truth) -> Any:  # fmt: skip
                above, below = SCORES[name]
                labels = np.arange(positives + negatives) < positives
                return [
                    covers(
                        auc(np.concatenate([above(generator, positives), below(generator, negatives)]), labels), truth
                    )
                    for _ in range(trials)
                ]

            promise = (0.92, 1.0) if min(positives, negatives) >= 10 else None
            yield Case(f"{name} (AUC {truth:.2f})", f"{positives} and {negatives}", simulate, 1000, promise)


def precise(generator: Generator, trials: int, inputs: int, least: float, found: bool) -> list[bool]:
    """Whether `fit_precision` finds a threshold, or one that misses its minimum on data without end."""
    counted = []
    for seed in range(trials):
        labels = generator.random(inputs) < 0.4
        try:
            probe = ThresholdProbe.fit_precision(generator.normal(2.0 * labels), labels, min_precision=least, seed=seed)
        except ProbeError:
            counted.append(False)
            continue
        hits, alarms = scipy.stats.norm.sf(probe.threshold - 2), scipy.stats.norm.sf(probe.threshold)
        counted.append(found or 0.4 * hits / (0.4 * hits + 0.6 * alarms) < least)
    return counted


def claimed(generator: Generator, trials: int, inputs: int, rate: float) -> list[bool]:
    """Whether `fit_precision` finds a precision of 0.9 in a channel that is less precise at every threshold."""
    counted = []
    for seed in range(trials):
        try:
            ThresholdProbe.fit_precision(generator.normal(size=inputs), generator.random(inputs) < rate, seed=seed)
        except ProbeError:
            counted.append(False)
        else:
            counted.append(True)
    return counted


def labelled(generator: Generator, trials: int) -> list[bool]:
    """Whether any of 20 channels without information gets a label."""
    names, directions = ("UP", "DOWN", "LEFT"), np.arange(60) % 3
    return [
        any(each.label for each in label_channels(generator.normal(size=(60, 20)), directions, names=names, seed=seed))
        for seed in range(trials)
    ]


def probes() -> Iterator[Case]:
    for least in (0.8, 0.9, 0.95):
        for kind, found in (("misses its minimum", False), ("finds a threshold", True)):
            for inputs in (200, 1000, 4000):

                def simulate(generator: Generator, trials: int, inputs: int = inputs, least: float = least,
                             found: bool = found) -> Any:  # fmt: skip
                    return precise(generator, trials, inputs, least, found)

                row = f"`fit_precision(min_precision={least})` {kind}"
                yield Case(row, f"n = {inputs}", simulate, 1000, None if found else TEST)
    for rate in (0.88, 0.895, 0.899):
        for inputs in (200, 1000, 4000):

            def without(generator: Generator, trials: int, inputs: int = inputs, rate: float = rate) -> Any:
                return claimed(generator, trials, inputs, rate)

            row = f"`fit_precision(min_precision=0.9)` misses it: {rate:.1%} positives, sums of noise"
            yield Case(row, f"n = {inputs}", without, 1000, TEST)


def labels() -> Iterator[Case]:
    yield Case("`label_channels` gives any of 20 channels of noise a label", "60 inputs", labelled, 200, TEST)


def by_mean(generator: Generator, trials: int, channel: int, matched: bool) -> list[float]:
    """Whether a channel ranks first among controls, if its effect only follows its mean activation."""
    claims = []
    for seed in range(trials):
        mean = np.sort(generator.lognormal(size=64))[::-1].copy()
        background = torch.from_numpy(mean * generator.uniform(0.5, 1.5, size=(8, 64)))
        effects = mean * (1 + 0.1 * generator.normal(size=64))
        points = hook_points(nn.Identity(), background[:2], axes={".out": ("batch", "feature")})
        others = matched_channels(points, points.site(".out", feature=channel), background, count=19, seed=seed)
        drawn = [effects[dict(site.indices)["feature"][0]] for site in others]
        rank = others.rank(effects[channel], drawn) if matched else rank_among(effects[channel], drawn)
        claims.append(rank.p is not None and rank.p <= 0.05)
    return claims


def exchangeable(generator: Generator, trials: int, side: str) -> list[bool]:
    effects = generator.standard_cauchy(size=(trials, 20))
    return [rank_among(each[0], each[1:], alternative=side).p <= 0.05 for each in effects]


def controls() -> Iterator[Case]:
    for place, channel in (("largest", 0), ("second", 1), ("fifth", 4), ("middle", 32)):
        for name, matched in (("`matched_channels(...).rank`", True), ("`rank_among` the same controls", False)):

            def simulate(generator: Generator, trials: int, channel: int = channel, matched: bool = matched) -> Any:
                return by_mean(generator, trials, channel, matched)

            yield Case(f"{name}: p <= 0.05", f"{place} mean of 64", simulate, 300, (0, 0.05) if matched else None)


def ranks() -> Iterator[Case]:
    for side in ("two-sided", "greater", "less"):

        def drawn(generator: Generator, trials: int, side: str = side) -> Any:
            return exchangeable(generator, trials, side)

        yield Case(f'`rank_among(alternative="{side}")`: p <= 0.05', "19 controls", drawn, 4000, (0, 0.05))


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    each.__name__: each
    for each in (means, clusters, bootstrap, ranked, simultaneous, proportions, areas, probes, labels, controls, ranks)
}


def table(part: str) -> str:
    """The rates of a part as a Markdown table: a row for each method and data, a column for each sample size."""
    cases = [*PARTS[part]()]
    columns, rows = list(dict.fromkeys(case.column for case in cases)), dict[str, dict[str, str]]()
    for case in cases:
        rate = rate_of(part, case)
        broken = " **not as promised**" if case.promise and not rate.keeps(case.promise) else ""
        rows.setdefault(case.row, {})[case.column] = f"{rate}{broken}"
        print(f"{case.row} | {case.column} | {rate}{broken} | {rate.trials:,}", flush=True)
    lines = [[f"{min(case.trials for case in cases):,} trials or more", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cells.get(column, "") for column in columns)] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"some of {', '.join(PARTS)}; default: all")
    arguments.add_argument("--write-docs", action="store_true", help="write the tables into docs/statistics.md")
    given = arguments.parse_args()
    for part in given.parts or PARTS:
        print(f"{part}:")
        found = table(part)
        if given.write_docs:  # part by part, so that an interrupt loses one at most
            marked = rf"(?<=<!-- {part} -->\n)[\s\S]*?(?=<!-- end -->)"
            PAGE.write_text(re.sub(marked, lambda _, found=found: f"{found}\n", PAGE.read_text(), count=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
