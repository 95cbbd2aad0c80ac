"""Law 9: a sweep equals the loop it replaces, over every model fixture and policies not written for the tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policies import CASES, case
from torch import nn

from chanpatch import PatchedPolicy, hook_points, sweep, zero_ablate
from chanpatch.policies import action_distribution
from chanpatch.sweeps.strategies import _difference


@pytest.mark.parametrize("strategy", ["auto", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_a_sweep_of_every_channel_equals_a_policy_with_each_patch(name, strategy):
    case_ = case(name)
    points, inputs = case_.points, case_.inputs(3)
    site = points.site(case_.site)
    axis = next(axis for axis in points[site.name].axes if axis in ("channel", "feature"))
    patches = {part: zero_ablate(part) for part in site.split(axis)[:5]}

    def probabilities(output):
        logits = output if case_.initial_state is None else output[0]  # the other is the new state
        return action_distribution(lambda _: logits, None, outputs="logits").probs[:, 0]

    result = sweep(points, *inputs, patches=patches, metric=probabilities, strategy=strategy)
    for row, patch in zip(result.values["probabilities"], patches.values(), strict=True):
        twin = PatchedPolicy(points, patch)
        with torch.no_grad():
            expected = probabilities(getattr(twin, case_.method)(*inputs))
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-6, atol=1e-6)
    assert np.ptp(result.values["probabilities"], axis=0).max() > 0


def test_in_half_precision_a_dead_channel_has_no_effect() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    model = model.bfloat16()
    with torch.no_grad():
        model[0].bias[:20] = -100
    vectors = torch.randn(16, 64).bfloat16()
    points = hook_points(model, vectors)
    patches = [zero_ablate(site) for site in points.site("1").split("feature")]
    fast, loop = (
        sweep(points, vectors, patches=patches, metric=lambda output: output[:, 0] - output[:, 1], strategy=strategy)
        for strategy in ("auto", "loop")
    )
    assert (fast.effect() == loop.effect()).all() and not fast.effect()[:20].any() and fast.effect()[20:].any()


def test_in_half_precision_nan_is_not_zero_and_infinity_is_not_the_largest_number() -> None:
    for got, wanted, alike in ((torch.nan, torch.nan, True), (torch.nan, 0.0, False), (torch.inf, 65504.0, False)):
        given, expected = (torch.tensor([number]).half() for number in (got, wanted))
        assert (_difference(expected, given) == "") is alike
