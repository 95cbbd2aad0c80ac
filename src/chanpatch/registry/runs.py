"""Run a model once without side effects, and record the tensors at all hook points with their axis names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction

from ..engine.calls import Observed, left_twice
from ..engine.inputs import copied_inputs
from ..engine.paths import Path, in_distribution, leaves, nested
from ..engine.state import undisturbed
from ..errors import UnsupportedModelError
from ..views import View
from .axes import NamePropagation, Names, axis_names
from .names import written_name


class Fired(NamedTuple):
    """One input or output tensor in a module call, or the tensor passed to a tap."""

    module: str
    side: Literal["in", "out", "tap"]
    path: Path
    call: int
    tensor: Tensor
    read_only: bool = False


Shapes: TypeAlias = dict[str, tuple[int, ...]]
Key: TypeAlias = tuple[str, str, Path, int]  # the first four fields of a Fired


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

    `views` maps each `Key` to a View with axis names from the user, which override inferred names. `totals` maps the
    id of each parameter to the parameter's sum before the run. During the run, these sums are compared with the current
    sums, to detect changed parameters. `infers_names` is False if only the shapes are needed.
    """

    def __init__(
        self,
        tracer: Tracer,
        *,
        views: Mapping[Key, View] = {},
        totals: Mapping[int, Any] = {},
        infers_names: bool = True,
    ) -> None:
        self.modules, self.module_names = tracer.modules, tracer.module_names
        self.views, self._totals, self.infers_names = views, totals, infers_names
        self.steady = True  # whether all parameters compared so far are unchanged
        self.fired: list[Fired] = []
        self.names: list[str] = []  # names of the hook points in `fired`, known at the end of the run
        self.inputs: list[Fired] = []  # inputs to the traced method; for `__call__`, these are also hook points
        self.calls: dict[str, int] = {}
        self.known = NamePropagation()
        self._stack: list[tuple[nn.Module, int, Names | None]] = []

    def shapes(self) -> Shapes:
        """Return a dict that maps each hook point's name to the shape of the tensor at the hook point."""
        return {name: tuple(fired.tensor.shape) for name, fired in self.named()}

    def named(self) -> Iterable[tuple[str, Fired]]:
        """Return a pair (name, tensor) for each hook point, in execution order."""
        return zip(self.names, self.fired, strict=True)

    def name(self, fired: Fired, module: str | None = None) -> str:
        """Return the name of a hook point. If `module` is given, use it as the name of the hook point's module."""
        call = fired.call if self.calls.get(fired.module, 1) > 1 else None
        return written_name(fired.module if module is None else module, fired.side, fired.path, call)

    def aliases(self, fired: Fired) -> tuple[str, ...]:
        """Return the other names of a hook point. There are other names only if the hook point's module is shared."""
        names = () if fired.side == "tap" else self.module_names[self.modules[fired.module]][1:]
        return tuple([self.name(fired, other) for other in names])

    def view(self, fired: Fired) -> View | None:
        """Return the user's axis names at a hook point, or None if the user did not name the axes."""
        return self.views.get(fired[:4]) if self.views else None

    def set_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tensors in the inputs to the traced method."""
        self.inputs = [Fired("", "in", path, 0, tensor) for path, tensor in _arguments(args, kwargs)]
        for fired in self.inputs:
            self._rename(fired)

    def on_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the input tensors of a module."""
        with DisableTorchFunction():
            name = self.module_names[module][0]
            call = self._count(name)
            if self._totals and not call:
                self.steady &= all([self._totals.get(id(each), "new") == total(each) for each in weights(module)])
            names = None
            for path, tensor in _arguments(args, kwargs):
                self._note(Fired(name, "in", path, call, tensor), module, None)
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
                self._note(Fired(name, "out", path, call, tensor, read_only), module, inputs)

    def on_tap(self, name: str, tensor: Tensor) -> None:
        """Record the tensor at a tap."""
        with DisableTorchFunction():
            self._note(Fired(name, "tap", (), self._count(name), tensor), None, None)

    def _count(self, name: str) -> int:
        """Count a call to a module or tap. Return the number of earlier calls."""
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        return call

    def _note(self, fired: Fired, module: nn.Module | None, inputs: Names | None) -> None:
        tensor = fired.tensor
        if tensor.is_nested:
            raise UnsupportedModelError(nested(self.name(fired)))
        self.fired.append(fired)
        if module is not None and self.infers_names:
            self.known.learn(tensor, axis_names(module, fired.side, fired.path, tensor.dim(), inputs))
        self._rename(fired)

    def _rename(self, fired: Fired) -> None:
        if (view := self.view(fired)) is not None:
            names = self.known.names(fired.tensor)
            split = (group[0] if len(group) == 1 else name for group, name in zip(view.groups, names, strict=True))
            self.known.rename(fired.tensor, [*split])


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[tuple[Path, Tensor]]:
    """Return the tensors among positional and keyword arguments, each with its path."""
    return itertools.chain(leaves(args), leaves(kwargs)) if kwargs else leaves(args)


def total(weight: Tensor) -> Any:
    """Return the sum of a parameter's values and, if it is large, of its bits. Return None if they cannot be read."""
    # If a forward pass changes the values, later forward passes must not be stopped early.
    try:
        if type(weight) is not nn.Parameter and type(weight.data) is not Tensor:  # a subclass may hide its data
            return None
        values = weight.detach()
        if values.numel() > _LARGE and values.is_contiguous() and values.nbytes % 8 == 0:
            return str(values.sum().item()), values.view(-1).view(torch.int64).sum().item()
        return str(values.sum(dtype=torch.complex128 if weight.is_complex() else torch.float64).item())
    except RuntimeError:  # some layouts and dtypes do not support sums, and values are unreadable on meta and in vmap
        return None


_LARGE = 2**16  # for larger parameters, two sums are up to ten times as fast as one sum in float64


def weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module, without the parameters of submodules."""
    return [weight for weight in module._parameters.values() if weight is not None]
