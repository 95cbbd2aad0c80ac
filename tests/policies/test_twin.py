"""Twins: every method and submodule of theirs is patched, the policy they were made from never is."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from chanpatch.errors import (
    ConcurrencyError,
    DistributionError,
    HookPointError,
    NaNError,
    SiteError,
    TraceMismatchError,
    UnreachedError,
    UnsupportedModelError,
)
from chanpatch.patching import Scale, Set, edit, patched, recording, run_with_cache, zero_ablate
from chanpatch.policies import PatchedPolicy, action_distribution
from chanpatch.registry import Site, hook_points


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.norm = nn.BatchNorm1d(8)
        self.actor = nn.Linear(8, 4)
        self.critic = nn.Linear(8, 1)

    def forward(self, vector):
        return self.actor(self.norm(self.body(vector)))

    def greedy(self, vector):
        return self(vector).argmax(-1)

    def value(self, vector, *, scale=1.0):
        return self.critic(self.body(vector)) * scale

    def size(self):
        return 6

    @property
    def first(self):
        return self.body[0]


def by_hand(policy: Policy, vector: Tensor, feature: int = 3) -> Tensor:
    """The policy's logits with one feature of its body set to zero."""
    hidden = policy.body(vector).clone()
    hidden[:, feature] = 0
    return policy.actor(policy.norm(hidden))


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return Policy().eval()


@pytest.fixture
def vector():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def points(policy, vector):
    return hook_points(policy, vector)


@pytest.fixture
def twin(policy, points):
    return PatchedPolicy(points, zero_ablate(points.site("body", feature=3)))


# --- what a twin is ---


def test_a_twin_is_patched_and_the_policy_is_not(policy, twin, vector):
    plain = policy(vector)
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)
    torch.testing.assert_close(policy(vector), plain, rtol=0, atol=0)
    assert not torch.equal(twin(vector), plain)


def test_a_twin_is_an_instance_of_the_policys_class_and_of_patched_policy(policy, twin):
    assert isinstance(twin, Policy)
    assert isinstance(twin, PatchedPolicy)
    assert not isinstance(policy, PatchedPolicy)
    assert type(twin).__name__ == "PatchedPolicy"


def test_a_twin_shares_every_parameter_and_buffer(policy, twin):
    assert twin.state_dict().keys() == policy.state_dict().keys()
    for (name, one), (other_name, other) in zip(policy.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other_name
        assert one is other
    assert all(one is other for one, other in zip(policy.buffers(), twin.buffers(), strict=True))


def test_a_twin_shares_no_module(policy, twin):
    assert not set(policy.modules()) & set(twin.modules())


def test_a_twin_of_a_bare_module_is_patched_the_same(policy, vector):
    twin = PatchedPolicy(policy, zero_ablate(Site("actor", feature=1)))
    expected = policy(vector)
    expected[:, 1] = 0
    torch.testing.assert_close(twin(vector), expected, rtol=0, atol=0)


def test_the_hooks_of_a_twin_are_not_on_the_policy(policy, twin):
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())


def test_the_patches_of_a_twin_can_be_read(points, twin):
    assert [patch.site for patch in twin.patches] == [points.site("body", feature=3)]


def test_every_method_of_a_twin_is_patched(policy, twin, vector):
    assert torch.equal(twin.greedy(vector), by_hand(policy, vector).argmax(-1))


def test_a_method_with_keywords_is_patched(policy, twin, vector):
    hidden = policy.body(vector).clone()
    hidden[:, 3] = 0
    torch.testing.assert_close(twin.value(vector, scale=2.0), policy.critic(hidden) * 2, rtol=0, atol=0)


def test_a_submodule_of_a_twin_called_from_outside_is_patched(policy, twin, vector):
    expected = policy.body(vector).clone()
    expected[:, 3] = 0
    torch.testing.assert_close(twin.body(vector), expected, rtol=0, atol=0)


def test_a_module_inside_a_patched_one_called_from_outside_is_not_held_to_run_the_patch(policy, twin, vector):
    torch.testing.assert_close(twin.first(vector), policy.body[0](vector), rtol=0, atol=0)


def test_a_method_that_runs_no_module_is_not_held_to_run_the_patch(twin):
    assert twin.size() == 6


def test_a_method_added_to_the_class_after_the_twin_was_made_is_not_lost(policy, twin, vector, monkeypatch):
    monkeypatch.setattr(Policy, "double", lambda self, vector: self(vector) * 2, raising=False)
    torch.testing.assert_close(twin.double(vector), by_hand(policy, vector) * 2, rtol=0, atol=0)


def test_methods_of_nn_module_work_on_a_twin(twin, policy):
    assert twin.train() is twin
    assert (twin.training, policy.training) == (True, False)
    assert "body" in dict(twin.named_children())
    assert len(list(twin.apply(lambda module: None).modules())) == len(list(policy.modules()))
    assert repr(twin).startswith("PatchedPolicy")


def test_twins_of_one_policy_are_independent(policy, points, vector):
    twins = [PatchedPolicy(points, zero_ablate(points.site("body", feature=feature))) for feature in range(8)]
    for feature, twin in enumerate(twins):
        torch.testing.assert_close(twin(vector), by_hand(policy, vector, feature), rtol=0, atol=0)


def test_a_twin_of_a_twin_has_the_patches_of_both(policy, points, twin, vector):
    both = PatchedPolicy(twin, zero_ablate(points.site("actor", feature=0)))
    expected = by_hand(policy, vector)
    expected[:, 0] = 0
    torch.testing.assert_close(both(vector), expected, rtol=0, atol=0)
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)
    assert all(one is other for one, other in zip(policy.parameters(), both.parameters(), strict=True))


def test_a_patch_that_is_in_a_list_that_grows_later_stays_out(points, vector, policy):
    patches = [zero_ablate(points.site("body", feature=3))]
    twin = PatchedPolicy(points, patches)
    patches.append(zero_ablate(points.site("actor")))
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)


def test_a_site_that_does_not_exist_is_refused_when_the_twin_is_made(policy, points):
    with pytest.raises(HookPointError):
        PatchedPolicy(policy, zero_ablate(Site("bodi")))
    with pytest.raises(SiteError):
        PatchedPolicy(points, zero_ablate(Site("body", feature=8)))


def test_a_forward_that_differs_from_the_trace_is_refused(twin):
    class Wide(nn.Module):
        def forward(self, vector):
            return vector[:, :3]

    points = hook_points(nn.Sequential(Wide(), nn.ReLU()), torch.randn(2, 6))
    with pytest.raises(TraceMismatchError, match="axes"):
        PatchedPolicy(points, zero_ablate(points.site("1.in[0]")))[1](torch.randn(2, 5))


# --- disable, ledger, unreached ---


def test_a_disabled_twin_is_the_policy(policy, twin, vector):
    with twin.disable():
        torch.testing.assert_close(twin(vector), policy(vector), rtol=0, atol=0)
        torch.testing.assert_close(twin.value(vector), policy.value(vector), rtol=0, atol=0)
        torch.testing.assert_close(twin.body(vector), policy.body(vector), rtol=0, atol=0)
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)


def test_disabling_nests_and_ends_also_when_the_model_raises(policy, twin, vector):
    with pytest.raises(ZeroDivisionError), twin.disable(), twin.disable():
        raise ZeroDivisionError
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)


def test_a_twin_is_disabled_until_the_last_of_several_contexts_closes(policy, twin, vector):
    patched, first, second = twin(vector), twin.disable(), twin.disable()
    with second:
        first.__enter__()
    assert torch.equal(twin(vector), policy(vector))
    first.__exit__(None, None, None)
    assert torch.equal(twin(vector), patched)
    first, second = twin.disable(), twin.disable()
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        assert torch.equal(twin(vector), policy(vector))
    assert torch.equal(twin(vector), patched)


def test_a_disabled_twin_counts_nothing(twin, vector):
    with twin.disable():
        twin(vector)
    assert twin.ledger.to_records()[0]["firings"] == 0


def test_the_ledger_counts_per_method(twin, vector):
    twin(vector), twin(vector[:2]), twin.greedy(vector), twin.value(vector), twin.body(vector)
    counted = {r["method"]: (r["firings"], r["rows"], r["elements"]) for r in twin.ledger.to_records()}
    assert counted == {"__call__": (3, 12, 12), "greedy": (1, 5, 5), "value": (1, 5, 5)}


@pytest.fixture
def on_actor(policy, points):
    return PatchedPolicy(points, zero_ablate(points.site("actor", feature=0)))


def test_a_patch_that_a_root_call_did_not_reach_is_an_error_of_that_call(on_actor, vector):
    on_actor(vector)
    with pytest.raises(UnreachedError) as caught:
        on_actor.value(vector)
    assert str(caught.value) == (
        "The patch at 'actor' never ran in value(). Possible causes: the module was not called, or its .forward() was "
        "called directly (bypassing hooks). If a patch does not have to run in every call, pass "
        "allow_unreached=['actor'] to PatchedPolicy."
    )


def test_a_patch_may_be_allowed_to_be_unreached(policy, points, vector):
    twin = PatchedPolicy(points, zero_ablate(points.site("actor", feature=0)), allow_unreached="actor")
    torch.testing.assert_close(twin.value(vector), policy.value(vector), rtol=0, atol=0)


def test_a_submodule_that_holds_no_patch_may_be_called_alone(policy, on_actor, vector):
    torch.testing.assert_close(on_actor.body(vector), policy.body(vector), rtol=0, atol=0)


def test_an_unreached_patch_masks_no_exception_in_flight(on_actor):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        on_actor.value(torch.randn(5, 7))


def test_a_call_after_one_that_raised_is_checked_anew(on_actor, policy, vector):
    with pytest.raises(RuntimeError):
        on_actor(torch.randn(5, 7))
    expected = policy(vector)
    expected[:, 0] = 0
    torch.testing.assert_close(on_actor(vector), expected, rtol=0, atol=0)


def test_a_submodule_called_after_one_that_was_interrupted_is_checked_anew(policy, points, vector):
    def interrupts(activation):
        if len(activation) == 2:
            raise KeyboardInterrupt
        return activation

    twin = PatchedPolicy(points, [edit(points.site("body"), interrupts), zero_ablate(points.site("actor"))])
    with pytest.raises(KeyboardInterrupt):
        twin.body(vector[:2])
    for _ in range(2):
        assert not twin.actor(policy.body(vector)).any()
    counted = [record for record in twin.ledger.to_records() if record["firings"]]
    assert [(record["method"], record["rows"]) for record in counted] == [("__call__", 10)]


def test_nan_that_a_patch_brings_in_is_told_at_the_end_of_the_root_call(points, vector):
    twin = PatchedPolicy(points, edit(points.site("body", feature=0), Scale(float("nan"))))
    for method in (twin, twin.greedy, twin.body):
        with pytest.raises(NaNError, match="introduced NaN"):
            method(vector)


def test_nan_is_named_before_the_error_it_leads_to(points):
    class Sampling(Policy):
        def act(self, vector):
            return Categorical(logits=self(vector)).sample()

    twin = PatchedPolicy(Sampling(), edit(Site("actor"), Scale(float("nan"))))
    with pytest.raises(NaNError, match="introduced NaN"):
        twin.act(torch.randn(3, 6))


# --- shared weights ---


def test_an_optimizer_step_on_the_policy_is_seen_by_the_twin(policy, twin, vector):
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    before = twin(vector)
    policy(vector).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)
    assert not torch.allclose(twin(vector), before)


def test_training_the_twin_trains_the_policy_with_the_gradients_of_the_patched_forward(policy, twin, vector):
    twin(vector).square().sum().backward()
    found = [None if p.grad is None else p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    by_hand(policy, vector).square().sum().backward()
    for one, parameter in zip(found, policy.parameters(), strict=True):
        assert (one is None) == (parameter.grad is None)
        if one is not None:
            torch.testing.assert_close(one, parameter.grad)


@pytest.mark.parametrize("changed", ["policy", "twin"])
def test_a_weight_changed_in_place_is_seen_on_both_sides(policy, twin, vector, changed):
    with torch.no_grad():
        (policy if changed == "policy" else twin).actor.weight.fill_(0.5)
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)


@pytest.mark.parametrize("loaded", ["policy", "twin"])
def test_a_loaded_state_dict_is_seen_on_both_sides(policy, twin, vector, loaded):
    state = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in policy.state_dict().items()}
    state["norm.running_var"] = state["norm.running_var"].abs()
    (policy if loaded == "policy" else twin).load_state_dict(state)
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)


def test_batch_norm_statistics_are_shared(policy, twin, vector):
    twin.train()
    twin(vector)
    assert policy.norm.num_batches_tracked == 1
    assert policy.norm.running_mean[3] == 0


@pytest.mark.parametrize("moved", ["policy", "twin"])
def test_another_dtype_of_parameters_is_seen_on_both_sides(vector, moved):
    policy = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    twin = PatchedPolicy(policy, zero_ablate(Site("0", feature=0)))
    (policy if moved == "policy" else twin).to(torch.float64)
    for each in (policy, twin):
        assert each(vector.double()).dtype == torch.float64


def replace_parameter(policy):
    policy.actor.weight = nn.Parameter(torch.full((4, 8), 0.5))


def replace_buffer(policy):
    policy.norm.running_mean = torch.full((8,), 0.5)


def assign_state(policy):
    state = {name: tensor.clone() * 2 for name, tensor in policy.state_dict().items()}
    policy.load_state_dict(state, assign=True)


def replace_buffers_by_another_dtype(policy):
    policy.to(torch.float64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replace_parameter, "'actor.weight'"),
        (replace_buffer, "'norm.running_mean'"),
        (assign_state, "'"),
        (replace_buffers_by_another_dtype, "'norm.running_"),
    ],
)
@pytest.mark.parametrize("side", ["policy", "twin"])
def test_a_parameter_or_buffer_that_was_replaced_on_one_side_is_a_clear_error(
    policy, twin, vector, change, side, named
):
    twin(vector)
    change(policy if side == "policy" else twin)
    with pytest.raises(UnsupportedModelError, match="was replaced in the policy or its PatchedPolicy") as caught:
        twin(vector)
    assert named in str(caught.value)


@pytest.mark.parametrize("difference", [0, 1])
def test_a_parameter_of_one_number_that_was_replaced_by_an_equal_or_another_number_is_a_clear_error(difference):
    policy = nn.Linear(1, 1)
    twin = PatchedPolicy(policy, zero_ablate(Site(".out")))
    twin.bias = nn.Parameter(policy.bias.detach() + difference)
    with pytest.raises(UnsupportedModelError, match="'bias' was replaced in the policy or its PatchedPolicy"):
        twin(torch.zeros(1, 1))


@pytest.mark.parametrize("side", ["policy", "twin"])
def test_a_weight_of_an_lstm_that_was_replaced_on_one_side_is_a_clear_error(side):
    policy, sequence = nn.Sequential(nn.LSTM(6, 4)), torch.randn(5, 2, 6)
    twin = PatchedPolicy(policy, edit(Site("0.out[1][0]"), torch.zeros_like))
    (policy if side == "policy" else twin)[0].weight_ih_l0 = nn.Parameter(torch.ones(16, 6))
    with pytest.raises(UnsupportedModelError, match="'0.weight_ih_l0' was replaced in the policy or its PatchedPolicy"):
        twin(sequence)


def replace_module(policy):
    policy.actor = nn.Linear(8, 4)


def replace_inner_module(policy):
    policy.body[0] = nn.Linear(6, 8)


def replace_elementwise_module(policy):
    policy.body[1] = nn.Tanh()


def append_module(policy):
    policy.body.append(nn.Tanh())


def delete_module(policy):
    del policy.body[1]


def add_parameter(policy):
    policy.actor.temperature = nn.Parameter(torch.ones(1))


def reparametrize(policy):
    nn.utils.parametrizations.weight_norm(policy.actor)


CHANGES = [
    replace_module, replace_inner_module, replace_elementwise_module,
    append_module, delete_module, add_parameter, reparametrize,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", ["policy", "twin"])
def test_another_structure_on_one_side_is_a_clear_error(policy, twin, vector, change, side):
    twin(vector)
    change(policy if side == "policy" else twin)
    for call in (twin, twin.greedy, twin.body):
        with pytest.raises(
            UnsupportedModelError, match=r"was replaced in the policy or its PatchedPolicy.*Create a new"
        ):
            call(vector)


@pytest.mark.parametrize("change", CHANGES)
def test_a_twin_that_is_made_anew_has_the_new_structure(policy, vector, change):
    change(policy)
    twin = PatchedPolicy(policy, edit(Site("actor"), Set(0.0)))
    assert not twin(vector).any()


# --- copies ---


def saved(twin: Any) -> Any:
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda twin: pickle.loads(pickle.dumps(twin)),
    "torch.save": saved,
}


@pytest.fixture(params=list(COPIES))
def copied(request):
    return COPIES[request.param]


def test_a_copy_of_a_twin_is_a_patched_twin(policy, twin, vector, copied):
    twin(vector)
    again = copied(twin)
    assert isinstance(again, PatchedPolicy)
    assert isinstance(again, Policy)
    torch.testing.assert_close(again(vector), by_hand(policy, vector), rtol=0, atol=0)
    torch.testing.assert_close(again.body(vector), twin.body(vector), rtol=0, atol=0)
    with again.disable():
        torch.testing.assert_close(again(vector), policy(vector), rtol=0, atol=0)


def test_a_copy_counts_for_itself(twin, vector, copied):
    twin(vector)
    again = copied(twin)
    assert again.ledger.to_records()[0]["firings"] == 0
    again(vector)
    assert twin.ledger.to_records()[0]["firings"] == 1


@pytest.mark.parametrize("name", ["deepcopy", "pickle", "torch.save"])
def test_a_deep_copy_has_weights_of_its_own(policy, twin, vector, name):
    again = COPIES[name](twin)
    expected = by_hand(policy, vector)
    with torch.no_grad():
        policy.actor.weight.zero_()
    torch.testing.assert_close(again(vector), expected, rtol=0, atol=0)


def test_a_shallow_copy_shares_the_weights(policy, twin):
    assert all(one is other for one, other in zip(policy.parameters(), copy.copy(twin).parameters(), strict=True))


def test_a_copy_keeps_what_may_be_unreached(policy, points, vector, copied):
    twin = PatchedPolicy(points, zero_ablate(points.site("actor")), allow_unreached=["actor"])
    torch.testing.assert_close(copied(twin).value(vector), policy.value(vector), rtol=0, atol=0)


def test_a_copy_keeps_the_training_flags_of_the_twin(twin, copied):
    twin.train()
    twin.norm.eval()
    again = copied(twin)
    assert (again.training, again.norm.training) == (True, False)


def test_a_policy_copied_while_it_is_patched_is_a_plain_policy(policy, points, vector):
    plain = policy(vector)
    with patched(points, zero_ablate(points.site("body"))):
        twin = PatchedPolicy(policy, zero_ablate(Site("actor", feature=0)))
        policy(vector)
    plain[:, 0] = 0
    torch.testing.assert_close(twin(vector), plain, rtol=0, atol=0)


# --- policies that are hard to copy ---


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.fc = norm(nn.Linear(6, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, vector):
        return self.head(self.fc(vector))


def old_weight_norm(module):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    "norm",
    [
        old_weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.spectral_norm,
    ],
)
def test_a_policy_with_computed_weights_has_a_twin(norm, vector):
    policy = Normed(norm).eval()
    policy(vector).sum().backward()
    twin = PatchedPolicy(policy, zero_ablate(Site("fc", feature=0)))
    hidden = policy.fc(vector).clone()
    hidden[:, 0] = 0
    torch.testing.assert_close(twin(vector), policy.head(hidden))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    hidden = policy.fc(vector).clone()
    hidden[:, 0] = 0
    torch.testing.assert_close(twin(vector), policy.head(hidden))


@pytest.mark.parametrize("thing", [threading.Lock, lambda: iter(i for i in "ab"), lambda: memoryview(b"ab")])
def test_a_policy_that_cannot_be_copied_is_a_clear_error(policy, thing):
    policy.held = thing()
    with pytest.raises(UnsupportedModelError, match="PatchedPolicy cannot copy Policy"):
        PatchedPolicy(policy, zero_ablate(Site("actor")))


def test_the_last_output_that_a_policy_keeps_does_not_hinder_a_twin(vector):
    class Keeping(Policy):
        def forward(self, vector):
            self.last = super().forward(vector)
            return self.last

    policy = Keeping().eval()
    policy(vector)
    twin = PatchedPolicy(policy, zero_ablate(Site("actor")))
    assert not twin(vector).any()


@pytest.mark.parametrize("compiled", [lambda p: torch.compile(p, backend="eager"), "in place"])
def test_a_compiled_policy_has_no_twin(policy, compiled):
    if compiled == "in place":
        policy.compile(backend="eager")
        compiled = nn.Identity
        with pytest.raises(UnsupportedModelError, match="compiled in place"):
            PatchedPolicy(policy, zero_ablate(Site("actor")))
    else:
        with pytest.raises(UnsupportedModelError, match="compiled with torch.compile"):
            PatchedPolicy(compiled(policy), zero_ablate(Site("actor")))


# --- hooks, contexts and threads ---


def test_the_users_own_hooks_run_on_the_twin_too(policy, vector):
    seen = []
    policy.body.register_forward_hook(lambda module, args, output: seen.append(output.clone()) or output + 1)
    twin = PatchedPolicy(policy, zero_ablate(Site("norm", channel=0)))
    twin(vector)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], policy.body[1](policy.body[0](vector)))


def test_a_twin_is_patched_and_recorded_like_any_model(policy, points, twin, vector):
    with patched(twin, zero_ablate(Site("actor", feature=1))), recording(twin, ["body", "actor"]) as cache:
        found = twin(vector)
    expected = by_hand(policy, vector)
    expected[:, 1] = 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not cache["body"][:, 3].any()
    torch.testing.assert_close(twin(vector), by_hand(policy, vector), rtol=0, atol=0)


def test_a_twin_can_be_traced_and_run_with_a_cache(policy, twin, vector):
    again = hook_points(twin, vector)
    _, cache = run_with_cache(again, vector, sites="actor")
    assert list(again) == list(hook_points(policy, vector))
    torch.testing.assert_close(cache["actor"], by_hand(policy, vector).detach(), rtol=0, atol=0)


def test_a_context_on_the_policy_does_not_reach_its_twin(policy, points, twin, vector):
    expected = by_hand(policy, vector)
    with patched(points, zero_ablate(points.site("actor"))):
        torch.testing.assert_close(twin(vector), expected, rtol=0, atol=0)
        assert not policy(vector).any()


def test_a_twin_may_move_to_another_thread_between_calls(policy, twin, vector):
    twin(vector)
    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(twin, vector).result(), by_hand(policy, vector), rtol=0, atol=0)


def test_two_twins_run_in_two_threads_at_once(policy, points, vector):
    barrier = threading.Barrier(2)

    def wait(activation):
        barrier.wait(10)
        return activation * 0

    twins = [PatchedPolicy(points, edit(points.site("body", feature=feature), wait)) for feature in (1, 3)]
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda twin: twin(vector), twins)
    torch.testing.assert_close(one, by_hand(policy, vector, 1))
    torch.testing.assert_close(other, by_hand(policy, vector, 3))


@pytest.mark.parametrize("entry", ["__call__", "greedy", "body"])
def test_one_twin_in_two_threads_at_once_is_refused(points, vector, entry):
    inside, leave = threading.Event(), threading.Event()

    def wait(activation):
        inside.set()
        leave.wait(10)
        return activation

    twin = PatchedPolicy(points, edit(points.site("body"), wait))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(twin, vector)
        assert inside.wait(10)
        with pytest.raises(ConcurrencyError, match="in another thread"):
            getattr(twin, entry)(vector)
        leave.set()
        running.result()


def test_a_part_of_a_twin_is_not_pickled_without_its_patches(twin):
    with pytest.raises(ConcurrencyError, match="cannot be pickled while it is patched.*pickle an entire PatchedPolicy"):
        pickle.dumps(twin.body)


def test_a_part_of_a_twin_that_holds_no_patch_can_be_pickled(policy, twin, vector):
    part = pickle.loads(pickle.dumps(twin.actor))
    hidden = torch.randn(5, policy.actor.in_features)
    torch.testing.assert_close(part(hidden), policy.actor(hidden), rtol=0, atol=0)


def test_a_copy_of_a_part_of_a_twin_is_refused_as_its_patches_are_not_in_it(twin, vector):
    with pytest.raises(ConcurrencyError, match="is a copy"):
        copy.deepcopy(twin.body)(vector)


# --- names of the user's own ---


class Named(nn.Module):
    """Has attributes of the names that a twin offers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.ledger = ["mine"]
        self.distribution = nn.Linear(4, 4)

    @property
    def patches(self):
        return 16

    def disable(self):
        return "off"

    def forward(self, vector):
        return self.distribution(self.fc(vector))


def test_names_that_the_policy_has_itself_stay_its_own(vector):
    policy = Named()
    twin = PatchedPolicy(policy, zero_ablate(Site("fc")))
    assert (twin.ledger, twin.patches, twin.disable()) == (["mine"], 16, "off")
    torch.testing.assert_close(twin(vector), policy.distribution(torch.zeros(5, 4)), rtol=0, atol=0)
    assert isinstance(twin.distribution, nn.Linear)


def test_what_the_policy_has_a_name_for_is_still_to_be_had_from_patched_policy(vector):
    twin = PatchedPolicy(Named(), zero_ablate(Site("fc")))
    twin(vector)
    assert PatchedPolicy.ledger.fget(twin).to_records()[0]["firings"] == 1
    assert len(PatchedPolicy.patches.fget(twin)) == 1
    with PatchedPolicy.disable(twin):
        assert not torch.equal(twin.fc(vector), torch.zeros(5, 4))


class Odd(Policy):
    """Static and class methods, decorated ones and generators."""

    @staticmethod
    def double(x):
        return x * 2

    @classmethod
    def build(cls):
        return cls()

    @torch.no_grad()
    def decorated(self, vector):
        return self(vector)

    def generated(self, vectors):
        for vector in vectors:
            yield self(vector)

    def __len__(self):
        return 3


def test_methods_of_every_kind_work_on_a_twin(vector):
    policy = Odd().eval()
    twin = PatchedPolicy(policy, zero_ablate(Site("body")))
    expected = policy.actor(policy.norm(torch.zeros(5, 8)))
    assert twin.double(2) == 4
    assert isinstance(type(twin).build(), Odd)
    torch.testing.assert_close(twin.decorated(vector), expected, rtol=0, atol=0)
    torch.testing.assert_close(next(iter(twin.generated([vector]))), expected, rtol=0, atol=0)
    assert len(twin) == 3


# --- Stable-Baselines3 ---


def actions(count=3):
    return spaces.Discrete(count)


VECTOR = spaces.Box(-1, 1, (6,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
POLICIES = {
    "mlp": (ActorCriticPolicy, VECTOR, actions(), {}),
    "mlp, continuous": (ActorCriticPolicy, VECTOR, spaces.Box(-1, 1, (2,), np.float32), {}),
    "mlp, state dependent": (ActorCriticPolicy, VECTOR, spaces.Box(-1, 1, (2,), np.float32), {"use_sde": True}),
    "mlp, many discrete": (ActorCriticPolicy, VECTOR, spaces.MultiDiscrete([3, 2]), {}),
    "cnn": (ActorCriticCnnPolicy, IMAGE, actions(), {}),
    "multi-input": (MultiInputActorCriticPolicy, spaces.Dict(image=IMAGE, vector=VECTOR), actions(), {}),
}


@pytest.fixture(params=list(POLICIES))
def sb3(request):
    kind, observation_space, action_space, settings = POLICIES[request.param]
    torch.manual_seed(0)
    if observation_space is VECTOR:
        settings = {**settings, "net_arch": [8, 8]}
    policy = kind(observation_space, action_space, lambda _: 1e-3, **settings)
    policy.set_training_mode(False)
    observation_space.seed(0)
    sampled = [observation_space.sample() for _ in range(4)]
    if isinstance(observation_space, spaces.Dict):
        batch: Any = {key: np.stack([row[key] for row in sampled]) for key in observation_space}
    else:
        batch = np.stack(sampled)
    return policy, batch


def tensors(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: torch.as_tensor(rows) for key, rows in batch.items()}
    return torch.as_tensor(batch)


def heads(policy: Any, latent: Tensor, latent_value: Tensor) -> tuple[Any, Tensor]:
    return policy._get_action_dist_from_latent(latent), policy.value_net(latent_value)


def ablated(policy: Any, batch: Any) -> tuple[Any, Tensor]:
    """Distribution and value of the policy with the features of its extractor at zero, step by step."""
    features = policy.extract_features(tensors(batch))
    latent, latent_value = policy.mlp_extractor(torch.zeros_like(features))
    return heads(policy, latent, latent_value)


def test_every_method_of_an_sb3_policy_is_patched(sb3):
    policy, batch = sb3
    twin = PatchedPolicy(policy, zero_ablate(Site("features_extractor")))
    expected, value = ablated(policy, batch)
    torch.manual_seed(1)
    sampled, found_value, log_prob = twin(tensors(batch))
    torch.testing.assert_close(found_value, value)
    torch.testing.assert_close(log_prob, expected.log_prob(sampled))
    evaluated = twin.evaluate_actions(tensors(batch), sampled)
    torch.testing.assert_close(evaluated[1], expected.log_prob(sampled))
    torch.testing.assert_close(twin.predict_values(tensors(batch)), value)
    torch.testing.assert_close(twin.get_distribution(tensors(batch)).log_prob(sampled), expected.log_prob(sampled))
    chosen, _ = twin.predict(batch, deterministic=True)
    np.testing.assert_allclose(
        chosen, expected.mode().detach().numpy().clip(-1, 1) if chosen.dtype.kind == "f" else expected.mode().numpy(),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    assert {r["method"] for r in twin.ledger.to_records()} == {
        "__call__", "evaluate_actions", "predict_values", "get_distribution", "predict",
    }  # fmt: skip


def test_an_sb3_policy_and_its_twin_share_weights_and_keys(sb3):
    policy, _ = sb3
    twin = PatchedPolicy(policy, zero_ablate(Site("action_net")))
    assert isinstance(twin, type(policy))
    assert list(twin.state_dict()) == list(policy.state_dict())
    assert all(one is other for one, other in zip(policy.parameters(), twin.parameters(), strict=True))


def test_the_distribution_of_an_sb3_twin_is_that_of_its_patched_policy(sb3):
    policy, batch = sb3
    twin = PatchedPolicy(policy, zero_ablate(Site("features_extractor")))
    found, (expected, _) = twin.distribution(tensors(batch)), ablated(policy, batch)
    if isinstance(policy.action_space, spaces.MultiDiscrete):
        for part, each in enumerate(expected.distribution):
            probabilities = found.probs[:, part]
            torch.testing.assert_close(probabilities[:, : each.probs.shape[1]], each.probs)
            assert (probabilities[:, each.probs.shape[1] :] == 0).all()
        return
    torch.testing.assert_close(found.mean, expected.distribution.mean, equal_nan=True)


def test_an_sb3_policy_can_be_traced_by_the_method_that_is_used(sb3):
    policy, batch = sb3
    points = hook_points(policy, tensors(batch), method="get_distribution")
    assert points["action_net"].batch_axis == 0
    with patched(points, zero_ablate(points.site("action_net"))):
        policy.get_distribution(tensors(batch))


def test_a_policy_that_has_just_learnt_has_a_twin():
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    model.learn(8)  # what it learnt from last is still in the policy, with its graph
    twin = PatchedPolicy(model.policy, zero_ablate(Site("value_net")))
    assert not twin.predict_values(torch.zeros(1, 4)).any()


def test_an_sb3_policy_learns_with_its_twin_inside():
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=2, seed=0, device="cpu",
                policy_kwargs={"net_arch": [8]})  # fmt: skip
    policy = model.policy
    twin = PatchedPolicy(policy, zero_ablate(Site("mlp_extractor.policy_net.1", axis1=0)),
                         allow_unreached="mlp_extractor.policy_net.1")  # fmt: skip
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    model.policy = twin
    model.learn(64)
    changed = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "mlp_extractor.policy_net.0.weight" in changed
    row = policy.mlp_extractor.policy_net[0].weight[0]
    assert torch.equal(row, before["mlp_extractor.policy_net.0.weight"][0])  # nothing flows through an ablated feature
    counted = {record["method"]: record["firings"] for record in twin.ledger.to_records()}
    assert counted["__call__"] == 64
    assert counted["evaluate_actions"] == 8
    model.policy = policy
    observation, _ = gymnasium.make("CartPole-v1").reset(seed=0)
    assert model.predict(observation)[0] in (0, 1)


def test_a_squashed_distribution_of_sb3_is_squashed():
    policy = ActorCriticPolicy(
        VECTOR, spaces.Box(-1, 1, (2,), np.float32), lambda _: 1e-3, use_sde=True, squash_output=True
    )
    observations = torch.randn(50, 6) * 5
    found = action_distribution(policy, observations)
    assert (found.sample().abs() <= 1).all()
    torch.testing.assert_close(found.base_dist.mean.tanh(), policy.get_distribution(observations).mode())


# --- CleanRL ---


class Agent(nn.Module):
    """As in CleanRL's ppo.py: no forward, two networks, a method for each use."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.actor = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def get_value(self, x):
        return self.critic(x)

    def get_action_and_value(self, x, action=None):
        logits = self.actor(x)
        probs = Categorical(logits=logits)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


def test_a_cleanrl_agent_is_patched_in_both_its_methods(vector):
    agent = Agent()
    twin = PatchedPolicy(agent, zero_ablate(Site("critic.1")), allow_unreached=[])
    expected = agent.critic[2].bias.expand(5, 1)
    torch.testing.assert_close(twin.get_value(vector), expected, rtol=0, atol=0)
    action, log_prob, entropy, value = twin.get_action_and_value(vector)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(log_prob, Categorical(logits=agent.actor(vector)).log_prob(action))


def test_a_patch_on_the_actor_of_a_cleanrl_agent_need_not_run_in_get_value(vector):
    agent = Agent()
    with pytest.raises(UnreachedError, match=r"'actor.1' never ran in get_value\(\)"):
        PatchedPolicy(agent, zero_ablate(Site("actor.1"))).get_value(vector)
    twin = PatchedPolicy(agent, zero_ablate(Site("actor.1")), allow_unreached="actor.1")
    torch.testing.assert_close(twin.get_value(vector), agent.get_value(vector), rtol=0, atol=0)
    torch.testing.assert_close(
        twin.get_action_and_value(vector, torch.zeros(5))[1],
        agent.actor[2].bias.log_softmax(-1)[:1].expand(5),
    )


def test_a_cleanrl_agent_is_traced_by_its_method(vector):
    points = hook_points(Agent(), vector, method="get_action_and_value")
    assert [name for name in points if ".in" not in name] == [
        "actor.0", "actor.1", "actor.2", "actor", "critic.0", "critic.1", "critic.2", "critic",
    ]  # fmt: skip
    assert {point.batch_axis for point in points.values()} == {0}


# --- action distributions ---


LOGITS = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 1.0]])
CATEGORICAL = Categorical(logits=LOGITS)


@dataclass
class WithLogits:
    logits: Tensor


OUTPUTS = {
    "logits": LOGITS,
    "distribution": CATEGORICAL,
    "distribution and value": (CATEGORICAL, torch.zeros(2)),
    "value and distribution": (torch.zeros(2), CATEGORICAL),
    "logits and value": (LOGITS, torch.zeros(2)),
    "list": [LOGITS, torch.zeros(2)],
    "dict with logits": {"value": torch.zeros(2), "logits": LOGITS},
    "dict with a distribution": {"pi": CATEGORICAL, "value": torch.zeros(2)},
    "object with logits": WithLogits(LOGITS),
    "object with a distribution": SimpleNamespace(distribution=CATEGORICAL),
    "nested": ((CATEGORICAL, None), torch.zeros(2)),
}


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_the_action_distribution_of_every_kind_of_output_is_found(name):
    found = action_distribution(lambda observations: OUTPUTS[name], None, outputs="logits")
    torch.testing.assert_close(found.probs, LOGITS.softmax(-1))


def test_a_policy_with_get_distribution_is_asked_by_it():
    class Asked(nn.Module):
        def get_distribution(self, observations):
            return SimpleNamespace(distribution=CATEGORICAL)

    assert action_distribution(Asked(), None) is CATEGORICAL


def test_the_distribution_of_a_model_and_of_its_hook_points_is_that_of_its_policy():
    model, seen = PPO("MlpPolicy", "CartPole-v1", seed=0), torch.ones(3, 4)
    wanted = action_distribution(model.policy, seen).logits
    points = hook_points(model.policy, seen, method="get_distribution")
    assert torch.equal(action_distribution(model, seen).logits, wanted)
    assert torch.equal(action_distribution(points, seen).logits, wanted)


def test_the_distribution_of_a_twin_is_patched(policy, twin, vector):
    torch.testing.assert_close(
        twin.distribution(vector, outputs="logits").logits, by_hand(policy, vector).log_softmax(-1)
    )


@pytest.mark.parametrize(
    ("output", "described"),
    [
        ((LOGITS, LOGITS), r"\(Tensor, Tensor\)"),
        ((LOGITS, torch.zeros(2), torch.zeros(2)), r"\(Tensor, Tensor, Tensor\)"),
        ({"value": torch.zeros(2)}, "a dict of 'value'"),
        ({"a": CATEGORICAL, "b": CATEGORICAL}, "a dict of 'a', 'b'"),
        ((CATEGORICAL, Normal(LOGITS, 1.0)), r"\(Categorical, Normal\)"),
        ((), r"\(\)"),
        (None, "NoneType"),
        ("left", "str"),
    ],
    ids=["two tensors", "three tensors", "dict", "two in a dict", "two in a tuple", "empty", "none", "text"],
)
def test_what_holds_no_action_distribution_is_described(output, described):
    with pytest.raises(DistributionError, match=f"returned {described}, which contains no action distribution"):
        action_distribution(lambda observations: output, None)


def test_a_policy_without_forward_is_told_what_to_pass(vector):
    with pytest.raises(DistributionError, match=r"Agent has no forward\(\). For rollout"):
        action_distribution(Agent(), vector)


class Deepening(nn.Module):
    """Calls itself: one layer, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, vector: Tensor, depth: int = 2) -> Tensor:
        hidden = self.layer(vector).tanh()
        return self(hidden, depth - 1) if depth else hidden

    def twice(self, vector: Tensor) -> Tensor:
        return self(vector) + self(vector)


@pytest.mark.parametrize("name", ["layer#0", "layer#2", "#1.in[0]", "#0.out"])
def test_in_a_twin_a_forward_inside_a_forward_is_a_part_of_it_and_those_of_a_method_are_not(name):
    torch.manual_seed(0)
    model, vectors = Deepening(), torch.randn(3, 4)
    points = hook_points(model, vectors)
    patch = edit(points.site(name), Scale(2.0))
    with patched(points, patch):
        expected = model(vectors)
    if name == "#0.out":  # the outermost call is entered first and left last
        torch.testing.assert_close(expected, 2 * model(vectors))
    twin = PatchedPolicy(points, patch)
    torch.testing.assert_close(twin(vectors), expected, rtol=0, atol=0)
    torch.testing.assert_close(twin.twice(vectors), 2 * expected, rtol=0, atol=0)
    assert [record["firings"] for record in twin.ledger.to_records()] == [1, 2]


class Offloaded(Mapping):
    """Weights that are on a disk until they are asked for."""

    def __init__(self, names):
        self.names = names

    def __getitem__(self, name):
        raise KeyError(name)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def test_a_mapping_that_computes_what_it_holds_is_not_asked_for_it_when_a_twin_is_made():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    model.weights = Offloaded(["0.weight"])
    vectors = torch.randn(3, 4)
    twin = PatchedPolicy(model, zero_ablate(Site("1")))
    assert not twin(vectors).any() and model(vectors).any()


def test_a_twin_inside_a_model_keeps_its_patches_in_a_twin_of_that():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = PatchedPolicy(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), zero_ablate(Site("0")))
            self.head = nn.Linear(5, 2)

        def forward(self, vector):
            return self.head(self.inner(vector))

    model, vectors = Outer(), torch.randn(3, 4)
    twin = PatchedPolicy(model, edit(Site("head"), Scale(2.0)))
    torch.testing.assert_close(twin(vectors), 2 * model(vectors), rtol=0, atol=0)
    torch.testing.assert_close(model(vectors), model.head.bias.expand(3, 2), rtol=0, atol=0)


def test_a_twin_whose_class_copies_itself_in_a_way_of_its_own_is_copied_with_its_patches():
    torch.manual_seed(0)
    graph, vectors = (
        torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))),
        torch.randn(3, 4),
    )
    twin = PatchedPolicy(graph, zero_ablate(Site("1")))
    copied, shallow = copy.deepcopy(twin), copy.copy(twin)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    for each in (copied, shallow):
        torch.testing.assert_close(each(vectors), twin(vectors), rtol=0, atol=0)
        assert each.patches
    assert next(copied.parameters()).any()
    assert next(shallow.parameters()) is next(twin.parameters())


def test_the_class_of_a_policy_is_freed_after_its_twins(vector):
    def make() -> weakref.ref[type]:
        made = type("Made", (Policy,), {})
        twins: Any = [PatchedPolicy(made(), zero_ablate(Site("actor"))) for _ in range(2)]
        assert type(twins[0]) is type(twins[1])
        twins[0](vector)
        return weakref.ref(made)

    kinds = [make() for _ in range(3)]
    gc.collect()
    gc.collect()  # the class of a twin goes first, then the policy's, which it inherits
    assert [kind() for kind in kinds] == [None] * 3


EXPORTS = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch.export goes through dynamo here"
)
RECORDED: dict[str, Any] = {
    "export": pytest.param(lambda twin, x: torch.export.export(twin, (x,)), marks=EXPORTS),
    "fx": lambda twin, x: torch.fx.symbolic_trace(twin),
    "fx of a model around it": lambda twin, x: torch.fx.symbolic_trace(nn.Sequential(twin)),
}


@pytest.mark.parametrize("record", RECORDED.values(), ids=[*RECORDED])
def test_a_twin_is_not_recorded_without_its_patches(record, policy, vector):
    twin: Any = PatchedPolicy(policy, zero_ablate(Site("actor")), allow_unreached="actor")
    with pytest.raises(UnsupportedModelError) as caught:
        record(twin, vector)
    assert str(caught.value) == (
        "torch.export and torch.fx would drop or freeze the patches of a PatchedPolicy. Instead, export the policy "
        "inside patched(policy, patches): torch.export then keeps the patches."
    )
    assert twin(vector) is not None


@EXPORTS
def test_a_program_that_was_exported_inside_patched_keeps_the_patches():
    model, vector = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(2, 4)
    with patched(model, zero_ablate(Site("0"))):
        expected = model(vector)
        program = torch.export.export(model, (vector,)).module()
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(vector), expected)
    assert torch.equal(program(vector), expected)
    assert torch.equal(graph(vector), model(vector))  # it calls the model's own modules
