"""Gradient estimates of what a sweep of single patches would give, with a receipt.

sites = [site for name in points.select("relu?") for site in points.site(name).split("channel")]
result = attribution(points, observations, patches=map(zero_ablate, sites), metric=logit_difference(0, 1))
result.top(10)
print(result)      # says how well the estimates rank the patches that were run
"""

from ._attribution import attribution
from ._result import Attribution

__all__ = ["Attribution", "attribution"]
