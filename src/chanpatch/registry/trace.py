"""Find the hook points in a model: one run lists the hook points, and a second run identifies the batch axis."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.calls import Observed, left_twice
from ..engine.inputs import copied_inputs
from ..engine.paths import Attr, Path, in_distribution, leaves, nested, replace, with_rows
from ..engine.state import undisturbed
from ..errors import BatchAxisError, HookPointError, SiteError, UnsupportedModelError, did_you_mean
from ..views import View
from .axes import NamePropagation, Names, axis_names, unwatched
from .names import alternative, selected, spellings, written_name
from .sites import HookPoint


class _Fired(NamedTuple):
    """One input or output tensor in a module call, or the tensor passed to a tap."""

    module: str
    side: Literal["in", "out", "tap"]
    path: Path
    call: int
    tensor: Tensor
    read_only: bool = False


_Shapes: TypeAlias = dict[str, tuple[int, ...]]
_Place: TypeAlias = tuple[str, str, Path, int]  # the first four fields of a _Fired


class Trace:
    """The tensors at all hook points in one run of a model, with axis names.

    `views` maps each `_Place` to a View with axis names from the user, which override inferred names. `totals` maps the
    id of each parameter to the parameter's sum before the run. During the run, these sums are compared with the current
    sums, to detect changed parameters. `infers_names` is False if only the shapes are needed.
    """

    def __init__(
        self,
        model: nn.Module,
        views: Mapping[_Place, View] = {},
        totals: Mapping[int, Any] = {},
        *,
        infers_names: bool = True,
    ) -> None:
        self.model, self.views, self._totals, self._infers_names = model, views, totals, infers_names
        self.steady = True  # whether all parameters compared so far are unchanged
        self.fired: list[_Fired] = []
        self.inputs: list[_Fired] = []  # inputs to the traced method; for `__call__`, these are also hook points
        self.calls: Counter[str] = Counter()
        self.known = NamePropagation()
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.module_names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            self.module_names.setdefault(module, []).append(name)
        self._stack: list[tuple[nn.Module, int, Names | None]] = []

    def run(self, method: str, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Trace:
        """Run a method of the model once on copies of the inputs, without side effects. Return this Trace."""
        with undisturbed(self.model):
            args, kwargs = copied_inputs(inputs, keywords)
            self.inputs = [_Fired("", "in", tuple(path), 0, tensor) for (_, *path), tensor in leaves((args, kwargs))]
            for fired in self.inputs:
                self._rename(fired)
            observing = Observed(self.model.modules(), self._on_inputs, self._on_output, self._on_tap)
            with self.known if self._infers_names else nullcontext(), left_twice(observing):
                getattr(self.model, method)(*args, **kwargs)
        return self

    def shapes(self) -> _Shapes:
        """Return a dict that maps each hook point's name to the shape of the tensor at the hook point."""
        return {self.name(fired): tuple(fired.tensor.shape) for fired in self.fired}

    def name(self, fired: _Fired, module: str | None = None) -> str:
        """Return the name of a hook point. If `module` is given, use it as the name of the hook point's module."""
        call = fired.call if self.calls[fired.module] > 1 else None
        return written_name(fired.module if module is None else module, fired.side, fired.path, call)

    def aliases(self, fired: _Fired) -> tuple[str, ...]:
        """Return the other names of a hook point. There are other names only if the hook point's module is shared."""
        names = () if fired.side == "tap" else self.module_names[self.modules[fired.module]][1:]
        return tuple(self.name(fired, other) for other in names)

    @unwatched
    def _on_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.module_names[module][0]
        call, self.calls[name] = self.calls[name], self.calls[name] + 1
        if self._totals and not call:
            weights = module.parameters(recurse=False)
            self.steady &= all(self._totals.get(id(each), "new") == _total(each) for each in weights)
        given = [_Fired(name, "in", tuple(path), call, tensor) for (_, *path), tensor in leaves((args, kwargs))]
        for fired in given:
            self._note(fired, module)
        self._stack.append((module, call, self.known.names(given[0].tensor) if given else None))

    @unwatched
    def _on_output(self, module: nn.Module, output: Any) -> None:
        while self._stack[-1][0] is not module:  # a call has no output if the model caught its exception
            self._stack.pop()
        _, call, inputs = self._stack.pop()
        for path, tensor in leaves(output):
            read_only = in_distribution(output, path)
            self._note(_Fired(self.module_names[module][0], "out", path, call, tensor, read_only), module, inputs)

    @unwatched
    def _on_tap(self, name: str, tensor: Tensor) -> None:
        self._note(_Fired(name, "tap", (), self.calls[name], tensor))
        self.calls[name] += 1

    def _note(self, fired: _Fired, module: nn.Module | None = None, inputs: Names | None = None) -> None:
        tensor = fired.tensor
        if tensor.is_nested:
            raise UnsupportedModelError(nested(self.name(fired)))
        self.fired.append(fired)
        if module is not None and self._infers_names:
            self.known.learn(tensor, axis_names(module, fired.side, fired.path, tensor.dim(), inputs))
        self._rename(fired)

    def _rename(self, fired: _Fired) -> None:
        if (view := self.views.get(fired[:4])) is not None:
            names = self.known.names(fired.tensor)
            split = (group[0] if len(group) == 1 else name for group, name in zip(view.groups, names, strict=True))
            self.known.rename(fired.tensor, [*split])


def traced_run(
    model: nn.Module,
    method: str,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    axes: Mapping[str, Any],
    free: Mapping[str, int],
) -> dict[str, Any]:
    """Trace a model. Return a dict with the arguments `points`, `calls`, `not_called` and `steady` for HookPoints."""
    if not callable(getattr(model, method, None)):
        raise HookPointError(f"{type(model).__name__} has no method '{method}'.{did_you_mean(method, dir(model))}")
    _refuse_untraceable(model, (inputs, keywords))
    try:
        trace = Trace(model, totals={id(weight): _total(weight) for weight in model.parameters()})
        steady = trace.run(method, inputs, keywords).steady
    except TypeError as fault:
        if any(isinstance(each, np.ndarray) for each in (*inputs, *keywords.values())):
            kind = type(model).__name__
            raise TypeError(f"{kind} does not accept NumPy arrays. Pass torch.as_tensor(array).") from fault
        raise
    if axes:  # run again, so that the given names propagate downstream
        trace = Trace(model, _views_by_place(trace, axes)).run(method, inputs, keywords)
    _refuse_shared_names(trace)
    proved, shapes = _proved_batches(method, inputs, keywords, trace)
    grown = _free_axes(trace, method, inputs, keywords, free, shapes) if free else {}
    sizes = {name: sum(weight.numel() for weight in module.parameters()) for name, module in trace.modules.items()}
    return {
        "points": [
            _point(trace, fired, sizes.get(fired.module, 0), proved.get(name := trace.name(fired)), grown.get(name, {}))
            for fired in trace.fired
        ],
        "calls": trace.calls,
        "not_called": [names[0] for names in trace.module_names.values() if names[0] and not trace.calls[names[0]]],
        "steady": steady,
    }


def _total(weight: Tensor) -> Any:
    """Return the sum of a parameter's entries, as a string; return None if the sum cannot be read."""
    # If a forward pass changes the sum, later forward passes must not be stopped early.
    if type(weight.data) is not Tensor or weight.is_meta or weight.layout != torch.strided or weight.is_quantized:
        return None
    with suppress(RuntimeError):  # some dtypes do not support sums, and values are unreadable inside vmap
        total = weight.detach().sum(dtype=torch.complex128 if weight.is_complex() else torch.float64)
        return str(total.item())  # a string, so that NaN equals NaN
    return None


def _refuse_shared_names(trace: Trace) -> None:
    """Raise HookPointError if two hook points have the same name, or if a tap has the same name as a module."""
    counts = Counter(map(trace.name, trace.fired))
    for fired in sorted(trace.fired, key=lambda each: each.side != "tap"):
        name = trace.name(fired)
        if fired.side == "tap" and (counts[name] > 1 or fired.module in trace.modules):
            other = "a module" if fired.module in trace.modules else "another hook point"
            raise HookPointError(f"tap('{fired.module}', ...) has the same name as {other}. Rename the tap.")
        if counts[name] > 1:
            raise HookPointError(
                f"Two hook points have the name '{name}': a submodule, and an entry in a module's input or output. "
                "Rename the submodule or the entry."
            )


def _views_by_place(trace: Trace, axes: Mapping[str, str | Sequence[str] | View]) -> dict[_Place, View]:
    """Map each `_Place` whose hook point matches a pattern in `axes` to a View with the pattern's axis names."""
    given: dict[_Place, View] = {}
    fired_by_name = defaultdict[str, list[_Fired]](list)
    for fired in (*trace.inputs, *trace.fired):
        fired_by_name[trace.name(fired)].append(fired)
    known = {name: spellings(name, fired.module, trace.aliases(fired)) for name, (fired, *_) in fired_by_name.items()}
    for pattern, names in axes.items():
        chosen = [fired for name in selected(pattern, known) for fired in fired_by_name[name]]
        if not chosen:
            hint = alternative(pattern, known) or did_you_mean(pattern, known)
            raise HookPointError(f"axes={{'{pattern}': ...}}: no hook point matches this pattern.{hint}")
        for fired in chosen:
            if isinstance(names, View):
                try:
                    names.split_lengths(fired.tensor.shape)
                except ValueError as fault:
                    raise SiteError(
                        f"axes={{'{pattern}': '{names}'}} does not match hook point '{trace.name(fired)}': {fault}."
                    ) from None
                given[fired[:4]] = names
                continue
            each = tuple(names.split() if isinstance(names, str) else names)
            if len(each) != fired.tensor.dim() or len(set(each)) < len(each):
                raise SiteError(
                    f"axes={{'{pattern}': {each}}}: hook point '{trace.name(fired)}' has {fired.tensor.dim()} axes. "
                    "Pass one name per axis, without repeats. To split an axis, pass chanpatch.view(...)."
                )
            given[fired[:4]] = View(tuple((name,) for name in each))
    return given


def _proved_batches(method: str, inputs: Any, keywords: Any, trace: Trace) -> tuple[dict[str, int], _Shapes]:
    """Run the model again with one more row, and return two dicts with the names of hook points as keys.

    The first dict contains the index of each hook point's batch axis. Hook points whose batch axis cannot be identified
    are left out. The second dict contains the shapes from this run. If the run fails, both dicts are empty.
    """
    grown: Any = (inputs, dict(keywords))
    growing: list[tuple[Path, Any, int]] = []
    certain: list[int] = []  # lengths of axes named "batch"
    for path, tensor in with_rows(grown):
        if Attr("batch_sizes") in path:
            return {}, {}  # the rows of a PackedSequence are interleaved
        inside = (each.tensor for each in trace.inputs if each.path[: len(path) - 1] == path[1:])
        names = next(map(trace.known.names, inside), None) or (None,)
        axis = names.index("batch") if "batch" in names else 0
        certain += [tensor.shape[axis]] if "batch" in names else []
        growing += [(path, tensor, axis)] if "batch" in names or None in names else []
    rows = next(iter([*certain, *(len(tensor) for _, tensor, _ in growing)]), 0)
    with suppress(Exception):  # a model or container may support only one batch size
        for path, tensor, axis in growing:
            if tensor.shape[axis] == rows:
                grown = replace(grown, path, torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis))
        second = Trace(trace.model, infers_names=False).run(method, *grown)
        shapes = second.shapes()
        return _grown_axes(trace, shapes, rows), shapes
    return {}, {}


def _free_axes(
    trace: Trace, method: str, inputs: Any, keywords: Any, free: Mapping[str, int], with_row: _Shapes
) -> dict[str, dict[int, str]]:
    """Find the axes whose lengths grow when the inputs have one more entry along a free axis of the inputs.

    Return a dict that maps each hook point's name to {index of the axis: name of the free axis}. `with_row` contains
    the shapes from the run with one more row. An axis that grows in that run is not free.
    """
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for name, axis in free.items():
        grown = _longer_inputs(trace, name, axis, inputs, keywords)
        try:
            shapes = Trace(trace.model, infers_names=False).run(method, *grown).shapes()
        except Exception as fault:
            raise SiteError(
                f"free={{'{name}': {axis}}}: the model fails if the length of this axis increases by 1. Omit "
                f"the axis, or fix the cause of this error: {fault}"
            ) from fault
        for fired in trace.fired:
            point, before = trace.name(fired), tuple(fired.tensor.shape)
            three = [before, shapes.get(point, before), with_row.get(point, before)]
            if (view := trace.views.get(fired[:4])) is not None:
                three = [*map(view.split_lengths, three)]
            for number, (length, longer, other) in enumerate(zip(*three, strict=False)):
                if longer == length + 1 and other == length:
                    found[point][number] = name
    return found


def _longer_inputs(trace: Trace, name: str, axis: int, inputs: Any, keywords: Any) -> Any:
    """Return the inputs with one more entry along the free axis `name`, whose index in the first input is `axis`.

    The new entry is a copy of the last entry. An input with a different length along this axis stays the same.
    """
    grown: Any = (inputs, dict(keywords))
    given = f"free={{'{name}': {axis}}}"
    tensors = [*with_rows(grown)]
    if not tensors or type(axis) is not int or not 0 <= axis < tensors[0][1].dim():
        raise SiteError(
            f"{given}: the first input has no axis {axis!r}. Pass the index of one of its axes, counted from 0."
        )
    first = tensors[0][1].shape
    names = next((trace.known.names(each.tensor) for each in trace.inputs), ())
    batch = names.index("batch") if "batch" in names else 0
    if axis == batch or name == "batch":
        raise SiteError(
            f"{given}: the batch axis can already have any length. Pass another axis, such as the position axis."
        )
    if first[axis] in (1, first[batch]):
        raise SiteError(
            f"{given}: the first input has shape {tuple(first)}. The length of axis {axis} must be at least 2 and "
            "differ from the batch size. Trace with other example inputs."
        )
    caches = [type(each).__name__ for each in (*inputs, *keywords.values()) if hasattr(each, "get_seq_length")]
    if caches:
        raise SiteError(
            f"{given}: to find the axes that grow with this axis, the model runs on inputs with one more entry, but a "
            f"cache ({caches[0]}) in the inputs would keep its length. Trace without this cache."
        )
    for path, tensor in tensors:
        if tensor is not tensors[0][1] and first[axis] in (*tensor.shape[:axis], *tensor.shape[axis + 1 :]):
            raise SiteError(
                f"{given}: another input has shape {tuple(tensor.shape)}, so length {first[axis]} does not identify "
                "a single axis. Trace with a length that no other axis has, or without that other input."
            )
        if tensor.dim() > axis and tensor.shape[axis] == first[axis]:
            last = tensor.narrow(axis, first[axis] - 1, 1)
            grown = replace(grown, path, torch.cat([tensor, last], axis))
    return grown


def _grown_axes(trace: Trace, shapes: Mapping[str, tuple[int, ...]], rows: int) -> dict[str, int]:
    """Map each hook point's name to the index of the axis whose length grew from `rows` to `rows + 1`.

    `shapes` contains the shapes with the additional row. A hook point is left out if the length of another of its axes
    also changed, or if the axis that grew is named, except "batch" and "channel" (from pooling of rows).
    """
    found = {}
    for fired in trace.fired:
        name, before = trace.name(fired), tuple(fired.tensor.shape)
        names, after = trace.known.names(fired.tensor), shapes.get(name, before)
        if (view := trace.views.get(fired[:4])) is not None:
            names, before, after = view.axes, view.split_lengths(before), view.split_lengths(after)
        changed = [number for number, lengths in enumerate(zip(before, after, strict=False)) if len({*lengths}) > 1]
        if "batch" in names and changed and names.index("batch") not in changed:
            return {}  # another axis grew, as in a sequence-first encoder after a Linear
        # If a tensor has only some of the rows, as in a mixture of experts, an extra row does not identify the axis.
        grew = [(before[number], after[number]) for number in changed] == [(rows, rows + 1)]
        if grew and len(before) == len(after) and names[changed[0]] in (None, "batch", "channel"):
            found[name] = changed[0]
    return found


def _point(trace: Trace, fired: _Fired, size: int, batch_axis: int | None, free: Mapping[int, str]) -> HookPoint:
    """Create a HookPoint for a tensor from a trace. `size` is the number of parameters in the hook point's module.

    `free` maps the index of each free axis to a name. The name is used only if the axis has no other name.
    """
    tensor, view = fired.tensor, trace.views.get(fired[:4])
    names = [*(trace.known.names(tensor) if view is None else view.axes)]
    lengths = tensor.shape if view is None else view.split_lengths(tensor.shape)
    for axis, name in free.items():
        names[axis] = names[axis] or (None if name in names else name)
    if batch_axis is not None:
        names[batch_axis] = "batch"
    module = None if fired.side == "tap" else trace.modules[fired.module]
    return HookPoint(
        name=trace.name(fired),
        axes=tuple(
            f"axis{number}" if name is None or name in names[:number] else name for number, name in enumerate(names)
        ),
        shape=tuple(None if axis in free else length for axis, length in enumerate(lengths) if axis != batch_axis),
        batch_axis=batch_axis,
        dtype=tensor.dtype,
        device=tensor.device,
        module_type="tap" if module is None else type(module).__name__,
        parameters=size,
        aliases=trace.aliases(fired),
        module=fired.module,
        side=fired.side,
        path=fired.path,
        call=fired.call if trace.calls[fired.module] > 1 else None,
        read_only=fired.read_only,
        lens=view if view is not None and view.splits else None,
    )


def _refuse_untraceable(model: nn.Module, inputs: Any) -> None:
    """Raise an error if the model has lazy parameters, or if the inputs have no rows."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedModelError(
                f"The weight '{name}' is lazy, so its shape is unknown until the first call. Call the model once "
                "before tracing."
            )
    first = next((tensor for _, tensor in leaves(inputs) if tensor.dim() and not tensor.is_nested), None)
    if first is not None and not len(first):
        raise BatchAxisError(
            f"The example inputs have no rows: the first tensor has shape {tuple(first.shape)}. Pass at least 2 rows, "
            "which are needed to identify the batch axis."
        )
