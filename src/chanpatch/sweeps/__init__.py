"""Many patches, one by one, and what each does to a metric.

    sites = points.site("embedder.relu3").split("channel")
    result = sweep(points, observations, patches=[zero_ablate(site) for site in sites], metric=logit_difference(0, 1))
    result.top(10)

What comes before the patches runs once, and what comes after them for many patches at a time where that gives the
numbers of the plain loop; the result says which strategy each hook point got, and why.
"""

from ._result import SweepInterrupted, SweepResult, Swept
from ._sweep import sweep

__all__ = ["SweepInterrupted", "SweepResult", "Swept", "sweep"]
