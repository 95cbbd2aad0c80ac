"""Law 10, two rollouts compared are paired: over every model fixture, and over policies not written for the tests."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import policies
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from policies import SEEDS, Drifting, same
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Independent, Normal

from chanpatch import paired_rollouts
from chanpatch.engine.moments import published
from chanpatch.policies import action_distribution


@pytest.fixture(params=list(policies.CASES))
def case(request):
    return policies.case(request.param)


def logits(policy: Any, *inputs: Any) -> tuple[Tensor, Any]:
    """Return a policy's logits, and the state of a recurrent one."""
    if len(inputs) == 1:
        return action_distribution(policy, *inputs, outputs="logits").logits, None
    return policy(*inputs)


def test_identical_policies_have_identical_trajectories(case):
    twins = {"one": case.policy, "copy": copy.deepcopy(case.policy), "identity edits": case.identity()}
    pairs = case.pairs(twins)
    assert len(set(pairs["one"].lengths)) > 1
    assert same(pairs["one"], pairs["copy"])
    assert same(pairs["one"], pairs["identity edits"])


def test_other_draws_are_other_trajectories(case):
    assert not same(case.rollout(case.policy), case.rollout(case.policy, sampling_seed=1))


def around_the_logits(policy: Any, centres: list[list[Tensor]]) -> Callable[..., Any]:
    """Return a policy of normal actions, which appends the center of each action to a list for its episode."""

    def act(*inputs: Any) -> Any:
        centre, state = logits(policy, *inputs)
        for episode, row in zip(published.now.rows.tolist(), centre, strict=True):
            centres[episode].append(row)
        distribution = Independent(Normal(centre, torch.ones_like(centre)), 1)
        return distribution if state is None else (distribution, state)

    return act


def test_the_same_draw_is_behind_each_action_even_after_the_trajectories_have_parted(case):
    shape, width = case.inputs(1)[0].shape[1:], logits(case.policy, *case.inputs(2))[0].shape[1]
    envs = SyncVectorEnv([lambda: Drifting(tuple(shape), width, continuous=True)] * 3)
    centres: dict[str, list[list[Tensor]]] = {name: [[] for _ in SEEDS] for name in ("one", "ablated")}
    policies = {"one": case.policy, "ablated": case.ablated()}
    acting = {name: around_the_logits(policy, centres[name]) for name, policy in policies.items()}
    pairs = paired_rollouts(acting, envs, SEEDS, max_steps=20, initial_state=case.initial_state)
    for name in acting:
        for seed, actions, means in zip(SEEDS, pairs[name].actions, centres[name], strict=True):
            source = np.random.SeedSequence(0, spawn_key=(seed, 0))
            draws = np.random.Generator(np.random.Philox(source)).random(actions.shape)
            np.testing.assert_allclose(actions - torch.stack(means).numpy(), norm.ppf(draws), atol=1e-4)
    for one, ablated in zip(pairs["one"].actions, pairs["ablated"].actions, strict=True):
        assert not np.array_equal(one[0], ablated[0])


@pytest.mark.parametrize("num_envs", [1, 2, 8])
def test_a_rollout_does_not_depend_on_the_number_of_environments(case, num_envs):
    assert same(case.rollout(case.policy), case.rollout(case.policy, num_envs))


def test_an_episode_does_not_depend_on_the_order_of_the_seeds(case):
    turned = case.rollout(case.policy, seeds=SEEDS[::-1])
    forth = case.rollout(case.policy)
    assert forth.to_records() == turned.to_records()[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forth.actions, turned.actions[::-1], strict=True))


def drawing(policy: Any) -> Callable[..., Any]:
    """Return the policy with draws of its own from every global generator, and noise on what it sees."""

    def act(observations, *state):
        noise = torch.randn(()) + random.random() + float(np.random.normal())
        centre, new = logits(policy, observations + noise, *state)
        return (centre, new) if state else centre

    return act


def test_a_rollout_does_not_depend_on_which_policy_ran_before(case):
    acting = {"one": drawing(case.policy), "ablated": drawing(case.ablated())}
    forth, back = case.pairs(acting), case.pairs(dict(reversed(acting.items())))
    assert all(same(forth[name], back[name]) for name in acting)


def test_a_rollout_leaves_the_global_random_generators_alone(case):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    case.rollout(drawing(case.policy))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
