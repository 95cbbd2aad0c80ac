"""Finding the hook points of a model: run it once to list them, once more to prove which axis is the batch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.hooks import observed, refuse_unhookable
from ..engine.inputs import copied_inputs
from ..engine.paths import Attr, Path, leaves, path_text, replace, with_rows
from ..engine.state import undisturbed
from ..errors import BatchAxisError, HookPointError, SiteError, UnsupportedModelError, did_you_mean
from .axes import NamePropagation, Names, axis_names
from .names import glob
from .points import HookPoints
from .sites import HookPoint


def hook_points(
    model: nn.Module,
    *example_inputs: Any,
    method: str = "__call__",
    axes: Mapping[str, tuple[str, ...]] | None = None,
    **example_keywords: Any,
) -> HookPoints:
    """Return every place where an activation of the model can be read or written, in execution order.

    The model is run under `torch.no_grad`, and once more with one row more, which proves the batch axis. Random
    number generators, buffers, attributes and training flags are put back afterwards.

    Args:
        model: Any module.
        example_inputs: What the model takes, with at least one row; the model gets copies. Tensors in them that
            have the batch on their first axis (the length of the first tensor's first axis) are lengthened for the
            second run; where `axes` names an axis of `.in[0]` "batch", or a module type such as a sequence-first
            LSTM says that it is another one, that one is the batch.
        method: The method to run, for models that are entered by another one than the forward.
        axes: Names for axes whose meaning the module type does not tell, by glob over hook point names:
            `{"encoder.*": ("batch", "position", "feature")}`. Elementwise modules and functions after it pass
            them on.
        example_keywords: Keyword inputs.

    Raises:
        UnsupportedModelError: If the model is compiled or scripted, so that hooks would be ignored, has lazy
            parameters, or handles nested tensors.
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
        raise TypeError(f"hook_points takes a torch.nn.Module, not {type(model).__name__}.")
    refuse_unhookable(model)
    refuse_untraceable(model, (example_inputs, example_keywords))
    trace, weights = _Trace(model), _Weights(model)
    try:
        with undisturbed(model), weights.watched():
            trace.run(method, example_inputs, example_keywords)
    except TypeError as fault:
        if any(isinstance(each, np.ndarray) for each in (*example_inputs, *example_keywords.values())):
            raise TypeError(f"{type(model).__name__} took no NumPy array. Give torch.as_tensor(array).") from fault
        raise
    if axes:  # run anew with the names known from the start, so that they are passed on to what comes after
        trace = _Trace(model, _names_by_place(trace, axes))
        with undisturbed(model):
            trace.run(method, example_inputs, example_keywords)
    _refuse_ambiguous_taps(trace)
    grown = _grown(model, method, example_inputs, example_keywords, trace)
    points = [_point(trace, fired, grown.get(trace.name(fired))) for fired in trace.fired]
    return HookPoints(
        model, points, method=method, calls=trace.calls, not_called=trace.not_called(), steady=weights.steady
    )


@dataclass(frozen=True)
class _Fired:
    """One tensor that one call took or returned."""

    module: str
    side: Literal["in", "out", "tap"]
    path: Path
    call: int
    tensor: Tensor

    @property
    def place(self) -> _Place:
        return self.module, self.side, self.path, self.call


_Place: TypeAlias = tuple[str, str, Path, int]


_MOST_TRIES = 32  # of which inputs have the batch on which axis


class _Trace:
    """Everything that fires while a model runs, with the axis names that can be told.

    Args:
        model: What is traced.
        given: Names that stand before those that can be told, by place.
    """

    def __init__(self, model: nn.Module, given: Mapping[_Place, tuple[str, ...]] | None = None) -> None:
        self.model = model
        self.given = given or {}
        self.fired: list[_Fired] = []
        self.inputs: dict[Path, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.known = NamePropagation()
        self.module_names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.module_names.setdefault(module, []).append(name)
        self._stack: list[tuple[nn.Module, int, Names | None]] = []

    def run(self, method: str, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Run the model once, on copies of its inputs that it may write into, and note what fires."""
        args, kwargs = copied_inputs(inputs, keywords)
        self.inputs = dict(leaves((args, kwargs)))
        with self.known, observed(self.model.modules(), self._on_inputs, self._on_output, self._on_tap):
            getattr(self.model, method)(*args, **kwargs)

    def batch_of_input(self, path: Path) -> int | None:
        """Return which axis of an input, of a TensorDict of its first tensor, has the name of the batch."""
        first = next((tensor for place, tensor in self.inputs.items() if place[: len(path)] == path), None)
        names = () if first is None else self.known.names(first) or ()
        return names.index("batch") if "batch" in names else None

    def not_called(self) -> list[str]:
        return [names[0] for names in self.module_names.values() if names[0] and not self.calls[names[0]]]

    def name(self, fired: _Fired, module: str | None = None) -> str:
        """Return a hook point's name, or its alias under another name of the module."""
        base = fired.module if module is None else module
        if self.calls[fired.module] > 1:
            base += f"#{fired.call}"
        if fired.side == "tap" or (fired.side == "out" and not fired.path and fired.module):
            return base
        return f"{base}.{fired.side}{path_text(fired.path)}"

    def _on_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.module_names[module][0]
        call, self.calls[name] = self.calls[name], self.calls[name] + 1
        first: Tensor | None = None
        for (_, *path), tensor in leaves((args, kwargs)):
            self._note(_Fired(name, "in", tuple(path), call, tensor), module, None)
            first = tensor if first is None else first
        self._stack.append((module, call, None if first is None else self.known.names(first)))

    def _on_output(self, module: nn.Module, output: Any) -> None:
        caller, call, inputs = self._stack.pop()
        while caller is not module:  # a call that raised, and was caught, gave no output
            caller, call, inputs = self._stack.pop()
        for path, tensor in leaves(output):
            self._note(_Fired(self.module_names[module][0], "out", path, call, tensor), module, inputs)

    def _on_tap(self, name: str, tensor: Tensor) -> None:
        if any(name in names for names in self.module_names.values()):
            raise HookPointError(f"tap('{name}', ...) has the name of a module. Give the tap a name of its own.")
        self._note(_Fired(name, "tap", (), self.calls[name], tensor), None, None)
        self.calls[name] += 1

    def _note(self, fired: _Fired, module: nn.Module | None, inputs: Names | None) -> None:
        tensor = fired.tensor
        if tensor.is_nested:
            raise UnsupportedModelError(
                f"The tensor at '{self.name(fired)}' is a nested one, which has no shape. Give padded inputs; where a "
                "TransformerEncoder makes it of them, build that with enable_nested_tensor=False."
            )
        self.fired.append(fired)
        unknown: Names = (None,) * tensor.dim()
        told = unknown if module is None else axis_names(module, fired.side, fired.path, tensor.dim(), inputs)
        self.known.learn(tensor, told)
        if fired.place in self.given:
            self.known.rename(tensor, self.given[fired.place])


class _Weights:
    """Whether a forward leaves the parameters alone while it runs.

    One that merges, casts or exchanges them, and undoes that at its end, must not be ended early.

    Attributes:
        steady: Whether each module had, when it was called, the very parameters of before.
    """

    def __init__(self, model: nn.Module) -> None:
        self.steady = True
        self._before = {id(weight): _total(weight) for weight in model.parameters()}
        self._modules = set(model.modules())

    def watched(self) -> AbstractContextManager[None]:
        """Look at the parameters of every module in the forward that runs inside, when it is first called."""
        return observed(self._modules, on_inputs=self._notice)

    def _notice(self, module: nn.Module, *inputs: Any) -> None:
        for weight in module.parameters(recurse=False) if module in self._modules else ():
            before = self._before.get(id(weight), "another parameter")
            self.steady &= before == _total(weight)
        self._modules.discard(module)


def _total(weight: Tensor) -> Any:
    """Return the sum of a parameter, from which a change can be told; None where that cannot be taken."""
    if type(weight.data) is not Tensor or weight.is_meta or weight.layout != torch.strided or weight.is_quantized:
        return None
    with suppress(RuntimeError):  # some dtypes know no sum, and inside a vmap no number can be read
        total = weight.detach().sum(dtype=torch.complex128 if weight.is_complex() else torch.float64)
        return str(total.item())  # by text, NaN equals itself
    return None


def _refuse_ambiguous_taps(trace: _Trace) -> None:
    names = Counter(trace.name(fired) for fired in trace.fired)
    for fired in trace.fired:
        if fired.side == "tap" and names[trace.name(fired)] > 1:
            raise HookPointError(
                f"tap('{fired.module}', ...) has the name of another hook point. Give the tap a name of its own."
            )


def _names_by_place(trace: _Trace, axes: Mapping[str, Sequence[str]]) -> dict[_Place, tuple[str, ...]]:
    """Return the names that the user gave, for each place that their globs match."""
    given = {}
    for pattern, names in axes.items():
        matches = glob(pattern)
        chosen = [fired for fired in trace.fired if matches(trace.name(fired))]
        if not chosen:
            hint = did_you_mean(pattern, map(trace.name, trace.fired))
            raise HookPointError(f"axes={{'{pattern}': ...}}: no hook point matches.{hint}")
        for fired in chosen:
            if len(names) != fired.tensor.dim() or len(set(names)) < len(names):
                raise SiteError(
                    f"axes={{'{pattern}': {tuple(names)}}}: hook point '{trace.name(fired)}' has "
                    f"{fired.tensor.dim()} axes; give each one name of its own."
                )
            given[fired.place] = tuple(names)
    return given


def _grown(model: nn.Module, method: str, inputs: Any, keywords: Any, trace: _Trace) -> dict[str, torch.Size]:
    """Return the shapes of a second run with one row more, by hook point; empty where there is none.

    Where the growth of the first axis shows that some module's batch is another axis of the inputs (a model may begin
    with Linear layers, which do not care, and have a sequence-first LSTM later), the others are tried in turn.
    """
    tensors = [*with_rows((inputs, dict(keywords)))]
    if not tensors or any(Attr("batch_sizes") in path for path, _ in tensors):
        return {}  # a PackedSequence has its rows between one another
    origin, first = tensors[0]
    named = trace.batch_of_input(origin)
    shapes = _with_one_row_more(model, method, inputs, keywords, trace, named or 0)
    if False not in _agreement(trace, shapes):
        return shapes
    for axis in range(1, first.dim()) if named is None else ():
        shapes = _with_one_row_more(model, method, inputs, keywords, trace, axis)
        if _agreement(trace, shapes) == {True}:
            return shapes
    return {}


def _agreement(trace: _Trace, grown: Mapping[str, torch.Size]) -> set[bool]:
    """Tell, for the hook points whose batch axis has its name, whether that one grew or another one instead."""
    found = set()
    for fired in trace.fired:
        names, before = trace.known.names(fired.tensor) or (), fired.tensor.shape
        after = grown.get(trace.name(fired), before)
        if "batch" in names and len(after) == len(before):
            longer = [number for number, length in enumerate(before) if after[number] == length + 1]
            if longer:
                found.add(names.index("batch") in longer)
    return found


def _with_one_row_more(
    model: nn.Module, method: str, inputs: Any, keywords: Any, trace: _Trace, batch_axis: int
) -> dict[str, torch.Size]:
    """Return the shapes of a run whose first tensor is longer by one on an axis; empty where no such run succeeds."""
    tensors = [*with_rows((inputs, dict(keywords)))]
    first = tensors[0][1]
    rows = first.shape[batch_axis]
    choices: list[list[int | None]] = []
    for path, tensor in tensors:
        known = trace.batch_of_input(path)
        fitting = [axis for axis, length in enumerate(tensor.shape) if length == rows]
        choices.append([batch_axis] if tensor is first else [known] if known is not None else [*fitting, None])
    for chosen in itertools.islice(itertools.product(*choices), _MOST_TRIES if rows else 0):
        grown: Any = (inputs, dict(keywords))
        second = _Trace(model)
        with suppress(Exception), undisturbed(model):  # a model, or a container, may be made for one batch size only
            for (path, tensor), axis in zip(tensors, chosen, strict=True):
                if axis is not None:
                    grown = replace(grown, path, torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis))
            second.run(method, *grown)
            # One more of some of the rows, as an expert is given them, does not tell which rows they are.
            of_all = {trace.name(fired) for fired in trace.fired if rows in fired.tensor.shape}
            shapes = {second.name(fired): fired.tensor.shape for fired in second.fired}
            return {name: shape for name, shape in shapes.items() if name in of_all and rows + 1 in shape}
    return {}


def _point(trace: _Trace, fired: _Fired, grown: torch.Size | None) -> HookPoint:
    tensor = fired.tensor
    names = list(trace.known.names(tensor) or (None,) * tensor.dim())
    batch_axis = _batch_axis(names, tensor.shape, grown)
    if batch_axis is not None:
        names[batch_axis] = "batch"
    axes = tuple(
        name if name is not None and name not in names[:number] else f"axis{number}"
        for number, name in enumerate(names)
    )
    module = None if fired.side == "tap" else trace.model.get_submodule(fired.module)
    other_names = [] if module is None else trace.module_names[module][1:]
    return HookPoint(
        name=trace.name(fired),
        axes=axes,
        shape=tuple(length for number, length in enumerate(tensor.shape) if number != batch_axis),
        batch_axis=batch_axis,
        dtype=tensor.dtype,
        device=tensor.device,
        module_type="tap" if module is None else type(module).__name__,
        parameters=0 if module is None else sum(parameter.numel() for parameter in module.parameters()),
        aliases=tuple(trace.name(fired, other) for other in other_names),
        module=fired.module,
        side=fired.side,
        path=fired.path,
        call=fired.call if trace.calls[fired.module] > 1 else None,
    )


def _batch_axis(names: Sequence[str | None], shape: torch.Size, grown: torch.Size | None) -> int | None:
    """Return the one axis that grew by one row, unless names say that another is the batch."""
    if grown is None or len(grown) != len(shape):
        return None
    longer = [number for number, (before, after) in enumerate(zip(shape, grown, strict=True)) if before != after]
    if len(longer) != 1 or grown[longer[0]] != shape[longer[0]] + 1:
        return None
    taken = names.index("batch") if "batch" in names else longer[0]
    return longer[0] if names[longer[0]] in (None, "batch") and taken == longer[0] else None


def refuse_untraceable(model: nn.Module, inputs: Any) -> None:
    """Raise for what cannot be traced: parameters that do not exist yet, inputs without rows."""
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
