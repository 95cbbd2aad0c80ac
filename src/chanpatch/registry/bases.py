"""Bases: coordinates of activations along given directions or principal components, for `Site.along`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError


class Directions:
    """Basis that consists of given directions.

    The coordinates of an activation are the weights for which the weighted sum of the directions is closest to the
    activation (least squares). If the directions are orthonormal, the coordinates are dot products of the activation
    with the directions.

    Args:
        matrix: Directions with shape `(component, axis)`; a single direction may have shape `(axis,)`.

    Raises:
        SiteError: If the matrix is not floating-point or requires a gradient, or if the directions are not finite or
            not linearly independent.

    Example:
        >>> Directions(torch.tensor([[3.0, 4.0]])).encode(torch.tensor([[6.0, 8.0]]))
        tensor([[2.]])
    """

    def __init__(self, matrix: Tensor) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point() or matrix.dim() not in (1, 2):
            got = f"{matrix.dtype} {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise SiteError(f"Directions expects a floating-point tensor with shape (component, axis); got {got}.")
        if matrix.requires_grad:
            raise SiteError(
                "The matrix requires a gradient, but Directions cannot train the matrix, because Directions inverts it "
                "only once. Pass matrix.detach(), or use a module with the methods encode and decode as the basis."
            )
        self.matrix = _fixed(matrix if matrix.dim() == 2 else matrix[None])
        exact = self.matrix.double()
        if not exact.isfinite().all() or torch.linalg.matrix_rank(exact) < len(exact):
            raise SiteError(
                "Directions expects rows that are finite and linearly independent, but the rows of this matrix with "
                f"shape {tuple(self.matrix.shape)} are not. Remove rows that are zero, contain NaN or infinity, or are "
                "linear combinations of other rows."
            )
        self._inverse = _fixed(torch.linalg.pinv(exact).to(matrix.dtype))

    def encode(self, activation: Tensor) -> Tensor:
        """Convert an activation with shape `(..., axis)` to coordinates with shape `(..., component)`."""
        coordinates: Tensor = activation @ self._inverse
        return coordinates

    def decode(self, coordinates: Tensor) -> Tensor:
        """Convert coordinates, `(..., component)`, to the weighted sum of directions with shape `(..., axis)`."""
        activation: Tensor = coordinates @ self.matrix
        return activation


class PCA(Directions):
    """Basis of principal components. Coordinates are relative to the mean activation.

    Args:
        matrix: Orthonormal components with shape `(component, axis)`, sorted by decreasing variance.
        mean: Mean activation with shape `(axis,)`.
    """

    def __init__(self, matrix: Tensor, mean: Tensor) -> None:
        super().__init__(matrix)
        self.mean = _fixed(mean)

    @classmethod
    def fit(cls, activations: Mapping[Any, Tensor] | Tensor, count: int, *, axis: str | None = None) -> PCA:
        """Compute the first `count` principal components along one axis. Positions along other axes are the samples.

        Args:
            activations: Cache with one recorded site, or a tensor.
            count: Number of components.
            axis: Name of the axis in a cache; by default, the channel or feature axis. If `activations` is a tensor,
                this argument is ignored, and the last axis is used.

        Raises:
            SiteError: If the cache does not have exactly one site, if the axis does not exist, if `count` is greater
                than the length of the axis, or if there are not more samples than components.

        References:
            Jolliffe 2002, "Principal component analysis", section 3.5.
        """
        number = -1
        if not isinstance(activations, Tensor):
            if len(activations) != 1:
                raise SiteError(
                    f"PCA.fit expects a cache with one site; got {len(activations)} sites. Record only one."
                )
            ((site, activation),) = activations.items()
            axes = activations.axes(site)  # type: ignore[attr-defined]
            named = [each for each in ("channel", "feature") if each in axes] if axis is None else [axis]
            if len(named) != 1 or named[0] not in axes:
                raise SiteError(
                    f"PCA.fit needs one axis of {site!r}; got axis={axis!r}. Pass one of these axes: {', '.join(axes)}."
                )
            activations, number = activation, axes.index(named[0])
        samples = activations.detach().movedim(number, -1).flatten(0, -2).double()
        if type(count) is not int or not 1 <= count <= min(len(samples) - 1, samples.shape[1]):
            raise SiteError(
                f"PCA.fit: count must be an integer from 1 to {min(len(samples) - 1, samples.shape[1])} for "
                f"{len(samples)} samples of length {samples.shape[1]}; got {count!r}."
            )
        mean = samples.mean(dim=0)
        _, _, components = torch.linalg.svd(samples - mean, full_matrices=False)
        return cls(components[:count].to(activations.dtype), mean.to(activations.dtype))

    def encode(self, activation: Tensor) -> Tensor:
        """Convert an activation, `(..., axis)`, to coordinates relative to the mean with shape `(..., component)`."""
        return super().encode(activation - self.mean)

    def decode(self, coordinates: Tensor) -> Tensor:
        """Convert coordinates with shape `(..., component)` to an activation with shape `(..., axis)`."""
        return super().decode(coordinates) + self.mean


def _fixed(tensor: Tensor) -> Tensor:
    """Return a detached copy of a tensor that autograd can use even if the original is an inference tensor."""
    with torch.inference_mode(False):
        return tensor.detach().clone()
