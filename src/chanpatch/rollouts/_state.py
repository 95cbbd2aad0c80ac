"""The state that a recurrent policy carries from step to step, one row per running episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from .._tree import Path, get, leaves, path_text, replace
from ..errors import RolloutError

InitialState: TypeAlias = Callable[[int], Any]
BatchAxes: TypeAlias = Mapping[Path, int]


def rows_of(tree: Any, batch_axes: BatchAxes, rows: slice | Tensor) -> Any:
    """Return the same tree with some rows of each tensor."""
    for path, axis in batch_axes.items():
        tree = replace(tree, path, get(tree, path)[(slice(None),) * axis + (rows,)])
    return tree


def state_batch_axes(initial_state: InitialState) -> BatchAxes:
    """Return which axis of each tensor of a state is the batch: the one that is as long as there are rows.

    Raises:
        RolloutError: If there is not exactly one such axis.
    """
    if not callable(initial_state):
        raise RolloutError(
            f"initial_state is a {type(initial_state).__name__}, but it takes a function from the number of rows to "
            "the state, such as lambda rows: torch.zeros(1, rows, 64)."
        )
    two, three = (dict(leaves(initial_state(rows))) for rows in (2, 3))
    if not two or two.keys() != three.keys():
        raise RolloutError(
            f"initial_state(2) holds {len(two)} tensors and initial_state(3) holds {len(three)}. A state holds the "
            "same tensors for any number of rows, and one at least."
        )
    return {path: _grown_axis(path, two[path], three[path]) for path in two}


def _grown_axis(path: Path, two: Tensor, three: Tensor) -> int:
    lengths = list(zip(two.shape, three.shape, strict=False))
    grown = [axis for axis, (shorter, longer) in enumerate(lengths) if shorter != longer]
    if two.dim() != three.dim() or [lengths[axis] for axis in grown] != [(2, 3)]:
        raise RolloutError(
            f"state{path_text(path)} has shape {tuple(two.shape)} in initial_state(2) and {tuple(three.shape)} in "
            "initial_state(3). Exactly one axis of each tensor is the batch, as long as the number of rows."
        )
    return grown[0]


def new_state(returned: Any, state: Any) -> tuple[Any, Any]:
    """Return the output and the new state that a recurrent policy returned.

    Raises:
        RolloutError: If that is no pair, or the new state is not like the one that the policy was given.
    """
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        got = f"{len(returned)} items" if isinstance(returned, (tuple, list)) else type(returned).__name__
        raise RolloutError(
            f"With an initial_state a policy takes (observations, state) and returns (output, new state), but it "
            f"returned {got}. Give the rollout a function that picks them out."
        )
    shapes, before = ({path: tuple(leaf.shape) for path, leaf in leaves(tree)} for tree in (returned[1], state))
    for path in dict.fromkeys([*before, *shapes]):
        if shapes.get(path) != before.get(path):
            raise RolloutError(
                f"state{path_text(path)} has shape {before.get(path, 'none')} where the policy is called, but "
                f"{shapes.get(path, 'none')} in the new state that it returns."
            )
    return returned[0], returned[1]
