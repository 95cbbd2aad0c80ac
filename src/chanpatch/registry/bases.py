"""Bases: coordinates of activations along given directions or principal components, for `Site.along`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError


class Directions:
    """Basis of given directions. The coordinates of an activation are those of its least-squares approximation.

    For orthonormal directions, the coordinates are dot products.

    Args:
        matrix: Directions with shape `(component, axis)`; a single direction may have shape `(axis,)`.

    Raises:
        SiteError: If the matrix is not a floating-point matrix of linearly independent, finite directions, or requires
            a gradient.

    Example:
        >>> Directions(torch.tensor([[3.0, 4.0]])).encode(torch.tensor([[6.0, 8.0]]))
        tensor([[2.]])
    """

    def __init__(self, matrix: Tensor) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point() or matrix.dim() not in (1, 2):
            raise SiteError("Directions expects a floating-point tensor with shape (component, axis).")
        if matrix.requires_grad:
            raise SiteError(
                "Directions inverts its matrix once, so the matrix cannot be trained, but it requires a gradient. Pass "
                "matrix.detach(), or a module with the methods encode and decode."
            )
        self.matrix = _fixed(matrix if matrix.dim() == 2 else matrix[None])
        exact = self.matrix.double()
        if not exact.isfinite().all() or torch.linalg.matrix_rank(exact) < len(exact):
            raise SiteError(
                f"Directions expects finite, linearly independent directions, but the matrix with shape "
                f"{tuple(self.matrix.shape)} does not contain {len(exact)} of them. Remove directions that are zero or "
                "combinations of others."
            )
        self._inverse = _fixed(torch.linalg.pinv(exact).to(matrix.dtype))

    def encode(self, activation: Tensor) -> Tensor:
        """Return the coordinates: `(..., axis)` to `(..., component)`."""
        coordinates: Tensor = activation @ self._inverse
        return coordinates

    def decode(self, coordinates: Tensor) -> Tensor:
        """Return the sum of the directions, weighted by the coordinates: `(..., component)` to `(..., axis)`."""
        activation: Tensor = coordinates @ self.matrix
        return activation


class PCA(Directions):
    """Basis of principal components; coordinates are relative to the mean activation.

    Args:
        matrix: Orthonormal components with shape `(component, axis)`, by decreasing variance.
        mean: Mean activation with shape `(axis,)`.
    """

    def __init__(self, matrix: Tensor, mean: Tensor) -> None:
        super().__init__(matrix)
        self.mean = _fixed(mean)

    @classmethod
    def fit(cls, activations: Mapping[Any, Tensor] | Tensor, count: int, *, axis: str | None = None) -> PCA:
        """Fit the first `count` principal components, with all other axes as samples.

        Args:
            activations: Cache with one recorded site, or a tensor.
            count: Number of components.
            axis: Axis of the cache; None for the last axis of a tensor, or the channel or feature axis of a cache.

        Raises:
            SiteError: If the cache has several sites or no such axis, or there are fewer samples than components.

        References:
            Jolliffe 2002, "Principal component analysis", section 3.5.
        """
        number = -1
        if not isinstance(activations, Tensor):
            if len(activations) != 1:
                raise SiteError(f"PCA.fit expects a cache with one site, but the cache has {len(activations)}.")
            ((site, activation),) = activations.items()
            axes = activations.axes(site)  # type: ignore[attr-defined]
            named = [each for each in ("channel", "feature") if each in axes] if axis is None else [axis]
            if len(named) != 1 or named[0] not in axes:
                raise SiteError(f"PCA.fit: pass one of the axes ({', '.join(axes)}) of {site!r} as axis=.")
            activations, number = activation, axes.index(named[0])
        samples = activations.detach().movedim(number, -1).flatten(0, -2).double()
        if type(count) is not int or not 1 <= count <= min(len(samples) - 1, samples.shape[1]):
            raise SiteError(
                f"PCA.fit: count must be an integer from 1 to {min(len(samples) - 1, samples.shape[1])} for "
                f"{len(samples)} samples with {samples.shape[1]} entries each; got {count!r}."
            )
        mean = samples.mean(dim=0)
        _, _, components = torch.linalg.svd(samples - mean, full_matrices=False)
        return cls(components[:count].to(activations.dtype), mean.to(activations.dtype))

    def encode(self, activation: Tensor) -> Tensor:
        """Return the coordinates relative to the mean: `(..., axis)` to `(..., component)`."""
        return super().encode(activation - self.mean)

    def decode(self, coordinates: Tensor) -> Tensor:
        """Return the activation with the given coordinates: `(..., component)` to `(..., axis)`."""
        return super().decode(coordinates) + self.mean


def _fixed(tensor: Tensor) -> Tensor:
    """Return a copy that later changes to the tensor do not affect, and that autograd can use."""
    with torch.inference_mode(False):
        return tensor.detach().clone()
