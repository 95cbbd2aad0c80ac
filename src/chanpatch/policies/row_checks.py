"""Check that the rows of a rollout sweep are independent, so that each label gets the numbers it would get alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.state import undisturbed
from ..errors import RolloutError
from .actions import numbers_of
from .decisions import Decision


def check_rows(
    run: undisturbed, again: undisturbed, decision: Decision, alone: Callable[[], Decision], mixed: bool
) -> None:
    """Raise RolloutError if the rows without patches depend on other rows, or on random numbers that the policy draws.

    Args:
        run: Context with the state before the first step.
        again: The same context, not entered, to restore the state after that step.
        decision: Decision for all rows in that step; those without patches come first.
        alone: Function that returns the decision for the first of these rows alone.
        mixed: Whether the step had rows with patches too.
    """
    with again:
        states = again.random_states()
        after = alone() if mixed else None  # with a state that all rows have updated
        run.snapshot.put_back()
        first = alone()
        draws = states != again.random_states()
        if draws and (isinstance(decision.choice, Tensor) or not _close(decision, first)):
            raise RolloutError(
                "The policy draws random numbers in its forward pass. In a sweep each label would get other numbers, "
                "so a patch that changes nothing would have an effect. Compare a PatchedPolicy for each label with "
                "paired_rollouts."
            )
        if not _close(decision, first) or (after and not _close(after, alone())):
            raise RolloutError(
                "The policy's output for a row depends on the other rows of the batch, as with batch statistics that "
                "the forward pass computes or updates, so the rows of all labels would mix. Compare a PatchedPolicy "
                "for each label with paired_rollouts."
            )


def _close(whole: Decision, alone: Decision) -> bool:
    """Return whether the first rows of a decision are those of the other one, up to rounding."""
    pairs = zip(_numbers(whole), _numbers(alone), strict=True)
    return all(_same(every[: len(own)], own) for every, own in pairs)


def _numbers(decision: Decision) -> list[Tensor]:
    return numbers_of(decision.choice) if decision.values is None else [decision.values]


def _same(one: Tensor, other: Tensor) -> bool:
    if not other.is_floating_point():
        return torch.equal(one, other)
    tolerance = min(100 * torch.finfo(other.dtype).eps, 1e-2)
    if other.is_cuda:
        tolerance = max(tolerance, 1e-3)  # kernels for other numbers of rows may round to TF32
    finite = other[other.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
