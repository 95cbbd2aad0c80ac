"""Donors against two forward passes and a replacement by hand, and their errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from policies import SEEDS, impala, recurrent
from test_unfamiliar_models import GPT
from torch import Tensor, nn

from chanpatch import (
    PatchedPolicy,
    Site,
    hook_points,
    paired_rollouts,
    patch_in,
    patched,
    recording,
    rollout,
    run_with_cache,
    save,
    sweep,
    tap,
    view,
    zero_ablate,
)
from chanpatch.errors import EditError, InterventionError, UnreachedError, UnsupportedModelError
from chanpatch.metrics import logit_difference
from chanpatch.policies import rollout_sweep
from chanpatch.registry import Directions


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)

    def forward(self, vector: Tensor) -> Tensor:
        return self.fc2(tap("hidden", self.relu(self.fc1(vector))))

    def act(self, vector: Tensor) -> Tensor:
        return self(vector) * 2


def blank(context: Any) -> Any:
    """Return the inputs of the root call with zeros in place of the observations."""
    observations, *rest = context.inputs
    return (torch.zeros_like(observations), *rest)


def by_hand(model: nn.Module, module: nn.Module, inputs: Any, others: Any, replaced: Callable[..., Tensor]) -> Any:
    """Run the model on both inputs, with one hook of torch's that records and one that replaces."""
    seen: list[Tensor] = []
    with torch.no_grad():
        hook = module.register_forward_hook(lambda *each: seen.append(each[2].clone()))
        model(*others)
        hook.remove()
        hook = module.register_forward_hook(lambda *each: replaced(each[2].clone(), seen[0]))
        output = model(*inputs)
        hook.remove()
    return output


def channel_3(own: Tensor, other: Tensor) -> Tensor:
    own[:, 3] = other[:, 3]
    return own


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy()


# Values


@pytest.mark.parametrize("site", ["embedder.block3.res1.conv1", "embedder.relu3", "embedder.block1.maxpool"])
def test_a_donor_channel_of_an_impala_policy_equals_a_replacement_by_hand(site: str) -> None:
    torch.manual_seed(0)
    model = impala().policy.eval()
    x = torch.rand(3, 3, 64, 64)
    points = hook_points(model, x)
    patch = patch_in(points.site(site, channel=3), donor=blank)
    expected = by_hand(model, model.get_submodule(site), (x,), (torch.zeros_like(x),), channel_3)
    with torch.no_grad():
        with patched(points, patch):
            torch.testing.assert_close(model(x)[0].logits, expected[0].logits)
        torch.testing.assert_close(PatchedPolicy(points, patch)(x)[0].logits, expected[0].logits)
        torch.testing.assert_close(PatchedPolicy(model, patch)(x)[0].logits, expected[0].logits)
        assert not torch.allclose(model(x)[0].logits, expected[0].logits)


def test_the_donor_of_a_recurrent_policy_starts_from_the_state_that_the_policy_was_given() -> None:
    torch.manual_seed(0)
    model, x, state = recurrent().policy.eval(), torch.randn(3, 6), tuple(torch.randn(2, 1, 3, 8))
    points = hook_points(model, x, state)
    patch = patch_in(points.site("lstm.out[0]"), donor=blank)
    with torch.no_grad():
        seen, _ = model.lstm(model.embed(torch.zeros_like(x)).tanh()[None], state)
        _, after = model.lstm(model.embed(x).tanh()[None], state)
        found, new = PatchedPolicy(points, patch)(x, state)
        torch.testing.assert_close(found, model.head(seen[0]))
        torch.testing.assert_close(new, after)
        hidden = points.site("lstm.out[1][0]")
        _, (first, cell) = PatchedPolicy(points, patch_in(hidden, donor=blank))(x, state)
    torch.testing.assert_close(first, seen)
    torch.testing.assert_close(cell, after[1])


def test_a_donor_of_a_transformer_may_return_keyword_arguments() -> None:
    torch.manual_seed(0)
    model = GPT().eval()
    clean, corrupted = torch.randint(11, (2, 3, 7))
    points = hook_points(model, clean)
    patch = patch_in(points.site("blocks.1.mlp"), donor=lambda _: {"tokens": corrupted})
    expected = by_hand(model, model.blocks[1].mlp, (clean,), (corrupted,), lambda own, other: other)
    with torch.no_grad(), patched(points, patch):
        torch.testing.assert_close(model(tokens=clean), expected)


def test_a_donor_on_heads_and_on_coordinates_sees_the_hook_point_as_the_patch_does() -> None:
    torch.manual_seed(0)
    model = GPT().eval()
    clean, corrupted = torch.randint(11, (2, 3, 7))
    names = {"blocks.1.proj.in[0]": view("batch position (head feature)", head=2)}
    points = hook_points(model, clean, axes=names)
    site = points.site("blocks.1.proj.in[0]", head=1)
    seen = run_with_cache(points, corrupted, sites=site, stop=True)
    along = points.site("blocks.0.mlp").along("feature", Directions(torch.eye(8)[:3]), component=[0, 2])
    with torch.no_grad():
        for place, source in ((site, seen[site]), (along, run_with_cache(points, corrupted, sites=along)[1][along])):
            with patched(points, patch_in(place, source)):
                expected = model(clean)
            with patched(points, patch_in(place, donor=lambda _: corrupted)):
                torch.testing.assert_close(model(clean), expected)
            assert not torch.allclose(model(clean), expected)


def test_patches_at_inputs_taps_and_several_sites_share_one_forward_pass(policy: Policy) -> None:
    x, runs = torch.randn(3, 4), []
    points = hook_points(policy, x)
    policy.fc1.register_forward_hook(lambda *_: runs.append("fc1"))
    policy.fc2.register_forward_hook(lambda *_: runs.append("fc2"))
    patches = [
        patch_in(points.site("fc1", feature=[1, 2]), donor=blank),
        patch_in(points.site("hidden", feature=0), donor=blank),
    ]
    with torch.no_grad(), patched(points, patches) as ledger:
        found = policy(x)
    assert runs == ["fc1", "fc1", "fc2"]  # the donor's forward pass stops at the tap
    other = policy.fc1(torch.zeros_like(x))
    hidden = policy.fc1(x)
    hidden[:, [1, 2]] = other[:, [1, 2]]
    hidden = hidden.relu()
    hidden[:, 0] = other.relu()[:, 0]
    torch.testing.assert_close(found, policy.fc2(hidden))
    assert [record["donor forwards"] for record in ledger.to_records()] == [1, 0]
    expected = policy.fc2(other.relu())
    with torch.no_grad(), patched(points, patch_in(points.site("fc2.in[0]"), donor=blank)):
        torch.testing.assert_close(policy(x), expected)


def test_the_ledger_counts_one_forward_pass_per_root_call_and_donor_function(policy: Policy) -> None:
    points = hook_points(policy, torch.randn(3, 4))
    two = [patch_in(points.site("fc1"), donor=blank), patch_in(points.site("relu"), donor=lambda c: blank(c))]
    twin = PatchedPolicy(points, two)
    twin(torch.randn(3, 4)), twin.act(torch.randn(5, 4))
    assert str(twin.ledger) == (
        "Ledger of 2 patches\n"
        "method    site          edit   firings  rows  elements  donor forwards\n"
        "__call__  Site('fc1')   Donor  1        3     24        1\n"
        "act       Site('fc1')   Donor  1        5     40        1\n"
        "__call__  Site('relu')  Donor  1        3     24        1\n"
        "act       Site('relu')  Donor  1        5     40        1"
    )


def test_a_ledger_without_donors_does_not_count_forward_passes(policy: Policy) -> None:
    with patched(policy, zero_ablate(Site("fc1"))) as ledger:
        policy(torch.randn(3, 4))
    assert "donor forwards" not in ledger.to_records()[0]


def test_in_a_method_of_a_bare_twin_the_donor_runs_that_method(policy: Policy) -> None:
    x = torch.randn(3, 4)
    twin = PatchedPolicy(policy, patch_in(Site("fc2"), donor=lambda context: context.inputs[0] + 1))
    torch.testing.assert_close(twin.act(x), policy.act(x + 1))
    torch.testing.assert_close(twin(x), policy(x + 1))


def test_a_traced_method_is_the_method_that_the_donor_runs(policy: Policy) -> None:
    x = torch.randn(3, 4)
    points = hook_points(policy, x, method="act")
    with patched(points, patch_in(points.site("fc2"), donor=lambda context: context.inputs[0] + 1)):
        found = policy.act(x)
    torch.testing.assert_close(found, policy.act(x + 1))


def test_a_donor_is_recorded_without_the_patches_of_any_context_or_twin(policy: Policy) -> None:
    x = torch.randn(3, 4)
    points = hook_points(policy, x)
    patch = patch_in(points.site("fc2"), donor=blank)
    expected = policy(torch.zeros_like(x))
    with patched(points, zero_ablate(points.site("fc1"))), patched(points, patch), recording(points, "fc1") as cache:
        torch.testing.assert_close(policy(x), expected)
    assert cache["fc1"].shape == (3, 8)  # of the patched forward pass only
    assert not cache["fc1"].any()
    inner = PatchedPolicy(points, zero_ablate(points.site("fc1")))
    torch.testing.assert_close(PatchedPolicy(inner, patch)(x), expected)


def test_where_limits_a_donor_to_some_rows(policy: Policy) -> None:
    x = torch.randn(3, 4)
    points = hook_points(policy, x)
    rows = torch.tensor([[True], [False], [True]])
    expected = torch.where(rows, policy(x * 0), policy(x))
    with patched(points, patch_in(points.site("fc2"), donor=blank, where=rows)):
        torch.testing.assert_close(policy(x), expected)


# No side effects


class Changing(nn.Module):
    """Batch norm and dropout in training mode, a counter, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)
        self.calls, self.seen = 0, []

    def forward(self, vector: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(vector))
        hidden = self.drop(self.norm(vector))
        self.eval()
        return self.fc(hidden)


def test_a_donor_leaves_buffers_flags_attributes_and_random_numbers_as_they_were() -> None:
    model, x = Changing(), torch.randn(6, 4)
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    plain(x)
    plain_draw = torch.rand(3)
    torch.manual_seed(1)
    with patched(model, patch_in(Site("fc"), donor=lambda context: context.inputs[0] * 7)):
        model(x)
    assert torch.equal(torch.rand(3), plain_draw)
    assert (model.calls, model.seen, model.training) == (1, [6], False)
    for own, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(own, other)


def test_gradients_of_the_patched_forward_pass_are_those_of_a_constant_donor() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 4)
    points = hook_points(model, x)
    site = points.site("2", feature=[0, 1])
    donated = run_with_cache(copy.deepcopy(model), x * 0, sites=site)[1][site]
    grads = []
    for patch in (patch_in(site, donor=blank), patch_in(site, donated)):
        trained = copy.deepcopy(model)
        with patched(trained, patch):
            trained(x).sum().backward()
        grads.append([weight.grad for weight in trained.parameters()])
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other)


def test_under_autocast_a_donor_does_not_cut_the_gradients_of_the_weights() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        points = hook_points(model, x)
        with patched(points, patch_in(points.site("0", feature=0), donor=blank)):
            model(x).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


# Rollouts


def without_angle(context: Any) -> Tensor:
    observations = context.inputs[0].clone()
    observations[:, 2] = 0
    return observations


def cart_pole() -> Any:
    return gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync")


def acted_by_hand(policy: Policy, features: list[int], seed: int) -> tuple[list[int], float]:
    """Play one episode, and act at each step on features that two forward passes by hand join."""
    environment, actions = gymnasium.make("CartPole-v1"), []
    observation, _ = environment.reset(seed=seed)
    for _ in range(40):
        x = torch.as_tensor(observation)[None]
        blinded = x.clone()
        blinded[:, 2] = 0
        hidden, other = policy.fc1(x).relu(), policy.fc1(blinded).relu()
        hidden[:, features] = other[:, features]
        actions.append(int(policy.fc2(hidden).argmax()))
        observation, _, over, *_ = environment.step(actions[-1])
        if over:
            break
    return actions, float(len(actions))


@torch.no_grad()
def test_in_cart_pole_a_policy_acts_on_features_as_if_the_pole_were_upright() -> None:
    torch.manual_seed(4)
    policy = Policy()
    policy.fc1.weight *= 4
    points = hook_points(policy, torch.randn(2, 4))
    seeds = [3, 4, 5, 6, 7]
    settings: Any = {"max_steps": 40, "greedy": True, "outputs": "logits"}
    chosen = {"few": [0, 1, 2], "many": [3, 4, 5, 6, 7]}
    patches = {
        name: patch_in(points.site("relu", feature=features), donor=without_angle) for name, features in chosen.items()
    }
    swept = rollout_sweep(points, cart_pole(), seeds, patches, **settings)
    twins = {name: PatchedPolicy(points, patch) for name, patch in patches.items()}
    pairs = paired_rollouts({"original": policy, **twins}, cart_pole(), seeds, **settings)
    for name, features in chosen.items():
        alone = rollout(twins[name], cart_pole(), seeds, **settings)
        for number, seed in enumerate(seeds):
            actions, total = acted_by_hand(policy, features, seed)
            for found in (swept[name], pairs[name], alone):
                assert found.actions[number].tolist() == actions
                assert found.returns[number] == total
    assert any((pairs[name].lengths != pairs["original"].lengths).any() for name in chosen)


@torch.no_grad()
def test_in_a_rollout_of_a_recurrent_policy_the_donor_gets_the_rows_and_states_of_each_label() -> None:
    torch.manual_seed(0)
    case = recurrent()
    model, points = case.policy, case.points
    patch = patch_in(points.site("lstm.out[0]", feature=[1, 2, 3]), donor=blank)

    def replaced(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        (hidden, new), (other, _) = (model.lstm(model.embed(each).tanh()[None], state) for each in (x, x * 0))
        hidden[..., 1:4] = other[..., 1:4]
        return model.head(hidden[0]), new

    expected = case.rollout(replaced)
    settings: Any = {"max_steps": 20, "outputs": "logits", "initial_state": case.initial_state}
    swept = rollout_sweep(points, SyncVectorEnv([case.environment] * 3), SEEDS, {"a": patch, "b": patch}, **settings)
    for found in (case.rollout(PatchedPolicy(points, patch)), swept["a"], swept["b"]):
        assert [each.tolist() for each in found.actions] == [each.tolist() for each in expected.actions]


# Sweeps


@pytest.mark.parametrize("strategy", ["auto", "loop", "resume", "vmap"])
def test_a_sweep_over_donors_equals_the_loop(policy: Policy, strategy: Any) -> None:
    x = torch.randn(12, 4)
    points = hook_points(policy, x)
    patches = {number: patch_in(points.site("relu", feature=number), donor=blank) for number in range(8)}
    result = sweep(points, x, patches=patches, metric=logit_difference(0, 1), strategy=strategy)
    with torch.no_grad():
        own, other = policy.fc1(x).relu(), policy.fc1(x * 0).relu()
        for number, row in enumerate(result.to_records()):
            logits = policy.fc2(torch.where(torch.arange(8) == number, other, own))
            assert row["patched"] == pytest.approx(float((logits[:, 0] - logits[:, 1]).mean()), abs=1e-6)


def test_a_donor_after_the_swept_site_gives_the_numbers_of_the_loop(policy: Policy) -> None:
    x = torch.randn(12, 4)
    points = hook_points(policy, x)
    later = patch_in(points.site("relu", feature=0), donor=blank)
    patches = {number: [zero_ablate(points.site("fc1", feature=number)), later] for number in range(8)}
    settings: Any = {"patches": patches, "metric": logit_difference(0, 1)}
    found, expected = (sweep(points, x, strategy=each, **settings).to_records() for each in ("auto", "loop"))
    for row, other in zip(found, expected, strict=True):
        assert row["patched"] == pytest.approx(other["patched"], abs=1e-6)


# Errors


def raised(policy: Policy, donor: Any, *, site: str = "relu") -> str:
    points = hook_points(policy, torch.zeros(2, 4))
    with (
        pytest.raises((EditError, UnreachedError)) as caught,
        patched(points, patch_in(points.site(site), donor=donor)),
    ):
        policy(torch.randn(3, 4))
    return str(caught.value)


RETURNED = (
    "The donor at Site('relu') must return the inputs of a forward pass: a tensor, a tuple of positional arguments or "
    "a dict of keyword arguments; got "
)


def test_a_donor_with_another_number_of_rows_is_an_error(policy: Policy) -> None:
    assert raised(policy, lambda context: context.inputs[0][:1]) == (
        "Site('relu') has shape (1, 8) with the donor's inputs, but (3, 8) in the patched forward pass. The donor must "
        "return inputs with the same shapes as context.inputs."
    )


def test_a_donor_that_returns_a_cache_is_an_error(policy: Policy) -> None:
    _, cache = run_with_cache(policy, torch.zeros(3, 4), sites="relu")
    advice = "an ActivationCache. To patch in recorded activations, use patch_in(site, cache)."
    assert raised(policy, lambda _: cache) == RETURNED + advice


def test_a_donor_that_returns_no_inputs_is_an_error(policy: Policy) -> None:
    assert raised(policy, lambda _: None) == RETURNED + "NoneType."
    assert raised(policy, lambda context: [*context.inputs]) == RETURNED + "list."


def test_a_donor_that_calls_the_patched_model_is_an_error(policy: Policy) -> None:
    assert raised(policy, lambda context: policy(*context.inputs)) == (
        "The donor at Site('relu') calls the patched Policy. A donor must only return inputs; chanpatch then runs the "
        "model on these inputs."
    )


def test_a_donor_whose_forward_pass_does_not_reach_the_site_is_an_error() -> None:
    class Choosing(Policy):
        def forward(self, vector: Tensor) -> Tensor:
            return self.fc2(self.relu(self.fc1(vector))) if vector.any() else self.fc2(self.fc1(vector))

    policy = Choosing()
    with pytest.raises(UnreachedError) as caught, patched(policy, patch_in(Site("relu"), donor=blank)):
        policy(torch.ones(3, 4))
    assert str(caught.value) == (
        "The forward pass on the donor's inputs did not reach Site('relu'). The donor must return inputs for which "
        "the model's __call__() reaches this site."
    )


def test_a_donor_that_returns_a_dict_of_observations_is_an_error() -> None:
    class Named(Policy):
        def forward(self, observations: dict[str, Tensor]) -> Tensor:
            return super().forward(observations["pole"])

    policy, seen = Named(), {"pole": torch.ones(3, 4)}
    donor = lambda context: {"pole": context.inputs[0]["pole"] * 0}  # noqa: E731
    with pytest.raises(EditError) as caught, patched(policy, patch_in(Site("relu"), donor=donor)):
        policy(seen)
    advice = "a dict of observations. Return a tuple that contains the dict."
    assert str(caught.value) == RETURNED + advice
    expected = policy({"pole": torch.zeros(3, 4)})
    with patched(policy, patch_in(Site("relu"), donor=lambda context: (donor(context),))):
        torch.testing.assert_close(policy(seen), expected)


def test_a_donor_needs_a_call_to_the_model(policy: Policy) -> None:
    twin = PatchedPolicy(policy, patch_in(Site("relu"), donor=blank))
    with pytest.raises(EditError) as caught:
        twin.relu(torch.randn(3, 8))
    assert str(caught.value) == (
        "The donor at Site('relu') needs a call to the whole model, but only a submodule was called."
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "patch_in at Site('relu') needs exactly one of source and donor; got neither."),
        ({"source": 0.0, "donor": blank}, "patch_in at Site('relu') needs exactly one of source and donor; got both."),
        (
            {"donor": torch.zeros(3, 4)},
            "The donor at Site('relu') must be a function that maps the context to inputs; got Tensor. To patch in an "
            "activation, pass it as `source`. To use fixed inputs, pass lambda context: inputs.",
        ),
        (
            {"source": blank},
            "The activation for Site('relu') must be a tensor with the region's axes or an ActivationCache; got "
            "function.",
        ),
    ],
    ids=["neither", "both", "a tensor as donor", "a function as source"],
)
def test_patch_in_needs_either_a_source_or_a_donor(given: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError) as caught:
        patch_in(Site("relu"), **given)
    assert str(caught.value) == message


def test_a_patch_with_a_donor_cannot_be_saved(tmp_path: Any) -> None:
    with pytest.raises(InterventionError, match="its edit Donor is code, but a file can only contain data"):
        save(tmp_path / "patch.safetensors", patch_in(Site("relu"), donor=blank))


def test_a_donor_inside_vmap_is_an_error(policy: Policy) -> None:
    twin = PatchedPolicy(policy, patch_in(Site("relu"), donor=blank))
    with pytest.raises(UnsupportedModelError) as caught:
        torch.vmap(twin)(torch.randn(3, 2, 4))
    assert str(caught.value) == (
        "The donor at Site('relu') cannot run inside torch.vmap or another transform. Call the model outside vmap."
    )


def test_two_labels_may_not_share_a_donor_with_state(policy: Policy) -> None:
    class Counting:
        def __call__(self, context: Any) -> Any:
            return blank(context)

    points, donor = hook_points(policy, torch.zeros(2, 4)), Counting()
    patches = {number: patch_in(points.site("relu", feature=number), donor=donor) for number in range(2)}
    with pytest.raises(EditError, match="Counting is used under two labels, 0 and 1, so the patches with these labels"):
        sweep(points, torch.zeros(2, 4), patches=patches, metric=logit_difference(0, 1))


# Twins


def test_a_twin_with_a_donor_can_be_copied_and_pickled(policy: Policy) -> None:
    x = torch.randn(3, 4)
    twin = PatchedPolicy(hook_points(policy, x), patch_in(Site("relu", feature=[0, 1]), donor=blank))
    for other in (pickle.loads(pickle.dumps(twin)), copy.deepcopy(twin), PatchedPolicy(twin, zero_ablate(Site("fc1")))):
        if len(other.patches) == 1:
            torch.testing.assert_close(other(x), twin(x))
        other(x)
        assert other.ledger.to_records()[0]["donor forwards"] > 0


def test_a_compiled_twin_runs_the_donor(policy: Policy) -> None:
    x = torch.randn(3, 4)
    twin = PatchedPolicy(hook_points(policy, x), patch_in(Site("relu"), donor=blank))
    expected = twin(x)
    torch.testing.assert_close(torch.compile(twin, backend="eager")(x), expected)
