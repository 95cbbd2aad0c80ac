"""Split and copy the inputs to a model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .paths import Item, Path, is_tensordict, leaves, replace, with_rows

Inputs: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"


def batches(
    inputs: Inputs | Iterable[Inputs], batch_size: int, shared: Mapping[Path, int] | None = None
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Yield the positional and keyword arguments for each forward pass.

    If `inputs` is a tensor, a TensorDict, a tuple of positional arguments or a mapping of keyword arguments, each
    tensor in `inputs` is split along the tensor's first axis. Tensors that all inputs share are not split; `shared`
    maps the path of each such tensor to the tensor's length. If `inputs` is any other iterable, each item is one batch.
    """
    for batch in _cut(inputs, batch_size, shared or {}) if _are_whole(inputs) else inputs:
        if isinstance(batch, Mapping) and not is_tensordict(batch):
            yield (), batch
        else:
            yield batch if isinstance(batch, tuple) else (batch,), {}


def first_batch(inputs: Inputs | Iterable[Inputs], batch_size: int) -> tuple[list[Inputs], Inputs | Iterable[Inputs]]:
    """Return a list with the first batch, and all inputs, including the first batch.

    The list is empty if there are no inputs. Use the returned inputs instead of the argument `inputs`, which may be an
    iterator whose first batch has been consumed.
    """
    if _are_whole(inputs):
        size = max(1, batch_size) if isinstance(batch_size, Integral) else 1  # callers check the batch size later
        return [*itertools.islice(_cut(inputs, size, {}), 1)], inputs
    rest = iter(inputs)
    first = [*itertools.islice(rest, 1)]
    return first, itertools.chain(first, rest)


def _are_whole(inputs: Any) -> bool:
    """Return whether inputs are to be split into batches, rather than an iterable of batches."""
    if isinstance(inputs, np.ndarray):
        raise TypeError("Inputs must be tensors; got a NumPy array. Pass torch.as_tensor(array).")
    return isinstance(inputs, (Tensor, tuple, Mapping))


def input_count(inputs: Inputs) -> int:
    """Return the number of inputs: the length of the first tensor that has axes, or 0 if there is no such tensor."""
    return next((len(tensor) for _, tensor in with_rows(inputs)), 0)


def _cut(inputs: Any, batch_size: int, shared: Mapping[Path, int]) -> Iterator[Any]:
    """Yield batches. Tensors that have one entry per input are split. Each batch contains all other arguments whole."""
    count = input_count(inputs)
    if 0 < count <= batch_size:  # sparse tensors cannot be split, for example
        yield inputs
        return
    single = isinstance(inputs, Tensor) or is_tensordict(inputs)
    for start in range(0, count, batch_size):
        batch = inputs
        for path, tensor in with_rows(inputs):
            if len(tensor) == count != shared.get((Item(0), *path) if single else path):
                batch = replace(batch, path, tensor[start : start + batch_size])
        yield batch


def copied_inputs(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of the positional and keyword arguments for a model, so that the model cannot modify the originals.

    The copies are returned as a pair (args, kwargs).
    """
    copies: Any = (inputs, dict(keywords))
    for path, tensor in [*leaves(copies)]:
        copies = replace(copies, path, tensor.clone())
    memo: dict[int, Any] = {id(tensor): tensor for _, tensor in leaves(copies)}
    args, kwargs = copies
    return tuple(_copied(each, memo) for each in args), {name: _copied(each, memo) for name, each in kwargs.items()}


def _copied(argument: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an argument, such as a key-value cache. Tensors with an id in `memo` are not copied again.

    If the argument is a module, or cannot be copied, return the argument itself.

    Raises:
        UnsupportedModelError: If the argument is a custom object that contains tensors that require gradients. The
            model may change such an object, for example by extending a key-value cache. Every later forward pass would
            then have different inputs.
    """
    if isinstance(argument, nn.Module):  # a module may be part of the model
        return argument
    try:
        return copy.deepcopy(argument, memo)
    except Exception as fault:  # locks and generators do not support copying
        if "deepcopy protocol" not in str(fault):
            return argument
    kind = type(argument).__name__
    raise UnsupportedModelError(
        f"An input of type {kind} contains tensors that require gradients, so the input cannot be copied for each "
        f"forward pass. Create the {kind} under torch.no_grad()."
    )
