"""Agents from other libraries act in rollouts as their own code does, and run with patches everywhere."""

from __future__ import annotations

from typing import Any

import agents
import gymnasium
import numpy as np
import pytest
import torch
from agents import CASES, Case
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from tensordict import TensorDict
from torch import nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Independent,
    Normal,
    SigmoidTransform,
    StickBreakingTransform,
    TanhTransform,
    TransformedDistribution,
)

from chanpatch import PatchedPolicy, edit, hook_points, paired_rollouts, rollout, zero_ablate
from chanpatch.errors import DistributionError
from chanpatch.policies import rollout_sweep

SEEDS = [4, 9, 1]


@pytest.mark.parametrize("batch_size", [[], [3]], ids=["unbatched", "batched"])
def test_an_actor_of_torchrl_is_patched_whether_its_trace_is_batched_or_not(batch_size):
    actor = agents.probabilistic_actor(agents.Walking(spaces.Discrete(4)))
    given = TensorDict({"observation": torch.ones(*batch_size, 3)}, batch_size)
    points = hook_points(actor, given)
    twin = PatchedPolicy(points, zero_ablate(points.site("module.0.module.0", feature=1)))
    layers = actor.module[0].module
    hidden = layers[0](given["observation"])
    hidden[..., 1] = 0
    torch.testing.assert_close(twin(given.clone())["logits"], layers[1:](hidden))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.agent}, {case.environment}")
def test_every_action_is_the_one_that_the_agents_own_code_takes(case: Case) -> None:
    same, count = case.compared()
    assert same == count > 40
    _, _, _, done = case.played()
    assert len(np.unique(np.concatenate(done.actions), axis=0)) > 1


def test_the_table_on_the_page_is_the_one_that_the_command_writes() -> None:
    assert agents.TABLE.read_text() == agents.table(), "`python tests/agents.py` writes the table"


ALGORITHMS: dict[Any, tuple[str, str]] = {
    PPO: ("CartPole-v1", "mlp_extractor.policy_net.1"),
    A2C: ("CartPole-v1", "mlp_extractor.policy_net.1"),
    DQN: ("CartPole-v1", "q_net.q_net.1"),
    SAC: ("Pendulum-v1", "actor.latent_pi.1"),
    TD3: ("Pendulum-v1", "actor.mu.1"),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_learns_with_a_twin_inside(algorithm):
    environment, name = ALGORITHMS[algorithm]
    starts = {"learning_starts": 8, "buffer_size": 200} if algorithm in (DQN, SAC, TD3) else {"n_steps": 64}
    model = algorithm("MlpPolicy", environment, seed=0, device="cpu", **starts)
    original = model.policy
    points = hook_points(original, torch.zeros(2, *model.observation_space.shape), method="_predict")
    model.policy = PatchedPolicy(points, zero_ablate(points.site(name, feature=[3, 5])), allow_unreached=[name])
    if algorithm in (DQN, SAC, TD3):
        model._create_aliases()  # model.q_net, model.actor and others
    weight = dict(model.policy.named_modules())[name.rpartition(".")[0] + ".2"].weight
    before = weight.detach().clone()
    model.learn(128)
    changed = (weight - before).abs().amax(0)
    assert weight is dict(original.named_modules())[name.rpartition(".")[0] + ".2"].weight
    assert changed.max() > 0
    assert changed[[3, 5]].max() == 0  # no gradient passes through ablated units
    assert model.policy.ledger.to_records()


def recurrent() -> Any:
    settings = {"lstm_hidden_size": 8, "n_lstm_layers": 2}
    return RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs=settings)


def test_a_recurrent_ppo_is_patched_paired_and_swept():
    policy = recurrent().policy
    nn.init.normal_(policy.action_net.weight, std=30)
    state = (torch.zeros(2, 2, 8), torch.zeros(2, 2, 8))
    points = hook_points(policy, torch.zeros(2, 4), state, torch.zeros(2), method="get_distribution")
    patches = {
        "cell": zero_ablate(points.site("lstm_actor.out[1][1]", feature=[0, 1, 2, 3, 4, 5])),
        "hidden": zero_ablate(points.site("lstm_actor.out[0]", feature=[0, 1, 2, 3, 4, 5])),
        "identity": edit(points.site("mlp_extractor.policy_net.1"), torch.clone),
    }
    envs = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 5)
    twins = {label: PatchedPolicy(points, patch) for label, patch in patches.items()}
    pairs = paired_rollouts({"original": policy, **twins}, envs, SEEDS, max_steps=40)
    swept = rollout_sweep(points, envs, SEEDS, patches, max_steps=40)
    assert [pairs[name].to_records() for name in pairs] == [swept[name].to_records() for name in pairs]
    assert pairs["identity"].to_records() == pairs["original"].to_records()
    assert all(pairs[name].to_records() != pairs["original"].to_records() for name in ("cell", "hidden"))


def test_a_normal_is_drawn_by_its_inverse_cdf_through_elementwise_transforms():
    loc, scale = torch.tensor([[0.5], [-0.5]]), torch.ones(2, 1)
    sigmoid, affine = SigmoidTransform(), AffineTransform(-1.0, 2.0)
    kinds = {
        "two": TransformedDistribution(Normal(loc, scale), [sigmoid, affine]),
        "composed": TransformedDistribution(Normal(loc, scale), ComposeTransform([sigmoid, affine])),
        "nested": Independent(TransformedDistribution(TransformedDistribution(Normal(loc, scale), sigmoid), affine), 1),
    }
    envs = SyncVectorEnv([agents.walking(spaces.Box(-9, 9, (1,)))] * 2)
    for greedy in (False, True):
        plain = rollout(lambda _: Normal(loc, scale), envs, [0, 1], max_steps=3, greedy=greedy)
        expected = [2 / (1 + np.exp(-actions)) - 1 for actions in plain.actions]
        for kind in kinds.values():
            done = rollout(lambda _, kind=kind: kind, envs, [0, 1], max_steps=3, greedy=greedy)
            np.testing.assert_allclose(done.actions, expected, rtol=1e-5, atol=1e-6)


def test_a_transform_that_mixes_actions_is_refused():
    mixed = TransformedDistribution(Normal(torch.zeros(2, 2), 1.0), [TanhTransform(), StickBreakingTransform()])
    with pytest.raises(DistributionError) as caught:
        rollout(lambda _: mixed, SyncVectorEnv([agents.walking(spaces.Box(-9, 9, (3,)))] * 2), [0, 1], max_steps=3)
    assert str(caught.value) == (
        "A rollout cannot sample actions from Normal with TanhTransform, StickBreakingTransform, because it samples by "
        "inverse CDF. The supported distributions are Categorical, Bernoulli and Normal (also inside Independent), and "
        "Normal with elementwise transforms such as tanh. Pass a function that calls the policy and returns one of "
        "these distributions."
    )


@pytest.mark.parametrize("rows", [(2,), ()])
def test_a_probabilistic_actor_is_traced_with_and_without_a_batch(rows):
    actor = agents.probabilistic_actor(agents.Walking(spaces.Discrete(4)))
    points = hook_points(actor, TensorDict({"observation": torch.zeros(*rows, 3)}, rows))
    name = "module.0.module.1"
    twin = PatchedPolicy(points, zero_ablate(points.site(name)))
    seen = TensorDict({"observation": torch.randn(5, 3)}, [5]) if rows else TensorDict({"observation": torch.randn(3)})
    assert not torch.equal(twin(seen.clone())["logits"], actor(seen.clone())["logits"])
