"""Contrastive pairs: find channels that respond to a feature, relative to their background variation.

result = contrast(points, clean, corrupted, background=observations)
result.top(10)
"""

from .contrast import contrast
from .result import Contrast

__all__ = ["Contrast", "contrast"]
