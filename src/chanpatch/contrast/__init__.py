"""Contrastive pairs: which channels notice a feature, against how much they vary anyway.

result = contrast(points, clean, corrupted, background=observations)
result.top(10)
"""

from ._contrast import contrast
from ._result import Contrast

__all__ = ["Contrast", "contrast"]
