"""What modules keep as attributes, where one forward may leave something that the next one reads."""

from __future__ import annotations

import itertools
import operator
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_TORCH = frozenset(vars(nn.Module()))  # parameters, hooks and the like


class Attributes:
    """The attributes of all modules of a model when `note` was called, and what containers, arrays and tensors hold.

    Dataclasses and namespaces are containers too; other objects may reach anywhere, and are left alone. Weights are
    left out: a forward does not change them, and copies of them would be large.

    Args:
        model: The model, or some of its modules.
    """

    def __init__(self, model: nn.Module | Iterable[nn.Module]) -> None:
        modules = model.modules() if isinstance(model, nn.Module) else model
        self._owns = [vars(module) for module in modules]
        self._names: list[str] = []
        self._values: list[Any] = []
        self._held: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._generators: list[tuple[Any, Any]] = []

    def note(self) -> Attributes:
        """Note what is there now; where that is plain and what it was, as in most models, nothing is copied again."""
        arrays = any(isinstance(held, np.ndarray) for held, _ in self._held)
        in_place = arrays or self._tensors or self._slots or self._generators
        if in_place or not (self._bound_as_noted() and all(itertools.starmap(same, self._held))):
            self._note_all()
        return self

    def storages(self) -> set[int]:
        """Return where the tensors and arrays lie whose content is put back."""
        arrays = {int(held.ctypes.data) for held, _ in self._held if isinstance(held, np.ndarray)}
        return arrays | {storage(tensor) for tensor, _ in self._tensors}

    def rebound(self) -> list[tuple[dict[str, Any], str]]:
        """Return what stands for another object by now: the attributes of its module, and its name."""
        if self._bound_as_noted():
            return []
        return [
            (own, name)
            for own, kept in zip(self._owns, self._kept, strict=True)
            for name, value in _kept(own).items()
            if name not in kept or kept[name] is not value
        ]

    def put_back(self) -> None:
        """Leave everything as it was at that moment, but for the generators."""
        if not self._bound_as_noted():
            for own, kept in zip(self._owns, self._kept, strict=True):
                for name in _kept(own).keys() - kept.keys():
                    del own[name]
                own.update(kept)
            self._note_bound()  # what else differs, such as a wrapped forward, may do so for long
        for container, content in self._held:
            if not same(container, content):
                refill(container, content)
        for instance, slot, value in self._slots:
            if getattr(instance, slot, None) is not value:
                object.__setattr__(instance, slot, value)  # a frozen dataclass refuses the plain assignment
        for tensor, value in self._tensors:
            write_back(tensor, value)

    def put_back_generators(self) -> None:
        """Leave the generators of the model's own as they were at that moment."""
        for generator, state in self._generators:
            _set_state(generator, state)

    def generator_states(self) -> list[str]:
        """Return the states that the generators of the model's own have by now, for comparison."""
        states = [_state(generator) for generator, _ in self._generators]
        return [str(state.tolist()) if isinstance(state, Tensor) else repr(state) for state in states]

    def _note_all(self) -> None:
        self._note_bound()
        self._kept = [_kept(own) for own in self._owns]
        self._held, self._slots, self._tensors, self._generators = [], [], [], []
        self._noted: set[int] = set()
        for kept in self._kept:
            self._note(kept.values())

    def _note_bound(self) -> None:
        self._names, self._values = [*_chained(self._owns)], [*_chained(map(dict.values, self._owns))]

    def _bound_as_noted(self) -> bool:
        """Tell whether every name of every module, torch's own too, still stands for the same object."""
        values = _chained(map(dict.values, self._owns))
        return [*_chained(self._owns)] == self._names and all(map(operator.is_, values, self._values))

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, _PLAIN) or id(value) in self._noted:
                continue
            self._noted.add(id(value))
            if isinstance(value, (list, dict, set, deque, bytearray, np.ndarray)):
                self._held.append((value, value.copy()))
            elif isinstance(value, Tensor):
                if _may_be_written(value):
                    self._tensors.append((value, value.detach().clone()))
            elif isinstance(value, _GENERATORS):
                self._generators.append((value, _state(value)))
            if isinstance(value, (list, tuple, deque, dict)):
                self._note([*value.values()] if isinstance(value, dict) else value)
            elif is_dataclass(value) or isinstance(value, SimpleNamespace):
                slots = [(slot, getattr(value, slot)) for slot in _slots(type(value)) if hasattr(value, slot)]
                self._slots += [(value, slot, held) for slot, held in slots]
                self._note([getattr(value, "__dict__", None), *(held for _, held in slots)])


_chained = itertools.chain.from_iterable


_PLAIN = (int, float, str, bytes, type(None))


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _slots(kind: type) -> Iterator[str]:
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())
        for slot in {slots} if isinstance(slots, str) else {*slots} - {"__dict__", "__weakref__"}:
            private = slot.startswith("__") and not slot.endswith("__")
            yield f"_{each.__name__.lstrip('_')}{slot}" if private else slot


def write_back(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor its content back; a needless write would invalidate graphs that hold it."""
    if tensor.is_meta or tensor.is_nested or _equal(tensor, value):
        return
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # others may not write into such a tensor
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)
        tensor.copy_(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(one, other)


def storage(tensor: Tensor) -> int:
    """Return where a tensor's numbers lie; 0 where that cannot be told."""
    if tensor.layout == torch.strided and not tensor.is_meta:
        with suppress(RuntimeError):  # a tensor that is made of others has no storage of its own
            return tensor.untyped_storage().data_ptr()
    return 0


def _may_be_written(tensor: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False  # it was left by a transform that has ended, and cannot be read
    weight = isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
    return not weight and tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested)


def same(container: Any, content: Any) -> bool:
    """Tell whether a container holds the very objects of a copy, in its order; of arrays it is not worth a look."""
    if isinstance(container, np.ndarray) or len(container) != len(content):
        return False
    if isinstance(container, set):
        return bool(container == content)
    if isinstance(container, dict) and not all(map(operator.is_, container.values(), content.values())):
        return False
    return all(map(operator.is_, container, content))


def refill(container: Any, content: Any) -> None:
    """Give a container its content back."""
    if isinstance(container, np.ndarray):
        if container.flags.writeable:
            container[...] = content
        return
    container.clear()
    container.update(content) if isinstance(container, (dict, set)) else container.extend(content)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _kept(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module that are the user's own, but functions: those that run may be wrapped."""
    return {name: own[name] for name in own.keys() - _OF_TORCH if not callable(own[name])}
