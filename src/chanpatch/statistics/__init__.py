"""Intervals and tests for proportions, differences, rankings and samples, built on scipy.

A paired comparison counts the pairs in which both inputs, only the first input, only the second input, or neither input
succeeded. The first axis of a sample has one row per input, level or pair. Rows with the same label in `clusters` are
not independent.
"""

from .comparisons import (
    auc_difference_interval,
    aucs,
    rank_correlation,
    share_interval,
    stratified_difference_interval,
)
from .corrections import benjamini_hochberg, equivalent, holm
from .flips import MaxT, max_t_test, sign_flip_test
from .interval import Interval
from .means import mean_interval
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
from .resampling import bootstrap_interval

__all__ = [
    "Interval", "MaxT", "PairedCounts", "Rank", "auc", "auc_difference_interval", "aucs", "benjamini_hochberg",
    "bootstrap_interval", "difference_interval", "equivalent", "holm", "max_t_test", "mcnemar_exact",
    "mean_interval", "paired_counts", "paired_difference_interval", "rank_among", "rank_correlation",
    "reweighted_precision", "share_interval", "sign_flip_test", "stratified_difference_interval", "wilson_interval",
]  # fmt: skip
