"""Inputs of a model: batches of single forwards, and copies."""

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
        inputs: A tensor or a TensorDict, a tuple of arguments, or a mapping of keywords, cut along the first axis of
            every tensor. Any other iterable yields batches of these kinds, which are not cut.
        batch_size: Number of inputs in one forward.
        shared: Lengths, by path in the arguments or the keywords, of tensors that all inputs share; these are not cut.
    """
    whole = isinstance(inputs, (Tensor, tuple, Mapping))
    for batch in _cut(inputs, batch_size, shared or {}) if whole else inputs:
        if isinstance(batch, Mapping) and not is_tensordict(batch):
            yield (), batch
        else:
            yield batch if isinstance(batch, tuple) else (batch,), {}


def first_batch(inputs: Inputs | Iterable[Inputs], batch_size: int) -> tuple[list[Inputs], Inputs | Iterable[Inputs]]:
    """Return a list of the first batch, if there is one, and all inputs, because iterators yield a batch only once."""
    if isinstance(inputs, (Tensor, tuple, Mapping)):
        return [*itertools.islice(_cut(inputs, max(1, batch_size), {}), 1)], inputs
    rest = iter(inputs)
    first = [*itertools.islice(rest, 1)]
    return first, itertools.chain(first, rest)


def input_count(inputs: Inputs) -> int:
    """Return the length of the first axis of the first tensor that has axes."""
    return next((len(tensor) for _, tensor in with_rows(inputs)), 0)


def _cut(inputs: Any, batch_size: int, shared: Mapping[Path, int]) -> Iterator[Any]:
    """Cut every tensor with one entry per input; anything else goes into every forward."""
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
    copies: Any = (inputs, dict(keywords))
    for path, tensor in [*leaves(copies)]:
        copies = replace(copies, path, tensor.clone())
    memo: dict[int, Any] = {id(tensor): tensor for _, tensor in leaves(copies)}
    args, kwargs = copies
    return tuple(_copied(each, memo) for each in args), {name: _copied(each, memo) for name, each in kwargs.items()}


def _copied(argument: Any, memo: dict[int, Any]) -> Any:
    """Copy an argument, such as a cache of keys, without the tensors in the memo."""
    if not isinstance(argument, nn.Module):  # it may be a part of the model
        with suppress(Exception):  # locks, generators and tensors inside a graph cannot be copied
            return copy.deepcopy(argument, memo)
    return argument
