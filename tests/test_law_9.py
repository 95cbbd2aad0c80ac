"""Law 9: a sweep equals the loop it replaces, over every model fixture and policies not written for the tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policies import CASES, case

from chanpatch import PatchedPolicy, sweep, zero_ablate
from chanpatch.policies import action_distribution


@pytest.mark.parametrize("strategy", ["auto", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_a_sweep_of_every_channel_equals_a_policy_with_each_patch(name, strategy):
    case_ = case(name)
    points, inputs = case_.points, case_.inputs(3)
    site = points.site(case_.site)
    axis = next(axis for axis in points[site.name].axes if axis in ("channel", "feature"))
    patches = {part: zero_ablate(part) for part in site.split(axis)[:5]}

    def probabilities(output):
        return action_distribution(lambda _: output, None).probs[:, 0]

    result = sweep(points, *inputs, patches=patches, metric=probabilities, strategy=strategy)
    for row, patch in zip(result.values["probabilities"], patches.values(), strict=True):
        twin = PatchedPolicy(points, patch)
        with torch.no_grad():
            expected = probabilities(getattr(twin, case_.method)(*inputs))
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-6, atol=1e-6)
    assert np.ptp(result.values["probabilities"], axis=0).max() > 0
