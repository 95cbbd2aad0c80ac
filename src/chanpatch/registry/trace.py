"""Find the hook points in a model: one run lists the hook points, and a second run identifies the batch axis."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from ..engine.paths import Attr, Path, leaves, replace, with_rows
from ..errors import BatchAxisError, HookPointError, SiteError, UnsupportedModelError, did_you_mean
from ..views import View
from .axes import Names
from .names import alternative, selected, spellings
from .runs import Fired, Key, Shapes, Trace, Tracer, total, weights
from .sites import Axes, HookPoint


def traced_run(
    modules: dict[str, nn.Module],
    method: str,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    axes: Mapping[str, Any],
    free: Mapping[str, int],
) -> dict[str, Any]:
    """Trace a model. Return a dict with the arguments `points`, `calls`, `not_called` and `steady` for HookPoints."""
    model = modules[""]
    if not callable(getattr(model, method, None)):
        raise HookPointError(f"{type(model).__name__} has no method '{method}'.{did_you_mean(method, dir(model))}")
    _refuse_untraceable(modules, (inputs, keywords))
    tracer = Tracer(modules, method)
    totals = {id(weight): total(weight) for module in tracer.module_names for weight in weights(module)}
    try:
        trace = tracer.run(inputs, keywords, totals=totals)
    except TypeError as fault:
        if any(isinstance(each, np.ndarray) for each in (*inputs, *keywords.values())):
            kind = type(model).__name__
            raise TypeError(f"{kind} does not accept NumPy arrays. Pass torch.as_tensor(array).") from fault
        raise
    steady = trace.steady
    if axes:  # run again, so that the given names propagate downstream
        trace = tracer.run(inputs, keywords, views=_views_by_place(trace, axes))
    _refuse_shared_names(trace)
    proved, shapes = _proved_batches(tracer, inputs, keywords, trace)
    grown = _free_axes(tracer, trace, inputs, keywords, free, shapes) if free else {}
    sizes = _sizes(modules)
    return {
        "points": [
            _point(trace, name, fired, sizes.get(fired.module, 0), proved.get(name), grown.get(name, {}))
            for name, fired in trace.named()
        ],
        "calls": trace.calls,
        "not_called": [names[0] for names in trace.module_names.values() if names[0] and names[0] not in trace.calls],
        "steady": steady,
    }


def _refuse_shared_names(trace: Trace) -> None:
    """Raise HookPointError if two hook points have the same name, or if a tap has the same name as a module."""
    counts = Counter(trace.names)
    for name, fired in sorted(trace.named(), key=lambda each: each[1].side != "tap"):
        if fired.side == "tap" and (counts[name] > 1 or fired.module in trace.modules):
            other = "a module" if fired.module in trace.modules else "another hook point"
            raise HookPointError(f"tap('{fired.module}', ...) has the same name as {other}. Rename the tap.")
        if counts[name] > 1:
            raise HookPointError(
                f"Two hook points have the name '{name}': a submodule, and an entry in a module's input or output. "
                "Rename the submodule or the entry."
            )


def _views_by_place(trace: Trace, axes: Mapping[str, str | Sequence[str] | View]) -> dict[Key, View]:
    """Map each `Key` whose hook point matches a pattern in `axes` to a View with the pattern's axis names."""
    given: dict[Key, View] = {}
    fired_by_name = defaultdict[str, list[Fired]](list)
    for name, fired in (*((trace.name(each), each) for each in trace.inputs), *trace.named()):
        fired_by_name[name].append(fired)
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


def _proved_batches(tracer: Tracer, inputs: Any, keywords: Any, trace: Trace) -> tuple[dict[str, int], Shapes]:
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
        shapes = tracer.run(*grown, infers_names=False).shapes()
        return _grown_axes(trace, shapes, rows), shapes
    return {}, {}


def _free_axes(
    tracer: Tracer, trace: Trace, inputs: Any, keywords: Any, free: Mapping[str, int], with_row: Shapes
) -> dict[str, dict[int, str]]:
    """Find the axes whose lengths grow when the inputs have one more entry along a free axis of the inputs.

    Return a dict that maps each hook point's name to {index of the axis: name of the free axis}. `with_row` contains
    the shapes from the run with one more row. An axis that grows in that run is not free.
    """
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for name, axis in free.items():
        grown = _longer_inputs(trace, name, axis, inputs, keywords)
        try:
            shapes = tracer.run(*grown, infers_names=False).shapes()
        except Exception as fault:
            raise SiteError(
                f"free={{'{name}': {axis}}}: the model fails if the length of this axis increases by 1. Omit "
                f"the axis, or fix the cause of this error: {fault}"
            ) from fault
        for point, fired in trace.named():
            before = tuple(fired.tensor.shape)
            three = [before, shapes.get(point, before), with_row.get(point, before)]
            if (view := trace.view(fired)) is not None:
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
    for name, fired in trace.named():
        before = tuple(fired.tensor.shape)
        names, after = trace.known.names(fired.tensor), shapes.get(name, before)
        if (view := trace.view(fired)) is not None:
            names, before, after = view.axes, view.split_lengths(before), view.split_lengths(after)
        changed = [axis for axis, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
        if "batch" in names and changed and names.index("batch") not in changed:
            return {}  # another axis grew, as in a sequence-first encoder after a Linear
        # If a tensor has only some of the rows, as in a mixture of experts, an extra row does not identify the axis.
        grew = [(before[number], after[number]) for number in changed] == [(rows, rows + 1)]
        if grew and len(before) == len(after) and names[changed[0]] in (None, "batch", "channel"):
            found[name] = changed[0]
    return found


def _point(
    trace: Trace, name: str, fired: Fired, size: int, batch_axis: int | None, free: Mapping[int, str]
) -> HookPoint:
    """Create the HookPoint called `name` for a tensor. `size` is the number of parameters in the hook point's module.

    `free` maps the index of each free axis to a name. The name is used only if the axis has no other name.
    """
    tensor, view = fired.tensor, trace.view(fired)
    names = trace.known.names(tensor) if view is None else view.axes
    lengths: Any = tensor.shape if view is None else view.split_lengths(tensor.shape)
    if free:
        names = tuple([a or (None if free.get(n) in names else free.get(n)) for n, a in enumerate(names)])
        lengths = [None if axis in free else length for axis, length in enumerate(lengths)]
    if batch_axis is not None:
        names = (*names[:batch_axis], "batch", *names[batch_axis + 1 :])
        lengths = (*lengths[:batch_axis], *lengths[batch_axis + 1 :])
    point = object.__new__(HookPoint)
    vars(point).update(  # the constructor of a frozen dataclass takes four times as long
        name=name,
        axes=_numbered(names),
        shape=tuple(lengths),
        batch_axis=batch_axis,
        dtype=tensor.dtype,
        device=tensor.device,
        module_type="tap" if fired.side == "tap" else type(trace.modules[fired.module]).__name__,
        parameters=size,
        aliases=trace.aliases(fired),
        module=fired.module,
        side=fired.side,
        path=fired.path,
        call=fired.call if trace.calls[fired.module] > 1 else None,
        read_only=fired.read_only,
        lens=view if view is not None and view.splits else None,
    )
    return point


@functools.lru_cache
def _numbered(names: Names) -> Axes:
    """Replace missing and repeated axis names with `axis0`, `axis1`, ..."""
    return tuple(f"axis{n}" if name is None or name in names[:n] else name for n, name in enumerate(names))


def _sizes(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the number of entries in each module's parameters, including the parameters of submodules."""
    sizes = {name: {id(each): each.numel() for each in weights(module)} for name, module in modules.items()}
    for name in reversed(sizes):  # submodules before their parents
        if name:
            sizes[name.rpartition(".")[0]].update(sizes[name])
    return {name: sum(each.values()) for name, each in sizes.items()}


def _refuse_untraceable(modules: Mapping[str, nn.Module], inputs: Any) -> None:
    """Raise an error if the model has lazy parameters, or if the inputs have no rows."""
    for module_name, module in modules.items():
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and nn.parameter.is_lazy(tensor):
                raise UnsupportedModelError(
                    f"The weight '{f'{module_name}.{name}' if module_name else name}' is lazy, so its shape is unknown "
                    "until the first call. Call the model once before tracing."
                )
    first = next((tensor for _, tensor in leaves(inputs) if tensor.dim() and not tensor.is_nested), None)
    if first is not None and not len(first):
        raise BatchAxisError(
            f"The example inputs have no rows: the first tensor has shape {tuple(first.shape)}. Pass at least 2 rows, "
            "which are needed to identify the batch axis."
        )
