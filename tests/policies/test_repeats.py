"""Functions that keep state in containers: shared logs are accepted, state that changes other episodes is refused."""

import functools
import itertools

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from policies import Drifting, same
from torch import nn

from chanpatch import PatchedPolicy, edit, hook_points, paired_rollouts
from chanpatch.errors import RolloutError
from chanpatch.policies import rollout_sweep

torch.manual_seed(0)
NETWORK = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
POINTS = hook_points(NETWORK, torch.zeros(2, 4))
SETTINGS = {"max_steps": 20, "outputs": "logits"}


def walks(num_envs=2):
    return SyncVectorEnv([functools.partial(Drifting, (4,), 2)] * num_envs)


def counting_list():
    calls = []

    def counting(activation):
        calls.append(1)
        return activation * (5 * (len(calls) % 2))

    return counting


def counting_dict():
    calls = {"number": 0}

    def counting(activation):
        calls["number"] += 1
        return activation * (5 * (calls["number"] % 2))

    return counting


def counting_default(activation, calls=np.zeros(1)):  # noqa: B008
    calls += 1
    return activation * (5 * float(calls[0] % 2))


def counting_tensor():
    calls = torch.zeros(1)

    def counting(activation):
        calls.add_(1)
        return activation * (5 * (calls % 2))

    return counting


def cycle():
    scales = itertools.cycle([0, 5])
    return lambda activation: activation * next(scales)


def late():
    calls = []

    def counting(activation):
        calls.append(1)
        return activation * (5 if len(calls) > 25 else 1)

    return counting


KEEPING = {
    "list": counting_list,
    "dict": counting_dict,
    "array in a default argument": lambda: counting_default,
    "tensor": counting_tensor,
    "iterator": cycle,
    "list read late": late,
}


def patch(function):
    return edit(POINTS.site("1"), function)


@pytest.mark.parametrize("name", KEEPING)
def test_policies_that_share_a_container_which_changes_their_episodes_are_refused(name):
    refused = 0
    for episodes in (6, 7):
        twin = PatchedPolicy(POINTS, patch(KEEPING[name]()))
        try:
            pairs = paired_rollouts({"one": twin, "same": twin}, walks(1), range(episodes), **SETTINGS)
            assert same(pairs["one"], pairs["same"])  # an even number of calls leaves a counter of pairs as it was
        except RolloutError as error:
            assert "gives different results" in str(error) or "first output changes" in str(error)
            refused += 1
    assert refused


@pytest.mark.parametrize("name", [name for name in KEEPING if "late" not in name])
def test_labels_that_share_a_container_which_changes_their_episodes_are_refused(name):
    function = KEEPING[name]()
    with pytest.raises(RolloutError, match="gives different results"):
        rollout_sweep(POINTS, walks(21), range(7), {"one": patch(function), "same": patch(function)}, **SETTINGS)


def test_the_error_names_the_container_and_its_users():
    twin = PatchedPolicy(POINTS, patch(late()))
    with pytest.raises(RolloutError) as caught:
        paired_rollouts({"one": twin, "same": twin}, walks(1), range(7), **SETTINGS)
    assert str(caught.value) == (
        "Replaying the episodes of 'one' gives different results, because 'one', 'same' share a list that changes "
        "during the episodes. Create a separate function with its own list for each of them. Alternatively, store the "
        "state in an object's attributes, which a rollout restores."
    )


def test_a_function_that_reads_no_shared_container_of_another_is_not_repeated():
    functions = {name: counting_list() for name in ("one", "same")}
    twins = {name: PatchedPolicy(POINTS, patch(function)) for name, function in functions.items()}
    pairs = paired_rollouts(twins, walks(), range(7), **SETTINGS)
    assert same(pairs["one"], pairs["same"])


def test_a_shared_log_is_accepted_and_has_one_entry_per_call():
    seen = []

    def log(activation, *, context):
        seen.append((context.label, context.step))
        return activation * 0

    twins = {name: PatchedPolicy(POINTS, patch(log)) for name in ("one", "same")}
    pairs = paired_rollouts(twins, walks(), range(2), **SETTINGS)
    assert seen == [(name, step) for name in twins for step in range(max(pairs[name].lengths))]
    seen.clear()
    found = rollout_sweep(POINTS, walks(6), range(2), {name: patch(log) for name in twins}, **SETTINGS)
    assert same(found["one"], pairs["one"])
    assert seen[:2] == [("one", 0), ("same", 0)]
    assert len(seen) == 2 * max(found["one"].lengths)


CALLS = 0


def counting_global(activation):
    global CALLS
    CALLS += 1
    return activation * (5 * (CALLS % 2))


def test_a_global_variable_that_a_function_sets_is_restored():
    twin = PatchedPolicy(POINTS, patch(counting_global))
    pairs = paired_rollouts({"one": twin, "same": twin}, walks(1), range(7), **SETTINGS)
    assert same(pairs["one"], pairs["same"])
    assert CALLS == 0


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, activation):
        self.calls += 1
        return activation * (5 * (self.calls % 2))


def test_a_module_with_state_is_no_edit_of_two_labels():
    module = Counting()
    with pytest.raises(RolloutError) as caught:
        rollout_sweep(POINTS, walks(6), range(2), {"one": patch(module), "same": patch(module)}, **SETTINGS)
    assert str(caught.value) == (
        "Patches with different labels use the same module as an edit at '1'. The module changes its own buffers or "
        "attributes, so the patches would affect each other. Use a separate module for each label."
    )


def test_a_module_without_state_is_an_edit_of_two_labels():
    module = nn.Tanh()
    patches = {"one": patch(module), "same": patch(module)}
    found = rollout_sweep(POINTS, walks(6), range(2), patches, **SETTINGS)
    assert same(found["one"], found["same"])


class Slotted:
    """An edit that counts in a slot, which a rollout cannot restore."""

    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self, activation):
        self.calls += 1
        return activation * (5 * (self.calls % 3))


def unseeded(activation):
    return activation + torch.from_numpy(np.random.default_rng().normal(size=16)).float()


@pytest.mark.parametrize("function", [unseeded, Slotted()], ids=["entropy of the system", "slots"])
def test_a_policy_whose_first_output_cannot_be_repeated_is_refused(function):
    twin = PatchedPolicy(POINTS, patch(function))
    with pytest.raises(RolloutError, match="first output changes when the same forward pass is repeated"):
        paired_rollouts({"original": NETWORK, "patched": twin}, walks(), range(3), **SETTINGS)


def test_the_repeated_pass_leaves_no_entry_in_logs_and_ledgers():
    seen = []
    twin = PatchedPolicy(POINTS, patch(lambda activation: (seen.append(1), activation)[1]))
    pairs = paired_rollouts({"original": NETWORK, "patched": twin}, walks(1), range(3), **SETTINGS)
    steps = int(pairs["patched"].lengths.sum())
    assert len(seen) == steps
    assert [record["firings"] for record in twin.ledger.to_records()] == [steps]


def test_one_policy_under_two_names_has_equal_episodes_or_is_refused():
    def late(activation, *, context):
        return unseeded(activation) * 5 if context.step > 2 else activation

    twin = PatchedPolicy(POINTS, patch(late))
    with pytest.raises(RolloutError) as caught:
        paired_rollouts({"one": twin, "same": twin}, walks(), range(5), **SETTINGS)
    assert str(caught.value) == (
        "'one' and 'same' are the same policy, but their episodes differ. The policy draws from a generator or keeps "
        "state that a rollout cannot restore. Store the generator or state in an attribute of the policy."
    )
