"""Find the hook points in a model: one run lists the hook points, and a second run identifies the batch axis."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction

from ..engine.calls import Observed, left_twice
from ..engine.inputs import copied_inputs
from ..engine.paths import Attr, Path, in_distribution, leaves, nested, replace, with_rows
from ..engine.state import undisturbed
from ..errors import BatchAxisError, HookPointError, SiteError, UnsupportedModelError, did_you_mean
from ..views import View
from .axes import NamePropagation, Names, axis_names
from .names import alternative, selected, spellings, written_name
from .sites import Axes, HookPoint


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


class Tracer:
    """Runs a method of a model without side effects, and records the tensors at all hook points."""

    def __init__(self, modules: dict[str, nn.Module], method: str) -> None:
        self.model, self.method, self.modules = modules[""], method, modules
        self.module_names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            self.module_names.setdefault(module, []).append(name)
        self._undisturbed = undisturbed(self.model)

    def run(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any], **options: Any) -> Trace:
        """Run the method once on copies of the inputs. `options` are the keyword arguments of the returned Trace."""
        trace = Trace(self, **options)
        with self._undisturbed:
            args, kwargs = copied_inputs(inputs, keywords)
            trace.set_inputs(args, kwargs)
            observing = Observed(self.module_names, trace.on_inputs, trace.on_output, trace.on_tap)
            with trace.known if trace.infers_names else nullcontext(), left_twice(observing):
                getattr(self.model, self.method)(*args, **kwargs)
        trace.names = [*map(trace.name, trace.fired)]
        return trace


class Trace:
    """The tensors at all hook points in one run of a model, with axis names.

    `views` maps each `_Place` to a View with axis names from the user, which override inferred names. `totals` maps the
    id of each parameter to the parameter's sum before the run. During the run, these sums are compared with the current
    sums, to detect changed parameters. `infers_names` is False if only the shapes are needed.
    """

    def __init__(
        self,
        tracer: Tracer,
        *,
        views: Mapping[_Place, View] = {},
        totals: Mapping[int, Any] = {},
        infers_names: bool = True,
    ) -> None:
        self.modules, self.module_names = tracer.modules, tracer.module_names
        self.views, self._totals, self.infers_names = views, totals, infers_names
        self.steady = True  # whether all parameters compared so far are unchanged
        self.fired: list[_Fired] = []
        self.names: list[str] = []  # names of the hook points in `fired`, known at the end of the run
        self.inputs: list[_Fired] = []  # inputs to the traced method; for `__call__`, these are also hook points
        self.calls: dict[str, int] = {}
        self.known = NamePropagation()
        self._stack: list[tuple[nn.Module, int, Names | None]] = []

    def shapes(self) -> _Shapes:
        """Return a dict that maps each hook point's name to the shape of the tensor at the hook point."""
        return {name: tuple(fired.tensor.shape) for name, fired in self.named()}

    def named(self) -> Iterable[tuple[str, _Fired]]:
        """Return a pair (name, tensor) for each hook point, in execution order."""
        return zip(self.names, self.fired, strict=True)

    def name(self, fired: _Fired, module: str | None = None) -> str:
        """Return the name of a hook point. If `module` is given, use it as the name of the hook point's module."""
        call = fired.call if self.calls.get(fired.module, 1) > 1 else None
        return written_name(fired.module if module is None else module, fired.side, fired.path, call)

    def aliases(self, fired: _Fired) -> tuple[str, ...]:
        """Return the other names of a hook point. There are other names only if the hook point's module is shared."""
        names = () if fired.side == "tap" else self.module_names[self.modules[fired.module]][1:]
        return tuple([self.name(fired, other) for other in names])

    def view(self, fired: _Fired) -> View | None:
        """Return the user's axis names at a hook point, or None if the user did not name the axes."""
        return self.views.get(fired[:4]) if self.views else None

    def set_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tensors in the inputs to the traced method."""
        self.inputs = [_Fired("", "in", path, 0, tensor) for path, tensor in _arguments(args, kwargs)]
        for fired in self.inputs:
            self._rename(fired)

    def on_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the input tensors of a module."""
        with DisableTorchFunction():
            name = self.module_names[module][0]
            call = self._count(name)
            if self._totals and not call:
                self.steady &= all([self._totals.get(id(each), "new") == _total(each) for each in _weights(module)])
            names = None
            for path, tensor in _arguments(args, kwargs):
                self._note(_Fired(name, "in", path, call, tensor), module, None)
                names = self.known.names(tensor) if names is None else names
            self._stack.append((module, call, names))

    def on_output(self, module: nn.Module, output: Any) -> None:
        """Record the output tensors of a module."""
        with DisableTorchFunction():
            while self._stack[-1][0] is not module:  # a call has no output if the model caught its exception
                self._stack.pop()
            _, call, inputs = self._stack.pop()
            name = self.module_names[module][0]
            for path, tensor in leaves(output):
                read_only = in_distribution(output, path)
                self._note(_Fired(name, "out", path, call, tensor, read_only), module, inputs)

    def on_tap(self, name: str, tensor: Tensor) -> None:
        """Record the tensor at a tap."""
        with DisableTorchFunction():
            self._note(_Fired(name, "tap", (), self._count(name), tensor), None, None)

    def _count(self, name: str) -> int:
        """Count a call to a module or tap. Return the number of earlier calls."""
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        return call

    def _note(self, fired: _Fired, module: nn.Module | None, inputs: Names | None) -> None:
        tensor = fired.tensor
        if tensor.is_nested:
            raise UnsupportedModelError(nested(self.name(fired)))
        self.fired.append(fired)
        if module is not None and self.infers_names:
            self.known.learn(tensor, axis_names(module, fired.side, fired.path, tensor.dim(), inputs))
        self._rename(fired)

    def _rename(self, fired: _Fired) -> None:
        if (view := self.view(fired)) is not None:
            names = self.known.names(fired.tensor)
            split = (group[0] if len(group) == 1 else name for group, name in zip(view.groups, names, strict=True))
            self.known.rename(fired.tensor, [*split])


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[tuple[Path, Tensor]]:
    """Return the tensors among positional and keyword arguments, each with its path."""
    return itertools.chain(leaves(args), leaves(kwargs)) if kwargs else leaves(args)


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
    totals = {id(weight): _total(weight) for module in tracer.module_names for weight in _weights(module)}
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


def _total(weight: Tensor) -> Any:
    """Return the sum of a parameter's entries, as a string; return None if the sum cannot be read."""
    # If a forward pass changes the sum, later forward passes must not be stopped early.
    if type(weight) is not nn.Parameter and type(weight.data) is not Tensor:
        return None
    try:
        total = weight.detach().sum(dtype=torch.complex128 if weight.is_complex() else torch.float64)
        return str(total.item())  # a string, so that NaN equals NaN
    except RuntimeError:  # some layouts and dtypes do not support sums, and values are unreadable on meta and in vmap
        return None


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


def _views_by_place(trace: Trace, axes: Mapping[str, str | Sequence[str] | View]) -> dict[_Place, View]:
    """Map each `_Place` whose hook point matches a pattern in `axes` to a View with the pattern's axis names."""
    given: dict[_Place, View] = {}
    fired_by_name = defaultdict[str, list[_Fired]](list)
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


def _proved_batches(tracer: Tracer, inputs: Any, keywords: Any, trace: Trace) -> tuple[dict[str, int], _Shapes]:
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
    tracer: Tracer, trace: Trace, inputs: Any, keywords: Any, free: Mapping[str, int], with_row: _Shapes
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
    trace: Trace, name: str, fired: _Fired, size: int, batch_axis: int | None, free: Mapping[int, str]
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
    sizes = {name: {id(each): each.numel() for each in _weights(module)} for name, module in modules.items()}
    for name in reversed(sizes):  # submodules before their parents
        if name:
            sizes[name.rpartition(".")[0]].update(sizes[name])
    return {name: sum(each.values()) for name, each in sizes.items()}


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module, without the parameters of submodules."""
    return [weight for weight in module._parameters.values() if weight is not None]


def _refuse_untraceable(modules: Mapping[str, nn.Module], inputs: Any) -> None:
    """Raise an error if the model has lazy parameters, or if the inputs have no rows."""
    for module_name, module in modules.items():
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if nn.parameter.is_lazy(tensor):
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
