"""Measure or estimate how each of many patches changes a metric, or measure the effect along a single path.

sites = points.site("embedder.relu3").split("channel")
result = sweep(points, observations, patches=[zero_ablate(site) for site in sites], metric=logit_difference(0, 1))
result.top(10)
"""

from ..results import Grid
from .attribution import attribution, edge_attribution
from .path_patching import path_patch
from .result import Attribution, SweepInterrupted, SweepResult, Swept
from .sweep import sweep

__all__ = ["Attribution", "Grid", "SweepInterrupted", "SweepResult", "Swept",
           "attribution", "edge_attribution", "path_patch", "sweep"]  # fmt: skip
