"""Run the model without side effects.

After a forward pass, we restore random number generators, buffers, flags, hooks, attributes and removed parameters. We
also restore the contents of plain containers, arrays, tensors, dataclasses and generators that attributes refer to.
"""

from __future__ import annotations

import itertools
import operator
import random
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .hooks import is_ours
from .paths import leaves, replace, storage

_Each = TypeVar("_Each")
_ONE_AT_A_TIME = threading.RLock()


class undisturbed:
    """Context manager for chanpatch's own forward passes, which run without gradients or side effects.

    The context is reusable, but cannot be nested. Threads take turns, because random number generators are global.
    Exiting raises UnsupportedModelError if a forward pass created a submodule or a parameter.
    """

    _is_locked = _is_noted = _is_shared = False

    def __init__(self, model: nn.Module, *more: Any) -> None:
        # If CUDA is not initialized, no tensor is on a GPU, so the devices of the tensors need not be checked.
        on_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        tensors = itertools.chain(model.parameters(), model.buffers()) if on_gpu else ()
        self._cuda = list({tensor.device for tensor in tensors if tensor.is_cuda})
        self.snapshot = Snapshot(model.modules(), *more)

    def __enter__(self) -> undisturbed:
        if self._is_shared:
            return self
        self._is_locked, self._is_noted = True, False  # set before the lock is taken, in case of an interrupt
        try:
            _ONE_AT_A_TIME.acquire()
            self._note()
        except BaseException:
            self._leave()
            raise
        return self

    def _note(self) -> None:
        self.snapshot.note()
        self._states = random_states(self._cuda)
        self._gradients, self._caches = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
        self._is_noted = True
        torch.set_grad_enabled(False)
        torch.set_autocast_cache_enabled(False)  # cached weights would have no gradient

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            self.put_back() if self._is_shared else self._leave()
        except UnsupportedModelError:
            if kind is None:
                raise
        finally:
            if not self._is_shared:
                self._leave()  # has an effect only if an interrupt stopped the first call

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Save the state once, for several `with self:` blocks inside this context. Each block restores this state.

        No other code may run between the blocks.
        """
        with self:
            self._is_shared = True
            try:
                yield
            finally:
                self._is_shared = False

    def __del__(self) -> None:
        if self._is_locked:  # an interrupt arrived before `__exit__` began
            self.snapshot.keep_hooks()
            self._leave()

    def _leave(self) -> None:
        if not self._is_locked:
            return
        try:
            if self._is_noted:
                torch.set_grad_enabled(self._gradients)
                torch.set_autocast_cache_enabled(self._caches)
                self.put_back()
        except UnsupportedModelError:
            self._unlock()
            raise
        self._unlock()

    def _unlock(self) -> None:
        with suppress(RuntimeError):  # an interrupt arrived before the lock was taken, or after the release
            _ONE_AT_A_TIME.release()
        self._is_locked = False

    def put_back(self) -> None:
        """Restore the state that was saved when the context was entered."""
        set_random_states(self._states, self._cuda)
        self.snapshot.put_back_generators()
        self.snapshot.put_back()

    def random_states(self) -> list[object]:
        """Return the current states of all random number generators, for comparison."""
        return [*random_states(self._cuda), *self.snapshot.generator_states()]

    def has_drawn(self) -> bool:
        """Return whether random numbers have been drawn since the context was entered."""
        return random_states(self._cuda) != self._states or self.snapshot.has_drawn()

    def apart(self, forwards: Iterable[_Each]) -> Iterator[_Each]:
        """Yield the items in `forwards`, each of which stands for one forward pass.

        Before each item, restore the model, but not the random number generators.
        """
        for each in forwards:
            self.snapshot.put_back()
            yield each

    def kept(self, output: Any) -> Any:
        """Return the output with clones in place of those tensors that restoring the model would overwrite."""
        restored = {storage(tensor) for tensor in self.snapshot.tensors()} - {0}
        for path, tensor in [*leaves(output)] if restored else ():
            if storage(tensor) in restored:
                output = replace(output, path, tensor.clone())
        return output


def random_states(cuda: Iterable[torch.device | int] = ()) -> list[Any]:
    """Return the states of the global random number generators, to be compared or passed to `set_random_states`."""
    kind, words, *place = np.random.get_state(legacy=True)
    of_torch = [each.numpy().tobytes() for each in (torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda))]
    return [random.getstate(), (kind, np.asarray(words).tobytes(), *place), *of_torch]


def set_random_states(states: Iterable[Any], cuda: Iterable[torch.device | int]) -> None:
    """Set the states of the global random number generators to a result of `random_states` for the same GPUs."""
    of_python, (kind, words, *place), *others = states
    random.setstate(of_python)
    np.random.set_state((kind, np.frombuffer(words, np.uint32), *place))
    on_cpu, *on_cuda = (torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in others)
    torch.set_rng_state(on_cpu)
    for device, state in zip(cuda, on_cuda, strict=True):
        torch.cuda.set_rng_state(state, device)


class Snapshot:
    """Snapshot of modules and attribute dicts, taken by `note`. Objects with ids in `apart` are not restored.

    For parameters, only the names are saved, because libraries that shard or offload a model replace parameters.
    """

    def __init__(
        self, modules: Iterable[nn.Module], attributes: Iterable[dict[Any, Any]] = (), apart: Iterable[int] = ()
    ) -> None:
        self._owns = [(type(module).__name__, vars(module)) for module in modules]
        self._dicts = [own for _, own in self._owns] + [own[name] for _, own in self._owns for name in _REGISTRIES]
        self._dicts += attributes
        self._apart = {*apart}
        self._noted: list[dict[Any, Any]] = []
        self.contents: list[tuple[Any, Any]] = []  # containers, arrays and tensors, each with its saved contents

    def note(self) -> Snapshot:
        """Save the current state. If nothing has changed since the last call, save only the generators' states."""
        if not self._noted or self.changed() or self.rewritten():
            self._noted = [dict(each) for each in self._dicts]
            self._parts, self._weights = [_parts(own) for _, own in self._owns], self._parameters()
            self.note_bound()
            found = _reachable(self._dicts, self._apart)
            self._generators: list[Any] = [each for each in found if isinstance(each, GENERATORS)]
            self.contents = [(each, _content(each)) for each in found if not isinstance(each, GENERATORS)]
        self._states = [_state(each) for each in self._generators]
        return self

    def changed(self) -> bool:
        """Return whether an attribute, buffer, submodule or hook has been set or removed since `note` last ran."""
        return not self.is_in(self._keys, self._values)

    def rebound(self) -> list[tuple[dict[str, Any], str]]:
        """List the noncallable attributes set since `note` last ran, as pairs (attribute dict of the module, name)."""
        if not self.changed():
            return []
        return [
            (own, name)
            for (_, own), noted in zip(self._owns, self._noted, strict=False)
            for name, value in own.items()
            if name not in _OF_TORCH and not callable(value) and noted.get(name, noted) is not value
        ]

    def state(self) -> tuple[list[Any], list[Any]]:
        """Return the names and the values of all attributes, buffers, submodules and hooks."""
        return [*itertools.chain(*self._dicts)], [*itertools.chain(*map(dict.values, self._dicts))]

    def is_in(self, keys: list[Any], values: list[Any]) -> bool:
        """Return whether a call to `state` would now return the given names and the same objects as values."""
        now, new = itertools.chain(*self._dicts), itertools.chain(*map(dict.values, self._dicts))
        return [*now] == keys and all(map(operator.is_, new, values))

    def put_back(self) -> None:
        """Restore everything but generators. Raise UnsupportedModelError if a submodule or parameter has been added."""
        built, changed, weights = [], self.changed(), self._parameters()
        if changed or len(weights) != len(self._weights) or not all(map(operator.is_, weights, self._weights)):
            for (kind, own), parts in zip(self._owns, self._parts, strict=True):
                for name in _parts(own).keys() - parts.keys():
                    built.append(f"'{name}' in {kind}")
                    own["_parameters"].pop(name, None)
                if parts.keys() - _parts(own).keys():  # an error may leave a module without its parameters
                    held = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
                    _refill(own["_parameters"], held | own["_parameters"])
        if changed:
            for each, noted in zip(self._dicts, self._noted, strict=True):
                _put_back(each, noted)
            self.note_bound()  # a method that stays wrapped is not a change
        for held, content in self.contents:
            if not _same(held, content):
                _refill(held, content)
        if built:
            raise UnsupportedModelError(
                f"{built[0]} was created by this forward pass, and would be created again by each forward pass that "
                "chanpatch runs. Run the model once before you pass it to chanpatch."
            )

    def rewritten(self) -> list[Any]:
        """List the containers, arrays and tensors whose contents have changed since `note` last ran."""
        return [held for held, content in self.contents if not _same(held, content)]

    def keep_hooks(self) -> None:
        """Make `put_back` keep the current hooks, because contexts may have closed since `note` ran."""
        hooks = {id(own[name]) for _, own in self._owns for name in ("_forward_hooks", "_forward_pre_hooks")}
        pairs = zip(self._dicts, self._noted, strict=False)  # `note` may not have run yet
        self._noted = [dict(each) if id(each) in hooks else noted for each, noted in pairs]

    def put_back_generators(self) -> None:
        """Restore the random number generators in the model."""
        for generator, state in zip(self._generators, self._states, strict=True):
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            else:
                getattr(generator, "setstate" if isinstance(generator, random.Random) else "set_state")(state)

    def generator_states(self) -> list[str]:
        """Return the current states of the random number generators in the model, for comparison."""
        return [*map(generator_state, self._generators)]

    def has_drawn(self) -> bool:
        """Return whether a random number generator in the model has been used since `note` last ran."""
        return self.generator_states() != [*map(_shown, self._states)]

    def tensors(self) -> list[Tensor]:
        """Return the tensors and arrays that `put_back` overwrites in place."""
        arrays = [torch.from_numpy(held) for held, _ in self.contents if isinstance(held, np.ndarray) and held.size]
        return [*arrays, *(held for held, _ in self.contents if isinstance(held, Tensor))]

    def note_bound(self) -> None:
        """Save only the names and objects that `state` returns, so that `changed` can be called."""
        self._keys, self._values = self.state()

    def _parameters(self) -> list[Any]:
        return [*itertools.chain(*[own["_parameters"].values() for _, own in self._owns])]


_REGISTRIES = ("_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_OF_TORCH = frozenset(vars(nn.Module()))
CONTAINERS = (list, dict, set, deque, np.ndarray)
_PLAIN = (bool, int, float, str, bytes, type(None), nn.Module)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class GlobalVariable:
    """A global variable with the interface of a closure cell."""

    def __init__(self, variables: dict[str, Any], name: str) -> None:
        self._variables, self._name = variables, name

    @property
    def cell_contents(self) -> Any:
        """Value of the variable."""
        return self._variables[self._name]

    @cell_contents.setter
    def cell_contents(self, value: Any) -> None:
        self._variables[self._name] = value


_VARIABLES = (types.CellType, GlobalVariable)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def generator_state(generator: Any) -> str:
    """Return the current state of a random number generator as a string, for comparison."""
    return _shown(_state(generator))


def _shown(state: Any) -> str:
    return str(state.tolist()) if isinstance(state, Tensor) else repr(state)


def _parts(own: dict[str, Any]) -> dict[str, Any]:
    return {name: part for kind in ("_modules", "_parameters") for name, part in own[kind].items() if part is not None}


def _put_back(each: dict[Any, Any], noted: dict[Any, Any]) -> None:
    """Restore the dict `each` to its saved contents, `noted`, with two exceptions.

    In a dict of hooks, chanpatch's own hooks stay as they are. In a module's attribute dict, callables stay as they
    are, because chanpatch may have wrapped a method.
    """
    stays = callable if "_modules" in each else is_ours
    kept = {key: value for key, value in each.items() if stays(value)}
    wanted = {key: value for key, value in noted.items() if key in each or not stays(value)} | kept
    if not _same(each, wanted):
        _refill(each, wanted)


def _reachable(dicts: Iterable[dict[str, Any]], apart: set[int]) -> list[Any]:
    """List the objects in attribute dicts, at any depth, that a forward pass could modify. Skip ids in `apart`."""
    waiting = [value for each in dicts for name, value in each.items() if name not in _OF_TORCH]
    found: dict[int, Any] = {}
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in found or id(value) in apart:
            continue
        if isinstance(value, (*CONTAINERS, *_VARIABLES, *GENERATORS)) or may_be_written(value):
            found[id(value)] = value
        if isinstance(value, (list, tuple, deque, dict)):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
            waiting.append(getattr(value, "__dict__", None))
    return [*found.values()]


def may_be_written(tensor: Any) -> bool:
    """Return whether an object is a tensor that a forward pass could modify. The result is False for parameters."""
    if not isinstance(tensor, Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False  # tensors left over from a finished transform are unreadable
    weight = isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
    return not (weight or tensor.is_meta or tensor.is_nested)


def _content(held: Any) -> Any:
    if isinstance(held, _VARIABLES):
        return [held.cell_contents]
    return held.detach().clone() if isinstance(held, Tensor) else held.copy()


def _same(held: Any, content: Any) -> bool:
    """Return whether an object `held` still has the saved content `content`.

    Arrays and tensors are compared by value. Containers must contain the same objects in the same order.
    """
    if isinstance(held, Tensor):
        dense = [each if each.layout == torch.strided else each.to_dense() for each in (held, content)]
        return torch.equal(*dense)
    if isinstance(held, np.ndarray):
        return np.array_equal(held, content)
    if isinstance(held, _VARIABLES):
        return _content(held)[0] is content[0]
    if isinstance(held, set):
        return bool(held == content)
    if len(held) != len(content) or not all(map(operator.is_, held, content)):
        return False
    return not isinstance(held, dict) or all(map(operator.is_, held.values(), content.values()))


def _refill(held: Any, content: Any) -> None:
    if isinstance(held, Tensor):
        with torch.inference_mode(held.is_inference()), torch.no_grad():  # needed to modify inference tensors
            if held.shape != content.shape:
                held.resize_(content.shape)
            (held.data if held.layout == torch.strided else held).copy_(content)  # autograd ignores writes to `data`
    elif isinstance(held, np.ndarray):
        held[...] = content
    elif isinstance(held, _VARIABLES):
        (held.cell_contents,) = content
    else:
        held.clear()
        held.update(content) if isinstance(held, (dict, set)) else held.extend(content)
