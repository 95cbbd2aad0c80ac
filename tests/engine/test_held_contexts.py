"""Contexts that are entered by hand, and freed or kept."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from chanpatch import PatchedPolicy, Site, hook_points, patched, recording, steer, zero_ablate
from chanpatch.errors import ConcurrencyError

FREED = (
    "A context for {} was garbage-collected while open, and is now closed. Use `with`, or keep the context in a "
    "variable: context = patched(model, patches); context.__enter__()."
)


@pytest.mark.parametrize("is_recording", [False, True], ids=["patched", "recording"])
@pytest.mark.parametrize("traced", [False, True], ids=["model", "points"])
def test_a_context_that_was_entered_by_hand_and_freed_makes_the_next_call_raise_and_is_closed(is_recording, traced):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU()), torch.randn(2, 4)
    plain, points = model(x), hook_points(model, x) if traced else model
    result = (recording(points, "1") if is_recording else patched(points, zero_ablate(Site("1")))).__enter__()
    with pytest.raises(ConcurrencyError) as caught:
        model(x)
    assert str(caught.value) == FREED.format("Sequential")
    assert torch.equal(model(x), plain)
    assert not len(result) if is_recording else result.to_records()[0]["firings"] == 0
    assert not model[1]._forward_hooks


def test_a_cell_that_enters_a_context_again_does_not_patch_twice_in_silence():
    model, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 4)
    plain = model(x)
    for _ in range(2):
        context = patched(model, steer(Site("0"), 1.0))
        context.__enter__()
    with pytest.raises(ConcurrencyError):
        model(x)
    torch.testing.assert_close(model(x), plain + 1)
    context.__exit__(None, None, None)
    assert torch.equal(model(x), plain)


def test_a_context_that_a_stack_or_a_variable_keeps_stays_open():
    model, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 4)
    with ExitStack() as stack:
        stack.enter_context(patched(model, zero_ablate(Site("0"))))
        assert not model(x).any()
    context = patched(model, zero_ablate(Site("0")))
    context.__enter__()
    assert not model(x).any()
    context.__exit__(None, None, None)
    assert model(x).any()


def test_a_twin_whose_disabling_was_freed_raises_and_is_patched_again():
    policy, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 4)
    twin = PatchedPolicy(policy, zero_ablate(Site("0")))
    twin.disable().__enter__()
    with pytest.raises(ConcurrencyError) as caught:
        twin(x)
    assert str(caught.value) == FREED.format("PatchedSequential")
    assert not twin(x).any()
