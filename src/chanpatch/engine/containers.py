"""Mutable containers (dicts, lists, dataclasses) that a module shares with its caller.

If a tensor in such a container is patched as an input, the module receives a copy of the container, so the caller would
not see the module's writes to the container. Such writes raise an error.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Iterable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..errors import UnsupportedModelError
from .paths import Attr, Item, _children, get, is_tensordict, replace


def written_into(before: Any, after: Any, given: Any, users: Container[int]) -> Any:
    """Return a module's patched output, in which containers that the module received as arguments are not copied.

    Patched tensors are written into these containers, so that the caller sees the patched tensors. `before` is the
    unpatched output, `after` is the patched output, in which containers are copies, `given` contains the module's
    arguments, and `users` contains the ids of the objects that the user passed to the model. If the user passed both a
    container and the tensor to be replaced, the container is still copied, because the user may reuse the container.
    """
    shared = {id(container) for container in containers(given)}
    return _written_into(before, after, shared, users) if shared else after


def _written_into(before: Any, after: Any, shared: Container[int], users: Container[int]) -> Any:
    if before is after or isinstance(after, Tensor):
        return after
    changed = [
        (step, old, _written_into(old, new, shared, users))
        for (step, old), (_, new) in zip(_children(before), _children(after), strict=True)
        if old is not new
    ]
    users_own = id(before) in users and any(id(old) in users for _, old, new in changed if new is not old)
    if id(before) in shared and not users_own:
        for step, _, new in changed:
            _put(before, step, new)
        return before
    for step, _, new in changed:
        after = replace(after, (step,), new)
    return after


def copied_containers(before: Any, after: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (original, copy) for each mutable container in `before` whose counterpart in `after` is a copy.

    `before` contains the original inputs, and `after` the patched inputs.
    """
    if before is after or isinstance(before, Tensor):
        return
    if _is_mutable(before):
        yield before, after
    for (_, old), (_, new) in zip(_children(before), _children(after), strict=True):
        yield from copied_containers(old, new)


def with_copies(arguments: Any, copied: Sequence[tuple[Any, Any]]) -> Any:
    """Return the pair `arguments`, which is (args, kwargs), with containers replaced by their copies.

    `copied` contains pairs (original, copy). A container nested inside an argument is not replaced.
    """
    copies = {id(own): copy for own, copy in copied}
    args, kwargs = arguments
    changed = {key: copies.get(id(argument), argument) for key, argument in kwargs.items()}
    return tuple(copies.get(id(argument), argument) for argument in args), changed


def contents(container: Any) -> list[Any]:
    """List a container's entries, followed by the values of the container's attributes."""
    attributes = () if is_tensordict(container) else getattr(container, "__dict__", {}).values()
    return [*(child for _, child in _children(container)), *attributes]


def holds(container: Any, before: list[Any]) -> bool:
    """Return whether a container still has exactly the entries and attribute values in `before`."""
    now = contents(container)
    return len(now) == len(before) and all(map(operator.is_, now, before))


def containers(tree: Any) -> Iterator[Any]:
    """Yield all mutable containers at any depth of an input or output, including the outermost container."""
    if isinstance(tree, Tensor):
        return
    if _is_mutable(tree):
        yield tree
    for _, child in _children(tree):
        yield from containers(child)


def _is_mutable(tree: Any) -> bool:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return isinstance(tree, dict) or not type(tree).__dataclass_params__.frozen  # type: ignore[attr-defined]
    if isinstance(tree, (dict, list)):
        return True
    # A lazy stack of TensorDicts creates new items on each access, so writes cannot be detected.
    items_stay = isinstance(tree, MutableMapping) and all(map(operator.is_, tree.values(), tree.values()))
    return items_stay and not getattr(tree, "is_locked", False)


def _put(container: Any, step: Item | Attr, child: Any) -> None:
    if isinstance(step, Attr):
        setattr(container, step.name, child)
    else:
        container[step.key] = child


def patched_tensors(places: Iterable[Any], output: Any) -> list[tuple[Any, Tensor, int | None]]:
    """Return (place, tensor, version) for each given place. The version counts the in-place writes to the tensor."""
    return [(place, tensor, _version(tensor)) for place in places if (tensor := get(output, place.path)) is not None]


def refuse_replaced(patched: Iterable[tuple[Any, Tensor, int | None]], output: Any, others: Iterable[object]) -> None:
    """Raise UnsupportedModelError if a patched tensor in an output was replaced or modified in place.

    `patched` is the result of `patched_tensors`. `others` are the hooks that may have done this, for the error message.
    """
    for place, tensor, version in patched:
        with suppress(LookupError, AttributeError, TypeError):
            if get(output, place.path) is tensor and _version(tensor) == version:
                continue
        names = ", ".join(str(getattr(hook, "__qualname__", hook)) for hook in others)
        raise UnsupportedModelError(
            f"A forward hook ({names}) replaced or modified the patched tensor at '{place.name}'. Remove the hook "
            "while the patch is active, or patch the input of the next module instead."
        )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # torch does not count writes in inference mode
