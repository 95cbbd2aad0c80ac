"""Simulations of every interval and test on data with known true values, for docs/statistics.md.

python tests/simulations.py [PART ...]    prints the tables
python tests/simulations.py --write-docs  writes them into docs/statistics.md; ten minutes
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from rates import GOOD, TEST, Case, Floats, Generator, covers, each, grid, least, rate_of, sizes
from simulated_means import bootstrap, clusters, fractions, means, ranked, simultaneous, tests
from torch import nn

import chanpatch.statistics as st
from chanpatch import ThresholdProbe, hook_points, label_channels
from chanpatch.controls import matched_channels
from chanpatch.errors import ProbeError
from chanpatch.probes import LogisticProbe, linear_probe
from chanpatch.statistics import auc, wilson_interval

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"


def wilson(rate: float, n: int, generator: Generator) -> Any:
    return covers(wilson_interval(generator.binomial(n, rate), n), rate)


def paired(rate: float, n: int, generator: Generator) -> Any:
    cells = (0.7 * rate, 0.3 * rate, 0.2 * (1 - rate), 0.8 * (1 - rate))
    return covers(st.paired_difference_interval(*generator.multinomial(n, cells)), cells[1] - cells[2])


def two(rate: float, n: int, generator: Generator) -> Any:
    one, other = (wilson_interval(generator.binomial(n, each), n) for each in (rate, 0.5))
    return covers(st.difference_interval(one, other), rate - 0.5)


def precision(rate: float, n: int, generator: Generator) -> Any:
    hits, alarms = (
        wilson_interval(generator.binomial(n, rate), n),
        wilson_interval(generator.binomial(3 * n, 0.2), 3 * n),
    )
    return covers(st.reweighted_precision(hits, alarms, base_rate=0.25), 0.25 * rate / (0.25 * rate + 0.75 * 0.2))


def mcnemar(rate: float, n: int, generator: Generator) -> bool:
    return st.mcnemar_exact(*generator.multinomial(n, (rate / 2, rate / 2, 1 - rate))[:2]) <= 0.05


def proportions() -> Iterator[Case]:
    good, rare = lambda n: (0.9 if n >= 10 else 0.85, 1.0), least(10, (0.9, 1.0))
    for rate in (0.02, 0.1, 0.5, 0.9):
        for title, trial, promise in (
            (f"`wilson_interval`: contains {rate:.0%}", wilson, good if rate == 0.5 else rare),
            (f"`paired_difference_interval`: contains the difference, first proportion {rate:.0%}", paired, good),
            (f"`difference_interval`: contains the difference, {rate:.0%} and 50%", two, good),
            (f"`reweighted_precision`: contains the precision, {rate:.0%} recall and 20% false positives",
             precision, good),
            (f"`mcnemar_exact`: p <= 0.05, {rate:.0%} of pairs differ", mcnemar, TEST),
        ):  # fmt: skip
            yield from grid(title, each(trial, rate), sizes(5, 6, 10, 20, 50), 2000, promise)


def stratified(rate: float, more: float, n: int, generator: Generator) -> Any:
    """Coverage for the difference between two groups spread unevenly over three strata with different rates."""
    strata = generator.integers(3, size=n)
    first = generator.random(n) < 0.3 + 0.2 * strata
    success = generator.random(n) < rate * (1 + strata) / 2 + more * first
    return covers(st.stratified_difference_interval(success, first, strata, resamples=399), more)


def strata() -> Iterator[Case]:
    for rate, more in ((0.3, 0.0), (0.3, 0.3), (0.02, 0.0), (0.02, 0.05)):
        name, row = f"success rate about {rate:.0%}, difference {more:.0%}", each(stratified, rate, more)
        yield from grid(name, row, sizes(10, 30, 100, 300), 250, least(100, (0.9, 1)) if rate > 0.1 else None)


def floor(generator: Generator, center: float, n: int) -> Floats:
    return np.maximum(generator.normal(center - 1, 1, n), 0)


Scores = Callable[[Generator, int], Floats]
SCORES: dict[str, tuple[Scores, Scores]] = {  # how to draw scores for positives and for negatives
    "normal, equal distributions": (lambda g, n: g.normal(size=n), lambda g, n: g.normal(size=n)),
    "normal, means 1.5 apart": (lambda g, n: g.normal(1.5, 1, n), lambda g, n: g.normal(size=n)),
    "normal, means 3 apart": (lambda g, n: g.normal(3, 1, n), lambda g, n: g.normal(size=n)),
    "normal, standard deviation of positives 3": (lambda g, n: g.normal(2, 3, n), lambda g, n: g.normal(size=n)),
    "Student's t, 2 degrees of freedom": (lambda g, n: g.standard_t(2, n) + 2, lambda g, n: g.standard_t(2, n)),
    "normal, rounded to integers": (lambda g, n: np.round(g.normal(1, 1, n)), lambda g, n: np.round(g.normal(size=n))),
    "84% zeros, equal distributions": (lambda g, n: floor(g, 0, n), lambda g, n: floor(g, 0, n)),
    "84% of negatives and 31% of positives are zero": (lambda g, n: floor(g, 1.5, n), lambda g, n: floor(g, 0, n)),
}
COUNTS = {f"{positives} and {negatives}": (positives, negatives)
          for positives, negatives in ((5, 50), (6, 50), (10, 10), (10, 50), (30, 30))}  # fmt: skip


def scored(name: str, generator: Generator, positives: int, negatives: int) -> Floats:
    return np.concatenate([draw(generator, n) for draw, n in zip(SCORES[name], (positives, negatives), strict=True)])


@cache
def true_area(name: str) -> float:
    scores = scored(name, np.random.default_rng(0), 100_000, 100_000)
    return auc(scores, np.arange(200_000) < 100_000).estimate


def area(name: str, counts: tuple[int, int], generator: Generator) -> Any:
    return covers(auc(scored(name, generator, *counts), np.arange(sum(counts)) < counts[0]), true_area(name))


def two_areas(name: str, counts: tuple[int, int], generator: Generator) -> Any:
    """Coverage for the AUC difference between independent inputs, such as held-out and shifted inputs."""
    one, other = (auc(scored(each, generator, *counts), np.arange(sum(counts)) < counts[0]) for each in (name, BEST))
    return covers(st.difference_interval(one, other), true_area(name) - true_area(BEST))


def paired_areas(name: str, counts: tuple[int, int], generator: Generator) -> Any:
    """Coverage for the AUC difference between two scores that have half of their noise variance in common."""
    labels = np.arange(sum(counts)) < counts[0]
    common, *own = generator.normal(size=(3, sum(counts)))
    if name == T2:
        common, *own = generator.standard_t(2, size=(3, sum(counts)))
    gains = PAIRED[name]
    one, other = (common + each + gain * 2**0.5 * labels for each, gain in zip(own, gains, strict=True))
    if name == ZEROS:
        one, other = (np.maximum(each - 2**0.5, 0) for each in (one, other))
    truth = np.diff(scipy.stats.norm.cdf(np.divide(gains, 2**0.5)))[0] if gains[0] != gains[1] else 0.0
    return covers(st.auc_difference_interval(one, other, labels), -truth)


BEST, T2 = "normal, means 1.5 apart", "Student's t, 2 degrees of freedom, equal AUC"
ZEROS = "84% of negatives are zero, equal AUC"
PAIRED = {  # distance from negatives to positives, in standard deviations, in the first and in the second score
    "normal, equal AUC (0.76)": (1.0, 1.0),
    "normal, AUC 0.92 and 0.64": (2.0, 0.5),
    "normal, equal AUC (0.98)": (3.0, 3.0),
    T2: (1.0, 1.0),
    ZEROS: (1.5, 1.5),
}


def areas() -> Iterator[Case]:
    rows = {f"`auc`: {name}": each(area, name) for name in SCORES}
    for name in ("normal, equal distributions", "normal, means 3 apart"):
        rows[f"`difference_interval`: AUC for {name}, minus AUC for {BEST}"] = each(two_areas, name)
    rows |= {f"`auc_difference_interval`: {name}": each(paired_areas, name) for name in PAIRED}
    for name, row in rows.items():
        yield from grid(name, row, COUNTS, 500, lambda counts: GOOD if min(counts) >= 10 else None)


def precise(least: float, found: bool, inputs: int, generator: Generator) -> bool:
    """Return whether `fit_precision` finds a threshold or, unless `found`, one whose true precision is too low."""
    labels, seed = generator.random(inputs) < 0.4, int(generator.integers(2**31))
    try:
        probe = ThresholdProbe.fit_precision(generator.normal(2.0 * labels), labels, min_precision=least, seed=seed)
    except ProbeError:
        return False
    hits, alarms = scipy.stats.norm.sf(probe.threshold - 2), scipy.stats.norm.sf(probe.threshold)
    return found or 0.4 * hits / (0.4 * hits + 0.6 * alarms) < least


def uninformed(rate: float, inputs: int, generator: Generator) -> bool:
    """Return whether `fit_precision` claims precision 0.9 for a channel that is less precise at every threshold."""
    sums, labels = generator.normal(size=inputs), generator.random(inputs) < rate
    try:
        ThresholdProbe.fit_precision(sums, labels, seed=int(generator.integers(2**31)))
    except ProbeError:
        return False
    return True


def probes() -> Iterator[Case]:
    columns = sizes(200, 1000, 4000)
    for minimum in (0.8, 0.9, 0.95):
        title = f"`fit_precision(min_precision={minimum})`"
        missed, found = each(precise, minimum, False), each(precise, minimum, True)
        yield from grid(f"{title}: precision is below the minimum", missed, columns, 300, TEST)
        yield from grid(f"{title}: finds a threshold", found, columns, 300, None)
    for rate in (0.88, 0.895, 0.899):
        row = f"`fit_precision(min_precision=0.9)`, uninformative channel, {rate:.1%} positives: finds a threshold"
        yield from grid(row, each(uninformed, rate), columns, 300, TEST)


def labeled(inputs: int, generator: Generator) -> bool:
    names, seed = ("UP", "DOWN", "LEFT"), int(generator.integers(2**31))
    found = label_channels(generator.normal(size=(inputs, 20)), np.arange(inputs) % 3, names=names, seed=seed)
    return any(each.label for each in found)


def cross_validated(rate: float, inputs: int, generator: Generator) -> bool:
    labels = np.arange(inputs) < rate * inputs
    return linear_probe(generator.normal(size=(inputs, 3)), labels, seed=int(generator.integers(2**31))).p <= 0.05


def labels() -> Iterator[Case]:
    row = "`label_channels`: labels at least one of 20 uninformative channels"
    yield from grid(row, each(labeled), sizes(60, 200), 200, TEST)
    for rate in (0.5, 0.3):
        row = f"`linear_probe`, three uninformative channels, {rate:.0%} positives: p <= 0.05"
        yield from grid(row, each(cross_validated, rate), sizes(60, 200), 100, TEST)


@cache
def mean_fit(coefficient: float, inputs: int) -> float:
    generator = np.random.default_rng(0)
    return float(
        np.mean([LogisticProbe.fit(*logistic(coefficient, inputs, generator)).coefficients[0] for _ in range(500)])
    )


def logistic(coefficient: float, inputs: int, generator: Generator) -> tuple[Floats, NDArray[np.bool_]]:
    sums = generator.normal(size=(inputs, 2))
    return sums, generator.random(inputs) < scipy.special.expit(coefficient * sums[:, 0] - 1)


def coefficient(truth: float, fitted: bool, inputs: int, generator: Generator) -> Any:
    data = logistic(truth, inputs, generator)
    interval = LogisticProbe.fit(*data).coefficient_interval(*data, resamples=199)
    return covers(interval, mean_fit(truth, inputs) if fitted else truth)[0]


def coefficients() -> Iterator[Case]:
    for title, truth, fitted, promise in (
        ("contains the true coefficient, 0", 0.0, False, least(100, (0.9, 1))),
        ("contains the mean penalized coefficient; true coefficient 1.5", 1.5, True, None),
        ("contains the true coefficient, 1.5", 1.5, False, None),
    ):
        yield from grid(title, each(coefficient, truth, fitted), sizes(10, 30, 100, 300), 100, promise)


def by_mean(matched: bool, channel: int, generator: Generator) -> bool:
    """Return whether a channel gets a p-value of at most 0.05 if effects depend only on mean activations."""
    mean = np.sort(generator.lognormal(size=64))[::-1].copy()
    background = torch.from_numpy(mean * generator.uniform(0.5, 1.5, size=(8, 64)))
    effects = mean * (1 + 0.1 * generator.normal(size=64))
    points, seed = (
        hook_points(nn.Identity(), background[:2], axes={".out": ("batch", "feature")}),
        generator.integers(999),
    )
    others = matched_channels(points, points.site(".out", feature=channel), background, count=19, seed=int(seed))
    drawn = [effects[dict(site.indices)["feature"][0]] for site in others]
    rank = others.rank(effects[channel], drawn) if matched else st.rank_among(effects[channel], drawn)
    return rank.p is not None and rank.p <= 0.05


def controls() -> Iterator[Case]:
    places = {"largest": 0, "second largest": 1, "fifth largest": 4, "median": 32}
    columns = {f"{place} of 64 mean activations": channel for place, channel in places.items()}
    yield from grid("`matched_channels(...).rank`: p <= 0.05", each(by_mean, True), columns, 300, TEST)
    yield from grid("`rank_among` with the same controls: p <= 0.05", each(by_mean, False), columns, 300, None)


def exchangeable(side: Any, count: int, generator: Generator) -> bool:
    effect, *others = generator.standard_cauchy(size=count + 1)
    p = st.rank_among(effect, others, alternative=side).p
    return p is not None and p <= 0.05


def ranks() -> Iterator[Case]:
    columns = {f"{count} controls": count for count in (18, 19, 99)}
    for side in ("two-sided", "greater", "less"):
        name, row = f'`rank_among(alternative="{side}")`: p <= 0.05', each(exchangeable, side)
        yield from grid(name, row, columns, 4000, TEST)


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    each.__name__: each
    for each in (means, clusters, fractions, bootstrap, tests, ranked, simultaneous, proportions, strata, areas, probes,
                 labels, coefficients, controls, ranks)
}  # fmt: skip


def table(part: str) -> str:
    """Return the rates of a part as a Markdown table: one row per method and data set, one column per sample size."""
    cases = [*PARTS[part]()]
    columns, rows = list(dict.fromkeys(case.column for case in cases)), dict[str, dict[str, str]]()
    for case in cases:
        rate = rate_of(part, case)
        broken = " **not as promised**" if case.promise and not rate.keeps(case.promise) else ""
        rows.setdefault(case.row, {})[case.column] = f"{rate}{broken}"
        print(f"{case.row} | {case.column} | {rate}{broken} | {rate.trials:,}", flush=True)
    lines = [[f"at least {min(case.trials for case in cases):,} data sets", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cells.get(column, "") for column in columns)] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], help=f"tables to print: {', '.join(PARTS)} (default: all)"
    )
    arguments.add_argument("--write-docs", action="store_true", help="write the tables into docs/statistics.md")
    given = arguments.parse_args()
    for part in given.parts or PARTS:
        print(f"{part}:")
        found = table(part)
        if given.write_docs:  # after each part, so an interrupt loses at most one
            marked = rf"(?<=<!-- {part} -->\n)[\s\S]*?(?=<!-- end -->)"
            PAGE.write_text(re.sub(marked, lambda _, found=found: f"{found}\n", PAGE.read_text(), count=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
