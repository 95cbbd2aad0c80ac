"""Edits: pure functions that map the activation in a region to a new activation.

An operand is a real number, or a tensor with as many axes as the region. Each axis of the tensor must have the region's
length or length 1. For a region with shape `(batch, channel, row, col)`, the shape `(1, channel, 1, 1)` is allowed.
Other operands raise EditError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ..engine.paths import inside_vmap
from ..errors import EditError
from ..registry.sites import Axes, HookPoint, Site
from .edit_context import Context, uniform

Edit: TypeAlias = Callable[..., Tensor]
Per: TypeAlias = Literal["episode", "step"]


@dataclass(frozen=True, eq=False)
class Set:
    """Set the activation to a value.

    Args:
        value: Real number or tensor.

    Example:
        >>> Set(2.0)(torch.zeros(3))
        tensor([2., 2., 2.])
    """

    value: Tensor | float

    def __post_init__(self) -> None:
        _check(self, "value", self.value, Real, Tensor)

    def __call__(self, activation: Tensor) -> Tensor:
        if isinstance(self.value, Tensor):
            return self.value.expand_as(activation)
        return torch.full_like(activation, self.value)


@dataclass(frozen=True, eq=False)
class Add:
    """Add a vector, multiplied by a coefficient, to the activation.

    Args:
        vector: Real number or tensor.
        coefficient: Multiplier for the vector; a negative coefficient steers away from the vector.

    Example:
        >>> Add(torch.tensor([[1.0, 2.0]]), -2.0)(torch.zeros(1, 2))
        tensor([[-2., -4.]])
    """

    vector: Tensor | float
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "vector", self.vector, Real, Tensor)
        _check(self, "coefficient", self.coefficient, Real)

    def __call__(self, activation: Tensor) -> Tensor:
        return _unwrapped(self, lambda region, vector: region + self.coefficient * vector, activation, self.vector)


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply the activation by a factor.

    Args:
        factor: Real number or tensor.

    Example:
        >>> Scale(0.5)(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    factor: Tensor | float

    def __post_init__(self) -> None:
        _check(self, "factor", self.factor, Real, Tensor)

    def __call__(self, activation: Tensor) -> Tensor:
        return _unwrapped(self, torch.mul, activation, self.factor)


@dataclass(frozen=True, eq=False)
class Clamp:
    """Clamp every element to a range.

    Args:
        low: Lower bound; None for no bound.
        high: Upper bound; None for no bound.

    Raises:
        EditError: If both bounds are None, or if `low` is greater than `high`.

    Example:
        >>> Clamp(low=0.0)(torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise EditError("Clamp needs a lower bound, an upper bound or both, as in Clamp(low=0.0).")
        _check(self, "lower bound", self.low, Real, type(None))
        _check(self, "upper bound", self.high, Real, type(None))
        if self.low is not None and self.high is not None and self.low > self.high:
            raise EditError(f"Clamp(low={self.low}, high={self.high}): low must not be above high.")

    def __call__(self, activation: Tensor) -> Tensor:
        return activation.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Project:
    """Remove the component along a direction (directional ablation).

    Args:
        direction: Tensor with size 1 along every axis that the direction does not span. For example,
            `direction.view(1, -1, 1, 1)` is a direction in channel space, and the component along the direction is
            removed separately at every row, column and batch entry.

    Raises:
        EditError: If every element of the direction is zero.

    Example:
        >>> Project(torch.tensor([[1.0, 0.0]]))(torch.tensor([[3.0, 4.0]]))
        tensor([[0., 4.]])

    References:
        Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section 2.4.
    """

    direction: Tensor

    def __post_init__(self) -> None:
        _check(self, "direction", self.direction, Tensor)
        if not (self.direction.is_meta or inside_vmap(self.direction) or self.direction.any()):
            raise EditError("Project: the direction is zero. Pass a tensor with at least one nonzero element.")

    def __call__(self, activation: Tensor) -> Tensor:
        along = tuple(axis for axis, length in enumerate(self.direction.shape) if length > 1)
        scaled = self.direction / self.direction.abs().amax()  # squares could otherwise overflow half precision
        unit = scaled / scaled.square().sum().sqrt()
        component = (activation * unit).sum(dim=along, keepdim=True) if along else activation * unit
        return activation - component * unit


@dataclass(frozen=True, eq=False)
class Resample:
    """Replace each row with a row from a reference set, drawn at random with replacement.

    Outside a rollout, the draw for a row depends only on the seed, the module's call index and the row's index. In a
    rollout, the row's index is replaced by the sampling seed, the episode's seed, the number of earlier episodes with
    the same seed and, if `per` is `"step"`, the step.

    Args:
        reference: Tensor with the region's axes. The entries along the batch axis are the rows of the reference set.
        seed: Random seed, an integer.
        batch_axis: Index of the batch axis.
        per: In a rollout, whether to draw one reference row per `"episode"` or one reference row per `"step"`.

    Raises:
        EditError: If the reference has no rows, or if `per` is neither `"episode"` nor `"step"`.
    """

    reference: Tensor
    seed: int
    batch_axis: int = 0
    per: Per = "episode"

    def __post_init__(self) -> None:
        _check(self, "reference", self.reference, Tensor)
        _check(self, "seed", self.seed, Integral)
        shape = tuple(self.reference.shape)
        if not 0 <= self.batch_axis < len(shape) or not shape[self.batch_axis]:
            raise EditError(
                f"Resample: the reference must have at least one row along batch_axis={self.batch_axis}; got shape "
                f"{shape}."
            )
        if self.per not in get_args(Per):
            raise EditError(f"Resample: per must be 'episode' or 'step'; got {self.per!r}.")

    def __call__(self, activation: Tensor, *, context: Context) -> Tensor:
        count = self.reference.shape[self.batch_axis]
        if keys := context.draw_keys(each_step=self.per == "step"):
            drawn = uniform([(int(self.seed), *key) for key in keys])
            donors = torch.from_numpy((drawn * count).astype(np.int64))
        else:
            donors = donor_rows(self.seed, context.call, context.rows, count)
        return self.reference.index_select(self.batch_axis, donors.to(self.reference.device))


_EXPECTED = {Real: "a real number (int or float)", Integral: "an integer", Tensor: "a tensor", type(None): "None"}


def _check(edit: object, name: str, operand: object, *kinds: type) -> None:
    """Raise EditError if an operand of an edit has none of the given types. `name` is the operand's name."""
    if not isinstance(operand, kinds) or isinstance(operand, Fraction):  # torch does not accept fractions
        short = isinstance(operand, (str, complex, int, float))
        shown = repr(operand) if short else type(operand).__name__
        expected = " or ".join(_EXPECTED[kind] for kind in kinds)
        raise EditError(f"{type(edit).__name__}: the {name} must be {expected}; got {shown}.")


def _unwrapped(edit: object, arithmetic: Callable[[Any, Any], Tensor], region: Tensor, operand: Any) -> Tensor:
    """Return `arithmetic(region, operand)`. Raise EditError if the result overflows an integer dtype."""
    result = arithmetic(region, operand)
    if not (result.is_floating_point() or result.is_complex() or result.dtype == torch.bool):
        exact = arithmetic(region.float(), operand.float() if isinstance(operand, Tensor) else operand)
        if ((exact - result).abs() > torch.iinfo(result.dtype).max / 2).any():
            raise EditError(
                f"{type(edit).__name__}: the result is out of range for the region's dtype, {result.dtype}. Use "
                "smaller values, or patch a floating-point activation."
            )
    return result


def donor_rows(seed: int, call: int, rows: Tensor, count: int) -> Tensor:
    """Draw one index from 0 to `count - 1` for each row index in `rows`. The result is int64 with shape `(row,)`.

    Each draw depends only on the seed, the module's call index `call` and the row index.
    """
    numbers = rows.cpu().numpy().astype(np.uint64)
    draws = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, call], dtype=np.uint64)))
    uniform = draws.random(int(numbers.max(initial=0)) + 1)[numbers]
    return torch.from_numpy((uniform * count).astype(np.int64))


def region_lengths(site: Site, point: HookPoint) -> list[int | None]:
    """Return the lengths of a region's axes at a traced hook point, with None for axes whose lengths vary."""
    lengths = point.lengths
    for axis, index in site.indices:
        number = point.axes.index(axis)
        if isinstance(index, tuple) and number != point.batch_axis:
            lengths[number] = len(index)
    return lengths


_VERBS = {Set: "sets", Add: "adds", Scale: "multiplies", Clamp: "limits", Project: "projects", Resample: "draws"}


def check_operands(
    edit: Edit, site: Site, axes: Axes, lengths: Sequence[int | None], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise EditError if an operand of a built-in edit does not fit the region.

    `axes`, `lengths`, `dtype` and `device` describe the region. Operands of other edits are not checked.
    """
    verb = next((verb for kind, verb in _VERBS.items() if isinstance(edit, kind)), None)
    if verb is None:
        return
    kind = type(edit).__name__
    if dtype in _QUANTIZED:
        raise EditError(
            f"{kind} at {site!r}: the region is quantized ({dtype}). Dequantize the tensor, or patch an earlier site."
        )
    if isinstance(edit, Resample):
        number = axes.index("batch") if "batch" in axes else edit.batch_axis
        if number != edit.batch_axis:
            raise EditError(
                f"{kind} at {site!r} has batch_axis={edit.batch_axis}, but the batch is axis {number} of "
                f"({', '.join(axes)}). Use Resample(reference, seed, batch_axis={number})."
            )
        lengths = [*lengths[:number], None, *lengths[number + 1 :]]  # any number of rows
    operands = {item.name: getattr(edit, item.name) for item in fields(edit)}  # type: ignore[arg-type]
    if isinstance(edit, Add) and not isinstance(edit.vector, Tensor):
        operands["vector times its coefficient"] = edit.coefficient * edit.vector
    for name, operand in operands.items():
        if isinstance(operand, Tensor):
            if not fits(operand, lengths, or_one=True):
                raise shape_error(f"{kind} at {site!r}", name, operand, axes, lengths, verb)
            if operand.dtype != dtype or operand.device != device:
                raise EditError(
                    f"{kind} at {site!r}: the {name} is {operand.dtype} on {operand.device}, but the region is "
                    f"{dtype} on {device}. Convert the {name}: {name}.to('{device}', {dtype})."
                )
        elif verb != "draws" and operand is not None and (fault := _out_of_range(dtype, operand)):
            raise EditError(f"{kind} at {site!r}: the {_BOUNDS.get(name, name)} must be {fault}")


_BOUNDS = {"low": "lower bound", "high": "upper bound"}
_QUANTIZED = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)


def _out_of_range(dtype: torch.dtype, number: float) -> str:
    """If a dtype cannot represent a number, return text that describes the dtype's range; otherwise, return "".

    Infinities and NaN are in the range of every floating-point dtype.
    """
    inexact = dtype.is_floating_point or dtype.is_complex
    limits = (torch.finfo if inexact else torch.iinfo)(dtype if dtype != torch.bool else torch.uint8)
    low, high = (0, 1) if dtype == torch.bool else (limits.min, limits.max)
    inside = low <= number <= high and (inexact or number == int(number))
    if not inside and (not inexact or -math.inf < number < math.inf):
        expected = f"{'a number' if inexact else 'an integer'} from {low} to {high}"
        return f"{expected}, because the region's dtype is {dtype}; got {number}."
    return ""


def check_mask(
    mask: Any, site: Site, axes: Axes = (), lengths: Sequence[int | None] | None = None, *, name: str = "where"
) -> None:
    """Raise EditError if a mask is not a bool tensor that matches the region.

    `axes` and `lengths` describe the region. The defaults come from the site's trace, if the site has a trace. `name`
    is the argument's name in the error message.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a {mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise EditError(
            f"`{name}` at {site!r} must be a bool tensor (such as column < 12)"
            f"{' or a function that returns a bool tensor' * (name == 'where')}; got {got}."
        )
    if lengths is None and site.point is not None:
        axes, lengths = site.point.axes, region_lengths(site, site.point)
    if lengths is not None and not fits(mask, lengths, or_one=True):
        raise shape_error(f"`{name}` at {site!r}", "mask", mask, axes, lengths, "selects")


def fits(operand: Tensor, lengths: Sequence[int | None], *, or_one: bool = False) -> bool:
    """Return whether a tensor has the given axis lengths. None stands for any length; `or_one` also allows length 1."""
    pairs = zip(operand.shape, lengths, strict=False)
    return operand.dim() == len(lengths) and all(want in (None, n) or (or_one and n == 1) for n, want in pairs)


def shape_error(
    subject: str, noun: str, operand: Tensor, axes: Axes, lengths: Sequence[int | None], verb: str
) -> EditError:
    """Return the error for an operand whose axes do not match the region's `axes` and `lengths`.

    In the message, `subject` names the edit and the site, `noun` names the operand, and `verb` says what the edit does.
    """
    rows = axes.index("batch") if "batch" in axes else 0
    # A mask with the length of the batch probably selects rows; any other vector probably does not.
    tried = [*[rows] * (noun == "mask"), *(number for number in range(len(axes)) if number != rows)]
    number = next((number for number in tried if lengths[number] == operand.numel()), None)
    advice = ""
    if operand.dim() == 1 and number is not None:
        view = ", ".join(str(len(operand)) if axis == number else "1" for axis in range(len(axes)))
        advice = f". For example, {noun}.view({view}) {verb} along the '{axes[number]}' axis"
    return EditError(
        f"{subject}: the {noun} has shape {tuple(operand.shape)}, but the region has axes {shown_axes(axes, lengths)}. "
        f"Each axis of the {noun} must have the region's length or length 1{advice}."
    )


def shown_axes(axes: Axes, lengths: Sequence[int | None]) -> str:
    """Format axis names and lengths as text for an error message, such as `(batch, channel) = (any, 8)`."""
    return f"({', '.join(axes)}) = ({', '.join('any' if length is None else str(length) for length in lengths)})"
