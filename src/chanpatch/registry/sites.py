"""Sites: regions of activations, and functions that read and replace regions without in-place writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..engine.paths import Place, inside_vmap
from ..errors import SiteError, UnsupportedModelError, did_you_mean
from ..views import View
from .indices import Flags, Index, Labels, Selection, advice, positions_in, selection_of, shown

Positions = Mapping[int, "slice | list[int] | Tensor"]
Shape: TypeAlias = "tuple[int | None, ...]"
Axes: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Along:
    """An axis, and the basis whose coordinates replace the axis. Bases are equal only if they are the same object."""

    axis: str
    basis: Any = field(compare=False)
    key: int  # id of the basis


@dataclass(frozen=True, init=False, repr=False)
class Site:
    """A region of the activation at a hook point, which can be read or written.

    Indices work as in Python and may be negative, but an int index keeps its axis, with length 1. An axis without an
    index is selected in full. Index lists along several axes select the Cartesian product of the lists.

    Args:
        name: Name of the hook point.
        indices: For each restricted axis, an int, a slice, a sequence of ints, or a boolean mask over the axis. If the
            axis has labels (see `chanpatch.view`), a label or a sequence of labels is also accepted.

    Raises:
        SiteError: If an index has a type not listed above, or selects nothing.

    Example:
        >>> Site("embedder.relu3", channel=[55, 121], row=slice(2, 5))
        Site('embedder.relu3', channel=[55, 121], row=2:5)
    """

    name: str
    indices: tuple[tuple[str, Selection], ...]
    basis: Along | None = None
    point: HookPoint | None = field(default=None, compare=False)
    no_p: str = field(default="", compare=False)  # for matched controls: why ranks among them have no p-value

    def __init__(self, name: str, /, *unnamed: Any, **indices: Any) -> None:
        if not isinstance(name, str):
            raise SiteError(f"Site expects the name of a hook point, not {type(name).__name__}.")
        if unnamed:
            raise SiteError(f"Site({name!r}, {unnamed[0]!r}): indices must be passed by axis name, as in channel=2.")
        vars(self).update(name=name, indices=_selections(name, indices))  # a frozen dataclass

    def split(self, axis: str) -> tuple[Site, ...]:
        """Return one site per selected index along an axis, in order.

        Raises:
            SiteError: If the axis does not exist, or if its length is unknown but needed to find the selected indices.
        """
        chosen, point = dict(self.indices).get(axis), self.point
        if isinstance(chosen, Flags):
            chosen = tuple(positions_in(chosen, len(chosen.values), axis))
        elif chosen is None and point is not None and axis in point.axes:
            chosen = tuple(range(point.length(axis) or 0)) or None
        if isinstance(chosen, tuple):
            return tuple(self.indexed(**{**dict(self.indices), axis: index}) for index in chosen)
        if point is None:
            why = "the length of that axis is unknown. Pass indices, or create the site with points.site(...)."
        elif axis in point.axes:
            varies = "the batch size" if point.axes.index(axis) == point.batch_axis else "the length of that axis"
            why = f"{varies} varies between forward passes. Pass indices, or select rows with where=."
        else:
            why = f"there is no such axis.{did_you_mean(axis, point.axes)} "
            why += f"Hook point '{self.name}' has axes ({', '.join(point.axes)})."
        raise SiteError(f"{self!r} cannot be split along '{axis}': {why}")

    def at(self, point: HookPoint | None) -> Site:
        """Return the same site bound to a traced hook point, without checking the axes and indices."""
        return self._with(point=point)

    def indexed(self, **indices: Any) -> Site:
        """Return a site with the given indices instead of this site's indices. The rest of the site stays the same."""
        return self._with(indices=_selections(self.name, indices))

    def along(self, axis: str, basis: Any, **indices: Index) -> Site:
        """Return a site in which one axis is replaced by an axis `component` of coordinates in a basis.

        An edit at the new site changes the selected coordinates. The rest of the activation, including the part outside
        the span of the basis, stays the same up to rounding.

        Args:
            axis: Axis that the coordinates replace, such as `"channel"`.
            basis: `Directions`, `PCA`, or another object, such as a sparse autoencoder, with two methods:
                `encode` maps activations `(..., axis)` to coordinates `(..., component)`, and `decode` maps them back.
            indices: Indices along `component` and the other axes.

        Raises:
            SiteError: If the site is not bound to a trace, or already has a basis or an index along the axis. Also if
                the axis does not exist, or if the basis does not fit the axis.

        Example:
            >>> from chanpatch import hook_points
            >>> from chanpatch.registry import Directions
            >>> points = hook_points(torch.nn.Linear(2, 3), torch.ones(4, 2))
            >>> points.site(".out").along("feature", Directions(torch.eye(3)[:2]), component=0)
            Site('.out', component=0).along('feature', Directions)
        """
        if self.point is None:
            raise SiteError(f"{self!r} is not traced. Create the site with hook_points(model, *inputs).site(...).")
        if self.basis is not None or axis in dict(self.indices):
            raise SiteError(f"{self!r} already has a basis or an index along '{axis}'. Use a site with neither.")
        other = self.indexed(**{**dict(self.indices), **indices}).with_basis(axis, basis)
        return normalized(other, self.point)

    def with_basis(self, axis: str, basis: Any) -> Site:
        """Return this site with the given basis. The basis is checked later, when the site is bound to a trace."""
        return self._with(basis=Along(axis, basis, id(basis)))

    def _with(self, **changes: Any) -> Site:
        """Return a copy of this site in which the given fields have new values."""
        other = object.__new__(Site)
        vars(other).update(vars(self), **changes)
        return other

    def positions(self, axes: Axes, lengths: Sequence[int]) -> dict[int, slice | list[int]]:
        """Map the index of each restricted axis to the selected positions. Raise SiteError for a bad axis or index."""
        found: dict[int, slice | list[int]] = {}
        faults = []
        for axis, selection in self.indices:
            if axis not in axes:
                hint = did_you_mean(axis, axes).strip().replace("Did", "did")
                faults.append(f"there is no axis '{axis}'" + (f" ({hint})" if hint else ""))
                continue
            try:
                chosen = positions_in(selection, lengths[number := axes.index(axis)], axis)
                first, last = chosen[0], chosen[-1]
                found[number] = slice(first, last + 1) if chosen == [*range(first, last + 1)] else chosen
            except ValueError as fault:
                faults.append(str(fault))
        if faults:
            numbered = ", ".join(f"{n} {axis}s (0 to {n - 1})" for axis, n in zip(axes, lengths, strict=True)
                                 if axis in dict(self.indices))  # fmt: skip
            raise SiteError(
                f"{self!r}: {'; '.join(faults)}; hook point '{self.name}' has axes ({', '.join(axes)})"
                + (f" and {numbered}." if numbered else ".")
                + advice([axis for axis, _ in self.indices], axes)
            )
        return found

    def __repr__(self) -> str:
        listed = "".join(f", {axis}={self._shown(axis, selection)}" for axis, selection in self.indices)
        along = f".along({self.basis.axis!r}, {type(self.basis.basis).__name__})" if self.basis else ""
        return f"Site({self.name!r}{listed}){along}"

    def _shown(self, axis: str, selection: Selection) -> str:
        labels = self.point.labels(axis) if self.point is not None else ()
        if labels and isinstance(selection, tuple):
            selection = Labels(tuple(labels[index] for index in selection))
        return shown(selection)


def _selections(name: str, indices: Mapping[str, Any]) -> tuple[tuple[str, Selection], ...]:
    """Convert a dict from axis names to indices into pairs (axis, selection), sorted by axis."""
    return tuple(sorted((axis, selection_of(name, axis, index)) for axis, index in indices.items()))


@dataclass(frozen=True)
class HookPoint(Place):
    """One tensor in a traced forward pass.

    Attributes:
        name: `module`, `module.out<path>` if the module returns more than one tensor, or `module.in<path>` for an
            input. `module#k` is call k of a module that is called more than once. `.out` is the model's output. A tap
            has the name passed to `tap`.
        axes: Names of the tensor's axes, such as `(batch, channel, row, col)`.
        shape: Length of each axis except the batch axis; None for a free axis, whose length varies.
        batch_axis: Index of the batch axis, found by running the model with one more row; None if not found.
        dtype, device: Dtype and device of the tensor.
        module_type: Class name of the module, or `tap`.
        parameters: Number of parameters in the module, including its submodules.
        aliases: Other names for the same hook point, if the module has several names.
        read_only: Whether the tensor is inside a distribution, and so can be recorded but not patched.
        lens: Object that splits the tensor's axes or computes coordinates in a basis; None to use the tensor unchanged.
            With a lens, the attributes above describe the split tensor or the coordinates.
    """

    axes: Axes
    shape: Shape
    batch_axis: int | None
    dtype: torch.dtype
    device: torch.device
    module_type: str
    parameters: int
    aliases: tuple[str, ...] = ()
    read_only: bool = field(default=False, repr=False)
    lens: View | Coordinates | None = field(default=None, repr=False)

    def seen(self, tensor: Tensor) -> Tensor:
        """Apply the lens to the model's tensor: split axes, compute coordinates, or return the tensor unchanged."""
        return tensor if self.lens is None else self.lens.split(tensor)

    @property
    def tensor_batch_axis(self) -> int | None:
        """Index of the batch axis in the model's own tensor, without views or bases; None if unknown or split."""
        if isinstance(self.lens, Coordinates):
            return self.lens.base.tensor_batch_axis
        if self.lens is None or self.batch_axis is None:
            return self.batch_axis
        batch = (self.axes[self.batch_axis],)
        return self.lens.groups.index(batch) if batch in self.lens.groups else None

    def labels(self, axis: str) -> tuple[str, ...]:
        """Return the labels of the positions along an axis, or an empty tuple if the positions have no labels."""
        return dict(self.lens.labels).get(axis, ()) if self.lens is not None else ()

    @property
    def apart(self) -> tuple[str, ...]:
        """Names of axes that separate unrelated channels: layer, head, and axes that a view makes from channels."""
        lens = self.lens.base.lens if isinstance(self.lens, Coordinates) else self.lens
        groups = [{*group} for group in lens.groups] if isinstance(lens, View) else []
        split = {"layer", "head"}.union(*(group for group in groups if group & {"channel", "feature"}))
        return tuple(axis for axis in self.axes if axis in split - {"channel", "feature"})

    @property
    def lengths(self) -> list[int | None]:
        """Length of each axis. The length is None for the batch axis and free axes, because their lengths vary."""
        at = self.batch_axis
        return [*self.shape] if at is None else [*self.shape[:at], None, *self.shape[at:]]

    def length(self, axis: str) -> int | None:
        """Return the length of an axis, or None if the length varies between forward passes."""
        return self.lengths[self.axes.index(axis)]


def normalized(site: Site, point: HookPoint) -> Site:
    """Check a site against the trace, and return the site with explicit indices, bound to the given hook point."""
    point = point.lens.base if isinstance(point.lens, Coordinates) else point
    if site.basis is not None:
        known = site.point.lens if site.point is not None else None
        same_base = isinstance(known, Coordinates) and known.base == point
        point = site.point if same_base and site.point else coordinates(site, point)
    if not site.indices:
        return site._with(name=point.name, point=point)
    lengths = [length or 0 for length in point.lengths]
    varying = {axis for axis, length in zip(point.axes, point.lengths, strict=True) if length is None}
    numbered = {axis: _numbers(site, axis, index, point.labels(axis)) for axis, index in site.indices}
    written = {axis: index for axis, index in numbered.items() if axis in varying}
    checked = site.indexed(**{axis: index for axis, index in numbered.items() if axis not in varying})
    for number, positions in checked.positions(point.axes, lengths).items():
        every = tuple(range(lengths[number]))
        chosen = every[positions] if isinstance(positions, slice) else tuple(positions)
        if chosen != every:
            written[point.axes[number]] = chosen
    return site._with(name=point.name, indices=_selections(point.name, written), point=point)


def _numbers(site: Site, axis: str, selection: Selection, labels: tuple[str, ...]) -> Selection:
    """Convert selected labels to indices; raise SiteError for an unknown label. Return other selections unchanged."""
    if not (isinstance(selection, Labels) and labels):
        return selection
    if unknown := [label for label in selection.values if label not in labels]:
        raise SiteError(
            f"{site!r}: {axis} has no label '{unknown[0]}'.{did_you_mean(unknown[0], labels)} The labels are "
            f"{', '.join(labels)}."
        )
    return tuple(map(labels.index, selection.values))


@dataclass(frozen=True)
class Coordinates:
    """Lens that replaces one axis of a hook point with an axis `component`, which contains coordinates in a basis."""

    base: HookPoint
    axis: int
    basis: Any

    @property
    def labels(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Labels along the base hook point's axes, as pairs (axis, labels)."""
        return () if self.base.lens is None else self.base.lens.labels

    def split(self, tensor: Tensor) -> Tensor:
        """Replace one axis of the model's tensor with an axis `component` that contains coordinates in the basis."""
        found: Tensor = self.basis.encode(self._last(tensor))
        return found.movedim(-1, self.axis)

    def merge(self, new: Tensor, tensor: Tensor) -> Tensor:
        """Return a copy of `tensor` with the coordinates `new`. The part that the basis does not encode is kept."""
        last = self._last(tensor)
        before, after = (self.basis.decode(each) for each in (self.basis.encode(last), new.movedim(self.axis, -1)))
        changed = (last + (after - before)).movedim(-1, self.axis)
        return changed if self.base.lens is None else self.base.lens.merge(changed, tensor)

    def _last(self, tensor: Tensor) -> Tensor:
        seen = tensor if self.base.lens is None else self.base.lens.split(tensor)
        return seen.movedim(self.axis, -1)


def coordinates(site: Site, point: HookPoint) -> HookPoint:
    """Return the hook point with a lens for the site's basis. Raise SiteError if the basis does not fit the axis."""
    assert site.basis is not None
    axis, basis = site.basis.axis, site.basis.basis
    if axis not in point.axes or point.length(axis) is None or "component" in point.axes:
        raise SiteError(
            f"A basis can replace only an existing axis with a fixed length, not '{axis}'. Hook point '{point.name}' "
            f"has axes ({', '.join(point.axes)}).{did_you_mean(axis, point.axes)}"
        )
    missing = [name for name in ("encode", "decode") if not callable(getattr(basis, name, None))]
    if missing:
        raise SiteError(f"A basis needs the methods encode and decode, but {type(basis).__name__} has no {missing[0]}.")
    number = point.axes.index(axis)
    example = torch.zeros(1, point.length(axis) or 0, dtype=point.dtype, device=point.device)
    try:
        with torch.no_grad():
            encoded = basis.encode(example)
            decoded = basis.decode(encoded)
        if encoded.dim() != 2 or decoded.shape != example.shape or decoded.dtype != example.dtype:
            raise ValueError(f"encode maps {_kind(example)} to {_kind(encoded)}, which decode maps to {_kind(decoded)}")
    except (RuntimeError, ValueError, TypeError) as fault:
        raise SiteError(
            f"{type(basis).__name__} does not fit the axis '{axis}' (length {point.length(axis)}, {point.dtype}) of "
            f"hook point '{point.name}': {str(fault).strip()}"
        ) from fault
    place = number - (point.batch_axis is not None and number > point.batch_axis)
    return replace(
        point,
        axes=(*point.axes[:number], "component", *point.axes[number + 1 :]),
        shape=(*point.shape[:place], encoded.shape[1], *point.shape[place + 1 :]),
        lens=Coordinates(point, number, basis),
    )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def no_batch(site: Site) -> str:
    """Return text for an error message: why the batch axis at a site is unknown, and what to do."""
    if site.point is None:
        return "Create the site with hook_points(model, *inputs).site(...), which identifies the batch axis."
    return (
        f"The trace could not identify the batch axis at '{site.name}': no single axis grew when the model ran with "
        "one more input. Name the axes of the model's input: hook_points(..., axes={'.in[0]': (...)})."
    )


def unusual_layout(tensor: Tensor) -> str:
    """Return "masked" or a sparse layout, such as "sparse_coo". For a dense tensor, return an empty string."""
    if isinstance(tensor, torch.masked.MaskedTensor):
        return "masked"
    return "" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def read(tensor: Tensor, positions: Positions) -> Tensor:
    """Return the region of a tensor at the given positions.

    Raises:
        UnsupportedModelError: If the region is only part of a sparse or masked tensor.
    """
    if positions and (layout := unusual_layout(tensor)):
        raise UnsupportedModelError(
            f"Cannot select part of a {layout} tensor. Use a site without indices, or make the tensor dense in the "
            f"model: tensor.{'to_tensor(0.0)' if layout == 'masked' else 'to_dense()'}."
        )
    for axis, chosen in positions.items():
        if isinstance(chosen, slice):
            tensor = tensor.narrow(axis, chosen.start, chosen.stop - chosen.start)
        else:
            tensor = tensor.index_select(axis, torch.as_tensor(chosen, device=tensor.device))
    return tensor


def written(tensor: Tensor, positions: Positions, region: Tensor) -> Tensor:
    """Return a copy of `tensor` with `region` at the given positions. Gradients flow to `tensor` and `region`.

    The copy shares no memory with the arguments, so in-place writes to the copy do not affect the arguments.
    """
    if not positions:
        return region.clone()
    (axis, chosen), *others = positions.items()
    if others:
        region = written(read(tensor, {axis: chosen}), dict(others), region)
    if isinstance(chosen, slice) and not tensor.is_complex():  # slice_scatter has no complex gradients
        return torch.slice_scatter(tensor, region, axis, chosen.start, chosen.stop)
    numbers = torch.arange(tensor.shape[axis])[chosen] if isinstance(chosen, slice) else torch.as_tensor(chosen)
    index = numbers.to(tensor.device)
    # vmap does not support the in-place write below.
    if inside_vmap(region) or inside_vmap(tensor):
        return tensor.index_copy(axis, index, region)
    return tensor.clone().index_copy_(axis, index, region)  # a clone keeps the strides, for bit-identical results
