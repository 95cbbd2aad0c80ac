"""Tensors, distributions and actions that policies return, and the actions that masks allow."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from torch import nn
from torch.distributions import Categorical, Normal

from chanpatch import HookPoints, PatchedPolicy, edit, hook_points, paired_rollouts, rollout, zero_ablate
from chanpatch.errors import DistributionError, NaNError, RolloutError
from chanpatch.metrics import entropy
from chanpatch.policies import action_distribution, rollout_sweep

BARE = (
    "{} returned a torch.float32 tensor of shape ({}, 2), which may contain logits, values or actions. Specify "
    'outputs="logits", outputs="values" (to select the action with the highest value) or outputs="actions".'
)


class Allowing(gymnasium.Env):
    """Gives a reward of 10 to the power of the action; allows two of four actions, which change with every step."""

    observation_space, action_space = spaces.Box(-9, 9, (3,)), spaces.Discrete(4)
    invalid = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._seen()

    def action_masks(self) -> Any:
        return np.isin(range(4), [self.steps % 4, (self.steps + 2) % 4])

    def _seen(self) -> Any:
        return self.np_random.normal(size=3).astype(np.float32), {"action_mask": self.action_masks().astype(np.int8)}

    def step(self, action: Any) -> Any:
        Allowing.invalid += not self.action_masks()[action]
        self.steps += 1
        observation, info = self._seen()
        return observation, float(10**action), self.steps == 3 + self.np_random.integers(3), False, info


MASKS = {
    "a method of the environments": lambda envs, infos: np.stack(envs.call("action_masks")),
    "infos": lambda envs, infos: infos["action_mask"],
}


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


@pytest.fixture
def points(network: nn.Module) -> HookPoints:
    return hook_points(network, torch.zeros(2, 4))


@pytest.fixture
def cart_poles() -> Any:
    return gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")


@pytest.fixture(params=AutoresetMode)
def allowing(request: pytest.FixtureRequest) -> Any:
    Allowing.invalid = 0
    return SyncVectorEnv([Allowing] * 3, autoreset_mode=request.param)


def test_a_tensor_is_not_taken_for_anything_unless_the_user_names_it(network, points, cart_poles):
    patch, more = zero_ablate(points.site("1")), {"max_steps": 3}
    asked = {
        ("Sequential", 5): lambda: action_distribution(network, torch.zeros(5, 4)),
        ("PatchedSequential", 5): lambda: PatchedPolicy(network, patch).distribution(torch.zeros(5, 4)),
        ("Sequential", 2): lambda: rollout(network, cart_poles, [0, 1], **more),
        ("function", 2): lambda: paired_rollouts({"one": lambda x: network(x)}, cart_poles, [0, 1], **more),
        ("PatchedSequential", 1): lambda: rollout_sweep(
            points, SyncVectorEnv(cart_poles.env_fns[:1]), [0], patch, **more
        ),
    }
    for (name, rows), ask in asked.items():
        with pytest.raises(DistributionError) as caught:
            ask()
        assert str(caught.value) == BARE.format(name, rows)


def test_named_logits_are_those_of_the_distribution(network):
    observations = torch.randn(5, 4)
    expected = Categorical(logits=network(observations)).probs
    for output in (lambda x: network(x), lambda x: (network(x), x[:, 0]), lambda x: [network(x), x[:, :1]]):
        found = action_distribution(output, observations, outputs="logits")
        torch.testing.assert_close(found.probs, expected)
    twin = PatchedPolicy(network, edit(hook_points(network, observations).site("1"), lambda a: a))
    torch.testing.assert_close(twin.distribution(observations, outputs="logits").probs, expected)


def test_values_put_all_probability_on_the_highest(network):
    observations = torch.randn(50, 4)
    found = action_distribution(network, observations, outputs="values")
    best = network(observations).argmax(-1)
    assert 0 < best.sum() < 50
    assert torch.equal(found.probs, nn.functional.one_hot(best, 2).float())
    assert torch.equal(found.sample(), best)
    assert not entropy(found).any()


def test_a_rollout_of_values_takes_the_best_action_in_each_step(network, points, cart_poles):
    def greedy(observations):
        return network(observations).argmax(-1)

    policies = {"values": network, "actions": greedy, "logits": network}
    pairs = paired_rollouts(policies, cart_poles, range(6), max_steps=60, outputs={name: name for name in policies})
    greedily = rollout(network, cart_poles, range(6), max_steps=60, outputs="logits", greedy=True)
    for name in ("values", "actions"):
        assert all(np.array_equal(*each) for each in zip(pairs[name].actions, greedily.actions, strict=True))
    assert not np.array_equal(pairs["logits"].lengths, greedily.lengths)
    patch = {"none": zero_ablate(points.site("1", feature=0), where=torch.tensor(False).view(1, 1))}
    swept = rollout_sweep(points, cart_poles, range(6), patch, max_steps=60, outputs="values")
    assert swept["none"].to_records() == greedily.to_records() == swept["original"].to_records()


def test_actions_are_taken_as_they_are():
    class Noting(gymnasium.Env):
        observation_space = spaces.Box(-1, 1, (2,))

        def __init__(self, action_space):
            self.action_space = action_space

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), float(np.sum(action)), False, False, {}

    for space, action in (
        (spaces.Discrete(3, start=2), torch.tensor(4)),
        (spaces.MultiDiscrete([2, 3]), torch.tensor([1, 2])),
        (spaces.MultiBinary(2), torch.tensor([True, False])),
        (spaces.Box(-1, 1, (2,)), torch.tensor([0.5, 3.0], dtype=torch.float64)),
    ):
        envs = SyncVectorEnv([lambda space=space: Noting(space)] * 2)
        act = lambda seen, action=action: action.expand(len(seen), *action.shape)  # noqa: E731
        done = rollout(act, envs, [0, 1, 2], max_steps=2, outputs="actions")
        assert done.returns.tolist() == [2 * action.sum().item()] * 3
        assert done.actions[0].dtype == space.dtype
        for wrong in (torch.full(action.shape, torch.nan), action[None]):
            with pytest.raises(RolloutError, match="The policy.* actions .* but"):
                rollout(lambda seen, wrong=wrong: wrong.expand(len(seen), *wrong.shape), envs, [0, 1], max_steps=2,
                        outputs="actions")  # fmt: skip


@pytest.mark.parametrize(
    ("action", "shown"),
    [(torch.tensor([2, 0]), "[2, 0] (int64)"), (torch.tensor([1.0, 0.0]), "[1.0, 0.0] (float32)")],
)
def test_actions_that_the_environments_do_not_have_are_refused(cart_poles, action, shown):
    with pytest.raises(RolloutError) as caught:
        rollout(lambda _: action, cart_poles, [0, 1], max_steps=2, outputs="actions")
    assert str(caught.value) == (
        f"The policy returned actions {shown}, but the environment expects Discrete(2). Pass a function that calls the "
        "policy and returns actions in this space."
    )


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("outputs", ["logits", "values", None])
def test_masks_leave_only_the_allowed_actions(allowing, masks, outputs):
    torch.manual_seed(0)
    network = nn.Linear(3, 4)
    policy = network if outputs else lambda seen: Categorical(logits=network(seen))
    for greedy in (False, True):
        rollout(policy, allowing, range(7), max_steps=9, outputs=outputs, greedy=greedy)
        assert Allowing.invalid > 0
        Allowing.invalid = 0
        rollout(policy, allowing, range(7), max_steps=9, outputs=outputs, greedy=greedy, masks=masks)
        assert Allowing.invalid == 0


@pytest.mark.parametrize("num_envs", [1, 3])
def test_no_mask_is_asked_for_when_the_last_episodes_end(num_envs):
    class Ending(Allowing):
        """Its last info has no mask, and all episodes are of one length."""

        def step(self, action: Any) -> Any:
            observation, reward, _, _, info = super().step(action)
            over = self.steps == 4
            return observation, reward, over, False, {} if over else info

    Allowing.invalid = 0
    done = rollout(
        nn.Linear(3, 4),
        SyncVectorEnv([Ending] * num_envs),
        range(5),
        max_steps=9,
        outputs="logits",
        masks=MASKS["infos"],
    )
    assert done.lengths.tolist() == [4] * 5 and Allowing.invalid == 0


def test_masks_of_zeros_and_ones_are_bools_of_any_dtype(allowing):
    policy = nn.Linear(3, 4)
    asked = {kind: lambda envs, infos, kind=kind: infos["action_mask"].astype(kind) for kind in (bool, int, float)}
    settings = {"max_steps": 9, "outputs": "logits"}
    found = [rollout(policy, allowing, range(4), masks=each, **settings).returns.tolist() for each in asked.values()]
    assert found[0] == found[1] == found[2] and Allowing.invalid == 0


def test_under_masks_the_best_of_the_allowed_values_is_taken(allowing):
    done = rollout(
        lambda seen: torch.arange(4.0).expand(len(seen), 4), allowing, range(3), max_steps=4, outputs="values",
        masks=MASKS["infos"],
    )  # fmt: skip
    assert all(actions.tolist() == [2, 3, 2, 3][: len(actions)] for actions in done.actions)


def test_masks_apply_to_each_row_of_a_sweep(allowing):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    points = hook_points(network, torch.zeros(2, 3))
    patches = {f"no {n}": zero_ablate(points.site("1", feature=n)) for n in range(3)}
    settings: Any = {"max_steps": 9, "outputs": "logits", "masks": MASKS["infos"]}
    swept = rollout_sweep(points, allowing, range(5), patches, **settings)
    assert Allowing.invalid == 0
    twins = {label: PatchedPolicy(points, patch) for label, patch in patches.items()}
    pairs = paired_rollouts({"original": network, **twins}, allowing, range(5), **settings)
    assert [swept[name].to_records() for name in swept] == [pairs[name].to_records() for name in pairs]


class Masked(nn.Module):
    """A policy with the public shape of sb3-contrib's MaskablePPO."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(3, 4)

    def get_distribution(self, obs, action_masks=None):
        return Categorical(logits=self.network(obs))


def test_a_policy_that_takes_masks_is_not_played_without_them(allowing):
    with pytest.raises(RolloutError) as caught:
        rollout(Masked(), allowing, [0], max_steps=2)
    assert str(caught.value) == (
        "Masked expects action_masks. Without masks, the policy may choose actions that are not allowed. Pass "
        'masks=lambda envs, infos: np.stack(envs.call("action_masks")).'
    )
    rollout(Masked(), allowing, range(7), max_steps=9, masks=MASKS["infos"])
    assert Allowing.invalid == 0


class Around(nn.Module):
    """Holds a policy, and asks it for its distribution."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, seen: Any) -> Any:
        return self.policy.get_distribution(seen)


@pytest.mark.parametrize("wrap", [
    lambda policy: lambda seen: policy.get_distribution(seen),
    lambda policy: policy.get_distribution,
    Around,
])  # fmt: skip
def test_a_policy_that_takes_masks_is_not_played_without_them_through_a_function_or_a_module(allowing, wrap):
    policy = wrap(MaskablePPO("MlpPolicy", Allowing(), seed=0).policy)
    with pytest.raises(RolloutError, match="MaskableActorCriticPolicy expects action_masks"):
        rollout(policy, allowing, range(4), max_steps=9)
    Allowing.invalid = 0
    rollout(policy, allowing, range(4), max_steps=9, masks=MASKS["infos"])
    assert Allowing.invalid == 0


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(2, 1)])
def test_of_a_pair_of_actions_and_values_the_actions_are_taken(cart_poles, value):
    settings: Any = {"max_steps": 20, "outputs": "actions"}
    for rows in (2, 1):  # the actions may have an axis of their own, as in a Box
        envs = gymnasium.make_vec("CartPole-v1", num_envs=rows, vectorization_mode="sync")
        pair = lambda seen: (torch.ones(len(seen), dtype=torch.int64), value[: len(seen)])  # noqa: E731
        alone = lambda seen: torch.ones(len(seen), dtype=torch.int64)  # noqa: E731
        assert (
            rollout(pair, envs, [4, 5], **settings).to_records()
            == rollout(alone, envs, [4, 5], **settings).to_records()
        )


class Parts(gymnasium.Env):
    """Takes actions of two parts, with two and three choices."""

    observation_space, action_space = spaces.Box(-9, 9, (3,)), spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        return self.np_random.normal(size=3).astype(np.float32), float(action @ [1, 10]), False, False, {}


def test_a_list_of_categoricals_chooses_the_parts_of_an_action():
    envs = SyncVectorEnv([Parts] * 2)
    policy = PPO("MlpPolicy", Parts(), seed=0, device="cpu").policy
    done = rollout(policy, envs, range(9), max_steps=9)
    listed = rollout(lambda seen: policy.get_distribution(seen).distribution, envs, range(9), max_steps=9)
    assert done.to_records() == listed.to_records()
    assert {tuple(action) for action in np.concatenate(done.actions)} == {(a, b) for a in range(2) for b in range(3)}
    greedy = rollout(policy, envs, [4], max_steps=1, greedy=True).actions[0][0]
    observation, _ = Parts().reset(seed=4)
    assert greedy.tolist() == policy.predict(observation, deterministic=True)[0].tolist()


@pytest.mark.parametrize("outputs", ["logits", "values"])
def test_nan_that_a_policy_returns_is_an_error_that_names_it(network, points, cart_poles, outputs):
    with torch.no_grad():
        network[2].bias[0] = torch.nan
    with pytest.raises(DistributionError) as caught:
        rollout(network, cart_poles, [0, 1], max_steps=2, outputs=outputs)
    assert str(caught.value) == (
        "Sequential returned a torch.float32 tensor of shape (2, 2) that contains NaN, so no action can be chosen. "
        "Use recording(...) to find the first activation with NaN."
    )


def test_nan_of_a_distribution_that_is_not_validated_is_an_error(cart_poles):
    unchecked = lambda seen: Categorical(logits=torch.full((len(seen), 2), torch.nan), validate_args=False)  # noqa: E731
    for greedy in (False, True):
        with pytest.raises(DistributionError) as caught:
            rollout(unchecked, cart_poles, [0, 1], max_steps=2, greedy=greedy)
        assert str(caught.value) == (
            "The policy's Categorical contains NaN, so no action can be chosen. Use recording(...) to find the "
            "first activation with NaN."
        )


def test_nan_that_a_patch_brings_in_is_the_patchs_error(points, cart_poles):
    patch = edit(points.site("1"), lambda activation: activation * torch.nan)
    with pytest.raises(NaNError, match="NaN"):
        rollout(PatchedPolicy(points, patch), cart_poles, [0, 1], max_steps=2, outputs="logits")
    with pytest.raises(NaNError, match="NaN"):
        rollout_sweep(points, cart_poles, [0, 1], {"nan": patch}, max_steps=2, outputs="logits")


def test_a_maskable_policy_of_sb3_contrib_takes_only_allowed_actions(allowing):
    policy = MaskablePPO("MlpPolicy", Allowing(), seed=0).policy
    with pytest.raises(RolloutError, match="MaskableActorCriticPolicy expects action_masks"):
        rollout(policy, allowing, range(7), max_steps=9)
    Allowing.invalid = 0
    done = rollout(policy, allowing, range(7), max_steps=9, masks=MASKS["a method of the environments"])
    assert Allowing.invalid == 0
    assert len(set(np.concatenate(done.actions).tolist())) == 4


def returning(output: Any, **settings: Any) -> Any:
    return lambda envs: rollout(lambda seen: output(len(seen)), envs, [0, 1], max_steps=2, **settings)


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "an unknown kind": (
        returning(lambda rows: torch.zeros(rows, 4), outputs="q"),
        DistributionError,
        'outputs must be "logits", "values" or "actions"; got \'q\'.',
    ),
    "kinds of policies that are not there": (
        lambda envs: paired_rollouts({"a": nn.Linear(3, 4)}, envs, [0], max_steps=2, outputs={"b": "logits"}),
        RolloutError,
        "outputs has the key 'b', which is not the name of a policy. The names are 'a'.",
    ),
    "values that are a distribution": (
        returning(lambda rows: Categorical(logits=torch.zeros(rows, 4)), outputs="values"),
        DistributionError,
        "function returned Categorical, which contains a distribution, but outputs='values' only applies to tensors. "
        "Omit outputs. With several policies, pass outputs as a dict without this policy's name.",
    ),
    "logits that are whole numbers": (
        returning(lambda rows: torch.zeros(rows, 4, dtype=torch.int64), outputs="logits"),
        DistributionError,
        "function returned a torch.int64 tensor of shape (2, 4), but outputs='logits' requires a float tensor with "
        "shape (batch, action).",
    ),
    "the logit of one of two actions": (
        returning(lambda rows: torch.zeros(rows, 1), outputs="logits"),
        DistributionError,
        "A tensor of shape (2, 1) contains only one logit per input, so the probability of that action is always 1. If "
        "this is the logit of the second of two actions, return torch.distributions.Bernoulli(logits=...) from the "
        "model.",
    ),
    "the value of one action, with a value": (
        returning(lambda rows: (torch.zeros(rows, 1), torch.zeros(rows)), outputs="values"),
        DistributionError,
        "A tensor of shape (2, 1) contains only one logit per input, so the probability of that action is always 1. If "
        "this is the logit of the second of two actions, return torch.distributions.Bernoulli(logits=...) from the "
        "model.",
    ),
    "a tuple of other tensors": (
        returning(lambda rows: (torch.zeros(rows, 4), torch.zeros(rows), torch.zeros(rows)), outputs="logits"),
        DistributionError,
        "function returned (Tensor, Tensor, Tensor), which contains no action distribution. Expected logits of shape "
        "(batch, action), a torch.distributions object, a tuple with such an object, a pair (logits, value), or a "
        "dict with the key 'logits'. Pass a function that selects one of these from the output: lambda observations: "
        "policy(observations)[0].",
    ),
    "masks of other actions": (
        returning(lambda rows: torch.zeros(rows, 4), outputs="logits", masks=lambda envs, infos: np.ones((3, 5))),
        RolloutError,
        "masks returned an array of shape (2, 5) for the running episodes, but the policy's logits or values have "
        "shape (2, 4). Return one bool per environment and action.",
    ),
    "masks of fewer environments": (
        returning(lambda rows: torch.zeros(rows, 4), outputs="logits", masks=lambda envs, infos: np.ones(4)),
        RolloutError,
        "masks returned an array of shape (4,) for num_envs=3. Return an array with one row per environment.",
    ),
    "masks that allow nothing": (
        returning(lambda rows: torch.zeros(rows, 4), outputs="logits", masks=lambda envs, infos: np.zeros((3, 4))),
        RolloutError,
        "masks returned False for all actions in at least one environment. Return True for the allowed actions.",
    ),
    "masks that are added to logits": (
        returning(
            lambda rows: torch.zeros(rows, 4),
            outputs="logits",
            masks=lambda envs, infos: np.array([[0, -np.inf, 0, -np.inf]] * 3, np.float32),
        ),
        RolloutError,
        "masks must return bools, or 1 for allowed and 0 for disallowed actions; got -inf (float32). For an "
        "additive mask (0 or -inf), return mask == 0.",
    ),
    "masks of whole numbers that are the allowed actions": (
        returning(lambda rows: torch.zeros(rows, 4), outputs="logits", masks=lambda envs, infos: [[0, 2, 1, 3]] * 3),
        RolloutError,
        "masks must return bools, or 1 for allowed and 0 for disallowed actions; got 2 (int64). For an additive "
        "mask (0 or -inf), return mask == 0.",
    ),
    "masks of continuous actions": (
        returning(lambda rows: Normal(torch.zeros(rows, 4), 1.0), masks=lambda envs, infos: np.ones((3, 4))),
        RolloutError,
        "masks can be applied only to a Categorical distribution, but function returned a Normal. Pass a policy that "
        "returns logits or values.",
    ),
    "masks of actions": (
        returning(torch.zeros, outputs="actions", masks=lambda envs, infos: np.ones((3, 4))),
        RolloutError,
        "masks can be applied only to a Categorical distribution, but function returned actions. Pass a policy that "
        "returns logits or values.",
    ),
    "a distribution of actions": (
        lambda envs: action_distribution(nn.Linear(3, 4), torch.zeros(2, 3), outputs="actions"),
        DistributionError,
        "Linear returns actions, not a distribution. Pass a function that returns logits or action values instead, "
        'such as policy.q_net with outputs="values".',
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_outputs_and_masks_that_do_not_fit_are_refused(name):
    ask, kind, message = FAULTS[name]
    with pytest.raises(kind) as caught:
        ask(SyncVectorEnv([Allowing] * 3))
    assert str(caught.value) == message


def test_actions_may_be_an_array(allowing: SyncVectorEnv) -> None:
    done = rollout(lambda seen: seen[:, :1].numpy().argmax(1) + 2, allowing, [0, 1], max_steps=9, outputs="actions")
    assert all((actions == 2).all() for actions in done.actions)


def test_a_recurrent_policy_without_its_initial_state_is_told_to_pass_it(allowing: SyncVectorEnv) -> None:
    class Remembering(nn.Module):
        def forward(self, seen: torch.Tensor, state: Any = None) -> Any:
            return seen[:, [0, 1, 2, 0]], torch.zeros(1, len(seen), 8)

    with pytest.raises(DistributionError) as caught:
        rollout(Remembering(), allowing, [0], max_steps=2, outputs="logits")
    assert str(caught.value).endswith(
        "lambda observations: policy(observations)[0]. If the policy is recurrent, pass initial_state to the rollout."
    )


class Pressing(Allowing):
    """Two buttons, one of which may be pressed in each step."""

    action_space = spaces.MultiBinary(2)

    def action_masks(self) -> Any:
        return np.array([True, self.steps % 2 == 0, True, self.steps % 2 == 1])

    def step(self, action: Any) -> Any:
        assert self.action_masks().reshape(2, 2)[range(2), action].all()
        return super().step(0)


def test_masks_of_buttons_are_those_of_predict() -> None:
    model = MaskablePPO("MlpPolicy", Pressing(), seed=0)
    envs, masks = SyncVectorEnv([Pressing] * 2), MASKS["a method of the environments"]
    done = rollout(model, envs, range(3), max_steps=9, greedy=True, masks=masks, keep="observations")
    for seen, actions in zip(done.kept["observations"], done.actions, strict=True):
        for step, (observation, action) in enumerate(zip(seen, actions, strict=True)):
            allowed = np.array([True, step % 2 == 0, True, step % 2 == 1])
            wanted, _ = model.predict(observation, deterministic=True, action_masks=allowed)
            assert action.tolist() == wanted.tolist()
