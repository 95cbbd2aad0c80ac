"""The prefix: the module calls before the patches. The prefix runs once; later forward passes reuse its outputs."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from ..engine.calls import Observed, WrappedMethod
from ..engine.paths import field_names, is_tensordict, leaves, replace, shallow_copy
from ..engine.state import Snapshot, storage


class StrategyError(Exception):
    """Raised when a fast strategy does not work for the model or the patches."""


@dataclass
class _Call:
    """One module call in the remembered forward pass."""

    module: nn.Module
    output: Any  # the value returned by forward(), before any hook changed it
    versions: list[tuple[Tensor, int]]  # the output's tensors, with their versions after the call
    left: Snapshot | None  # the state of the module after the call; None if not known
    known: bool  # whether later forward passes may reuse the output instead of running the call
    copied: bool = False  # whether to copy the output for each pass, because a module modifies it in place

    @property
    def unwritten(self) -> bool:
        """Whether the output's tensors have not been modified in place since the call."""
        return all(tensor._version == version for tensor, version in self.versions)


class Prefix:
    """The module calls in one forward pass, with the outputs that later forward passes reuse.

    The output of a call is reused if no submodule has hooks, the call draws no random numbers, and the output shares no
    memory with the arguments. All other calls run in every forward pass. The hooks on a skipped module itself still
    run, and receive the stored output. The caller must restore the model after each forward pass.
    """

    def __init__(self, model: nn.Module, snapshot: Snapshot) -> None:
        self._model, self._snapshot = model, snapshot
        self._taps: Collection[str] = ()
        self._free_bytes = 0
        self._cuda = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda}
        self.calls: list[_Call] = []  # in the order in which the calls finished
        self._sizes: dict[int, int] = {}  # bytes in the largest tensor computed, by the number of calls finished before
        self._quiet: dict[nn.Module, bool] = {}
        self._inside = self._tapped = False
        self.finished = self._skipped = 0  # numbers of calls finished, or to skip, in the current forward pass

    def largest_after(self, number: int) -> int:
        """Return the size in bytes of the largest tensor that was computed after the first `number` calls finished."""
        return max((size for position, size in self._sizes.items() if position >= number), default=0)

    @contextmanager
    def remembered(self, taps: Collection[str], max_bytes: int) -> Iterator[None]:
        """Store the module calls in the forward pass that runs inside this context.

        The output of a call is not stored if a tap in `taps` runs during the call, or if all stored outputs together
        would exceed `max_bytes`.
        """
        self._taps, self._free_bytes = taps, max_bytes
        modules = [*self._model.modules()]
        all_hooked = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        hooked = {each for each in modules if all_hooked or each._forward_hooks or each._forward_pre_hooks}
        self._quiet = {module: not hooked & {*module.modules()} - {module} for module in modules}
        with Observed((), on_tap=self._on_tap), _wrapped(modules, self._remember), _Sizes(self._on_size):
            yield
        for call in self.calls:
            call.known &= call.unwritten

    @contextmanager
    def skipped(self, number: int) -> Iterator[None]:
        """In the forward pass that runs inside this context, skip the first `number` calls and reuse their outputs."""
        self.finished, self._inside, self._skipped = 0, False, number
        for call in self.calls[:number]:
            if call.known and call.left:
                call.left.put_back()  # later modules may read attributes that a skipped module sets
        with _wrapped({call.module for call in self.calls[:number]}, self._replay):
            yield
        if not all(call.unwritten for call in self.calls[:number] if call.known):
            raise StrategyError("a forward pass modified an earlier module's output in place")

    def _remember(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside or not self._quiet[module]:
            return forward(*args, **kwargs)
        given = {storage(tensor) for _, tensor in leaves((args, kwargs))} - {0}
        if any(getattr(part, "inplace", False) for part in module.modules()):
            self._keep_apart(given)
        self._tapped, drawn = False, self._random_state()
        output = self._run(forward, *args, **kwargs)
        returned = [tensor for _, tensor in leaves(output)]
        size = sum(tensor.nbytes for tensor in returned)
        # Skipping a call that draws would change later draws. In-place writes to inference tensors cannot be detected.
        known = not self._tapped and size <= self._free_bytes and drawn == self._random_state()
        if known and not any(tensor.is_inference() or storage(tensor) in given for tensor in returned):
            self._free_bytes -= size
            versions = [(tensor, tensor._version) for tensor in returned]
            self.calls.append(_Call(module, fresh(output), versions, Snapshot(module.modules()).note(), known=True))
        else:
            self.calls.append(_Call(module, None, [], None, known=False))
        return output

    def _replay(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside or self.finished >= self._skipped:
            return forward(*args, **kwargs)
        call = self.calls[self.finished]
        if call.module is not module:
            raise StrategyError(f"{type(module).__name__} was called instead of {type(call.module).__name__}")
        if not call.known:
            return self._run(forward, *args, **kwargs)
        self.finished += 1
        return _copy(call.output) if call.copied else fresh(call.output)

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inside = True
        try:
            return forward(*args, **kwargs)
        finally:
            self._inside = False
            self.finished += 1

    def _keep_apart(self, written: Collection[int]) -> None:
        """Copy the stored outputs that a module may modify in place. `written` contains the storages of its inputs."""
        for call in self.calls:
            if call.known and any(storage(tensor) in written for tensor, _ in call.versions):
                call.output, call.copied, call.known, call.versions = _copy(call.output), True, call.unwritten, []

    def _random_state(self) -> tuple[Any, ...]:
        """Return the states of all random number generators that the model may use."""
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]
        others = pickle.dumps((random.getstate(), np.random.get_state()))
        return *(state.numpy().tobytes() for state in states), others, *self._snapshot.generator_states()

    def _on_size(self, size: int) -> None:
        self._sizes[self.finished] = max(size, self._sizes.get(self.finished, 0))

    def _on_tap(self, name: str, tensor: Tensor) -> None:
        self._tapped |= name in self._taps


class _Sizes(TorchFunctionMode):
    """Report the size in bytes of each tensor that a torch function returns, except views of its arguments."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {storage(tensor) for _, tensor in leaves((args, kwargs))}
        for _, tensor in leaves(output):
            if storage(tensor) not in given:
                self._report(tensor.nbytes)
        self._report(_scores(func.__name__, args, kwargs or {}))
        return output


def _scores(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the size in bytes of the attention scores that vmap, but not the loop, stores on a CPU.

    For functions other than attention, return 0.
    """
    named = {**dict(zip(_OF_ATTENTION, args, strict=False)), **kwargs}
    if function == "scaled_dot_product_attention" and named["query"].is_cpu:
        keys: int = named["key"].shape[-2]
    elif function == "multi_head_attention_forward":
        keys = named["key"].shape[0] * named["num_heads"]
    else:
        return 0
    return int(named["query"].nbytes // max(1, named["query"].shape[-1]) * keys)


_OF_ATTENTION = ("query", "key", "value", "embed_dim_to_check", "num_heads")


def fresh(tree: Any) -> Any:
    """Copy the containers in an output, but not the tensors inside them."""
    if type(tree) is list:
        return [*map(fresh, tree)]
    if isinstance(tree, tuple):
        parts = [*map(fresh, tree)]
        if all(part is before for part, before in zip(parts, tree, strict=True)):
            return tree
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if is_tensordict(tree):
        return shallow_copy(tree)  # copies nested TensorDicts too
    if isinstance(tree, MutableMapping):
        copied: Any = shallow_copy(tree)
        for key, value in tree.items():
            copied[key] = fresh(value)
        return copied
    if names := field_names(tree):
        tree = copy.copy(tree)
        for name in names:
            object.__setattr__(tree, name, fresh(getattr(tree, name)))
    return tree


def _copy(output: Any) -> Any:
    """Return an output with a copy of each tensor."""
    for path, tensor in [*leaves(output)]:
        output = replace(output, path, tensor.clone())
    return output


@contextmanager
def _wrapped(modules: Iterable[nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """Inside this context, call `around(module, forward, ...)` instead of each module's `forward(...)`."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(WrappedMethod(module, "forward", partial(around, module)))
        yield
