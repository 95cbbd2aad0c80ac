"""Tensors inside nested outputs: where they are, and the same output with one of them replaced.

A module may return a tensor, or tensors inside tuples, named tuples, lists, dicts, dataclasses and
`torch.distributions` objects. A path leads to one tensor: `[0]`, `["h"]`, `.logits`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..errors import UnsupportedModelError


class Item(NamedTuple):
    """One step into a tuple, a list or a dict."""

    key: Any

    def __str__(self) -> str:
        return f'["{self.key}"]' if isinstance(self.key, str) else f"[{self.key!r}]"


class Attr(NamedTuple):
    """One step into a named tuple, a dataclass or a distribution."""

    name: str

    def __str__(self) -> str:
        return f".{self.name}"


Path = tuple["Item | Attr", ...]


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield every tensor inside an output with its path, in the order of the output."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    for step, child in _children(tree):
        yield from leaves(child, (*path, step))


def with_rows(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield, with its path, every tensor that has axes, and whole every container that knows its batch size.

    Such a container, as a TensorDict is, refuses tensors of another size. It is cut and lengthened as tensors are.
    """
    if knows_batch_size(tree) or (isinstance(tree, Tensor) and tree.dim()):
        yield path, tree
    elif not isinstance(tree, Tensor):
        for step, child in _children(tree):
            yield from with_rows(child, (*path, step))


def knows_batch_size(tree: Any) -> bool:
    """Tell whether this is a container whose tensors all begin with the axes of its batch size."""
    return is_tensordict(tree) and len(tree.batch_size) > 0


def is_tensordict(tree: Any) -> bool:
    """Tell whether this is a TensorDict, or a class made of one."""
    return isinstance(getattr(tree, "batch_size", None), torch.Size)


def _copy(container: Any) -> Any:
    """Return a container of its own that holds the very same."""
    # Copies of TensorDicts by the copy module may share what they are made of.
    return container.clone(recurse=False) if is_tensordict(container) else copy.copy(container)


def fresh(tree: Any) -> Any:
    """Return an output in containers of its own, which others may change; what lies in them is the same."""
    if type(tree) is list:
        return [*map(fresh, tree)]
    if isinstance(tree, tuple):
        parts = [*map(fresh, tree)]
        if all(part is before for part, before in zip(parts, tree, strict=True)):
            return tree
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if is_tensordict(tree):
        return _copy(tree)  # those inside it are copied too
    if isinstance(tree, MutableMapping):
        copied: Any = _copy(tree)
        for key, value in tree.items():
            copied[key] = fresh(value)
        return copied
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        own: Any = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(own, field.name, fresh(getattr(tree, field.name)))
        return own
    return tree


def get(tree: Any, path: Path) -> Any:
    """Return what a path leads to.

    Raises:
        LookupError, AttributeError, TypeError: If the output has no such place; a tensor has none inside.
    """
    for step in path:
        if isinstance(tree, Tensor):
            raise TypeError(f"There is nothing at {step} inside a tensor.")
        tree = tree[step.key] if isinstance(step, Item) else getattr(tree, step.name)
    return tree


def replace(tree: Any, path: Path, leaf: Any) -> Any:
    """Return the same output with one leaf replaced; containers on the way are rebuilt, never written to.

    Raises:
        UnsupportedModelError: If a container on the way cannot be rebuilt.
    """
    if not path:
        return leaf
    step, rest = path[0], path[1:]
    child = replace(get(tree, (step,)), rest, leaf)
    if isinstance(tree, Distribution):
        return _rebuilt(tree, step.name, child)  # type: ignore[union-attr]
    if isinstance(step, Attr):
        named: Any = tree
        return named._replace(**{step.name: child}) if isinstance(tree, tuple) else _with(tree, step.name, child)
    if isinstance(tree, tuple):
        kind, items = type(tree), (*tree[: step.key], child, *tree[step.key + 1 :])
        # What torch.max and its like return only their own type can make; of others __new__ may take anything.
        return kind(items) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, items)
    try:
        changed = _copy(tree)
        changed[step.key] = child
    except TypeError as fault:  # a read-only view, as of types.MappingProxyType
        raise UnsupportedModelError(
            f"{type(tree).__name__} cannot be copied with {step} replaced ({fault}). Have the module return a dict."
        ) from fault
    return changed


def _children(tree: Any) -> Iterator[tuple[Item | Attr, Any]]:
    if isinstance(tree, Distribution):
        for name in _parameters(tree):
            yield Attr(name), getattr(tree, name)
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        for name in tree._fields:
            yield Attr(name), getattr(tree, name)
    elif isinstance(tree, (tuple, list)):
        for index, child in enumerate(tree):
            yield Item(index), child
    elif isinstance(tree, Mapping):  # before dataclasses: some output classes are both
        for key, child in tree.items():
            yield Item(key), child
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield Attr(field.name), getattr(tree, field.name)


def _with(instance: Any, name: str, child: Any) -> Any:
    if is_tensordict(instance):
        made = _copy(instance)
        setattr(made, name, child)
        return made
    derives = hasattr(instance, "__post_init__") and all(item.init for item in dataclasses.fields(instance))
    if derives:
        with suppress(TypeError, ValueError):  # an __init__ of its own, or one that takes an InitVar
            return dataclasses.replace(instance, **{name: child})
    changed = copy.copy(instance)
    object.__setattr__(changed, name, child)  # a frozen dataclass refuses the plain assignment
    return changed


@cache
def _constructor(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.__init__).parameters)[1:]


_ALTERNATIVES = ({"probs", "logits"}, {"covariance_matrix", "precision_matrix", "scale_tril"})


def _parameters(distribution: Distribution) -> tuple[str, ...]:
    """Name the parameters that a distribution was built with, as attributes of it.

    Of alternatives such as `probs` and `logits`, only the one that was given rebuilds the distribution bit for bit. The
    constructor stored it before any other was derived.
    """
    given, kind = _stored(distribution), cast("Any", type(distribution))
    names = [_attribute(name) for name in _constructor(kind)]
    for alternatives in _ALTERNATIVES:
        present = [name for name in given if name in alternatives and name in names]
        names = [name for name in names if name not in alternatives or name in present[:1]]
    return tuple(name for name in names if isinstance(getattr(distribution, name, None), (Tensor, Distribution)))


def _stored(distribution: Distribution) -> list[str]:
    """Return the names of the attributes of a distribution, or of the one that it wraps, oldest first."""
    held = vars(distribution)
    wrapped = held.get("_categorical", held.get("base_dist"))
    return [*([] if wrapped is None else _stored(wrapped)), *held]


def _attribute(parameter: str) -> str:
    return "base_dist" if parameter == "base_distribution" else parameter


def _rebuilt(distribution: Distribution, changed: str, parameter: Any) -> Distribution:
    """Return the distribution with one parameter replaced, through its constructor.

    Raises:
        UnsupportedModelError: If it is not one of torch's: another constructor may transform its arguments.
    """
    kind: Any = type(distribution)
    if kind.__module__.split(".")[:2] != ["torch", "distributions"]:
        raise UnsupportedModelError(f"{kind.__name__} is not one of torch's distributions, so it cannot be rebuilt.")
    alternatives = set().union(*_ALTERNATIVES)
    built_with = set(_parameters(distribution)).difference(*(each for each in _ALTERNATIVES if changed in each))
    arguments: dict[str, Any] = {}
    for name in _constructor(kind):
        attribute = _attribute(name)
        if attribute == changed:
            arguments[name] = parameter
        elif name == "validate_args":
            arguments[name] = distribution._validate_args
        elif attribute in built_with or (attribute not in alternatives and hasattr(distribution, attribute)):
            arguments[name] = getattr(distribution, attribute)
    rebuilt: Distribution = kind(**arguments)
    return rebuilt


def in_distribution(tree: Any, path: Path) -> bool:
    """Return whether a path leads into a distribution, whose tensors can be read but not replaced."""
    return any(isinstance(get(tree, path[:end]), Distribution) for end in range(len(path)))


def inside_vmap(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for the many of a `torch.vmap`, so that none of its numbers can be read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
