import random
import sys
import time
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from tensordict import TensorDict
from torch import nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from chanpatch.engine.moments import published
from chanpatch.errors import DistributionError, MissingPackageError, RolloutError
from chanpatch.patching import edit, zero_ablate
from chanpatch.policies import PairedRollouts, PatchedPolicy, paired_rollouts, rollout
from chanpatch.registry import Site, hook_points
from chanpatch.statistics import paired_counts
from chanpatch.statistics.flips import ranked_interval

SEEDS = [3, 11, 4, 90, 2, 77, 5]


class CategoricalPolicy(nn.Module):
    """A small policy for CartPole that keeps the number of rows of every forward."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.note = [].append  # what a list of its own holds is put back

    @property
    def forwards(self):
        return self.note.__self__

    def forward(self, observations):
        self.note((published.now.step, published.now.rows.tolist(), len(observations)))
        return Categorical(logits=self.layers(observations))


def cart_poles(num_envs, autoreset_mode=AutoresetMode.NEXT_STEP):
    return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * num_envs, autoreset_mode=autoreset_mode)


def same(first, second):
    return first.to_records() == second.to_records() and all(
        np.array_equal(a, b) for a, b in zip(first.actions, second.actions, strict=True)
    )


def draws(sampling_seed, seed, steps):
    source = np.random.SeedSequence(sampling_seed, spawn_key=(seed, 0))
    return np.random.Generator(np.random.Philox(source)).random(steps)


def test_a_rollout_is_the_loop_over_one_environment_written_out():
    policy = CategoricalPolicy()
    result = rollout(policy, cart_poles(3), SEEDS, max_steps=60, sampling_seed=8)
    environment = gymnasium.make("CartPole-v1")
    for episode, seed in enumerate(SEEDS):
        observation, _ = environment.reset(seed=seed)
        actions, total, terminated, truncated = [], 0.0, False, False
        for uniform in draws(8, seed, 60):
            with torch.no_grad():
                probability_of_left = policy.layers(torch.as_tensor(observation)[None]).softmax(-1)[0, 0]
            actions.append(int(uniform >= probability_of_left.item()))
            observation, reward, terminated, truncated, _ = environment.step(actions[-1])
            total += float(reward)
            if terminated or truncated:
                break
        assert result.actions[episode].tolist() == actions
        assert result.to_records()[episode] == {
            "seed": seed,
            "return": total,
            "length": len(actions),
            "terminated": terminated,
            "truncated": truncated or not terminated,
        }


def test_identical_policies_have_identical_trajectories():
    policies = {"one": CategoricalPolicy(), "other": CategoricalPolicy()}
    pairs = paired_rollouts(policies, cart_poles(4), SEEDS, max_steps=100)
    assert same(pairs["one"], pairs["other"])


def test_identical_policies_with_dropout_have_identical_trajectories():
    policy = nn.Sequential(nn.Linear(4, 16), nn.Dropout(), nn.Linear(16, 2))

    def act(observations):
        return Categorical(logits=policy(observations))

    pairs = paired_rollouts({"one": act, "other": act}, cart_poles(4), SEEDS, max_steps=100)
    assert same(pairs["one"], pairs["other"])


def test_a_twin_with_an_identity_edit_has_the_trajectories_of_the_original():
    policy = CategoricalPolicy()
    twin = PatchedPolicy(policy, edit(Site("layers.1"), lambda region: region.clone()))
    pairs = paired_rollouts({"original": policy, "twin": twin}, cart_poles(4), SEEDS, max_steps=100)
    assert same(pairs["original"], pairs["twin"])


def test_a_twin_with_every_logit_ablated_follows_the_draws_alone():
    twin = PatchedPolicy(CategoricalPolicy(), zero_ablate(Site("layers.2")))
    result = rollout(twin, cart_poles(4), SEEDS, max_steps=100)
    for seed, length, actions in zip(result.seeds, result.lengths, result.actions, strict=True):
        assert actions.tolist() == (draws(0, seed, length) >= 0.5).tolist()


def test_a_patch_sees_the_step_and_the_episodes_of_each_forward():
    seen = []

    def remember(region, *, context):
        seen.append((context.step, context.rows.tolist()))
        return region

    policy = CategoricalPolicy()
    points = hook_points(policy.layers, torch.zeros(2, 4))
    policy.layers = PatchedPolicy(points, edit(points.site("1"), remember))
    rollout(policy, cart_poles(4), SEEDS, max_steps=100)
    assert seen == [(step, rows) for step, rows, _ in policy.forwards]


def test_a_stable_baselines_policy_can_be_rolled_out():
    policy = PPO("MlpPolicy", gymnasium.make("CartPole-v1"), seed=0, device="cpu").policy
    policy.set_training_mode(False)
    twin = PatchedPolicy(policy, edit(Site("action_net"), lambda region: region))
    pairs = paired_rollouts({"original": policy, "twin": twin}, cart_poles(4), SEEDS, max_steps=100)
    assert same(pairs["original"], pairs["twin"])


def test_different_policies_start_from_the_same_levels_and_then_part():
    policies = {"one": CategoricalPolicy(1), "other": CategoricalPolicy(2)}
    pairs = paired_rollouts(policies, cart_poles(4), SEEDS, max_steps=100)
    assert not same(pairs["one"], pairs["other"])
    assert same(pairs["other"], rollout(policies["other"], cart_poles(4), SEEDS, max_steps=100))


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("num_envs", [1, 2, 7, 10])
def test_neither_the_number_of_environments_nor_their_autoreset_mode_matters(num_envs, mode):
    policy = CategoricalPolicy()
    expected = rollout(policy, cart_poles(3), SEEDS, max_steps=100)
    assert expected.lengths.min() < expected.lengths.max()
    assert same(expected, rollout(policy, cart_poles(num_envs, mode), SEEDS, max_steps=100))


def test_asynchronous_environments_give_the_same_rollout():
    envs = AsyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.DISABLED)
    try:
        result = rollout(CategoricalPolicy(), envs, SEEDS, max_steps=100)
    finally:
        envs.close()
    assert same(result, rollout(CategoricalPolicy(), cart_poles(3), SEEDS, max_steps=100))


@pytest.mark.parametrize("mode", AutoresetMode)
def test_asynchronous_environments_without_shared_memory_give_the_same_rollout_or_are_refused(mode):
    made = [lambda: gymnasium.make("CartPole-v1")] * 2
    envs = AsyncVectorEnv(made, shared_memory=False, autoreset_mode=mode)
    try:
        if mode is not AutoresetMode.NEXT_STEP:
            result = rollout(CategoricalPolicy(), envs, SEEDS, max_steps=100)
            assert same(result, rollout(CategoricalPolicy(), cart_poles(3), SEEDS, max_steps=100))
            return
        with pytest.raises(RolloutError) as caught:
            rollout(CategoricalPolicy(), envs, SEEDS, max_steps=100)
    finally:
        envs.close()
    assert str(caught.value) == (
        "An AsyncVectorEnv with shared_memory=False may reset an episode a second time in its first step. Pass "
        "shared_memory=True or autoreset_mode=AutoresetMode.SAME_STEP to the AsyncVectorEnv."
    )


def test_an_episode_does_not_depend_on_the_other_seeds():
    together = rollout(CategoricalPolicy(), cart_poles(3), SEEDS, max_steps=100)
    turned = rollout(CategoricalPolicy(), cart_poles(3), SEEDS[::-1], max_steps=100)
    alone = rollout(CategoricalPolicy(), cart_poles(3), SEEDS[4:5], max_steps=100)
    assert together.to_records() == turned.to_records()[::-1]
    assert together.to_records()[4:5] == alone.to_records()


def test_a_seed_listed_twice_is_the_same_level_with_other_draws():
    fair = nn.Sequential(nn.Linear(4, 2))
    nn.init.zeros_(fair[0].weight)
    nn.init.zeros_(fair[0].bias)
    seen = []

    def act(observations):
        seen.append(observations)
        return Categorical(logits=fair(observations))

    result = rollout(act, cart_poles(2), [6, 6], max_steps=12)
    assert torch.equal(seen[0][0], seen[0][1])
    assert not np.array_equal(result.actions[0], result.actions[1])


def test_another_sampling_seed_gives_other_draws_in_the_same_levels():
    first, second = (
        rollout(CategoricalPolicy(), cart_poles(3), SEEDS, max_steps=100, sampling_seed=seed) for seed in (1, 2)
    )
    assert first.seeds == second.seeds
    assert not same(first, second)


def test_the_policy_sees_only_the_episodes_that_still_run_once_per_step():
    policy = CategoricalPolicy()
    result = rollout(policy, cart_poles(4), SEEDS, max_steps=100)
    expected = []
    for wave in (range(4), range(4, 7)):
        for step in range(max(result.lengths[list(wave)])):
            running = [episode for episode in wave if result.lengths[episode] > step]
            expected.append((step, running, len(running)))
    assert policy.forwards == expected


def test_the_published_context_ends_with_the_rollout():
    rollout(CategoricalPolicy(), cart_poles(2), SEEDS, max_steps=3)
    assert (published.now.step, published.now.rows) == (None, None)


def test_an_episode_is_truncated_at_max_steps():
    result = rollout(CategoricalPolicy(), cart_poles(3), SEEDS, max_steps=9)
    assert result.lengths.max() == 9
    assert (result.lengths[result.truncated] == 9).all()
    assert result.truncated.any()
    assert not (result.truncated & result.terminated).any()
    assert (result.truncated | result.terminated).all()


def test_an_episode_that_the_environment_cuts_is_truncated():
    envs = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1", max_episode_steps=5)] * 2)
    result = rollout(CategoricalPolicy(), envs, SEEDS, max_steps=100)
    assert result.lengths.tolist() == [5] * len(SEEDS)
    assert result.truncated.all() and not result.terminated.any()


def test_greedy_actions_are_the_modes():
    policy = CategoricalPolicy()
    observed = []
    policy.register_forward_hook(lambda module, args, output: observed.append((args[0], output.probs)))
    result = rollout(policy, cart_poles(1), [5], max_steps=20, greedy=True)
    assert result.actions[0].tolist() == [int(probabilities.argmax()) for _, probabilities in observed]


def test_random_number_generators_are_left_as_they_were_found():
    policy = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

    def act(observations):
        random.random(), np.random.random()
        return Categorical(logits=policy(observations))

    rollout(act, cart_poles(3), SEEDS, max_steps=20)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_running_statistics_of_a_policy_in_training_are_left_as_they_were_found():
    class Policy(nn.Sequential):
        def forward(self, observations):
            return Categorical(logits=super().forward(observations))

    policy = Policy(nn.Linear(4, 2), nn.BatchNorm1d(2, eps=1.0)).train()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    rollout(policy, cart_poles(7), SEEDS, max_steps=3)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert policy.training


class LSTMPolicy(nn.Module):
    """Takes and returns the `(hidden, cell)` of an LSTM, each `(layer, batch, feature)`."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.lstm, self.head = nn.LSTM(4, 8, num_layers=2, bias=False), nn.Linear(8, 2, bias=False)

    def initial_state(self, rows):
        return torch.zeros(2, rows, 8), torch.zeros(2, rows, 8)

    def forward(self, observations, state):
        hidden, state = self.lstm(observations[None], state)
        return 200 * self.head(hidden[0]), state


def recurrent_by_hand(policy, seed, max_steps):
    """Play one episode alone, in one environment, with the state carried from step to step."""
    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=seed)
    state, actions = policy.initial_state(1), []
    for uniform in draws(0, seed, max_steps):
        with torch.no_grad():
            logits, state = policy(torch.as_tensor(observation)[None], state)
        actions.append(int(uniform >= logits.softmax(-1)[0, 0].item()))
        observation, _, terminated, truncated, _ = environment.step(actions[-1])
        if terminated or truncated:
            break
    return actions


@pytest.mark.parametrize("num_envs", [1, 3, 7])
def test_a_recurrent_policy_carries_the_state_of_each_episode_by_itself(num_envs):
    policy = LSTMPolicy()
    result = rollout(
        policy, cart_poles(num_envs), SEEDS, max_steps=60, outputs="logits", initial_state=policy.initial_state
    )
    for seed, actions in zip(SEEDS, result.actions, strict=True):
        assert actions.tolist() == recurrent_by_hand(policy, seed, 60)
    forgetful = lambda x: policy(x, policy.initial_state(len(x)))[0]  # noqa: E731
    assert not same(result, rollout(forgetful, cart_poles(num_envs), SEEDS, max_steps=60, outputs="logits"))


def test_a_patched_recurrent_policy_is_patched_in_every_step():
    policy = LSTMPolicy()
    forwards = []

    def negated(region, *, context):
        forwards.append((context.step, context.rows.tolist(), context.inputs[1][0].shape[1]))
        return -region

    points = hook_points(policy, torch.randn(2, 4), policy.initial_state(2))
    twin = PatchedPolicy(points, edit(points.site("lstm.out[1][0]"), negated))
    settings = {"max_steps": 60, "outputs": "logits", "initial_state": policy.initial_state}
    pairs = paired_rollouts({"original": policy, "twin": twin}, cart_poles(3), SEEDS, **settings)

    def by_hand(observations, state):
        logits, (hidden, cell) = policy(observations, state)
        return logits, (-hidden, cell)

    assert not same(pairs["original"], pairs["twin"])
    assert same(pairs["twin"], rollout(by_hand, cart_poles(3), SEEDS, **settings))
    lengths = pairs["twin"].lengths
    expected = [
        (step, [episode for episode in wave if lengths[episode] > step])
        for wave in ([0, 1, 2], [3, 4, 5], [6])
        for step in range(max(lengths[wave]))
    ]
    assert forwards == [(step, rows, len(rows)) for step, rows in expected]


COUNTERS = {
    "tensor": (lambda rows: torch.zeros(rows), lambda state: state, lambda count: count),
    "row": (lambda rows: torch.zeros(1, 5, rows), lambda state: state[0, 0], lambda count: count.expand(1, 5, -1)),
    "dict": (lambda rows: {"n": torch.zeros(rows, 1)}, lambda state: state["n"][:, 0], lambda n: {"n": n[:, None]}),
    "TensorDict": (
        lambda rows: TensorDict({"n": torch.zeros(rows, 1)}, [rows]),
        lambda state: state["n"][:, 0],
        lambda n: TensorDict({"n": n[:, None]}, [len(n)]),
    ),
    "mixed": (lambda rows: (None, [torch.zeros(rows)]), lambda state: state[1][0], lambda n: (None, [n])),
}


@pytest.mark.parametrize("kind", COUNTERS)
def test_a_state_may_have_any_form_and_begins_anew_with_every_episode(kind):
    initial_state, count_of, state_of = COUNTERS[kind]

    def every_third(observations, state):
        count = count_of(state)
        assert len(count) == len(observations)
        return Bernoulli((count % 3 == 2).double()), state_of(count + 1)

    result = rollout(every_third, cart_poles(3), SEEDS, max_steps=60, initial_state=initial_state)
    assert len(set(result.lengths)) > 1
    for actions in result.actions:
        assert actions.tolist() == [int(step % 3 == 2) for step in range(len(actions))]


def test_a_state_comes_in_the_dtype_of_the_policy():
    policy = LSTMPolicy().double()
    result = rollout(policy, cart_poles(2), [3], max_steps=4, outputs="logits", initial_state=policy.initial_state)
    assert result.lengths.tolist() == [4]


def test_observations_are_not_converted_to_the_dtype_of_quantized_weights():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(
                torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]], dtype=torch.int8), requires_grad=False
            )

        def forward(self, observations):
            return observations.float() @ self.weight.float().T

    policy = Quantized()
    wanted = rollout(lambda seen: policy(seen), cart_poles(2), SEEDS, max_steps=40, outputs="logits")
    assert same(rollout(policy, cart_poles(2), SEEDS, max_steps=40, outputs="logits"), wanted)


class Spaces(gymnasium.Env):
    """Any spaces; ends after six steps, and its reward is the sum of the action."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), self.steps == 6, False, {}


def environments(observation_space, action_space, num_envs=2):
    return SyncVectorEnv([lambda: Spaces(observation_space, action_space)] * num_envs)


VECTOR = gymnasium.spaces.Box(-1, 1, (3,), np.float64)


def test_normal_actions_are_quantiles_of_the_normal_distribution():
    envs = environments(VECTOR, gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32))
    mean, spread = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    result = rollout(
        lambda x: Independent(Normal(mean.expand(len(x), 2), spread.expand(len(x), 2)), 1),
        envs,
        [7, 8, 9],
        max_steps=10,
    )
    for seed, actions in zip(result.seeds, result.actions, strict=True):
        uniform = torch.from_numpy(draws(0, seed, (6, 2)))
        expected = Normal(mean.double(), spread.double()).icdf(uniform)
        assert actions.dtype == np.float32
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)


def test_bernoulli_actions_happen_as_often_as_their_probability():
    envs = environments(VECTOR, gymnasium.spaces.MultiBinary(3), num_envs=8)
    probabilities = torch.tensor([0.0, 0.3, 1.0])
    result = rollout(lambda x: Bernoulli(probabilities.expand(len(x), 3)), envs, range(400), max_steps=10)
    happened = np.concatenate(result.actions).mean(0)
    assert happened[0] == 0 and happened[2] == 1
    assert happened[1] == pytest.approx(0.3, abs=4 * (0.21 / 2400) ** 0.5)


def test_categorical_actions_happen_as_often_as_their_probability_and_never_at_zero():
    envs = environments(VECTOR, gymnasium.spaces.MultiDiscrete([4, 4]), num_envs=8)
    probabilities = torch.tensor([[0.0, 0.2, 0.5, 0.3], [0.6, 0.0, 0.4, 0.0]])
    result = rollout(
        lambda x: Independent(Categorical(probabilities.expand(len(x), 2, 4)), 1),
        envs,
        range(400),
        max_steps=10,
    )
    actions = np.concatenate(result.actions)
    happened = np.stack([np.bincount(column, minlength=4) / len(actions) for column in actions.T])
    assert (happened[probabilities.numpy() == 0] == 0).all()
    np.testing.assert_allclose(happened, probabilities, atol=4 * (0.25 / 2400) ** 0.5)


class Moded(Categorical):
    """Has a method `mode`, as the distributions of many agents from before torch had that attribute."""

    def mode(self):
        return self.probs.argmax(-1, keepdim=True)


def test_a_distribution_whose_mode_is_a_method_is_played_greedily():
    policy = CategoricalPolicy()
    moded = rollout(lambda seen: Moded(logits=policy.layers(seen)), cart_poles(3), SEEDS, max_steps=40, greedy=True)
    assert same(moded, rollout(policy, cart_poles(3), SEEDS, max_steps=40, greedy=True))


class Truncated(Normal):
    def sample(self, sample_shape=()):
        return super().sample(sample_shape).clamp(-1, 1)


class Clipped(Independent):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).clamp(-1, 1)


class Shifted(TransformedDistribution):
    def sample(self, sample_shape=()):
        return super().sample(sample_shape) + 1


OWN = {
    "Truncated": lambda seen: Truncated(seen, 3.0),
    "Clipped": lambda seen: Clipped(Normal(seen, 3.0), 1),
    "Shifted": lambda seen: Shifted(Normal(seen, 3.0), TanhTransform()),
}


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_a_distribution_that_samples_in_its_own_way_is_refused(name, greedy):
    envs = environments(gymnasium.spaces.Box(-1, 1, (3,)), gymnasium.spaces.Box(-1, 1, (3,)))
    with pytest.raises(DistributionError) as caught:
        rollout(OWN[name], envs, [1], max_steps=4, greedy=greedy)
    assert str(caught.value) == (
        f"{name} has its own sample() or rsample(), but a rollout samples by inverse CDF. Pass a function that calls "
        f"the policy and returns a distribution from torch.distributions. If {name} clips its samples, clip the "
        "actions in a wrapper of the environments."
    )


@pytest.mark.parametrize("outputs", [None, "actions"])
def test_actions_in_bfloat16_are_those_of_the_policy(outputs):
    box = gymnasium.spaces.Box(-9, 9, (3,))
    policy = nn.Linear(3, 3).bfloat16()
    given = policy if outputs else lambda seen: Normal(policy(seen.bfloat16()), 1.0)
    done = rollout(given, environments(box, box), [1], max_steps=4, greedy=True, outputs=outputs, keep="observations")
    wanted = policy(torch.from_numpy(done.kept["observations"][0]).bfloat16()).float()
    torch.testing.assert_close(torch.from_numpy(done.actions[0]), wanted.detach(), rtol=0.02, atol=0.02)


def test_a_bernoulli_tie_is_a_no_when_greedy_as_in_predict():
    envs = environments(VECTOR, gymnasium.spaces.MultiBinary(2))
    result = rollout(lambda x: Bernoulli(torch.full((len(x), 2), 0.5)), envs, [1], max_steps=10, greedy=True)
    assert (result.actions[0] == 0).all()


def test_dict_observations_reach_the_policy_as_tensors_of_its_dtype():
    space = gymnasium.spaces.Dict(
        {
            "image": gymnasium.spaces.Box(0, 255, (2, 2), np.uint8),
            "pair": gymnasium.spaces.Tuple((VECTOR, gymnasium.spaces.Discrete(5))),
        }
    )
    seen = []

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, observations):
            seen.append(observations)
            return Categorical(logits=self.head(observations["pair"][0]))

    rollout(Policy(), environments(space, gymnasium.spaces.Discrete(2)), [1, 2], max_steps=2)
    assert seen[0]["image"].dtype == torch.uint8 and seen[0]["image"].shape == (2, 2, 2)
    assert seen[0]["pair"][0].dtype == torch.float32 and seen[0]["pair"][0].shape == (2, 3)
    assert seen[0]["pair"][1].dtype == torch.int64 and seen[0]["pair"][1].shape == (2,)


def test_no_gradient_is_recorded_in_a_rollout():
    recorded = []

    def act(observations):
        recorded.append(torch.is_grad_enabled())
        return Bernoulli(torch.full((len(observations),), 0.5))

    rollout(act, cart_poles(1), [1], max_steps=2)
    assert recorded == [False, False]
    assert torch.is_grad_enabled()


def test_a_rollout_prints_as_a_table_of_its_first_episodes():
    envs = environments(VECTOR, gymnasium.spaces.MultiBinary(3))
    result = rollout(lambda x: Bernoulli(torch.ones(len(x), 3)), envs, [1_000_000, *range(21)], max_steps=6)
    row = "{:<7}  18      6       True        False\n"
    assert repr(result) == (
        "22 episodes\n"
        "seed     return  length  terminated  truncated\n"
        + "".join(row.format(seed) for seed in [1_000_000, *range(19)])
        + "... 2 more"
    )


POLICIES = {
    "fair": lambda x: Bernoulli(torch.full((len(x),), 0.5)),
    "always right": lambda x: Bernoulli(torch.ones(len(x))),
    "fair again": lambda x: Bernoulli(torch.full((len(x),), 0.5)),
}


def test_paired_rollouts_print_as_one_row_per_policy_with_its_difference_to_the_first():
    pairs = paired_rollouts(POLICIES, cart_poles(4), range(8), max_steps=99)
    first, right = pairs["fair"], pairs["always right"]
    interval = pairs.interval()
    columns = [line.split("  ") for line in repr(pairs).splitlines()]
    filled = [[cell.strip() for cell in row if cell.strip()] for row in columns]
    assert filled[:2] == [
        ["3 policies over the same 8 episodes"],
        ["policy", "mean return", "difference", "joint 95%", "mean length", "terminated"],
    ]
    ended = f"{first.terminated.mean():.1%}"
    assert filled[2] == ["fair", f"{first.returns.mean():.4g}", f"{first.lengths.mean():.4g}", ended]
    assert filled[3][:4] == [
        "always right",
        f"{right.returns.mean():.4g}",
        f"{interval.estimate[0]:+.3g}",
        f"{interval.low[0]:+.3g} to {interval.high[0]:+.3g} (few)",
    ]
    assert filled[4][2:4] == ["+0", "-"]  # the same draws behind the actions
    assert repr(pairs).splitlines()[-2:] == [
        "few: an interval over fewer than ten independent rows.",
        "No interval (-): fewer than 6 of the 8 rows have a nonzero value.",
    ]


def test_policies_are_compared_with_the_first_episode_by_episode():
    pairs = paired_rollouts(POLICIES, cart_poles(4), range(8), max_steps=99)
    assert pairs.labels == ("always right", "fair again")
    expected = pairs["always right"].returns - pairs["fair"].returns
    np.testing.assert_array_equal(pairs.differences(), [expected, np.zeros(8)])
    np.testing.assert_allclose(pairs.effect(), [expected.mean(), 0])
    by_hand = ranked_interval(pairs.differences().T, seed=0)
    interval, top = pairs.interval(), pairs.top(1).interval()
    assert (interval.low[0], interval.high[0]) == (top.low[0], top.high[0]) == (by_hand.low[0], by_hand.high[0])
    assert pairs.comparisons()[0] == {
        "label": "always right",
        "effect": pytest.approx(expected.mean()),
        "low": by_hand.low[0],
        "high": by_hand.high[0],
        "note": "few",
        "patched": pairs["always right"].returns.mean(),
        "original": pairs["fair"].returns.mean(),
        "n": 8,
    }


def test_episodes_of_one_seed_are_a_cluster():
    seeds = [*range(7)] * 3
    pairs = paired_rollouts(POLICIES, cart_poles(7), seeds, max_steps=99)
    expected = ranked_interval(pairs.differences().reshape(2, 3, 7).mean(axis=1).T, seed=0)
    assert pairs.interval().low[0] == pytest.approx(expected.low[0])
    assert pairs.interval().high[0] == pytest.approx(expected.high[0]) and pairs.interval().note[0] == "few"
    assert repr(pairs).startswith("3 policies over the same 21 episodes (7 seeds)\n")


def test_fewer_than_six_seeds_have_no_interval_however_often_they_are_repeated():
    pairs = paired_rollouts(POLICIES, cart_poles(5), [*range(5)] * 8, max_steps=99)
    assert np.isnan([pairs.interval().low, pairs.interval().high]).all()
    assert repr(pairs).splitlines()[-1] == "No interval (-): 5 independent clusters, fewer than 6."


def test_returns_that_differ_by_rounding_alone_have_no_interval():
    first = rollout(POLICIES["fair"], cart_poles(4), range(8), max_steps=99)
    pairs = PairedRollouts({"fair": first, "same": replace(first, returns=first.returns * (1 + 3e-16))})
    assert pairs.effect()[0] > 0 and pairs.interval().note[0] == "fewer than 6 of the 8 rows have a nonzero value"


def test_rollouts_over_other_episodes_are_not_compared():
    one, other = (rollout(POLICIES["fair"], cart_poles(4), seeds, max_steps=9) for seeds in (range(4), range(1, 5)))
    with pytest.raises(RolloutError, match="cannot be compared because their rollouts used different seeds"):
        PairedRollouts({"one": one, "other": other}).comparisons()


def test_one_policy_alone_is_compared_with_none():
    alone = paired_rollouts({"fair": POLICIES["fair"]}, cart_poles(4), range(4), max_steps=9)
    assert (alone.labels, alone.comparisons(), alone.differences().shape) == ((), [], (0, 4))
    assert repr(alone).splitlines()[1].split() == ["policy", "mean", "return", "mean", "length", "terminated"]


def test_paired_rollouts_are_a_mapping_whose_records_name_the_policy():
    policies = {"one": CategoricalPolicy(1), "other": CategoricalPolicy(2)}
    pairs = paired_rollouts(policies, cart_poles(3), SEEDS, max_steps=30)
    assert list(pairs) == ["one", "other"]
    frame = pairs.to_pandas()
    assert frame.columns.tolist() == ["policy", "seed", "return", "length", "terminated", "truncated"]
    assert frame.groupby("policy")["length"].sum().to_dict() == {name: pairs[name].lengths.sum() for name in pairs}


def test_paired_rollouts_count_episodes_by_outcome():
    policies = {"one": CategoricalPolicy(1), "other": CategoricalPolicy(2)}
    pairs = paired_rollouts(policies, cart_poles(3), SEEDS, max_steps=100)
    counts = paired_counts(pairs["one"].lengths > 20, pairs["other"].lengths > 20)
    assert sum(counts) == len(SEEDS)
    assert counts.both + counts.only_first == sum(length > 20 for length in pairs["one"].lengths)


def refused(error, **changed):
    arguments = {
        "policy": CategoricalPolicy(),
        "envs": cart_poles(2),
        "seeds": SEEDS,
        "max_steps": 5,
        **changed,
    }
    with pytest.raises(error) as caught:
        rollout(arguments.pop("policy"), arguments.pop("envs"), arguments.pop("seeds"), **arguments)
    return str(caught.value)


def test_a_distribution_without_a_known_inverse_cdf_is_refused():
    policy = lambda x: Independent(Beta(torch.ones(len(x), 1), torch.ones(len(x), 1)), 1)  # noqa: E731
    assert refused(DistributionError, policy=policy) == (
        "A rollout cannot sample actions from Beta, because it samples by inverse CDF. The supported distributions are "
        "Categorical, Bernoulli and Normal (also inside Independent), and Normal with elementwise transforms such as "
        "tanh. Pass a function that calls the policy and returns one of these distributions."
    )


def test_environments_that_take_only_one_seed_are_refused():
    assert refused(RolloutError, envs=CartPoleVectorEnv(num_envs=2)) == (
        "CartPoleVectorEnv cannot be reset with one seed per sub-environment. Use a SyncVectorEnv or an "
        'AsyncVectorEnv, for example gymnasium.make_vec(..., vectorization_mode="sync").'
    )


def test_actions_that_do_not_fit_the_environments_are_refused():
    assert refused(RolloutError, policy=lambda x: Normal(torch.zeros(len(x), 3), 1.0)) == (
        "The policy's actions have shape (2, 3) for a batch of size 2, but Discrete(2) expects shape (2,)."
    )


def stateful(state):
    """Return a policy that returns this state, whatever it was given."""
    return lambda observations, _: (torch.zeros(len(observations), 2), state(len(observations)))


@pytest.mark.parametrize(
    ("initial_state", "message"),
    [
        (
            torch.zeros(2, 8),
            "initial_state must be a function that receives the number of rows in the batch and returns the initial "
            "state, such as lambda rows: torch.zeros(1, rows, 64); got Tensor.",
        ),
        (
            lambda rows: (torch.zeros(rows, 2), torch.zeros(1, 2, 8)),
            "state[1] has shape (1, 2, 8) in initial_state(2) and (1, 2, 8) in initial_state(3). Each tensor must "
            "have exactly one batch axis, whose length is the number of rows in the batch.",
        ),
        (
            lambda rows: {"h": torch.zeros(rows, rows)},
            'state["h"] has shape (2, 2) in initial_state(2) and (3, 3) in initial_state(3). Each tensor must '
            "have exactly one batch axis, whose length is the number of rows in the batch.",
        ),
        (
            lambda rows: torch.zeros(2 * rows, 8),
            "state has shape (4, 8) in initial_state(2) and (6, 8) in initial_state(3). Each tensor must "
            "have exactly one batch axis, whose length is the number of rows in the batch.",
        ),
        (
            lambda rows: [torch.zeros(8)] * rows,
            "initial_state must return at least one tensor, and the same structure for any number of rows in the "
            "batch. Number of tensors in initial_state(2): 2; in initial_state(3): 3.",
        ),
        (
            lambda rows: None,
            "initial_state must return at least one tensor, and the same structure for any number of rows in the "
            "batch. Number of tensors in initial_state(2): 0; in initial_state(3): 0.",
        ),
    ],
)
def test_a_state_without_one_batch_axis_per_tensor_is_refused(initial_state, message):
    policy = stateful(lambda rows: torch.zeros(rows, 8))
    assert refused(RolloutError, policy=policy, initial_state=initial_state) == message


def test_a_new_state_of_another_shape_is_refused():
    policy = stateful(lambda rows: (torch.zeros(rows, 1, 8), torch.zeros(1, rows, 8)))
    initial_state = lambda rows: (torch.zeros(1, rows, 8), torch.zeros(1, rows, 8))  # noqa: E731
    assert refused(RolloutError, policy=policy, initial_state=initial_state) == (
        "state[0] has shape (1, 2, 8) when passed to the policy, but (2, 1, 8) in the state that the policy returns. "
        "Return a state with the same tensors and shapes."
    )


def test_a_new_state_with_other_tensors_is_refused():
    policy = stateful(lambda rows: {"h": torch.zeros(rows, 8)})
    initial_state = lambda rows: {"h": torch.zeros(rows, 8), "c": torch.zeros(rows, 8)}  # noqa: E731
    assert refused(RolloutError, policy=policy, initial_state=initial_state) == (
        'state["c"] has shape (2, 8) when passed to the policy, but none in the state that the policy returns. '
        "Return a state with the same tensors and shapes."
    )


def test_a_recurrent_policy_that_returns_no_pair_is_refused():
    initial_state = lambda rows: torch.zeros(rows, 8)  # noqa: E731
    message = (
        "With initial_state, the policy must return (output, new state); got {}. Pass a function that accepts "
        "(observations, state) and returns such a pair."
    )
    alone, many = lambda x, state: torch.zeros(len(x), 2), lambda x, state: (x, x, state)  # noqa: E731
    assert refused(RolloutError, policy=alone, initial_state=initial_state) == message.format("Tensor")
    assert refused(RolloutError, policy=many, initial_state=initial_state) == message.format("3 items")


IMAGE = gymnasium.spaces.Box(0, 255, (3,), np.uint8)


class Embedded(nn.Module):
    """Turns bytes into fractions by itself."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, image):
        assert image.dtype == torch.uint8
        return self.head(image / 255)


def test_bytes_reach_a_policy_that_takes_them():
    envs = environments(IMAGE, gymnasium.spaces.Discrete(2))
    assert rollout(Embedded(), envs, [1], max_steps=10, outputs="logits").lengths.tolist() == [6]


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv1d(3, 2, 1), nn.LSTMCell(3, 2), nn.LayerNorm(3)])
def test_a_policy_that_refuses_bytes_is_told_to_convert_them(layer):
    envs = environments(IMAGE, gymnasium.spaces.Discrete(2))
    policy = nn.Sequential(nn.Unflatten(1, (3, 1)), layer) if isinstance(layer, nn.Conv1d) else layer
    message = refused(RolloutError, policy=policy, envs=envs)
    assert message.startswith("The policy failed on observations of dtype torch.uint8 (")
    assert message.endswith(
        "). A rollout does not preprocess observations. Convert the observations as in training, inside the policy "
        "or in a wrapper function such as lambda observations: policy(observations.float() / 255)."
    )


def test_a_policy_that_refuses_doubles_is_told_to_convert_them_without_a_scale():
    envs = environments(gymnasium.spaces.Box(-1, 1, (3,), np.float64), gymnasium.spaces.Discrete(2))
    layer = nn.Linear(3, 2)
    message = refused(RolloutError, policy=lambda seen: layer(seen), envs=envs)
    assert message.endswith("such as lambda observations: policy(observations.float()).")


def test_a_state_that_the_policy_keeps_for_more_rows_than_still_run_gets_advice():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head, self.hidden = nn.GRUCell(4, 8), nn.Linear(8, 2), None

        def forward(self, observations):
            self.hidden = self.cell(observations, self.hidden)
            return self.head(self.hidden)

    message = refused(RolloutError, policy=Keeping(), max_steps=99, envs=cart_poles(3), outputs="logits")
    assert message == (
        "The policy failed when the number of running episodes fell from 3 to 2 (Input batch size 2 doesn't match "
        "hidden0 batch size 3). If the policy stores a recurrent state with one row per environment, return that "
        "state from the policy and pass initial_state, or use a single environment."
    )


def test_an_error_of_the_policys_own_stays_as_it_is():
    envs = environments(IMAGE, gymnasium.spaces.Discrete(2))
    policy = lambda x: nn.Linear(4, 2)(x / 255)  # noqa: E731
    assert "mat1 and mat2 shapes cannot be multiplied" in refused(RuntimeError, policy=policy, envs=envs)


def test_a_mistake_of_dtypes_that_is_not_about_the_observations_stays_as_it_is():
    policy = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2).double())
    assert "must have the same dtype" in refused(RuntimeError, policy=policy)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": []}, "seeds is empty: pass one seed per episode."),
        ({"seeds": [3, -4]}, "A seed must be a whole number, at least 0; got -4."),
        ({"seeds": [0.5]}, "A seed must be a whole number, at least 0; got 0.5."),
        ({"seeds": [3, 2**64]}, "A seed must be less than 2**63, to fit in int64; got 18446744073709551616."),
        ({"sampling_seed": -1}, "sampling_seed must be a whole number, at least 0; got -1."),
        ({"max_steps": 0}, "max_steps must be a whole number, at least 1; got 0."),
        ({"max_steps": 2.5}, "max_steps must be a whole number, at least 1; got 2.5."),
    ],
)
def test_a_wrong_number_is_refused_by_name(changed, message):
    assert refused(RolloutError, **changed) == message


def test_no_policy_at_all_is_refused():
    with pytest.raises(RolloutError) as caught:
        paired_rollouts({}, cart_poles(2), SEEDS, max_steps=5)
    assert str(caught.value) == "policies is empty: pass at least one policy."


def test_a_missing_gymnasium_is_named_with_the_line_that_installs_it(monkeypatch):
    envs = cart_poles(2)
    monkeypatch.setitem(sys.modules, "gymnasium.vector", None)
    assert refused(MissingPackageError, envs=envs) == ("gymnasium is not installed: pip install gymnasium")


def test_actions_begin_where_the_discrete_space_begins():
    class Shifted(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(0, 1, (1,)), gymnasium.spaces.Discrete(2, start=3)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            assert self.action_space.contains(action)
            return np.zeros(1, np.float32), float(action), False, False, {}

    def act(observations):
        return Categorical(logits=torch.tensor([[0.0, 0.0]]).expand(len(observations), 2))

    done = rollout(act, gymnasium.vector.SyncVectorEnv([Shifted] * 2), range(4), max_steps=8)
    assert set(np.concatenate(done.actions).tolist()) == {3, 4}
    assert done.returns.tolist() == [actions.sum() for actions in done.actions]


@pytest.mark.slow
@pytest.mark.parametrize(("progress", "drawn"), [(True, True), (False, False), (None, False)])
def test_a_long_rollout_draws_a_progress_bar_off_a_terminal_only_when_asked_to(capsys, progress, drawn):
    def act(observations):
        time.sleep(0.4)
        return Bernoulli(torch.ones(len(observations)))

    rollout(act, cart_poles(1), SEEDS, max_steps=1, progress=progress)
    assert ("7/7" in capsys.readouterr().err) == drawn


def acting(envs, distribution):
    return rollout(lambda observations: distribution(len(observations)), envs, [0, 1], max_steps=3, outputs="logits")


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (
            lambda rows: torch.zeros(rows),
            r"Categorical has batch shape \(\) for a batch of size 2.*logits with shape \(batch, action\)",
        ),
        (lambda rows: torch.zeros(1, 2), r"batch shape \(1,\) for a batch of size 2"),
        (
            lambda rows: Categorical(logits=torch.zeros(rows, 1)),
            r"Categorical has 1 action, but the environment expects Discrete\(2\)",
        ),
        (lambda rows: torch.zeros(rows, 3), "has 3 actions"),
        (lambda rows: Normal(torch.zeros(rows), 1.0), "Normal is continuous"),
    ],
)
def test_a_distribution_for_other_rows_or_over_other_actions_is_refused(distribution, message):
    with pytest.raises(RolloutError, match=message):
        acting(cart_poles(2), distribution)


class Buttons(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_of_several_actions_some_may_have_fewer_choices_if_the_others_logits_are_padded():
    envs = SyncVectorEnv([lambda: Buttons(gymnasium.spaces.MultiDiscrete([2, 3]))] * 2)
    padded = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    assert acting(envs, lambda rows: padded.expand(rows, 2, 3)).actions[0].shape == (3, 2)
    with pytest.raises(RolloutError, match=r"has 3 actions, but the environment expects MultiDiscrete\(\[2 3\]\)"):
        acting(envs, lambda rows: torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 0.0]]).expand(rows, 2, 3))
    with pytest.raises(RolloutError, match="has 2 actions"):
        acting(envs, lambda rows: torch.zeros(rows, 2, 2))


def test_a_normal_presses_no_buttons():
    envs = SyncVectorEnv([lambda: Buttons(gymnasium.spaces.MultiBinary(2))] * 2)
    assert acting(envs, lambda rows: Bernoulli(logits=torch.zeros(rows, 2))).actions[0].shape == (3, 2)
    with pytest.raises(RolloutError, match="Normal is continuous"):
        acting(envs, lambda rows: Normal(torch.zeros(rows, 2), 1.0))


def test_policies_without_names_and_seeds_that_are_a_number_are_refused():
    policy = CategoricalPolicy()
    with pytest.raises(TypeError, match="policies must be a dict that maps names to policies"):
        paired_rollouts([policy, policy], cart_poles(2), range(2), max_steps=3)
    with pytest.raises(RolloutError, match=r"seeds must contain one seed per episode, such as range\(100\); got 5"):
        rollout(policy, cart_poles(2), 5, max_steps=3)
