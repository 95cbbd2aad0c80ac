"""The prefix: the module calls before the patches. These calls run once; later forward passes reuse their outputs."""

from __future__ import annotations

import copy
import math
import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from ..engine.calls import Observed, WrappedMethod
from ..engine.paths import Path, field_names, is_tensordict, leaves, replace, shallow_copy, storage
from ..engine.state import Snapshot, random_states
from ..registry.points import HookPoints


class StrategyError(Exception):
    """Raised when a fast strategy does not work for the model or the patches."""


@contextmanager
def refused(*, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Convert all errors raised inside this context to StrategyError, except errors of the types in `but`."""
    try:
        yield
    except Exception as fault:
        if isinstance(fault, (*but, StrategyError)):
            raise
        raise StrategyError(str(fault).partition("\n")[0] or type(fault).__name__) from fault


@dataclass
class Call:
    """One module call in the forward pass that a Prefix remembers."""

    module: nn.Module
    number: int  # index of the call among all calls to the module
    output: Any  # the value returned by forward(), before any hook changed it
    versions: list[tuple[Tensor, int]]  # each tensor in the output, with the tensor's version after the call
    left: Snapshot | None  # the state of the module after the call; None if the call did not change the state
    known: bool  # whether later forward passes may reuse the output instead of running the call
    copied: bool = False  # whether to copy the output for each pass, because a module modifies it in place

    @property
    def unwritten(self) -> bool:
        """Whether the output's tensors have not been modified in place since the call."""
        return all(tensor._version == version for tensor, version in self.versions)


class Use(NamedTuple):
    """A torch function, or the end of a module call, in the forward pass that a Prefix remembers."""

    call: int  # index of the module call in which the function ran, or of the call that ended; -1 if in no call
    finished: int  # number of module calls that had finished
    given: set[int] | None  # addresses of the storages of the function's arguments; None at the end of a call
    made: set[int]  # addresses of the storages of the function's results


class Prefix:
    """The module calls in one forward pass, with the outputs that later forward passes reuse.

    The output of a module call is reused if no submodule of the module has hooks, the call neither draws random numbers
    nor modifies its arguments, and the output shares no memory with them. All other calls run in every forward pass. If
    a call is skipped, hooks on the called module still run, and receive the stored output. The user of this class must
    restore the model after each forward pass.
    """

    def __init__(self, points: HookPoints, snapshot: Snapshot) -> None:
        self._points, self._model, self._snapshot = points, points.model, snapshot
        self._taps: Collection[str] = ()
        self._free_bytes, self._draws = 0, False
        self.calls: list[Call] = []  # in the order in which the calls have finished
        # For each call to a torch function: number of module calls finished before, bytes, and arithmetic operations.
        self.steps: list[tuple[int, int, float]] = []
        self.uses: list[Use] = []
        # Addresses of storages that were read as `.data` or as an array, through which writes do not change versions.
        self.exposed: set[int] = set()
        self.last_read = 0  # number of steps recorded before the last torch function that read a tensor's values
        self._counts: Counter[nn.Module] = Counter()
        self._spread: Callable[[Call, Any], Any] | None = None
        self.inside = False  # whether a remembered or replayed call is running
        self._tapped = self._is_wrapped = False
        self.finished = self._skipped = 0  # in the current forward pass: number of finished calls, and of calls to skip

    def largest_after(self, number: int) -> int:
        """Return the size in bytes of the largest tensor computed after the first `number` module calls finished."""
        return int(self._largest[bisect_left(self._finished, number)])

    def work_after(self, step: int) -> tuple[int, float, float]:
        """Return (torch functions, arithmetic operations, bytes): totals over all torch functions from `step` onward.

        `step` is an index in `steps`.
        """
        return len(self.steps) - step, float(self._operations[step]), float(self._bytes[step])

    @contextmanager
    def remembered(
        self, taps: Collection[str], max_bytes: int, *, draws: bool = False, store: bool = True
    ) -> Iterator[None]:
        """Record the work of the forward pass that runs inside this context. If `store` is True, store module calls.

        The output of a module call is not stored if a tap in `taps` runs during the call, or if all stored outputs
        together would exceed `max_bytes`. `draws` must be True if the forward pass draws random numbers.
        """
        self._taps, self._free_bytes, self._draws = taps, max_bytes, draws
        self.finished, self.last_read = 0, 0
        for noted in (self.calls, self.steps, self.uses, self.exposed, self._counts):
            noted.clear()
        modules = dict.fromkeys(self._without_hooks_inside(self._model)) if store else ()
        with Observed((), on_tap=self._on_tap), _wrapped(modules, self._remember), _Watch(self):
            yield
        for call in self.calls:
            call.known &= call.unwritten
            if self.exposed:
                call.known &= self.exposed.isdisjoint(storage(tensor) for tensor, _ in call.versions)
        finished, sizes, operations = np.array([*self.steps, (0, 0, 0.0)]).T
        self._finished = [*finished[:-1]]
        self._largest, self._operations, self._bytes = (
            accumulate(each[::-1])[::-1]
            for accumulate, each in ((np.maximum.accumulate, sizes), (np.cumsum, operations), (np.cumsum, sizes))
        )

    @contextmanager
    def skipped(self, number: int, spread: Callable[[Call, Any], Any] | None = None) -> Iterator[None]:
        """In the forward pass that runs inside this context, skip the first `number` calls and reuse their outputs.

        If `spread` is given, it receives each skipped Call and the reused output, and returns the output to use.
        """
        self.finished, self.inside, self._skipped, self._spread = 0, False, number, spread
        for call in self.calls[:number]:
            if call.known and call.left:
                call.left.put_back()  # later modules may read attributes that a skipped module sets
        try:
            with self.wrapped(number):
                yield
        finally:
            self._skipped = 0
        if not all(call.unwritten for call in self.calls[:number] if call.known):
            raise StrategyError("a forward pass modified an earlier module's output in place")

    @contextmanager
    def wrapped(self, number: int) -> Iterator[None]:
        """Wrap the modules of the first `number` calls, once for all uses of `skipped` inside this context."""
        if self._is_wrapped:
            yield
            return
        self._is_wrapped = True
        try:
            with _wrapped({call.module for call in self.calls[:number]}, self._replay):
                yield
        finally:
            self._is_wrapped = False

    def read_after(self, number: int, output: Any) -> set[object]:
        """Find the tensors that are read or returned by a forward pass that skips the first `number` calls.

        `output` is the output of the remembered forward pass. The result contains (module, index of the call) for each
        skipped call whose output is read. For tensors that existed before the forward pass, such as the inputs, the
        result contains the addresses of their storages.
        """
        read: set[int] = {storage(tensor) for _, tensor in leaves(output)}
        calls = set[object]()
        for use in reversed(self.uses):
            is_skipped = 0 <= use.call < number and self.calls[use.call].known
            if is_skipped and use.given is None:
                if not read.isdisjoint(use.made):
                    calls.add((self.calls[use.call].module, self.calls[use.call].number))
                read -= use.made
            elif use.given is not None and not is_skipped:
                is_read = use.finished >= number or not read.isdisjoint(use.made)
                read -= use.made - use.given - {0}
                read |= use.given if is_read else set()
        return calls | read

    def _without_hooks_inside(self, module: nn.Module, name: str = "") -> Iterator[nn.Module]:
        """Yield the outermost modules that the traced method calls and whose submodules have no hooks."""
        hooked = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        inside = [each for each in module.modules() if each is not module]
        quiet = not (inside and hooked) and not any(each._forward_hooks or each._forward_pre_hooks for each in inside)
        if quiet and name in self._points.calls:
            yield module
        else:
            for part, child in module.named_children():
                yield from self._without_hooks_inside(child, f"{name}.{part}".lstrip("."))

    def _remember(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = self._counts[module]
        self._counts[module] += 1
        if self.inside:
            return forward(*args, **kwargs)
        parts = [*module.modules()]
        with torch._C.DisableTorchFunction():  # _Watch slows down each access to an attribute of a tensor
            before, given = _versions(args, kwargs)
        if any(getattr(part, "inplace", False) for part in parts):
            self._keep_apart(given)
        self._tapped, drawn = False, self._draws and self._random_state()
        state = Snapshot(parts)
        state.note() if self._snapshot.contents else state.note_bound()
        output = self._run(forward, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            returned = [*_tensors([output])]
            made, size = {*map(storage, returned)} - {0}, sum(tensor.nbytes for tensor in returned)
            self.uses.append(Use(len(self.calls), self.finished, None, made))
            known = not self._tapped and size <= self._free_bytes and _versions(args, kwargs)[0] == before
            # The call must not share memory with its arguments. Writes to inference tensors cannot be detected.
            known &= self.exposed.isdisjoint(given) and given.isdisjoint(made)
            known &= not any(tensor.is_inference() for tensor in returned)
            versions = [(tensor, tensor._version) for tensor in returned] if known else []
        if known and drawn == (self._draws and self._random_state()):  # skipping a call that draws changes later draws
            self._free_bytes -= size
            left = Snapshot(module.modules()).note() if state.changed() or state.rewritten() else None
            self.calls.append(Call(module, number, fresh(output), versions, left, known=True))
        else:
            self.calls.append(Call(module, number, None, [], None, known=False))
        return output

    def _replay(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.inside or self.finished >= self._skipped:
            return forward(*args, **kwargs)
        call = self.calls[self.finished]
        if call.module is not module:
            raise StrategyError(f"{type(module).__name__} was called when {type(call.module).__name__} was expected")
        if not call.known:
            return self._run(forward, *args, **kwargs)
        self.finished += 1
        output = _copy(call.output) if call.copied else fresh(call.output)
        return output if self._spread is None else self._spread(call, output)

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.inside = True
        try:
            return forward(*args, **kwargs)
        finally:
            self.inside = False
            self.finished += 1

    def _keep_apart(self, written: Collection[int]) -> None:
        """Copy those stored outputs that a module may modify in place.

        `written` contains the addresses of the storages of the module's inputs.
        """
        for call in self.calls:
            if call.known and any(storage(tensor) in written for tensor, _ in call.versions):
                call.output, call.copied, call.known, call.versions = _copy(call.output), True, call.unwritten, []

    def _random_state(self) -> list[object]:
        """Return the states of all random number generators that the model may use."""
        cuda = {tensor.device for tensor in [*self._model.parameters(), *self._model.buffers()] if tensor.is_cuda}
        return [*random_states(cuda), *self._snapshot.generator_states()]

    def _on_tap(self, name: str, tensor: Tensor) -> None:
        self._tapped |= name in self._taps


class _Watch(TorchFunctionMode):
    """Record, in a Prefix, each torch function's output size and arithmetic, and which function last read values."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self._prefix = prefix

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, name, prefix = func(*args, **(kwargs or {})), func.__name__, self._prefix
        if name in ("numpy", "__array__") or getattr(func, "__self__", None) is Tensor.data:
            prefix.exposed.add(storage(args[0]))
        if name == "__get__" or ((ours := _caller(1).startswith(_OURS)) and name != "clone"):  # the inputs are clones
            return output
        tensors = [*_tensors(args), *_tensors(kwargs.values())] if kwargs else [*_tensors(args)]
        given = {storage(tensor) for tensor in tensors}
        returned = [*_tensors(tensors[:1] if name == "__setitem__" else [output])]
        made = [*map(storage, returned)]
        prefix.uses.append(Use(prefix.finished if prefix.inside else -1, prefix.finished, given, {*made}))
        if ours:
            return output
        always_reads, multiplies = _kind(name)
        if (always_reads or _reads_by(name, args, kwargs or {})) and not _caller(1).startswith(
            "torch.distributions"
        ):  # these reads only check arguments
            prefix.last_read = len(prefix.steps)
        if not returned:
            return output
        sizes = [tensor.nbytes for tensor, address in zip(returned, made, strict=True) if address not in given]
        size = max([*sizes, _scores(name, args, kwargs or {})])
        count = 0.0
        if multiplies and isinstance(output, Tensor):  # exact for matrices with shapes (m, k) and (k, n)
            count = 2 * math.sqrt(math.prod(max(1, each.numel()) for each in (*tensors[:2], output)))
            count *= math.sqrt(math.prod(tensors[1].shape[2:])) if "conv" in name else 1.0
        prefix.steps.append((prefix.finished, size, count))
        return output


_OURS = __name__.partition(".")[0]
_MULTIPLIES = re.compile("linear|matmul|mm|conv|einsum|attention|bilinear")
_READS = re.compile(
    "__(bool|int|float|index|complex|contains|array)__|item|tolist|numpy|equal|allclose|is_nonzero|nonzero|argwhere"
    "|unique|unique_consecutive|masked_select|bincount"
)


def _tensors(each: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the given arguments or outputs of a torch function, also inside tuples and lists."""
    for one in each:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (tuple, list)):
            yield from _tensors(one)


@cache
def _kind(name: str) -> tuple[bool, bool]:
    """Return whether a torch function always reads a tensor's values, and whether the function multiplies matrices."""
    return bool(_READS.fullmatch(name)), bool(_MULTIPLIES.search(name))


def _reads_by(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the arguments make a torch function return a tensor whose shape depends on a tensor's values."""
    masks = name == "__getitem__" and any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1:]))
    counts = name in ("repeat_interleave", "topk") and len([*_tensors((*args, *kwargs.values()))]) > 1
    return masks or counts or (name in ("where", "one_hot") and len(args) + len(kwargs) == 1)


def _caller(depth: int) -> str:
    return str(sys._getframe(depth + 1).f_globals.get("__name__", ""))


def _scores(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the size in bytes of the attention scores, which on a CPU are stored under vmap but not in the loop.

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
    """Return an output with copies of all containers. The tensors inside the containers are not copied."""
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


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[tuple[Path, int, int]], set[int]]:
    """Return path, id and version of each tensor in a module's arguments, and the addresses of their storages."""
    given = [*leaves(args), *(leaves(kwargs) if kwargs else ())]
    versions = [(path, id(each), -1 if each.is_inference() else each._version) for path, each in given]
    return versions, {storage(each) for _, each in given} - {0}


def _copy(output: Any) -> Any:
    """Return an output with a copy of each tensor."""
    for path, tensor in [*leaves(output)]:
        output = replace(output, path, tensor.clone())
    return output


@contextmanager
def _wrapped(modules: Iterable[nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """Inside this context, calls to each module's `forward(...)` run `around(module, forward, ...)` instead."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(WrappedMethod(module, "forward", partial(around, module)))
        yield
