"""Forwards of chanpatch's own, of which nothing is left on the model."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules import batchnorm, dropout

from ..errors import UnsupportedModelError
from .attributes import Attributes, refill, same, storage, write_back
from .hooks import is_ours
from .paths import leaves, replace


def training_modules(model: nn.Module) -> list[str]:
    """Return the modules in training mode whose output is drawn at random, or depends on the batch or on what ran."""
    found = []
    for name, module in model.named_modules():
        drawn = isinstance(module, dropout._DropoutNd) and module.p > 0
        drawn |= isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0
        if module.training and (drawn or isinstance(module, (batchnorm._BatchNorm, nn.RReLU))):
            found.append(f"'{name}' ({type(module).__name__})")
    return found


_Each = TypeVar("_Each")


class undisturbed:
    """Runs forwards of chanpatch's own so that nothing is left of them: no gradient, RNG, buffer, attribute or flag.

    It may be entered again and again, but not inside itself; `put_back` parts one forward from the next inside it.

    Raises:
        UnsupportedModelError: At the end, if a forward built a submodule or a parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [*model.modules()]
        own = [each for module in self._modules for each in (module._parameters, module._buffers) if each]
        devices = {tensor.device for each in own for tensor in each.values() if tensor is not None}
        self._cuda = [device for device in devices if device.type == "cuda"]
        self._no_grad = torch.no_grad()
        self._registered = _Registered(self._modules)
        self.attributes = Attributes(self._modules)

    def __enter__(self) -> undisturbed:
        self._training = [module.training for module in self._modules]
        self._registered.note()
        buffers = (buffer for module in self._modules for buffer in module._buffers.values())
        self._values = [(buffer, buffer.detach().clone()) for buffer in buffers if buffer is not None]
        self.attributes.note()
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._on_cuda = [torch.cuda.get_rng_state(device) for device in self._cuda]
        self._no_grad.__enter__()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._no_grad.__exit__(None, None, None)
        try:
            self.put_back()
        except UnsupportedModelError:
            if kind is None:
                raise

    def put_back(self) -> None:
        """Leave everything as it was at the entry."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for device, state in zip(self._cuda, self._on_cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        self.attributes.put_back_generators()
        self.put_back_state()

    def put_back_state(self) -> None:
        """Leave the model as it was at the entry, but let random draws go on."""
        for module, training in zip(self._modules, self._training, strict=True):
            if module.training is not training:
                module.training = training
        for buffer, value in self._values:
            write_back(buffer, value)
        built = self._registered.put_back()
        self.attributes.put_back()
        if built:
            raise UnsupportedModelError(
                f"{built[0]} is built in the forward, so that it is no part of the model yet, and would be another one "
                "in each forward. Run the model once before you give it to chanpatch."
            )

    def apart(self, forwards: Iterable[_Each]) -> Iterator[_Each]:
        """Yield what forwards over several batches give, each of which begins with the model as it was."""
        for each in forwards:
            self.put_back_state()
            yield each

    def kept(self, output: Any) -> Any:
        """Return an output in which nothing changes when the model's state is put back under it."""
        written = {storage(buffer) for buffer, _ in self._values} | self.attributes.storages()
        for path, tensor in [*leaves(output)]:
            if storage(tensor) in written - {0}:
                output = replace(output, path, tensor.clone())
        return output


class _Registered:
    """What is registered with modules: buffers, submodules, parameters and hooks.

    Of parameters only the names count: libraries that shard or offload a model exchange them in a forward.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owns = [(module, vars(module)) for module in modules]

    def note(self) -> None:
        """Note what is there now."""
        self._noted = [{name: dict(own[name]) for name in _REGISTRIES if own[name]} for _, own in self._owns]
        self._names, self._values = self._flat()

    def put_back(self) -> list[str]:
        """Leave all as it was then, but for hooks of ours; return the new submodules and parameters."""
        names, values = self._flat()
        if names == self._names and all(map(operator.is_, values, self._values)):
            return []
        built = []
        for (module, own), noted in zip(self._owns, self._noted, strict=True):
            for name in _REGISTRIES:
                now, before = own[name], noted.get(name, {})
                if name in _BUILT:
                    new = [key for key, value in now.items() if value is not None and before.get(key) is None]
                    built += [f"'{key}' of {type(module).__name__}" for key in new]
                after = _after(name, now, before)
                if not same(now, after):
                    refill(now, after)
        return built

    def _flat(self) -> tuple[list[Any], list[Any]]:
        registries = [own[name] for _, own in self._owns for name in _REGISTRIES]
        bound = [own[name] for _, own in self._owns for name in _BOUND]
        return [*_chained(registries)], [*_chained(map(dict.values, bound))]


def _after(name: str, now: Mapping[Any, Any], before: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return what a registry holds once it is put back."""
    if name in _FLAGS:  # of hooks, by number: those of hooks that are gone say nothing
        return {**now, **before}
    if name == "_parameters":
        return {key: None if value is None else now.get(key, value) for key, value in before.items()}
    kept = {key: value for key, value in before.items() if key in now or not is_ours(value)}
    return kept | {key: value for key, value in now.items() if is_ours(value)}


_chained = itertools.chain.from_iterable


_BOUND = ("_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")  # those that stand for the very same again


_BUILT = ("_modules", "_parameters")


_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


_REGISTRIES = (*_BOUND, "_parameters", *_FLAGS)
