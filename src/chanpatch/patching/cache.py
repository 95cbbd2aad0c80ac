"""Cache of recorded activations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partialmethod
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchAxisError, HookPointError, RolloutError, SiteError, counted, did_you_mean
from ..registry.names import is_pattern, selected, spellings
from ..registry.sites import Axes, HookPoint, Site, no_batch, normalized
from ..results import Records, data_array


class ActivationCache(Records, Mapping[Site, Tensor]):
    """Recorded activations, with sites as keys.

    A key may also be a hook point's name. If the whole hook point was recorded, the name refers to the whole hook
    point; otherwise, the name refers to the only recorded site at the hook point. A pattern such as `"h.*"` works if
    exactly one recorded site matches. The operators +, -, * and / accept a number or a cache with the same sites, as in
    `clean - corrupted`. The operators convert bool and small integer dtypes to int64.

    Args:
        activations: Dict that maps each site to the activation, with all axes of the region or, after a reduction, with
            the remaining axes.
        axes: Dict that maps each site to the names of the activation's axes.
        batch_axes: Dict that maps each site to the index of the activation's batch axis, or to None if the batch axis
            is unknown.

    Attributes:
        counts: Cache that contains, for each reduced value, the number of elements that `where` selected. None if the
            recording had no `where`.
    """

    _most = None
    counts: ActivationCache | None = None
    _is_mean = False  # whether the activations have a single row, which may broadcast over the rows of another cache

    def __init__(
        self, activations: Mapping[Site, Tensor], axes: Mapping[Site, Axes], batch_axes: Mapping[Site, int | None]
    ) -> None:
        self._parts = {site: [activation] for site, activation in activations.items()}
        self._axes, self._batch_axes = dict(axes), dict(batch_axes)
        self._steps: dict[Site, list[Tensor]] = {}  # only in a rollout: the episode and the step of each row

    def __getitem__(self, key: Site | str | HookPoint) -> Tensor:
        site = self._site(key)
        parts = self._parts[site]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts, dim=self._batch_axes[site] or 0)]
        return parts[0]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def axes(self, key: Site | str) -> Axes:
        """Return the axis names of the activation at a site."""
        return self._axes[self._site(key)]

    def batch_axis(self, key: Site | str) -> int | None:
        """Return the index of the batch axis in the activation at a site, or None if the batch axis is unknown."""
        return self._batch_axes[self._site(key)]

    def steps(self, key: Site | str | HookPoint) -> Tensor:
        """Return the indices of the episode and the step of each row: an int64 tensor with shape `(row, 2)`.

        Raises:
            RolloutError: If the activation was not recorded in a rollout, or was recorded without its batch axis.
        """
        site = self._site(key)
        if site not in self._steps or self._batch_axes[site] is None:
            raise RolloutError(
                f"The episodes and steps at {site!r} are unknown, because the activation was not recorded in a rollout "
                "or was recorded without its batch axis. Open the recording around rollout(), and keep the batch axis."
            )
        return torch.cat(self._steps[site])

    def _site(self, key: Site | str | HookPoint) -> Site:
        if isinstance(key, Site) and key in self._parts:
            return key
        if not isinstance(key, (str, Site, HookPoint)):
            raise TypeError(f"A cache's key must be a site, a hook point or a name, as in cache['conv1']; got {key!r}.")
        name = key if isinstance(key, str) else key.name
        names = self._matching(key) if isinstance(key, str) and is_pattern(key) else [name]
        held = [s for s in self if s.name in names or (s.point and name in s.point.aliases)]
        if isinstance(key, Site):  # the same region spelled differently, such as channel=-1
            held = [site for site in held if site.point is not None and normalized(key, site.point) == site]
        elif len({site.name for site in held}) == 1:  # a name means the whole hook point, if cached
            held = [site for site in held if not site.indices and site.basis is None] or held
        if len(held) != 1:
            held_sites = ", ".join(map(repr, self)) or "none yet"
            hint = "" if held else did_you_mean(name, [site.name for site in self])
            fault = f"contains {len(held)} sites at '{name}'; pass one site" if held else f"does not contain {key!r}"
            raise HookPointError(f"The cache {fault}.{hint} Sites in the cache: {held_sites}.")
        return held[0]

    def _matching(self, pattern: str) -> list[str]:
        """Return the names of the recorded hook points that match a pattern."""
        traced = {site.name: (site.point.module, site.point.aliases) if site.point else () for site in self}
        return selected(pattern, {name: spellings(name, *known) for name, known in traced.items()})

    def _ipython_key_completions_(self) -> list[str]:
        return [*dict.fromkeys(site.name for site in self)]

    def select(self, pattern: str) -> ActivationCache:
        """Return a cache with only the sites that match a pattern, such as `"h.*.mlp"`; see `HookPoints.select`."""
        names = self._matching(pattern)
        same = self._like(lambda activation, site: activation)
        same._parts = {site: parts for site, parts in same._parts.items() if site.name in names}
        same.counts = self.counts and self.counts.select(pattern)
        if not same:
            raise HookPointError(f"No site in the cache matches '{pattern}'. Sites: {', '.join(map(repr, self))}.")
        return same

    def stack(self) -> Tensor:
        """Stack all activations along a new first axis, as in `cache.select("h.*").stack()`.

        Raises:
            SiteError: If the activations differ in shape or axis names, or if the cache is empty.
        """
        kinds = {f"{tuple(each.shape)} with axes ({', '.join(self._axes[site])})" for site, each in self.items()}
        if len(kinds) != 1:
            raise SiteError(
                "Only activations with equal shapes and axes can be stacked; got "
                f"{', '.join(sorted(kinds)) or 'no sites'}. Select the sites first: cache.select('h.*.mlp').stack()."
            )
        return torch.stack([*self.values()])

    def to_xarray(self) -> Any:
        """Return all activations, stacked as in `stack`, as an `xarray.DataArray` whose first dimension is `site`."""
        stacked, axes = self.stack().detach().cpu(), self._axes[next(iter(self))]
        numbers = stacked.float() if stacked.dtype == torch.bfloat16 else stacked  # NumPy has no bfloat16
        coords = {axis: range(length) for axis, length in zip(axes, stacked.shape[1:], strict=True)}
        return data_array(numbers.numpy(), {"site": [*map(repr, self)], **coords}, "activation")

    def _like(self, change: Callable[[Tensor, Site], Tensor]) -> ActivationCache:
        changed = {site: change(activation, site) for site, activation in self.items()}
        like = ActivationCache(changed, self._axes, self._batch_axes)
        like._is_mean, like._steps = self._is_mean, self._steps
        return like

    def _combined(self, operation: Callable[[Any, Any], Tensor], other: Any) -> ActivationCache:
        if isinstance(other, Real):
            return self._like(lambda activation, site: operation(_widened(activation), other))
        if not isinstance(other, ActivationCache):
            raise TypeError(
                f"An ActivationCache can be combined only with another cache or a number; got {type(other).__name__}. "
                "To combine a tensor with the activation at one site, use cache[site] * tensor."
            )
        if set(self) != set(other):
            apart = ", ".join(sorted(repr(site) for site in set(self) ^ set(other)))
            raise SiteError(f"Only caches with the same sites can be combined. Record these sites in both: {apart}.")
        repeats = self._is_mean or other._is_mean
        for site, activation in self.items():
            lengths, others, rows = tuple(activation.shape), tuple(other[site].shape), self._batch_axes[site]
            fixed = set() if repeats else set(range(len(lengths))) if rows is None else {rows}
            pairs = enumerate(itertools.zip_longest(lengths, others, fillvalue=-1))
            if any(m != n and (axis in fixed or -1 in (m, n) or 1 not in (m, n)) for axis, (m, n) in pairs):
                raise SiteError(
                    f"{site!r} has shape {lengths} in one cache and {others} in the other. The shapes must be equal. "
                    "Only the result of cache.mean() is broadcast, along the batch axis."
                )
        combined = self._like(lambda activation, site: operation(_widened(activation), _widened(other[site])))
        combined._is_mean = self._is_mean and other._is_mean
        return combined

    __add__ = __radd__ = partialmethod(_combined, torch.add)
    __mul__ = __rmul__ = partialmethod(_combined, torch.mul)
    __sub__ = partialmethod(_combined, torch.sub)
    __truediv__ = partialmethod(_combined, torch.div)

    def __neg__(self) -> ActivationCache:
        return self._like(lambda activation, site: -_widened(activation))

    __array_ufunc__ = None  # NumPy scalars defer to the cache's operators

    def mean(self) -> ActivationCache:
        """Average each activation over the batch. In the result, the batch axis has length 1.

        Integer and bool activations are converted to float32.

        Raises:
            BatchAxisError: If a batch axis is unknown.
        """
        for site in self:
            if self._batch_axes[site] is None:
                raise BatchAxisError(f"Cannot average {site!r} over the batch. {no_batch(site)}")
        means = self._like(lambda activation, site: _mean(activation, self._batch_axes[site]))
        means._is_mean, means._steps = True, {}
        return means

    def to(self, *args: Any, **kwargs: Any) -> ActivationCache:
        """Return a copy of the cache on another device or with another dtype. Arguments are passed to `Tensor.to`."""
        moved = self._like(lambda activation, site: activation.to(*args, **kwargs))
        moved.counts = self.counts
        return moved

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per element of each activation, with the site, the index along each axis, and the value.

        For activations from a rollout, the dicts have the keys `episode` and `step` instead of `batch`.
        """
        records = []
        for site, activation in self.items():
            axes, batch_axis = self._axes[site], self._batch_axes[site]
            indices: list[Iterable[Any]] = [
                [{axis: n} for n in range(size)] for axis, size in zip(axes, activation.shape, strict=True)
            ]
            if site in self._steps and batch_axis is not None:
                indices[batch_axis] = [{"episode": row[0], "step": row[1]} for row in self.steps(site).tolist()]
            values = activation.detach().cpu().flatten().tolist()
            for index, value in zip(itertools.product(*indices), values, strict=True):
                named = {name: number for part in index for name, number in part.items()}
                records.append({"site": repr(site), **named, "value": value})
        return records

    def _lines(self) -> list[dict[str, Any]]:
        return [
            {
                "site": repr(site),
                "axes": ", ".join(self._axes[site]),
                "shape": " x ".join(map(str, activation.shape)),
                "dtype": str(activation.dtype).removeprefix("torch."),
            }
            for site, activation in self.items()
        ]

    def _notes(self) -> list[str]:
        notes = []
        for site, counts in (self.counts or {}).items():
            axis, empty = self._batch_axes[site], (counts == 0).nonzero()
            if len(empty):
                rows = [] if axis is None else sorted({*empty[:, axis].tolist()})
                place = f"in row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:8]))}" if rows else "for some values"
                notes.append(f"NaN at {site!r}: `where` selects nothing {place}{', ...' * (len(rows) > 8)}.")
        return notes

    def _title(self) -> str:
        return f"ActivationCache of {counted(len(self), 'site')}"

    def _append(
        self, site: Site, activation: Tensor, axes: Axes, batch_axis: int | None, steps: Tensor | None = None
    ) -> None:
        """Append an activation from one forward pass. All activations at a site are joined along the batch axis."""
        parts = self._parts.setdefault(site, [])
        if parts and batch_axis is None:
            raise BatchAxisError(
                f"{site!r} was recorded in two forward passes, whose activations cannot be concatenated. "
                f"{no_batch(site)} Alternatively, open one recording per forward pass."
            )
        fixed = [[n for axis, n in enumerate(each.shape) if axis != batch_axis] for each in (*parts[:1], activation)]
        if fixed[0] != fixed[-1]:
            raise SiteError(
                f"{site!r} has shape {tuple(parts[0].shape)} in one forward pass and {tuple(activation.shape)} in "
                "another, so the activations cannot be joined along the batch axis. Record a single position "
                "(position=-1), pass reduce= to reduce the axis whose length varies, or open one recording per length."
            )
        parts.append(activation)
        self._axes[site], self._batch_axes[site] = axes, batch_axis
        if steps is not None:
            self._steps.setdefault(site, []).append(steps)


def _widened(activation: Tensor) -> Tensor:
    """Convert a bool activation, or one with a small integer dtype, to int64, so that arithmetic does not overflow."""
    small = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
    return activation.long() if activation.dtype in small else activation


def _mean(activation: Tensor, axis: int | None) -> Tensor:
    inexact = activation.is_floating_point() or activation.is_complex()
    return activation.mean(dim=axis, keepdim=True, dtype=None if inexact else torch.float32)
