import functools
import math
import sys

import gymnasium
import numpy as np
import policies
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from matplotlib import pyplot
from policies import SEEDS, Drifting, Recurrent, same
from torch import nn

import chanpatch
from chanpatch import (
    PatchedPolicy,
    Site,
    edit,
    hook_points,
    mean_ablate,
    patched,
    recording,
    resample_ablate,
    zero_ablate,
)
from chanpatch.controls import matched_channels
from chanpatch.engine.moments import published
from chanpatch.errors import BatchAxisError, EditError, HookPointError, MissingPackageError, NaNError, RolloutError
from chanpatch.patching import Add, Patch, Scale, run_with_cache
from chanpatch.registry import Directions
from chanpatch.statistics import rank_among

rollout_sweep = functools.partial(chanpatch.policies.rollout_sweep, outputs="logits")
paired_rollouts = functools.partial(chanpatch.paired_rollouts, outputs="logits")


@pytest.fixture(params=list(policies.CASES))
def case(request):
    return policies.case(request.param)


class Counting(nn.Module):
    """A small policy that notes the step and the number of rows of every forward, its own or a twin's."""

    def __init__(self, forwards):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        self.note = lambda rows: forwards.append((published.now.step, rows))

    def forward(self, observations):
        self.note(len(observations))
        return 3 * self.layers(observations)


@pytest.fixture
def forwards():
    return []


@pytest.fixture
def policy(forwards):
    torch.manual_seed(0)
    return Counting(forwards)


@pytest.fixture
def points(policy, forwards):
    points = hook_points(policy, torch.zeros(2, 4))
    forwards.clear()
    return points


def drifting(num_envs):
    return SyncVectorEnv([functools.partial(Drifting, (4,), 3)] * num_envs)


def one_by_one(points, patches, envs, **settings):
    """Return the same rollouts by the loop that a sweep replaces."""
    twins = {label: PatchedPolicy(points, each) for label, each in patches.items()}
    return paired_rollouts({"original": points.model, **twins}, envs, SEEDS, **settings)


def along_rows(site, flags):
    """Return a mask that says the same of all elements of a row."""
    return flags.view([-1 if axis == "batch" else 1 for axis in site.point.axes])


def test_a_sweep_equals_paired_rollouts_with_a_patched_policy_each(case):
    points = case.points
    site = points.site(case.site)
    donors = run_with_cache(points, *case.inputs(7), sites=site, stop=True)
    first = next(iter(points))

    def noise(region, *, context):
        drawn = context.uniform([n for axis, n in zip(site.point.axes, region.shape, strict=True) if axis != "batch"])
        return region + 50 * drawn.movedim(0, site.point.axes.index("batch"))

    def odd_episodes(context):
        return along_rows(site, context.rows % 2 == 1)

    def later(context):
        return along_rows(site, torch.tensor([context.step > 2]))

    def positive(context):
        return along_rows(site, context.inputs[0].flatten(1)[:, 0] > 0)

    patches = {
        "scaled": Patch(site, Scale(50.0)),
        "drawn": [resample_ablate(site, donors, seed=4), Patch(site, Scale(50.0))],
        "drawn in every step": [resample_ablate(site, donors, per="step"), Patch(site, Scale(50.0))],
        "noise": edit(site, noise),
        "odd episodes": Patch(site, Scale(50.0), odd_episodes),
        "later": Patch(site, Scale(-50.0), later),
        "positive": [Patch(site, Scale(-50.0), positive)],
        "two sites": [Patch(points.site(first), Add(1.0)), Patch(site, Scale(50.0))],
        "nothing": [],
    }
    envs = SyncVectorEnv([case.environment] * 9)
    settings = {"max_steps": 20, "initial_state": case.initial_state}
    found = rollout_sweep(points, envs, SEEDS, patches, **settings)
    expected = one_by_one(points, patches, envs, **settings)
    assert list(found) == list(expected)
    assert all(same(found[label], expected[label]) for label in expected)
    assert sum(not same(found["original"], found[label]) for label in patches) >= 3
    assert same(found["original"], found["nothing"])


@pytest.mark.parametrize("num_envs", [1, 4, 20])
def test_a_sweep_does_not_depend_on_the_number_of_environments(points, num_envs):
    site = points.site("layers.1")
    patches = {"scaled": Patch(site, Scale(-9.0)), "drawn": resample_ablate(site, torch.randn(7, 16), seed=2)}
    found = rollout_sweep(points, drifting(num_envs), SEEDS, patches, max_steps=20)
    expected = one_by_one(points, patches, drifting(3), max_steps=20)
    assert all(same(found[label], expected[label]) for label in expected)
    assert not same(found["original"], found["drawn"])


def test_there_is_one_forward_per_step_of_each_wave(forwards, points):
    patches = {f"no {n}": zero_ablate(points.site("layers.1", feature=n)) for n in range(3)}
    found = rollout_sweep(points, drifting(8), SEEDS, patches, max_steps=20)
    lengths = np.concatenate([found[label].lengths for label in found])
    waves = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
    assert len(waves) == 3
    assert forwards[1:4] == [(0, 2)] * 3  # the check that rows are independent
    del forwards[1:4]
    assert forwards == [(step, int((wave > step).sum())) for wave in waves for step in range(max(wave))]


def test_a_patch_sees_the_rows_of_its_own_label_alone_under_the_numbers_of_their_episodes(points):
    seen = {"one": [], "other": []}

    def remember(label, region, *, context):
        assert len(region) == len(context.rows) == len(context.inputs[0])
        seen[label] += [(context.step, episode) for episode in context.rows.tolist()]
        return region

    site = points.site("layers.1")
    patches = {label: edit(site, functools.partial(remember, label)) for label in seen}
    found = rollout_sweep(points, drifting(7), SEEDS, patches, max_steps=20)
    for label, rows in seen.items():
        lengths = enumerate(found[label].lengths)
        assert sorted(rows) == sorted((step, episode) for episode, length in lengths for step in range(length))


def test_a_draw_at_the_second_call_of_a_module_is_the_one_of_that_call():
    case = policies.case("shared_module")
    site = case.points.site("relu#1")
    patches = {"drawn": resample_ablate(site, 9 * torch.randn(7, 6), seed=2)}
    envs = SyncVectorEnv([case.environment] * 4)
    found = rollout_sweep(case.points, envs, SEEDS, patches, max_steps=20)
    assert same(found["drawn"], one_by_one(case.points, patches, envs, max_steps=20)["drawn"])


def test_an_edit_that_mixes_rows_mixes_those_of_its_own_label(points):
    mixed = edit(points.site("layers.1"), lambda region: region.mean(0, keepdim=True).expand_as(region))
    patches = {"mixed": mixed, "ablated": zero_ablate(points.site("layers.1"))}
    found = rollout_sweep(points, drifting(3 * len(SEEDS)), SEEDS, patches, max_steps=20)
    expected = one_by_one(points, patches, drifting(len(SEEDS)), max_steps=20)
    assert all(same(found[label], expected[label]) for label in expected)
    assert not same(found["original"], found["mixed"])


def test_the_draws_of_actions_are_those_of_the_sampling_seed(points):
    patches = {"ablated": zero_ablate(points.site("layers.2"))}
    settings = {"max_steps": 20, "sampling_seed": 5}
    found = rollout_sweep(points, drifting(4), SEEDS, patches, **settings)
    expected = one_by_one(points, patches, drifting(4), **settings)
    assert all(same(found[label], expected[label]) for label in expected)
    assert not same(found["ablated"], rollout_sweep(points, drifting(4), SEEDS, patches, max_steps=20)["ablated"])


def test_greedy_actions_are_the_modes_under_each_patch(points):
    ranking = torch.tensor([[0.0, 9.0, 0.0]])
    patches = {"second": Patch(points.site("layers.2"), Add(ranking)), "tie": zero_ablate(points.site("layers.2"))}
    found = rollout_sweep(points, drifting(4), SEEDS, patches, max_steps=20, greedy=True)
    assert set(np.concatenate(found["second"].actions).tolist()) == {1}
    assert set(np.concatenate(found["tie"].actions).tolist()) == {0}


def test_a_module_takes_sites_of_its_trace(policy, points):
    patches = {"ablated": zero_ablate(points.site("layers.1"))}
    by_points, by_module = (rollout_sweep(each, drifting(4), SEEDS, patches, max_steps=20) for each in (points, policy))
    assert all(same(by_points[label], by_module[label]) for label in by_points)


def test_the_policy_itself_stays_without_patches(policy, points):
    observations = torch.randn(3, 4)
    before = policy(observations)
    rollout_sweep(points, drifting(4), SEEDS, {"ablated": zero_ablate(points.site("layers.2"))}, max_steps=20)
    assert torch.equal(policy(observations), before)
    assert not any(module._forward_hooks for module in policy.modules())


def test_a_twin_is_swept_with_its_own_patches_in_every_row(points):
    inner = zero_ablate(points.site("layers.1", feature=slice(8)))
    twin = PatchedPolicy(points, inner)
    site = points.site("layers.1", feature=slice(8, None))
    found = rollout_sweep(twin, drifting(4), SEEDS, {"rest": zero_ablate(site)}, max_steps=20)
    expected = one_by_one(
        points, {"half": inner, "all": zero_ablate(points.site("layers.1"))}, drifting(4), max_steps=20
    )
    assert same(found["original"], expected["half"])
    assert same(found["rest"], expected["all"])


def test_a_sweep_of_a_recurrent_policy_carries_the_state_of_each_row():
    policy = policies.case("recurrent").policy
    points = hook_points(policy, torch.randn(2, 6), policy.initial_state(2))
    carried = points.site("lstm.out[1][0]")
    patches = {"forgets": zero_ablate(carried), "remembers": Patch(carried, Scale(20.0))}
    envs = SyncVectorEnv([functools.partial(Drifting, (6,), 4)] * 4)
    settings = {"max_steps": 20, "initial_state": policy.initial_state}
    found = rollout_sweep(points, envs, SEEDS, patches, **settings)
    expected = one_by_one(points, patches, envs, **settings)
    assert all(same(found[label], expected[label]) for label in expected)


def test_the_state_in_a_patchs_inputs_is_that_of_its_own_rows():
    policy = Recurrent()
    points = hook_points(policy, torch.randn(2, 6), policy.initial_state(2))

    def shapes(region, *, context):
        rows = len(context.rows)
        assert context.inputs[0].shape == (rows, 6)
        assert [tensor.shape for tensor in context.inputs[1]] == [(1, rows, 8)] * 2
        return region

    envs = SyncVectorEnv([functools.partial(Drifting, (6,), 4)] * 4)
    patches = {"looks": edit(points.site("head"), shapes)}
    assert rollout_sweep(points, envs, SEEDS, patches, max_steps=20, initial_state=policy.initial_state)["looks"]


# --- what is compared with what ---


@pytest.fixture(scope="module")
def cart_pole():
    """Return the hook points of a policy for CartPole, an ablation of each of its 24 features, and environments."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 2)).eval()
    points = hook_points(policy, torch.zeros(2, 4))
    ablations = {f"no {n}": zero_ablate(points.site("1", feature=n)) for n in range(24)}
    return points, ablations, SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 30)


def few(ablations, start, end):
    return dict([*ablations.items()][start:end])


def test_controls_are_played_beside_the_patches_and_rank_their_effects(cart_pole):
    points, ablations, envs = cart_pole
    everything = rollout_sweep(points, envs, SEEDS, ablations, max_steps=60)
    asked, others = few(ablations, 0, 4), few(ablations, 4, 24)
    found = rollout_sweep(points, envs, SEEDS, asked, controls=others, max_steps=60)
    assert list(found) == ["original", *asked] and list(found.controls) == [*others] and found.labels == tuple(asked)
    assert all(same(found[label], everything[label]) for label in found)
    assert all(same(found.controls[label], everything[label]) for label in others)
    effects = [(everything[label].returns - everything["original"].returns).mean() for label in ablations]
    np.testing.assert_allclose(found.effect(), effects[:4])
    assert np.ptp(effects[:4]) > 0
    assert found.ranks() == [rank_among(effect, effects[4:]) for effect in effects[:4]]
    assert all(rank.p == rank.rank / 21 for rank in found.ranks())


def test_effects_are_drawn_above_the_controls_and_returns_and_lengths_as_curves(cart_pole):
    pyplot.switch_backend("Agg")
    points, ablations, envs = cart_pole
    found = rollout_sweep(points, envs, SEEDS, few(ablations, 0, 7), controls=few(ablations, 7, 9), max_steps=60)
    names = [text.get_text() for text in found.plot().get_yticklabels()]
    assert {*names[:7]} == {*found.labels} and {*names[7:]} == {"no 7", "no 8"}
    shown = [*found.top(5)]
    for values in ("returns", "lengths"):
        axes = found.plot_curves(values)
        assert [line.get_label() for line in axes.lines] == [f"{name} (n = 5)" for name in shown]
        for name, line in zip(shown, axes.lines, strict=True):
            assert line.get_xdata()[:-1].tolist() == sorted(getattr(found[name], values))
    assert axes.get_xlabel() == "episode length (steps)"
    with pytest.raises(RolloutError, match=r"^values must be 'returns' or 'lengths'; got 'rewards'\.$"):
        found.plot_curves("rewards")
    pyplot.close("all")


def test_labels_with_two_parts_make_a_grid_of_effects_in_episodes(cart_pole):
    points, ablations, envs = cart_pole
    patches = {(n % 2, n // 2): ablations[f"no {n}"] for n in range(4)}
    found = rollout_sweep(points, envs, SEEDS, patches, max_steps=60)
    grid = found.grid()
    assert grid.differences.shape == (2, 2, 5)
    np.testing.assert_array_equal(grid.effect().T.ravel(), found.effect())
    assert grid.effect_label == found.effect_label == "difference in mean return, n = 5 episodes"
    np.testing.assert_array_equal(found.to_xarray(("a", "b")), grid.effect())


def test_records_hold_the_paired_difference_of_mean_return_its_interval_and_the_rank(cart_pole):
    points, ablations, envs = cart_pole
    found = rollout_sweep(points, envs, SEEDS, few(ablations, 0, 2), controls=few(ablations, 2, 4), max_steps=60)
    original = found["original"].returns
    records = found.comparisons()
    assert [(record["label"], record["control"]) for record in records] == [
        ("no 0", False), ("no 1", False), ("no 2", True), ("no 3", True)
    ]  # fmt: skip
    for record in records:
        returns = {**found, **found.controls}[record["label"]].returns
        assert (record["patched"], record["original"]) == (returns.mean(), original.mean())
        np.testing.assert_allclose(record["effect"], (returns - original).mean())
        assert math.isnan(record["low"]) and record["note"] == "5 independent rows, fewer than 6"
    assert [record["rank"] for record in records] == [*(rank.rank for rank in found.ranks()), None, None]
    assert {record["p"] for record in records} == {None}
    assert [record["no_p"] for record in records[1:3]] == [
        "fewer than 19 controls", "no rank among the controls"
    ]  # fmt: skip
    without = rollout_sweep(points, envs, SEEDS, few(ablations, 0, 2), max_steps=60)
    assert without.ranks() == [None, None] and "rank" not in without.comparisons()[0]


def test_a_sweep_prints_the_differences_and_p_values_from_19_controls_on(cart_pole):
    points, ablations, envs = cart_pole
    settings = {"max_steps": 60}
    printed = {
        count: repr(rollout_sweep(points, envs, SEEDS, few(ablations, 0, 1), controls=few(ablations, 5, 5 + count),
                                  **settings)).splitlines()
        for count in (18, 19)
    }  # fmt: skip
    assert printed[19][0] == f"1 patch, mean return over the same {len(SEEDS)} episodes"
    assert printed[19][1].split() == ["label", "effect", "joint", "95%", "patched", "original", "rank", "p"]
    withheld = "No interval (-): 5 independent rows, fewer than 6."
    assert printed[19][3:] == [withheld, "Ranks are among 19 controls."]
    assert printed[18][3:] == [withheld, "Ranks are among 18 controls.", "No p-values: fewer than 19 controls"]
    assert len(printed[19][2].split()) == len(printed[18][2].split()) + 1
    assert "... 4 more" in repr(rollout_sweep(points, envs, SEEDS, ablations, **settings)).splitlines()


# --- what is refused ---


def refused(error, policy, patches):
    with pytest.raises(error) as caught:
        rollout_sweep(policy, drifting(4), SEEDS, patches, max_steps=20)
    return str(caught.value)


def test_a_site_whose_batch_axis_is_not_proved_is_refused(policy):
    assert refused(BatchAxisError, policy, {"ablated": zero_ablate(Site("layers.1"))}) == (
        "rollout_sweep cannot limit the patch at Site('layers.1') to the patch's own rows of the batch. Create the "
        "site with hook_points(model, *inputs).site(...), which identifies the batch axis."
    )


def test_a_site_without_rows_in_the_trace_is_refused(policy):
    class Tabled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Linear(4, 3)

        def forward(self, observations):
            return observations @ self.table(torch.eye(4))

    points = hook_points(Tabled(), torch.zeros(2, 4))
    message = refused(BatchAxisError, points, {"ablated": zero_ablate(points.site("table"))})
    assert message.startswith(
        "rollout_sweep cannot limit the patch at Site('table') to the patch's own rows of the batch. The trace could"
    )


@pytest.mark.parametrize("patches", [{}, []])
def test_no_patches_are_refused(points, patches):
    assert (
        refused(RolloutError, points, patches)
        == "There are no patches: the mapping or sequence is empty. Pass at least one patch."
    )


@pytest.mark.parametrize("one", [True, False])
def test_patches_without_labels_are_labelled_by_their_sites(points, one):
    site = points.site("layers.1", feature=2)
    patch, other = zero_ablate(site), edit(site, torch.neg)
    given = (patch, other) if one else ([patch], [other])
    named = ({"layers.1, feature=2": each} for each in (patch, other))
    found, expected = (
        rollout_sweep(points, drifting(4), SEEDS, patches, controls=controls, max_steps=20)
        for patches, controls in (given, named)
    )
    np.testing.assert_equal(found.comparisons(), expected.comparisons())  # which takes NaN for equal
    assert [*found] == ["original", "layers.1, feature=2"]


def test_the_label_of_the_policy_without_patches_is_refused(points):
    assert refused(RolloutError, points, {"original": zero_ablate(points.site("layers.1"))}) == (
        "patches has the label 'original', which is reserved for the unpatched policy. Use a different label."
    )


def test_controls_without_a_label_of_their_own_are_refused(points):
    patches = {"ablated": zero_ablate(points.site("layers.1"))}
    for controls, message in (({}, "There are no controls"), ({"original": []}, "controls has the label 'original'")):
        with pytest.raises(RolloutError, match=message):
            rollout_sweep(points, drifting(4), SEEDS, patches, controls=controls, max_steps=20)


def test_a_name_that_does_not_exist_is_refused(points):
    assert "Did you mean 'layers.1'?" in refused(HookPointError, points, {"ablated": zero_ablate(Site("layer.1"))})


def test_the_patch_that_brought_nan_is_named(points):
    patches = {
        "fine": zero_ablate(points.site("layers.1")),
        "broken": Patch(points.site("layers.1", feature=3), Scale(float("nan"))),
    }
    message = refused(NaNError, points, patches)
    assert message.startswith(
        "'broken': Patch(Site('layers.1', feature=3), Scale) introduced NaN: at least one element is NaN only with the "
        "patch."
    )


def test_an_edit_that_writes_in_place_is_refused(points):
    message = refused(EditError, points, {"in place": edit(points.site("layers.1"), lambda region: region.zero_())})
    assert message.endswith("modified the activation in place. Return a new tensor, such as activation * 0 instead of "
                            "activation.mul_(0).")  # fmt: skip


def test_what_an_edit_returns_is_checked_against_its_own_rows(points):
    message = refused(EditError, points, {"other": edit(points.site("layers.1"), lambda region: region[:, :2])})
    assert message.startswith(
        "'other': The edit in Patch(Site('layers.1'), <lambda>) returned a tensor with shape (3, 2). An edit must "
        "return a tensor with the region's shape: (3, 16)"
    )


def test_an_edit_that_raises_is_named_by_its_label(points):
    def broken(region):
        raise ValueError("nothing to see")

    site = points.site("layers.1")
    with pytest.raises(ValueError, match="nothing to see") as caught:
        rollout_sweep(points, drifting(4), SEEDS, {"fine": zero_ablate(site), "x": edit(site, broken)}, max_steps=20)
    if sys.version_info >= (3, 11):  # exceptions have notes
        assert caught.value.__notes__ == ["Raised by the patch 'x' in a sweep."]


def test_nan_is_let_through_where_it_is_meant(points):
    gone = edit(points.site("layers.1", feature=3), lambda region: region * float("nan"))
    back = edit(points.site("layers.1"), torch.nan_to_num)
    patches = {"gone and back": [gone, back], "zero": zero_ablate(points.site("layers.1", feature=3))}
    found = rollout_sweep(points, drifting(4), SEEDS, patches, max_steps=20, check_nan=False)
    assert same(found["gone and back"], found["zero"])


@pytest.mark.parametrize(("module", "name"), [(nn.BatchNorm1d(4), "BatchNorm1d"), (nn.Dropout(0.5), "Dropout")])
def test_a_policy_that_treats_the_rows_of_all_labels_together_is_refused(module, name):
    policy = nn.Sequential(module, nn.Linear(4, 3)).train()
    points = hook_points(policy, torch.zeros(2, 4))
    patches = {"ablated": zero_ablate(points.site("1", feature=0))}
    assert refused(RolloutError, points, patches) == (
        f"'0' ({name}) in training mode would let patches with different labels affect each other. Call eval() on the "
        "policy, or use paired_rollouts with one PatchedPolicy per label."
    )
    policy.eval()
    found, expected = (
        rollout_sweep(points, drifting(4), SEEDS, patches, max_steps=20),
        one_by_one(points, patches, drifting(4), max_steps=20),
    )
    assert all(same(found[label], expected[label]) for label in expected)


def test_without_a_bar_tqdm_is_not_needed(points, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    patches = {"ablated": zero_ablate(points.site("layers.1"))}
    for progress in (False, None):
        assert rollout_sweep(points, drifting(4), SEEDS, patches, max_steps=3, progress=progress)["ablated"]
    with pytest.raises(MissingPackageError):
        rollout_sweep(points, drifting(4), SEEDS, patches, max_steps=3, progress=True)


def test_a_sweep_inside_an_open_context_on_the_policy_is_refused(policy, points):
    inside = {
        "patched": patched(points, zero_ablate(points.site("layers.1"))),
        "recorded": recording(points, "layers.1"),
    }
    for context in inside.values():
        with pytest.raises(RolloutError) as caught, context:
            rollout_sweep(points, drifting(4), SEEDS, zero_ablate(points.site("layers.1")), max_steps=2)
        assert str(caught.value) == (
            "rollout_sweep runs a copy of the policy, which the open patched() or recording() context does not "
            "affect. Close the context. To apply the context's patches under every label, pass PatchedPolicy(policy, "
            "patches) as the policy."
        )


def test_episodes_of_one_seed_are_a_cluster_of_a_sweep_too(points):
    site = points.site("layers.0")
    patches, controls = {"no unit": zero_ablate(site)}, [zero_ablate(part) for part in site.split("feature")[:2]]
    swept = rollout_sweep(points, drifting(5), [*range(5)] * 2, patches, controls=controls, max_steps=20)
    assert {record["note"] for record in swept.comparisons()} == {"5 independent clusters, fewer than 6"}
    assert repr(swept).startswith("1 patch, mean return over the same 10 episodes (5 seeds)\n")


def test_controls_at_an_edge_have_no_p_in_a_rollout_sweep_either(policy, points):
    with torch.no_grad():
        policy.layers[0].bias[5] = 9.0  # the largest mean
    site = points.site("layers.1", feature=5)
    others = matched_channels(points, site, torch.randn(32, 4), count=5)
    controls = {repr(control): [zero_ablate(control)] for control in others}
    swept = rollout_sweep(points, drifting(5), range(5), zero_ablate(site), controls=controls, max_steps=5)
    assert "have a larger mean activation than" in swept.no_p and swept.no_p == others.no_p


def test_the_tables_of_rollouts_say_that_one_reference_is_fixed():
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    points = hook_points(policy, torch.zeros(2, 4))
    site = points.site("1", feature=[0, 1])
    _, cache = run_with_cache(points, torch.randn(20, 4), sites=site)
    envs = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    note = "Intervals ignore the sampling error in the reference of a mean or resample ablation."
    for patch, noted in (
        (mean_ablate(site, cache), True),
        (resample_ablate(site, cache), True),
        (zero_ablate(site), False),
    ):
        twin = PatchedPolicy(points, patch)
        pairs = paired_rollouts({"a": policy, "b": twin}, envs, range(3), max_steps=9)
        swept = rollout_sweep(points, envs, range(3), {"b": patch}, max_steps=9)
        assert (note in str(pairs)) is (note in str(swept)) is noted


def test_an_edit_that_runs_another_patched_model_gets_the_same_draws_in_a_sweep(points):
    other = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
    inner = hook_points(other, torch.zeros(2, 4))
    noisy = edit(inner.site("1"), lambda activation, *, context: activation + context.uniform((16,)))
    twin = PatchedPolicy(inner, noisy)

    def from_the_other(activation, *, context):
        return twin(*context.inputs)

    patches = {"noise": edit(points.site("layers.1"), from_the_other), "zero": zero_ablate(points.site("layers.1"))}
    swept = rollout_sweep(points, drifting(12), SEEDS, patches, max_steps=12)
    looped = one_by_one(points, patches, drifting(3), max_steps=12)
    assert all(same(swept[label], looped[label]) for label in looped)


def test_heads_and_coordinates_of_one_hook_point_are_swept_like_the_channels_that_they_contain(policy):
    names = {"layers.0": chanpatch.view("batch (head feature)", head=4)}
    split, whole = (hook_points(policy, torch.zeros(2, 4), axes=axes) for axes in (names, {}))
    first = Directions(torch.eye(4)[:1])
    patches = {
        "head": zero_ablate(split.site("layers.0", head=1)),
        "coordinate": zero_ablate(split.site("layers.0", head=2).along("feature", first)),
    }
    by_hand = {
        "head": zero_ablate(whole.site("layers.0", feature=slice(4, 8))),
        "coordinate": zero_ablate(whole.site("layers.0", feature=8)),
    }
    found = rollout_sweep(split, drifting(2), SEEDS, patches=patches, max_steps=8)
    expected = rollout_sweep(whole, drifting(2), SEEDS, patches=by_hand, max_steps=8)
    assert found.to_records() == expected.to_records()


def test_a_batch_that_is_one_part_of_a_split_axis_is_an_error():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, observations):
            return self.layer(observations.view(-1, 2)).view(len(observations), 2, 3).sum(1)

    points = hook_points(Flat(), torch.zeros(3, 4), axes={"layer": chanpatch.view("(batch half) feature", half=2)})
    with pytest.raises(BatchAxisError, match="cannot limit the patch at Site\\('layer', half=1\\) to the patch's own"):
        rollout_sweep(points, drifting(2), SEEDS, patches=zero_ablate(points.site("layer", half=1)), max_steps=2)
