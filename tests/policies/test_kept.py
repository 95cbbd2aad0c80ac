"""Rewards, observations, infos and states that a rollout keeps; activations by episode and step; joined parts."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from policies import Recurrent, same
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from chanpatch import PatchedPolicy, hook_points, paired_rollouts, recording, rollout, zero_ablate
from chanpatch.errors import RolloutError
from chanpatch.policies import rollout_sweep

SEEDS = [4, 9, 1, 9]


class Counting(gymnasium.Env):
    """Lasts 2 to 5 steps; the reward is the number of the step, and every info but "always" is only there at times."""

    observation_space, action_space = spaces.Dict(a=spaces.Box(-9, 9, (3,)), b=spaces.Discrete(9)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.steps = int(self.np_random.integers(2, 6)), 0
        return self.seen(), {"always": 0, "at reset": self.length}

    def seen(self):
        return {"a": np.array([self.steps, self.length, 0], np.float32), "b": self.steps}

    def step(self, action):
        self.steps += 1
        over = self.steps == self.length
        infos = {"always": self.steps, "nested": {"square": self.steps**2}} | ({"at end": "over"} if over else {})
        return self.seen(), float(self.steps), over, False, infos


def lengths() -> list[int]:
    return [int(np.random.Generator(np.random.PCG64(seed)).integers(2, 6)) for seed in SEEDS]


ENVS = {
    "next step": lambda: SyncVectorEnv([Counting] * 3),
    "same step": lambda: SyncVectorEnv([Counting] * 3, autoreset_mode=AutoresetMode.SAME_STEP),
    "disabled": lambda: SyncVectorEnv([Counting] * 3, autoreset_mode=AutoresetMode.DISABLED),
    "SB3": lambda: DummyVecEnv([Counting] * 3),
    "single": Counting,
}
HEAD = nn.Linear(3, 2)


def act(seen: Any) -> Any:
    return HEAD(seen["a"])


@pytest.mark.parametrize("kind", ENVS)
def test_rewards_observations_and_infos_are_kept_per_step(kind):
    names = ["observations", "always", "at reset", "at end", "nested"]
    done = rollout(act, ENVS[kind](), SEEDS, max_steps=9, outputs="logits", keep=names)
    assert done.lengths.tolist() == lengths()
    for episode, length in enumerate(done.lengths):
        steps = np.arange(1, length + 1)
        np.testing.assert_array_equal(done.rewards[episode], steps)
        kept = {name: each[episode] for name, each in done.kept.items()}
        np.testing.assert_array_equal(kept["observations"]["a"][:, :2], [[step, length] for step in range(length)])
        np.testing.assert_array_equal(kept["observations"]["b"], steps - 1)
        np.testing.assert_array_equal(kept["always"], [0, *steps])
        assert kept["at reset"].tolist() == [length, *[None] * length]
        assert kept["at end"].tolist() == [*[None] * length, "over"]
        assert [each and each["square"] for each in kept["nested"]] == [None, *steps**2]


def test_nothing_but_rewards_is_kept_unless_asked():
    done = rollout(act, ENVS["next step"](), SEEDS, max_steps=9, outputs="logits")
    assert done.kept == {}
    np.testing.assert_array_equal([each.sum() for each in done.rewards], done.returns)


def test_an_info_that_is_never_there_and_a_state_of_no_recurrent_policy_are_refused():
    with pytest.raises(RolloutError) as caught:
        rollout(act, ENVS["next step"](), SEEDS, max_steps=9, outputs="logits", keep=["allways"])
    assert str(caught.value) == (
        "keep contains 'allways', but the infos from the environments contain always, at end, at reset, nested. Pass "
        "names of infos, 'observations' or 'final_state'."
    )
    with pytest.raises(RolloutError) as caught:
        rollout(act, ENVS["next step"](), SEEDS, max_steps=9, outputs="logits", keep="final_state")
    assert str(caught.value) == (
        "keep contains 'final_state', but the policy is not recurrent. Pass initial_state, or omit 'final_state'."
    )


def test_the_final_state_is_the_state_after_the_last_step():
    torch.manual_seed(0)
    policy = Recurrent()

    def embed(seen: Any, state: Any) -> Any:
        logits, state = policy(torch.cat([seen["a"], seen["a"]], 1), state)
        return logits[:, :2], state

    settings: Any = {
        "outputs": "logits",
        "initial_state": policy.initial_state,
        "keep": ["final_state", "observations"],
    }
    for max_steps in (9, 3):
        done = rollout(embed, ENVS["next step"](), SEEDS, max_steps=max_steps, **settings)
        for observations, state in zip(done.kept["observations"], done.kept["final_state"], strict=True):
            expected = policy.initial_state(1)
            for seen in observations["a"]:
                _, expected = embed({"a": torch.tensor(seen)[None]}, expected)
            for part, other in zip(state, expected, strict=True):
                torch.testing.assert_close(part, other)


# --- Activations by episode and step


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def cart_poles(num_envs: int = 3) -> Any:
    return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * num_envs)


SETTINGS: Any = {"max_steps": 30, "outputs": "logits"}


def test_activations_carry_their_episode_and_step():
    policy = network()
    points = hook_points(policy, torch.zeros(2, 4))
    with recording(points, [points.site("1", feature=[2, 5]), points.site("0")]) as cache:
        done = rollout(points, cart_poles(), SEEDS, keep="observations", **SETTINGS)
    frame = cache.to_pandas()
    assert [*frame.columns] == ["site", "episode", "step", "feature", "value"]
    assert len(frame) == 10 * done.lengths.sum()
    chosen = frame[frame.site == repr(points.site("1", feature=[2, 5]))].set_index(["episode", "step", "feature"]).value
    for episode, seen in enumerate(done.kept["observations"]):
        own = policy[:2](torch.tensor(seen))[:, [2, 5]].detach()
        np.testing.assert_allclose(chosen[episode].to_numpy().reshape(-1, 2), own, rtol=1e-6)
    assert torch.equal((cache * 2).steps("0"), cache.steps("0"))
    assert cache.steps("0").tolist()[:4] == [[0, 0], [1, 0], [2, 0], [0, 1]]


def test_rows_of_a_batch_index_and_a_reduction_carry_theirs():
    points = hook_points(network(), torch.zeros(2, 4))
    with (
        recording(points, points.site("1", batch=-1)) as last,
        recording(points, "1", reduce=("b f -> b", "sum")) as sums,
    ):
        rollout(points, cart_poles(), SEEDS[:3], **SETTINGS)
    assert last.steps("1").tolist()[:2] == [[2, 0], [2, 1]]
    assert len(sums["1"]) == len(sums.steps("1"))


def test_a_step_that_a_comparison_repeats_is_recorded_once():
    points = hook_points(network(), torch.zeros(2, 4))
    twin = PatchedPolicy(points, zero_ablate(points.site("1", feature=[0, 1])))
    with recording(hook_points(twin, torch.zeros(2, 4)), "1") as cache:
        pairs = paired_rollouts({"original": points, "patched": twin}, cart_poles(), SEEDS, **SETTINGS)
    assert len(cache["1"]) == pairs["patched"].lengths.sum()
    assert len({*map(tuple, cache.steps("1").tolist())}) == len(cache["1"])


def test_activations_from_outside_a_rollout_have_no_steps():
    points = hook_points(network(), torch.zeros(2, 4))
    with recording(points, "1") as cache:
        points.model(torch.zeros(2, 4))
    with pytest.raises(RolloutError) as caught:
        cache.steps("1")
    assert str(caught.value) == (
        "The episodes and steps at Site('1') are unknown, because the activation was not recorded in a rollout or was "
        "recorded without its batch axis. Open the recording around rollout(), and keep the batch axis."
    )


# --- Parts


def equal(one: Any, other: Any) -> bool:
    return same(one, other) and all(
        np.array_equal(a, b)
        for name in ("seen", "rewards")
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True)
    )


def test_parts_of_a_rollout_are_joined_to_the_rollout_over_all_seeds():
    parts = [rollout(act, ENVS["next step"](), seeds, max_steps=9, outputs="logits", keep="always") for seeds in
             ([4, 9, 9], [1])]  # fmt: skip
    whole = rollout(act, ENVS["next step"](), [4, 9, 9, 1], max_steps=9, outputs="logits", keep="always")
    joined = parts[0] + parts[1]
    assert equal(joined, whole)
    assert [each.tolist() for each in joined.kept["always"]] == [each.tolist() for each in whole.kept["always"]]
    assert {each.name for each in fields(joined)} == {*vars(joined)}


def swept(seeds: Any, **settings: Any) -> Any:
    points = hook_points(network(), torch.zeros(2, 4))
    patches = {f"{n}": zero_ablate(points.site("1", feature=n)) for n in range(4)}
    controls = {f"control {n}": zero_ablate(points.site("1", feature=n)) for n in range(4, 8)}
    return rollout_sweep(points, cart_poles(9), seeds, patches, controls=controls, **SETTINGS | settings)


def test_parts_of_a_sweep_are_joined_to_the_sweep_over_all_seeds():
    joined, whole = swept(range(4)) + swept(range(4, 9)), swept(range(9))
    assert joined.to_records() == whole.to_records()
    assert repr(joined.comparisons()) == repr(whole.comparisons())  # NaN equals NaN
    assert [rank.rank for rank in joined.ranks()] == [rank.rank for rank in whole.ranks()]


def test_parts_that_are_not_parts_of_one_comparison_are_refused():
    one = swept(range(4))
    for other, message in (
        (swept([7, 3]), "Both results contain seed 3. Episodes with this seed use the same random numbers, so they "
            "are not independent. Play all episodes that share a seed in one call."),
        (swept([7], sampling_seed=1), "The results cannot be joined because sampling_seed differs: 0 vs. 1."),
        (swept([7], keep="observations"),
            "The results cannot be joined because keep differs: [] vs. ['observations']."),
        (swept([7]).top(2), None),
        (replace(swept([7]), controls=None), "Two sweeps can be joined only if they have the same controls in the same "
            "order."),
    ):  # fmt: skip
        with pytest.raises(RolloutError) as caught:
            one + other
        assert message is None or str(caught.value) == message
    assert str(caught.value)
    with pytest.raises(
        RolloutError, match="only if they have the same policies in the same order; got .* before calling top"
    ):
        one + swept([7]).top(2)
    with pytest.raises(TypeError):
        one + one["original"]


def test_joined_parts_are_checked_to_be_paired():
    one, other = swept(range(4)), swept([7])
    broken = replace(other["1"], seen=(other["1"].seen[0] + np.uint64(1),))
    rollouts = {**other.rollouts, "1": broken}
    object.__setattr__(other, "rollouts", rollouts)
    with pytest.raises(RolloutError, match=r"episode 4 \(seed 7\) differs at step 0"):
        one + other


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_statistics_that_a_vector_wrapper_adds_are_those_of_the_finished_episode(mode: AutoresetMode) -> None:
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(SyncVectorEnv([Counting] * 3, autoreset_mode=mode))
    done = rollout(act, envs, SEEDS, max_steps=9, outputs="logits", keep=["episode", "at reset"])
    for episode, length in enumerate(lengths()):
        last = done.kept["episode"][episode][-1]
        assert (last["r"], last["l"]) == (done.returns[episode], length)
        assert [*done.kept["at reset"][episode]] == [length] + [None] * length


def test_infos_in_a_list_cannot_be_kept() -> None:
    envs = gymnasium.wrappers.vector.DictInfoToList(SyncVectorEnv([Counting] * 3))
    assert rollout(act, envs, SEEDS, max_steps=9, outputs="logits").lengths.tolist() == lengths()
    with pytest.raises(RolloutError) as caught:
        rollout(act, envs, SEEDS, max_steps=9, outputs="logits", keep=["always"])
    assert str(caught.value) == (
        "keep contains 'always', which requires a dict of infos from the environments; got list. Remove the wrapper "
        "that converts the infos, such as DictInfoToList."
    )
