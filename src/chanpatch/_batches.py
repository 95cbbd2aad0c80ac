"""Many inputs of a model, cut into the batches of single forwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from . import _tree

Inputs: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"


def batches(
    inputs: Inputs | Iterable[Inputs], batch_size: int, shared: Mapping[_tree.Path, int] | None = None
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
        if isinstance(batch, Mapping) and not _tree.is_tensordict(batch):
            yield (), batch
        else:
            yield batch if isinstance(batch, tuple) else (batch,), {}


def input_count(inputs: Inputs) -> int:
    """Return the length of the first axis of the first tensor that has axes."""
    return next((len(tensor) for _, tensor in _tree.with_rows(inputs)), 0)


def _cut(inputs: Any, batch_size: int, shared: Mapping[_tree.Path, int]) -> Iterator[Any]:
    """Cut every tensor with one entry per input; what else there is goes into every forward."""
    count = input_count(inputs)
    single = isinstance(inputs, Tensor) or _tree.is_tensordict(inputs)
    for start in range(0, count, batch_size):
        batch = inputs
        for path, tensor in _tree.with_rows(inputs):
            if len(tensor) == count != shared.get((_tree.Item(0), *path) if single else path):
                batch = _tree.replace(batch, path, tensor[start : start + batch_size])
        yield batch
