"""Tensors inside nested outputs: where they are, and the same output with one of them replaced.

A module may return a tensor, or tensors inside tuples, named tuples, lists, dicts, dataclasses and
`torch.distributions` objects. A path leads to one tensor: `[0]`, `["h"]`, `.logits`.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributions import Distribution


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
_STEP = re.compile(r"""\[(\d+|"[^"]*"|'[^']*')\]|\.([A-Za-z_]\w*)""")


def path_text(path: Path) -> str:
    """Return a path as it stands in a hook point's name."""
    return "".join(str(step) for step in path)


def parse_path(text: str) -> Path | None:
    """Return the path that a text such as `[1]["h"].logits` names, or None if it names none."""
    steps: list[Item | Attr] = []
    end = 0
    for match in _STEP.finditer(text):
        if match.start() != end:
            return None
        end = match.end()
        steps.append(Attr(match[2]) if match[2] else Item(ast.literal_eval(match[1])))
    return tuple(steps) if end == len(text) else None


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield every tensor inside an output with its path, in the order of the output."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    for step, child in _children(tree):
        yield from leaves(child, (*path, step))


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
    """Return the same output with one leaf replaced; containers on the way are rebuilt, never written to."""
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
    changed = copy.copy(tree)
    changed[step.key] = child
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
    changed = copy.copy(instance)
    object.__setattr__(changed, name, child)  # a frozen dataclass refuses the plain assignment
    return changed


@cache
def _constructor(kind: Any) -> tuple[str, ...]:
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    return tuple(name for name in names if name != "validate_args")


_ALTERNATIVES = ({"probs", "logits"}, {"covariance_matrix", "precision_matrix", "scale_tril"})


def _parameters(distribution: Distribution) -> tuple[str, ...]:
    """Name the parameters that a distribution was built with, as attributes of it.

    Alternatives such as `probs` and `logits` can all be read afterwards, but only the one that was given
    rebuilds the distribution bit for bit: the one that its constructor stored, before any was derived.
    """
    kind: Any = type(distribution)
    given = _stored(distribution)
    names = [_attribute(name) for name in _constructor(kind)]
    for alternatives in _ALTERNATIVES:
        present = [name for name in given if name in alternatives and name in names]
        names = [name for name in names if name not in alternatives or name in present[:1]]
    return tuple(name for name in names if isinstance(getattr(distribution, name, None), (Tensor, Distribution)))


def _stored(distribution: Distribution) -> list[str]:
    """Return the names of what a distribution, or the one it wraps (as OneHotCategorical does), holds, oldest first."""
    held = vars(distribution)
    wrapped = held.get("_categorical", held.get("base_dist"))
    return [*([] if wrapped is None else _stored(wrapped)), *held]


def _attribute(parameter: str) -> str:
    return "base_dist" if parameter == "base_distribution" else parameter


def _rebuilt(distribution: Distribution, changed: str, parameter: Any) -> Distribution:
    kind: Any = type(distribution)
    alternatives = set().union(*_ALTERNATIVES)
    arguments: dict[str, Any] = {"validate_args": distribution._validate_args}
    built_with = _parameters(distribution)
    for name in _constructor(kind):
        attribute = _attribute(name)
        if attribute == changed:
            arguments[name] = parameter
        elif attribute in built_with or (attribute not in alternatives and hasattr(distribution, attribute)):
            arguments[name] = getattr(distribution, attribute)
    rebuilt: Distribution = kind(**arguments)
    return rebuilt
