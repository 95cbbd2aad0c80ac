"""A sweep refuses policies and patches whose numbers for a row depend on other rows, or on random generators."""

import functools
import random

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from policies import Drifting, same
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional

from chanpatch import PatchedPolicy, edit, hook_points, paired_rollouts
from chanpatch.errors import RolloutError
from chanpatch.policies import rollout_sweep

SETTINGS = {"max_steps": 20, "outputs": "logits"}
DRAWS = (
    "The policy draws random numbers in its forward pass. In a sweep, the numbers would differ between the labels of "
    "the patches, so even a patch that changes nothing would appear to have an effect. Use paired_rollouts with one "
    "PatchedPolicy per label instead."
)
MIXES = (
    "The policy's output for one observation depends on the other observations in the batch, for example through "
    "batch statistics, so patches with different labels would affect each other. Use paired_rollouts with one "
    "PatchedPolicy per label instead."
)
PATCH_DRAWS = (
    "A patch at 'net.1' draws random numbers from a generator. In a sweep, the numbers would differ between labels, so "
    "identical patches would have different effects. Use context.uniform(shape), whose numbers depend only on the "
    "episode and the step."
)


class Policy(nn.Module):
    """A policy around the network; `before` runs on observations and `after` on logits."""

    def __init__(self, before=torch.clone, after=torch.clone):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.before, self.after = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)), before, after

    def forward(self, observations):
        return self.after(self.net(self.before(observations)))


class Normalizer(nn.Module):
    """Divides by a running scale, which it updates before or after."""

    def __init__(self, late):
        super().__init__()
        self.late = late
        self.register_buffer("scale", torch.ones(()))

    def forward(self, observations):
        before = self.scale.clone()
        self.scale.mul_(0.9).add_(0.1 * observations.detach().abs().mean())
        return observations / (before if self.late else self.scale)


def sampled(logits):
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


DRAWING = {
    "torch": lambda x: x + torch.randn_like(x),
    "NumPy": lambda x: x + float(np.random.normal()),
    "Python": lambda x: x + random.random() * torch.tensor([1.0, 0, 0, 0]),
    "dropout that is always on": functools.partial(functional.dropout, p=0.5),
}
MIXING = {
    "batch statistics": nn.BatchNorm1d(4, track_running_stats=False),
    "a normalizer that updates first": Normalizer(late=False),
    "a normalizer that updates last": Normalizer(late=True),
}


def swept(policy, num_envs=5, function=torch.clone, **settings):
    policy.eval()
    points = hook_points(policy, torch.ones(2, 4))
    envs = SyncVectorEnv([functools.partial(Drifting, (4,), 3)] * num_envs)
    patches = {label: edit(points.site("net.1"), function) for label in "ab"}
    return rollout_sweep(points, envs, range(6), patches, **{**SETTINGS, **settings})


@pytest.mark.parametrize("num_envs", [3, 5, 30])
@pytest.mark.parametrize("name", DRAWING)
def test_a_policy_that_draws_random_numbers_is_refused(name, num_envs):
    with pytest.raises(RolloutError) as caught:
        swept(Policy(DRAWING[name]), num_envs)
    assert str(caught.value) == DRAWS


def test_a_policy_that_samples_its_actions_is_refused():
    with pytest.raises(RolloutError) as caught:
        swept(Policy(after=sampled), outputs="actions")
    assert str(caught.value) == DRAWS


def test_random_numbers_that_do_not_reach_the_decision_are_no_hindrance():
    policy = Policy(after=lambda logits: (sampled(logits), Categorical(logits=logits)))
    found = swept(policy, outputs=None)
    assert same(found["a"], found["original"])


@pytest.mark.parametrize("num_envs", [8, 30])
@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("outputs", ["logits", "values"])
def test_a_policy_that_mixes_rows_is_refused(name, num_envs, outputs):
    with pytest.raises(RolloutError) as caught:
        swept(Policy(MIXING[name]), num_envs, outputs=outputs)
    assert str(caught.value) == MIXES


def test_logits_that_are_centered_over_the_batch_are_refused():
    with pytest.raises(RolloutError) as caught:
        swept(Policy(after=lambda logits: logits - logits.mean(0)), 30)
    assert str(caught.value) == MIXES


@pytest.mark.parametrize("name", [name for name in MIXING if "normalizer" in name])
def test_labels_that_share_no_forward_do_not_mix(name):
    found = swept(Policy(MIXING[name]), num_envs=6)
    assert same(found["a"], found["original"])


def test_a_policy_that_counts_its_calls_is_swept():
    class Counting(Policy):
        calls = 0

        def forward(self, observations):
            self.calls += 1
            return super().forward(observations) * (self.calls % 3 - 1)

    policy = Counting()
    found = swept(policy, 30)
    assert same(found["a"], found["original"])
    assert policy.calls == 0


@pytest.mark.parametrize("name", DRAWING)
def test_a_patch_that_draws_from_a_global_generator_is_refused(name):
    def late(activation, *, context):
        return activation if context.step < 4 else DRAWING[name](activation[:, :4]).repeat(1, 4)

    for function in (lambda activation: DRAWING[name](activation[:, :4]).repeat(1, 4), late):
        with pytest.raises(RolloutError) as caught:
            swept(Policy(), function=function)
        assert str(caught.value).endswith(PATCH_DRAWS)


def test_a_patch_that_draws_from_a_generator_of_its_own_is_refused():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RolloutError, match="A patch at 'net.1' draws random numbers"):
        swept(Policy(), function=lambda activation: activation + torch.randn(16, generator=generator))


def test_the_check_leaves_the_random_generators_and_the_module_alone():
    policy, states = Policy(Normalizer(late=True)), (torch.get_rng_state(), random.getstate())
    swept(policy, 6)
    assert policy.before.scale == 1
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_a_refused_policy_is_compared_by_twins():
    policy = Policy(DRAWING["torch"]).eval()
    twin = PatchedPolicy(policy, edit(hook_points(policy, torch.randn(2, 4)).site("net.1"), torch.clone))
    envs = SyncVectorEnv([functools.partial(Drifting, (4,), 3)] * 3)
    pairs = paired_rollouts({"policy": policy, "twin": twin}, envs, range(6), **SETTINGS)
    assert same(pairs["policy"], pairs["twin"])
