"""What a patch does to a region: pure functions of its activation, most of them plain data.

An edit is any callable `activation -> activation`. One that wants to know more takes a keyword-only `context`.
Operands are scalars, or tensors with one length per axis of the region, each equal to the region's or 1: they are
never broadcast in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import EditError


class Edit(Protocol):
    """Anything that turns a region's activation into another of the same shape, dtype and device."""

    def __call__(self, activation: Tensor, /) -> Tensor:
        """Return the new activation, or the one given to change nothing."""
        ...


class Context(Protocol):
    """What an edit or a `where` function may ask about the forward under way.

    Attributes:
        inputs: Inputs of the root call, the observations for a policy.
        step: Step of the rollout, or None outside one.
        rows: int64 `(batch,)`, the number of each row: of the episode in a rollout, otherwise 0, 1, 2, ...
        call: Index of the module's call within the root call.
    """

    @property
    def inputs(self) -> tuple[Any, ...]:  # noqa: D102
        ...

    @property
    def step(self) -> int | None:  # noqa: D102
        ...

    @property
    def rows(self) -> Tensor:  # noqa: D102
        ...

    @property
    def call(self) -> int:  # noqa: D102
        ...


@dataclass(frozen=True, eq=False)
class Set:
    """Puts a value in place of the activation.

    Args:
        value: Scalar, or tensor with the region's axes.
    """

    value: Tensor | float

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the value, in the shape of the activation."""
        if isinstance(self.value, Tensor):
            return self.value.expand_as(activation)
        return torch.full_like(activation, self.value)


@dataclass(frozen=True, eq=False)
class Add:
    """Adds a vector, times a coefficient.

    Args:
        vector: Scalar, or tensor with the region's axes.
        coefficient: Multiplies the vector.
    """

    vector: Tensor | float
    coefficient: float = 1.0

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the activation plus the vector times the coefficient."""
        return activation + self.coefficient * self.vector


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiplies by a factor.

    Args:
        factor: Scalar, or tensor with the region's axes.
    """

    factor: Tensor | float

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the activation times the factor."""
        return activation * self.factor


@dataclass(frozen=True, eq=False)
class Clamp:
    """Keeps every element between two bounds.

    Args:
        low: Lower bound, or None.
        high: Upper bound, or None.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        """Refuse bounds that are missing or crossed."""
        if self.low is None and self.high is None:
            raise EditError("Clamp needs a lower bound, an upper bound, or both: Clamp(low=0.0).")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise EditError(f"Clamp(low={self.low}, high={self.high}): the lower bound is above the upper one.")

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the activation, clamped."""
        return activation.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Project:
    """Removes the component along a direction (directional ablation).

    Args:
        direction: Tensor with the region's axes. The component is taken over the axes on which it is longer than
            1, and removed at every place of the others: `direction.view(1, -1, 1, 1)` is one direction in channel
            space, removed at every row, column and input.

    References:
        Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section 2.4.
    """

    direction: Tensor

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the activation minus its component along the direction."""
        along = tuple(axis for axis, length in enumerate(self.direction.shape) if length > 1)
        unit = self.direction / self.direction.square().sum().sqrt()
        component = (activation * unit).sum(dim=along, keepdim=True) if along else activation * unit
        return activation - component * unit


@dataclass(frozen=True, eq=False)
class Resample:
    """Puts a row of a reference set in place of each row, drawn at random with replacement.

    The draw is a function of the seed, the module's call index and the row's number, and of nothing else: neither
    the order of the rows nor how they are cut into forwards changes it.

    Args:
        reference: Tensor with the region's axes; its batch axis is the set to draw from.
        seed: Of the draw.
        batch_axis: Which axis of the reference is the batch.
    """

    reference: Tensor
    seed: int
    batch_axis: int = 0

    def __call__(self, activation: Tensor, *, context: Context) -> Tensor:
        """Return one reference row per row."""
        donors = donor_rows(self.seed, context.call, context.rows, self.reference.shape[self.batch_axis])
        return self.reference.index_select(self.batch_axis, donors.to(self.reference.device))


def donor_rows(seed: int, call: int, rows: Tensor, count: int) -> Tensor:
    """Return, for each row number, the position of its donor among `count`.

    Args:
        seed: Of the draw.
        call: The module's call index.
        rows: int64 `(batch,)`.
        count: Number of donors.
    """
    numbers = rows.cpu().numpy().astype(np.uint64)
    draws = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, call], dtype=np.uint64)))
    uniform = draws.random(int(numbers.max(initial=0)) + 1)[numbers]
    return torch.from_numpy((uniform * count).astype(np.int64))
