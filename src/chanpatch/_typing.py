"""Types that several modules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = tuple[str, ...]
Index: TypeAlias = "int | slice | Sequence[int] | Sequence[bool] | range | Tensor | np.ndarray[Any, Any]"
Reduce: TypeAlias = 'Literal["sum", "mean", "max", "norm"] | tuple[str, str | Callable[..., Tensor]]'
Mask: TypeAlias = "Tensor | Callable[..., Tensor]"
Stage: TypeAlias = Literal["before", "patch", "after"]
STAGES: tuple[Stage, ...] = ("before", "patch", "after")  # of what listens at one place, in the order of its turn
