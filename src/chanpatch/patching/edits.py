"""What a patch does to a region: pure functions of its activation, most of them plain data.

An edit is any callable `activation -> activation`. One that wants to know more takes a keyword-only `context`.
Operands are scalars, or tensors with one length per axis of the region, each equal to the region's or 1: they are
never broadcast in silence.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..engine.paths import inside_vmap
from ..errors import EditError


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
        value: Real number, or tensor with the region's axes, such as `(1, channel, 1, 1)` at a region
            `(batch, channel, row, col)`.

    Raises:
        EditError: If the value is neither.

    Example:
        >>> Set(2.0)(torch.zeros(3))
        tensor([2., 2., 2.])
    """

    value: Tensor | float

    def __post_init__(self) -> None:
        """Refuse a value that is neither a tensor nor a real number."""
        _check_operand(self, "value")

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the value, in the shape of the activation."""
        if isinstance(self.value, Tensor):
            return self.value.expand_as(activation)
        return torch.full_like(activation, self.value)


@dataclass(frozen=True, eq=False)
class Add:
    """Adds a vector, times a coefficient.

    Args:
        vector: Real number, or tensor with the region's axes, such as `(1, channel, 1, 1)` at a region
            `(batch, channel, row, col)`.
        coefficient: Multiplies the vector; negative to steer away from it.

    Raises:
        EditError: If the vector is neither, or the coefficient no real number.

    Example:
        >>> Add(torch.tensor([[1.0, 2.0]]), -2.0)(torch.zeros(1, 2))
        tensor([[-2., -4.]])
    """

    vector: Tensor | float
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a vector or a coefficient that cannot be added or multiplied."""
        _check_operand(self, "vector")
        _check_number(self, "coefficient")

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the activation plus the vector times the coefficient."""
        return activation + self.coefficient * self.vector


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiplies by a factor.

    Args:
        factor: Real number, or tensor with the region's axes, such as `(1, channel, 1, 1)` at a region
            `(batch, channel, row, col)`.

    Raises:
        EditError: If the factor is neither.

    Example:
        >>> Scale(0.5)(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    factor: Tensor | float

    def __post_init__(self) -> None:
        """Refuse a factor that is neither a tensor nor a real number."""
        _check_operand(self, "factor")

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the activation times the factor."""
        return activation * self.factor


@dataclass(frozen=True, eq=False)
class Clamp:
    """Keeps every element between two bounds.

    Args:
        low: Lower bound, or None.
        high: Upper bound, or None.

    Raises:
        EditError: If both are missing, they are crossed, or one of them is no real number.

    Example:
        >>> Clamp(low=0.0)(torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        """Refuse bounds that are missing or crossed."""
        if self.low is None and self.high is None:
            raise EditError("Clamp needs a lower bound, an upper bound, or both: Clamp(low=0.0).")
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                _check_number(self, name)
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
            space, removed at every row, column and input. A direction of one element spans all of what it is
            applied to, so that everything is removed. A batch axis longer than 1 is an axis as the others: the
            component is taken over all the inputs together, which is seldom meant.

    Raises:
        EditError: If the direction is no tensor, or has no length.

    Example:
        >>> Project(torch.tensor([[1.0, 0.0]]))(torch.tensor([[3.0, 4.0]]))
        tensor([[0., 4.]])

    References:
        Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section 2.4.
    """

    direction: Tensor

    def __post_init__(self) -> None:
        """Refuse a direction that is none."""
        if not isinstance(self.direction, Tensor):
            raise EditError(f"Project: the direction is {_shown(self.direction)}; it takes a tensor.")
        unread = self.direction.is_meta or inside_vmap(self.direction)
        if not unread and not self.direction.any():
            raise EditError("Project: the direction is zero everywhere, which is no direction.")

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
        seed: Of the draw, a whole number.
        batch_axis: Which axis of the reference, and of the region, is the batch.

    Raises:
        EditError: If the reference is no tensor with that axis and at least one row, or the seed no whole number.
    """

    reference: Tensor
    seed: int
    batch_axis: int = 0

    def __post_init__(self) -> None:
        """Refuse a reference without rows and a seed that is none."""
        if not isinstance(self.reference, Tensor):
            raise EditError(f"Resample: the reference is {_shown(self.reference)}; it takes a tensor.")
        try:
            operator.index(self.seed)
        except TypeError as fault:
            raise EditError(f"Resample: the seed is {_shown(self.seed)}; it takes a whole number.") from fault
        if not 0 <= self.batch_axis < self.reference.dim() or not self.reference.shape[self.batch_axis]:
            raise EditError(
                f"Resample: the reference has shape {tuple(self.reference.shape)}, and so no rows on axis "
                f"{self.batch_axis}."
            )

    def __call__(self, activation: Tensor, *, context: Context) -> Tensor:
        """Return one reference row per row."""
        donors = donor_rows(self.seed, context.call, context.rows, self.reference.shape[self.batch_axis])
        return self.reference.index_select(self.batch_axis, donors.to(self.reference.device))


def _check_operand(edit: Any, name: str) -> None:
    operand = getattr(edit, name)
    if not isinstance(operand, (Tensor, Real)):
        raise EditError(
            f"{type(edit).__name__}: the {name} is {_shown(operand)}; it takes a real number or a tensor "
            f"(torch.as_tensor({name}))."
        )


def _check_number(edit: Any, name: str) -> None:
    number = getattr(edit, name)
    if not isinstance(number, Real):
        raise EditError(f"{type(edit).__name__}: {name} is {_shown(number)}; it takes a real number.")


def _shown(operand: Any) -> str:
    """Show a short value as it is, a long one by its type."""
    return repr(operand) if isinstance(operand, (str, complex, int, float)) else f"of type {type(operand).__name__}"


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
