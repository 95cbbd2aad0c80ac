"""Dicts, lists and dataclasses that a module takes and its caller goes on to use.

A patched input is a copy of its container, so the caller would miss later writes of the module. They are written back.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from .paths import Attr, Item, _children, field_names, replace


def written_into(before: Any, after: Any, given: Any, users: Container[int]) -> Any:
    """Return a patched output; containers that were also arguments are patched in place instead of copied.

    Args:
        before: The output.
        after: The patched output.
        given: The module's arguments.
        users: Ids of the user's own tensors and containers. Such a container is copied if such a tensor in it was
            replaced, because the user may pass it again.
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


class CopiedContainer:
    """A caller's `own` container, and the `copy` that a module takes and writes into."""

    def __init__(self, own: Any, copy: Any) -> None:
        self.own, self.copy = own, copy
        items = zip(_children(own), _children(copy), strict=True)
        self._replaced = {step: (new, old) for (step, old), (_, new) in items if new is not old}
        for name, value in _beside_fields(own).items():
            vars(copy).setdefault(name, value)
        self._beside = _beside_fields(copy)

    def write_back(self) -> None:
        """Write the module's changes into the caller's container, but not the patches."""
        wanted = dict(_children(self.copy))
        for step, (new, old) in self._replaced.items():
            if wanted.get(step) is new:
                wanted[step] = old
        if isinstance(self.own, list):
            self.own[:] = wanted.values()
        else:
            present = dict(_children(self.own))
            for step in present.keys() - wanted.keys():
                if isinstance(step, Item):  # a dataclass keeps its fields
                    del self.own[step.key]
            for step, child in wanted.items():
                if step not in present or present[step] is not child:
                    _put(self.own, step, child)
        for name, value in _beside_fields(self.copy).items():
            if name not in self._beside or self._beside[name] is not value:
                setattr(self.own, name, value)


def with_copies(arguments: Any, copied: Sequence[CopiedContainer]) -> Any:
    """Return (args, kwargs) with each argument that is a copied container replaced by its copy."""
    copies = {id(each.own): each.copy for each in copied}
    args, kwargs = arguments
    changed = {key: copies.get(id(argument), argument) for key, argument in kwargs.items()}
    return tuple(copies.get(id(argument), argument) for argument in args), changed


def copied_containers(before: Any, after: Any) -> Iterator[CopiedContainer]:
    """Yield the mutable containers that were copied to patch arguments."""
    if before is after or isinstance(before, Tensor):
        return
    if _is_mutable(before):
        yield CopiedContainer(before, after)
    for (_, old), (_, new) in zip(_children(before), _children(after), strict=True):
        yield from copied_containers(old, new)


def containers(tree: Any) -> Iterator[Any]:
    """Yield all mutable containers in a tree."""
    if isinstance(tree, Tensor):
        return
    if _is_mutable(tree):
        yield tree
    for _, child in _children(tree):
        yield from containers(child)


def _beside_fields(container: Any) -> dict[str, Any]:
    """Return the attributes of a dataclass that are not fields."""
    attributes = getattr(container, "__dict__", {}) if dataclasses.is_dataclass(container) else {}
    return {name: value for name, value in attributes.items() if name not in field_names(container)}


def _is_mutable(tree: Any) -> bool:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return isinstance(tree, dict) or not type(tree).__dataclass_params__.frozen  # type: ignore[attr-defined]
    if isinstance(tree, (dict, list)):
        return True
    # A lazy stack of TensorDicts creates its items at each access, so changes in it cannot be found.
    items_stay = isinstance(tree, MutableMapping) and all(map(operator.is_, tree.values(), tree.values()))
    return items_stay and not getattr(tree, "is_locked", False)


def _put(container: Any, step: Item | Attr, child: Any) -> None:
    if isinstance(step, Attr):
        setattr(container, step.name, child)
    else:
        container[step.key] = child
