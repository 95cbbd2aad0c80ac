"""Intervals and tests for proportions, differences, rankings and samples, built on scipy.

Counts of a paired comparison are `both`, `only_first`, `only_second`, `neither`, after who succeeded. The first axis of
a sample has one row per input, level or pair; `clusters` labels the rows that are not independent of each other.
"""

from .corrections import benjamini_hochberg, equivalent, holm
from .interval import Interval
from .proportions import (
    PairedCounts,
    difference_interval,
    mcnemar_exact,
    paired_counts,
    paired_difference_interval,
    reweighted_precision,
    wilson_interval,
)
from .ranking import Rank, auc, rank_among
from .resampling import bootstrap_interval, sign_flip_test

__all__ = [
    "Interval",
    "PairedCounts",
    "Rank",
    "auc",
    "benjamini_hochberg",
    "bootstrap_interval",
    "difference_interval",
    "equivalent",
    "holm",
    "mcnemar_exact",
    "paired_counts",
    "paired_difference_interval",
    "rank_among",
    "reweighted_precision",
    "sign_flip_test",
    "wilson_interval",
]
