"""Find the hook points of a model: one run lists them, a second one proves the batch axis."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.calls import observed
from ..engine.hooks import Station
from ..engine.inputs import Inputs, batches, copied_inputs
from ..engine.paths import Attr, Path, in_distribution, leaves, replace, with_rows
from ..engine.sessions import disabled
from ..engine.state import undisturbed
from ..errors import BatchAxisError, HookPointError, SiteError, UnsupportedModelError, did_you_mean
from .axes import NamePropagation, Names, axis_names
from .names import selected, spellings, written_name
from .points import HookPoints, model_of, no_module, refuse_unhookable
from .sites import Axes, HookPoint


def hook_points(
    model: nn.Module,
    *example_inputs: Any,
    method: str = "__call__",
    axes: Mapping[str, tuple[str, ...]] | None = None,
    **example_keywords: Any,
) -> HookPoints:
    """Return every place where an activation of the model can be read or written, in execution order.

    The model runs under `torch.no_grad`, and again with one more row, which proves the batch axis. Random number
    generators, buffers, attributes and training flags are restored.

    Args:
        model: Any module.
        example_inputs: Inputs with at least one row; the model gets copies. In the second run an input grows along the
            axis named "batch", by `axes` or by a module such as a sequence-first LSTM. An input with unnamed axes grows
            along its first axis instead, if that is as long as the batch.
        method: The method to run, if not the forward.
        axes: Axis names by patterns as in `HookPoints.select`, for axes that no module type names:
            `{"encoder.*": ("batch", "position", "feature")}`. Elementwise modules and functions pass them on. Inputs of
            the method are `.in[0]`, ...
        example_keywords: Keyword inputs.

    Raises:
        UnsupportedModelError: If the model is compiled, scripted or lazy, or handles nested tensors.
        BatchAxisError: If the example inputs have no rows.
        HookPointError: If `axes` names a hook point that did not fire, or a tap has the name of another hook point.
        SiteError: If `axes` gives another number of names than the hook point has axes, or one name twice.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> points = hook_points(model, torch.zeros(2, 3, 9, 9))
        >>> points["1"].axes, points["1"].shape
        (('batch', 'channel', 'row', 'col'), (8, 7, 7))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hook_points takes a torch.nn.Module, not {no_module(model)}")
    refuse_unhookable(dict(model.named_modules()))
    _refuse_untraceable(model, (example_inputs, example_keywords))
    weights = _Weights(model)
    trace = _Trace(model, on_call=weights.compare)
    try:
        with undisturbed(model):
            trace.run(method, example_inputs, example_keywords)
    except TypeError as fault:
        if any(isinstance(each, np.ndarray) for each in (*example_inputs, *example_keywords.values())):
            raise TypeError(f"{type(model).__name__} took no NumPy array. Give torch.as_tensor(array).") from fault
        raise
    if axes:  # run again with the names known from the start, so that later modules and functions pass them on
        trace = _Trace(model, given=_names_by_place(trace, axes))
        with undisturbed(model):
            trace.run(method, example_inputs, example_keywords)
    _refuse_ambiguous_taps(trace)
    proved = _proved_batches(model, method, example_inputs, example_keywords, trace)
    points = [_point(trace, fired, proved.get(trace.name(fired))) for fired in trace.fired]
    not_called = [names[0] for names in trace.module_names.values() if names[0] and not trace.calls[names[0]]]
    return HookPoints(model, points, method=method, calls=trace.calls, not_called=not_called, steady=weights.steady)


def names_by_trace(
    model: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, tuple[Axes, int | None]]:
    """Return axes and batch axis by hook point, from one trace with these inputs; empty if that trace fails."""
    if model not in _names:
        found = {}
        with suppress(Exception), without_listeners(model):
            points = hook_points(model, *args, method=method, **kwargs).values()
            found = {name: (each.axes, each.batch_axis) for each in points for name in (each.name, *each.aliases)}
        _names[model] = found
    return _names[model]


@contextmanager
def without_listeners(model: nn.Module) -> Iterator[None]:
    """Run the model without any listener, also in the middle of a forward that has some."""
    stations = [station for module in model.modules() if (station := Station.of(module)) is not None]
    sessions = {each for station in stations for each in (*station.scopes, *(at.session for at in station.listeners))}
    with disabled(sessions):
        yield


_names: WeakKeyDictionary[nn.Module, Mapping[str, tuple[Axes, int | None]]] = WeakKeyDictionary()


class _Fired(NamedTuple):
    """One tensor that one call took or returned."""

    module: str
    side: Literal["in", "out", "tap"]
    path: Path
    call: int
    tensor: Tensor
    read_only: bool = False


_Place: TypeAlias = tuple[str, str, Path, int]  # all of a _Fired but the tensor


class _Trace:
    """All tensors that fire while a model runs, with axis names; `given` names override others."""

    def __init__(
        self,
        model: nn.Module,
        *,
        given: Mapping[_Place, tuple[str, ...]] | None = None,
        on_call: Callable[[nn.Module], None] = lambda module: None,
    ) -> None:
        self.model, self.given, self.on_call = model, given or {}, on_call
        self.fired: list[_Fired] = []
        self.inputs: list[_Fired] = []  # of the traced method, which are hook points only of a forward
        self.calls: Counter[str] = Counter()
        self.known = NamePropagation()
        self.module_names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.module_names.setdefault(module, []).append(name)
        self._stack: list[tuple[nn.Module, int, Names | None]] = []

    def run(self, method: str, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Run the model once, on copies of its inputs."""
        args, kwargs = copied_inputs(inputs, keywords)
        self.inputs = [_Fired("", "in", tuple(path), 0, tensor) for (_, *path), tensor in leaves((args, kwargs))]
        for fired in self.inputs:
            self._rename(fired)
        with self.known, observed(self.model.modules(), self._on_inputs, self._on_output, self._on_tap):
            getattr(self.model, method)(*args, **kwargs)

    def name(self, fired: _Fired, module: str | None = None) -> str:
        """Return a hook point's name, or its alias under another name of the module."""
        call = fired.call if self.calls[fired.module] > 1 else None
        return written_name(fired.module if module is None else module, fired.side, fired.path, call)

    def aliases(self, fired: _Fired) -> tuple[str, ...]:
        """Return the other names of a hook point, which a shared module has."""
        names = () if fired.side == "tap" else self.module_names[self.model.get_submodule(fired.module)][1:]
        return tuple(self.name(fired, other) for other in names)

    def _on_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.on_call(module)
        name = self.module_names[module][0]
        call, self.calls[name] = self.calls[name], self.calls[name] + 1
        given = [_Fired(name, "in", tuple(path), call, tensor) for (_, *path), tensor in leaves((args, kwargs))]
        for fired in given:
            self._note(fired, module)
        self._stack.append((module, call, self.known.names(given[0].tensor) if given else None))

    def _on_output(self, module: nn.Module, output: Any) -> None:
        caller, call, inputs = self._stack.pop()
        while caller is not module:  # a call that raised, and was caught, gave no output
            caller, call, inputs = self._stack.pop()
        for path, tensor in leaves(output):
            read_only = in_distribution(output, path)
            self._note(_Fired(self.module_names[module][0], "out", path, call, tensor, read_only), module, inputs)

    def _on_tap(self, name: str, tensor: Tensor) -> None:
        self._note(_Fired(name, "tap", (), self.calls[name], tensor))
        self.calls[name] += 1

    def _note(self, fired: _Fired, module: nn.Module | None = None, inputs: Names | None = None) -> None:
        tensor = fired.tensor
        if tensor.is_nested:
            raise UnsupportedModelError(
                f"The tensor at '{self.name(fired)}' is a nested one, which has no shape. Give padded inputs; where a "
                "TransformerEncoder makes it of them, build that with enable_nested_tensor=False."
            )
        self.fired.append(fired)
        if module is not None:
            self.known.learn(tensor, axis_names(module, fired.side, fired.path, tensor.dim(), inputs))
        self._rename(fired)

    def _rename(self, fired: _Fired) -> None:
        if fired[:4] in self.given:
            self.known.rename(fired.tensor, self.given[fired[:4]])


class _Weights:
    """Compares parameters before and during a forward; one that changes them must not be ended early."""

    def __init__(self, model: nn.Module) -> None:
        self.steady = True
        self._before = {id(weight): _total(weight) for weight in model.parameters()}
        self._compared: set[nn.Module] = set()

    def compare(self, module: nn.Module) -> None:
        """Compare the parameters of a module at its first call."""
        if module not in self._compared:
            self._compared.add(module)
            weights = module.parameters(recurse=False)
            self.steady &= all(self._before.get(id(each), "new") == _total(each) for each in weights)


def _total(weight: Tensor) -> Any:
    """Return the sum of a parameter; None if there is no sum."""
    if type(weight.data) is not Tensor or weight.is_meta or weight.layout != torch.strided or weight.is_quantized:
        return None
    with suppress(RuntimeError):  # some dtypes know no sum, and inside a vmap no number can be read
        total = weight.detach().sum(dtype=torch.complex128 if weight.is_complex() else torch.float64)
        return str(total.item())  # by text, NaN equals itself
    return None


def _refuse_ambiguous_taps(trace: _Trace) -> None:
    names, modules = Counter(map(trace.name, trace.fired)), dict(trace.model.named_modules(remove_duplicate=False))
    for fired in trace.fired:
        if fired.side == "tap" and (names[trace.name(fired)] > 1 or fired.module in modules):
            what = "a module" if fired.module in modules else "another hook point"
            raise HookPointError(f"tap('{fired.module}', ...) has the name of {what}. Give the tap a name of its own.")


def _names_by_place(trace: _Trace, axes: Mapping[str, Sequence[str]]) -> dict[_Place, tuple[str, ...]]:
    """Return the user's axis names for each place that the patterns match."""
    given: dict[_Place, tuple[str, ...]] = {}
    fired_by_name: dict[str, list[_Fired]] = {}
    for fired in (*trace.inputs, *trace.fired):
        fired_by_name.setdefault(trace.name(fired), []).append(fired)
    known = {name: spellings(name, fired.module, trace.aliases(fired)) for name, (fired, *_) in fired_by_name.items()}
    for pattern, names in axes.items():
        chosen = [fired for name in selected(pattern, known) for fired in fired_by_name[name]]
        if not chosen:
            hint = did_you_mean(pattern, known)
            raise HookPointError(f"axes={{'{pattern}': ...}}: no hook point matches.{hint}")
        for fired in chosen:
            if len(names) != fired.tensor.dim() or len(set(names)) < len(names):
                raise SiteError(
                    f"axes={{'{pattern}': {tuple(names)}}}: hook point '{trace.name(fired)}' has "
                    f"{fired.tensor.dim()} axes; give each one name of its own."
                )
            given[fired[:4]] = tuple(names)
    return given


def _proved_batches(model: nn.Module, method: str, inputs: Any, keywords: Any, trace: _Trace) -> dict[str, int]:
    """Return the batch axis of each hook point for which a second run with one more row proves it."""
    grown: Any = (inputs, dict(keywords))
    growing: list[tuple[Path, Any, int]] = []
    certain: list[int] = []  # lengths of axes named "batch"
    for path, tensor in with_rows(grown):
        if Attr("batch_sizes") in path:
            return {}  # the rows of a PackedSequence are interleaved
        inside = (each.tensor for each in trace.inputs if each.path[: len(path) - 1] == path[1:])
        names = next(map(trace.known.names, inside), None) or (None,)
        axis = names.index("batch") if "batch" in names else 0
        certain += [tensor.shape[axis]] if "batch" in names else []
        growing += [(path, tensor, axis)] if "batch" in names or None in names else []
    rows = next(iter([*certain, *(len(tensor) for _, tensor, _ in growing)]), 0)
    second = _Trace(model)
    with suppress(Exception), undisturbed(model):  # a model, or a container, may be made for one batch size only
        for path, tensor, axis in growing:
            if tensor.shape[axis] == rows:
                grown = replace(grown, path, torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis))
        second.run(method, *grown)
        return _grown_axes(trace, {second.name(fired): fired.tensor.shape for fired in second.fired}, rows)
    return {}


def _grown_axes(trace: _Trace, shapes: Mapping[str, torch.Size], rows: int) -> dict[str, int]:
    """Return the one axis of each hook point that grew from `rows` by one, unless it has another name than batch."""
    found = {}
    for fired in trace.fired:
        name, before = trace.name(fired), fired.tensor.shape
        names, after = trace.known.names(fired.tensor) or (None,) * len(before), shapes.get(trace.name(fired), before)
        changed = [number for number, lengths in enumerate(zip(before, after, strict=False)) if len({*lengths}) > 1]
        if "batch" in names and changed and names.index("batch") not in changed:
            return {}  # as a sequence-first encoder behind a Linear, which lets any axis grow
        # One more of some of the rows, as an expert is given them, does not prove which rows they are.
        grew = [(before[number], after[number]) for number in changed] == [(rows, rows + 1)]
        if grew and len(before) == len(after) and names[changed[0]] in (None, "batch"):
            found[name] = changed[0]
    return found


def _point(trace: _Trace, fired: _Fired, batch_axis: int | None) -> HookPoint:
    tensor = fired.tensor
    names = list(trace.known.names(tensor) or (None,) * tensor.dim())
    if batch_axis is not None:
        names[batch_axis] = "batch"
    module = None if fired.side == "tap" else trace.model.get_submodule(fired.module)
    return HookPoint(
        name=trace.name(fired),
        axes=tuple(
            f"axis{number}" if name is None or name in names[:number] else name for number, name in enumerate(names)
        ),
        shape=tuple(length for number, length in enumerate(tensor.shape) if number != batch_axis),
        batch_axis=batch_axis,
        dtype=tensor.dtype,
        device=tensor.device,
        module_type="tap" if module is None else type(module).__name__,
        parameters=0 if module is None else sum(parameter.numel() for parameter in module.parameters()),
        aliases=trace.aliases(fired),
        module=fired.module,
        side=fired.side,
        path=fired.path,
        call=fired.call if trace.calls[fired.module] > 1 else None,
        read_only=fired.read_only,
    )


def _refuse_untraceable(model: nn.Module, inputs: Any) -> None:
    """Raise for lazy parameters and for inputs without rows."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedModelError(
                f"'{name}' has no shape before the model's first call. Call the model once, then trace it."
            )
    first = next((tensor for _, tensor in leaves(inputs) if tensor.dim() and not tensor.is_nested), None)
    if first is not None and not len(first):
        raise BatchAxisError(
            f"The example inputs have no rows: the first tensor has shape {tuple(first.shape)}. Trace with two rows or "
            "more, which proves the batch axis."
        )


def traced(
    points_or_model: HookPoints | nn.Module, inputs: Inputs | Iterable[Inputs] | None, keywords: Mapping[str, Any] = {}
) -> HookPoints:
    """Return given hook points, or those of a model, traced with its inputs or with the first batch of them."""
    if isinstance(points_or_model, HookPoints):
        return points_or_model
    model = model_of(points_or_model)
    if inputs is None:
        what = type(model).__name__
        raise TypeError(f"There are no inputs to trace the {what} with. Give its hook points: hook_points(model, ...).")
    each = [inputs] if isinstance(inputs, (Tensor, tuple, Mapping)) else inputs
    for arguments, named in batches(each, 1):
        return hook_points(model, *arguments, **named, **keywords)
    raise BatchAxisError("There are no inputs to trace the model with. Give one batch at least.")
