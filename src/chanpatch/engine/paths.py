"""Read and replace tensors in nested outputs: tuples, lists, dicts, dataclasses and distributions.

A path, such as `[0]`, `["h"]` or `.logits`, identifies a tensor in an output.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..errors import UnsupportedModelError


class Item(NamedTuple):
    """One step in a path: an index into a tuple or list, or a key of a mapping."""

    key: Any

    def __str__(self) -> str:
        return f'["{self.key}"]' if isinstance(self.key, str) else f"[{self.key!r}]"


class Attr(NamedTuple):
    """One step in a path: an attribute of a named tuple, dataclass or distribution."""

    name: str

    def __str__(self) -> str:
        return f".{self.name}"


Path = tuple["Item | Attr", ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Location of a tensor, as encoded in a hook point's name."""

    name: str
    module: str = dataclasses.field(repr=False)  # name of the module or tap
    side: Literal["in", "out", "tap"] = dataclasses.field(repr=False)
    path: Path = dataclasses.field(repr=False)  # path to the tensor in a nested input or output
    call: int | None = dataclasses.field(repr=False)  # index of the module call; None if not in the name


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield (path, tensor) for every tensor in an input or output, in order. `path` is prepended to each path."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    for step, child in _children(tree):
        if isinstance(child, Tensor):
            yield (*path, step), child
        else:
            yield from leaves(child, (*path, step))


def with_rows(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, value) for each tensor with at least one axis and each TensorDict with a nonempty batch size.

    The contents of such a TensorDict are not yielded separately.
    """
    if (isinstance(tree, Tensor) and tree.dim()) or (is_tensordict(tree) and tree.batch_size):
        yield path, tree
    elif not isinstance(tree, Tensor):
        for step, child in _children(tree):
            yield from with_rows(child, (*path, step))


def is_tensordict(tree: Any) -> bool:
    """Return whether an object is a TensorDict or a tensorclass."""
    return isinstance(getattr(tree, "batch_size", None), torch.Size)


def shallow_copy(container: Any) -> Any:
    """Return a new container of the same type that contains the same objects."""
    # copy.copy() of a TensorDict may share internal containers with the original.
    return container.clone(recurse=False) if is_tensordict(container) else copy.copy(container)


def get(tree: Any, path: Path) -> Any:
    """Return the value at a path in an input or output.

    Raise LookupError, AttributeError or TypeError if the path does not exist.
    """
    for step in path:
        if isinstance(tree, Tensor):
            raise TypeError(f"A tensor has no entry {step}.")
        tree = tree[step.key] if isinstance(step, Item) else getattr(tree, step.name)
    return tree


def replace(tree: Any, path: Path, leaf: Any) -> Any:
    """Return an input or output in which `leaf` replaces the value at a path. The containers along the path are copied.

    Raises:
        UnsupportedModelError: If a container cannot be copied.
    """
    if not path:
        return leaf
    step, rest = path[0], path[1:]
    child = replace(get(tree, (step,)), rest, leaf)
    if isinstance(step, Attr):
        return _with(tree, step.name, child)
    if isinstance(tree, tuple):
        kind, items = type(tree), (*tree[: step.key], child, *tree[step.key + 1 :])
        # Result types of functions such as torch.max need their constructor; other constructors may have any arguments.
        return kind(items) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, items)
    try:
        changed = shallow_copy(tree)
        changed[step.key] = child
    except TypeError as fault:  # a read-only view, such as types.MappingProxyType
        raise UnsupportedModelError(
            f"The value at {step} in an object of type {type(tree).__name__} cannot be replaced, because the object "
            f"cannot be copied ({fault}). Use a dict instead of the {type(tree).__name__}."
        ) from fault
    return changed


def _children(tree: Any) -> Iterable[tuple[Item | Attr, Any]]:
    if isinstance(tree, Distribution):
        names = _parameters(tree)
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        names = tree._fields
    elif isinstance(tree, (tuple, list)):
        return [(Item(index), child) for index, child in enumerate(tree)]
    elif isinstance(tree, Mapping):  # checked before dataclasses, because some output classes are both
        return [(Item(key), child) for key, child in tree.items()]
    else:
        names = field_names(tree)
    return [(Attr(name), getattr(tree, name)) for name in names]


def field_names(tree: Any) -> tuple[str, ...]:
    """Return the field names of a dataclass instance, or an empty tuple for any other object."""
    is_instance = dataclasses.is_dataclass(tree) and not isinstance(tree, type)
    return tuple(field.name for field in dataclasses.fields(tree)) if is_instance else ()


def _with(instance: Any, name: str, child: Any) -> Any:
    if isinstance(instance, Distribution):
        return _rebuilt(instance, name, child)
    if isinstance(instance, tuple):
        return cast("Any", instance)._replace(**{name: child})
    changed = shallow_copy(instance)
    if is_tensordict(instance):
        setattr(changed, name, child)
        return changed
    if hasattr(instance, "__post_init__") and all(each.init for each in dataclasses.fields(instance)):
        with suppress(TypeError, ValueError):  # the class has a custom __init__ or an InitVar
            return dataclasses.replace(instance, **{name: child})
    object.__setattr__(changed, name, child)  # frozen dataclasses forbid setattr
    return changed


@cache
def _constructor(kind: Any) -> dict[str, str]:
    """Map the name of each constructor argument of a distribution class to the attribute that stores the argument."""
    names = [*inspect.signature(kind.__init__).parameters][1:]
    return {
        name: {"base_distribution": "base_dist", "validate_args": "_validate_args"}.get(name, name) for name in names
    }


_ALTERNATIVES = ({"probs", "logits"}, {"covariance_matrix", "precision_matrix", "scale_tril"})


def _parameters(distribution: Distribution) -> tuple[str, ...]:
    """Return the names of the attributes that store the parameters passed to a distribution's constructor.

    If there are alternatives such as `probs` and `logits`, the distribution can be rebuilt exactly only from the
    alternative that was passed to the constructor. This is the alternative that torch stores first.
    """
    given = _stored(distribution)
    names = [*_constructor(cast("Any", type(distribution))).values()]
    for alternatives in _ALTERNATIVES:
        present = [name for name in given if name in alternatives and name in names]
        names = [name for name in names if name not in alternatives or name in present[:1]]
    return tuple(name for name in names if isinstance(getattr(distribution, name, None), (Tensor, Distribution)))


def _stored(distribution: Distribution) -> list[str]:
    """List the names of a distribution's attributes in the order in which the attributes were set.

    If the distribution wraps another distribution, the attribute names of the wrapped distribution come first.
    """
    held = vars(distribution)
    wrapped = held.get("_categorical", held.get("base_dist"))
    return [*([] if wrapped is None else _stored(wrapped)), *held]


def _rebuilt(distribution: Distribution, changed: str, parameter: Any) -> Distribution:
    """Return a new distribution in which `parameter` replaces the parameter stored in the attribute `changed`."""
    kind: Any = type(distribution)
    if kind.__module__.split(".")[:2] != ["torch", "distributions"]:
        raise UnsupportedModelError(
            f"{kind.__name__} is not a torch.distributions class, so chanpatch cannot create a copy with patched "
            "parameters. Have the model return a torch.distributions class, or the parameters as tensors."
        )
    derived = set().union(*_ALTERNATIVES) - set(_parameters(distribution))
    derived |= set().union(*(each for each in _ALTERNATIVES if changed in each))
    kept = {name: getattr(distribution, attribute) for name, attribute in _constructor(kind).items()
            if attribute not in derived and hasattr(distribution, attribute)}  # fmt: skip
    changes = {name: parameter for name, attribute in _constructor(kind).items() if attribute == changed}
    return cast("Distribution", kind(**{**kept, **changes}))


def in_distribution(tree: Any, path: Path) -> bool:
    """Return whether the tensor at a path is inside a distribution, and so cannot be patched."""
    return any(isinstance(get(tree, path[:end]), Distribution) for end in range(len(path)))


def read_only(name: str) -> str:
    """Return the error message for a patch at the hook point `name`, whose tensor is inside a distribution."""
    return (
        f"The tensor at '{name}' is inside a distribution, so it can be recorded but not patched. Patch the module "
        "that computes the tensor, or call tap('name', tensor) in the model's forward()."
    )


def nested(name: str) -> str:
    """Return the error message for the hook point `name`, whose tensor is a nested tensor."""
    return (
        f"The value at hook point '{name}' is a nested tensor, which has no fixed shape. Pass padded inputs. If a "
        "TransformerEncoder creates nested tensors, build it with enable_nested_tensor=False."
    )


def inside_vmap(tensor: Tensor) -> bool:
    """Return whether a tensor is batched by `torch.vmap`. The values of such a tensor cannot be read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def storage(tensor: Tensor) -> int:
    """Return the memory address of a tensor's storage, or 0 if the address is unknown."""
    if tensor.layout == torch.strided and not tensor.is_meta:
        try:
            return tensor.untyped_storage().data_ptr()
        except RuntimeError:  # a wrapper around other tensors has no storage
            return 0
    return 0
