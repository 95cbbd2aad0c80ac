"""Many inputs of a model, cut into the batches of single forwards."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from torch import Tensor, nn

from .paths import Item, Path, is_tensordict, leaves, replace, with_rows

Inputs: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"


def batches(
    inputs: Inputs | Iterable[Inputs], batch_size: int, shared: Mapping[Path, int] | None = None
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Yield the arguments and the keywords of each forward.

    Args:
        inputs: All inputs at once, cut along the first axis of every tensor: a tensor or a TensorDict, a tuple of the
            model's arguments, or a mapping of its keywords. Any other iterable holds batches of these kinds, which stay
            whole.
        batch_size: How many inputs go into one forward, where they are cut.
        shared: The length of tensors that all inputs have in common, which are not cut, by their path from the
            arguments or the keywords on.
    """
    whole = isinstance(inputs, (Tensor, tuple, Mapping))
    for batch in _cut(inputs, batch_size, shared or {}) if whole else inputs:
        if isinstance(batch, Mapping) and not is_tensordict(batch):
            yield (), batch
        else:
            yield batch if isinstance(batch, tuple) else (batch,), {}


def first_batch(inputs: Inputs | Iterable[Inputs], batch_size: int) -> tuple[list[Inputs], Inputs | Iterable[Inputs]]:
    """Return a list of the first batch, if there is one, and all inputs: an iterator yields each batch only once."""
    if isinstance(inputs, (Tensor, tuple, Mapping)):
        return [*itertools.islice(_cut(inputs, max(1, batch_size), {}), 1)], inputs
    rest = iter(inputs)
    first = [*itertools.islice(rest, 1)]
    return first, itertools.chain(first, rest)


def input_count(inputs: Inputs) -> int:
    """Return the length of the first axis of the first tensor that has axes."""
    return next((len(tensor) for _, tensor in with_rows(inputs)), 0)


def _cut(inputs: Any, batch_size: int, shared: Mapping[Path, int]) -> Iterator[Any]:
    """Cut every tensor with one entry per input; what else there is goes into every forward."""
    count = input_count(inputs)
    single = isinstance(inputs, Tensor) or is_tensordict(inputs)
    for start in range(0, count, batch_size):
        batch = inputs
        for path, tensor in with_rows(inputs):
            if len(tensor) == count != shared.get((Item(0), *path) if single else path):
                batch = replace(batch, path, tensor[start : start + batch_size])
        yield batch


def copied_inputs(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of a model's arguments and keywords, which it may write into."""
    args, kwargs = inputs, dict(keywords)
    for path, tensor in [*leaves((args, kwargs))]:
        args, kwargs = replace((args, kwargs), path, tensor.clone())
    tensors = [tensor for _, tensor in leaves((args, kwargs))]
    return _copied_arguments(args, tensors), _copied_arguments(kwargs, tensors)


def _copied_arguments(arguments: Any, tensors: Iterable[Tensor]) -> Any:
    """Copy what a model may write into, such as a cache of keys; tensors are copies already."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    if isinstance(arguments, dict):
        return {name: _copied_one(argument, memo) for name, argument in arguments.items()}
    return tuple(_copied_one(argument, memo) for argument in arguments)


def _copied_one(argument: Any, memo: dict[int, Any]) -> Any:
    if isinstance(argument, nn.Module):  # it may be a part of the model
        return argument
    with suppress(Exception):  # locks, generators and tensors inside a graph cannot be copied
        return copy.deepcopy(argument, memo)
    return argument
