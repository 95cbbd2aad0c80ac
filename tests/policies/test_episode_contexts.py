"""Edits and `where` functions in rollouts: the environments, seeds and infos they see, their draws, and their state."""

import functools
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from policies import same
from torch import nn

import chanpatch.policies
from chanpatch import PatchedPolicy, Site, edit, hook_points, patched, resample_ablate, sweep, zero_ablate
from chanpatch.errors import EditError, RolloutError
from chanpatch.patching import Patch, Scale

rollout, paired_rollouts, rollout_sweep = (
    functools.partial(getattr(chanpatch.policies, name), outputs="logits")
    for name in ("rollout", "paired_rollouts", "rollout_sweep")
)
SEEDS = [4, 8, 15, 16, 23, 42, 8, 4]


class Walk(gymnasium.Env):
    """Steps to the left and right, with noise for observations."""

    observation_space, action_space = spaces.Box(-9, 9, (4,)), spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.left = 0, int(self.np_random.integers(9, 15))
        return self.observed(), self.info()

    def observed(self):
        return self.np_random.normal(size=4).astype(np.float32)

    def info(self):
        return {"place": self.place, "inside": {"left": self.left}}

    def step(self, action):
        self.place += 2 * int(action) - 1
        self.left -= 1
        return self.observed(), float(self.place), self.left == 0, False, self.info()


def walks(num_envs=5):
    return SyncVectorEnv([Walk] * num_envs)


@pytest.fixture
def points():
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    with torch.no_grad():
        policy[2].weight.mul_(6)
    return hook_points(policy, torch.zeros(2, 4))


@pytest.fixture
def site(points):
    return points.site("1")


def play(points, patches, seeds=SEEDS, num_envs=5, **settings):
    return rollout(PatchedPolicy(points, patches), walks(num_envs), seeds, max_steps=20, **settings)


def both_ways(points, patches, envs):
    """Return the rollouts of a sweep, and those of a twin for each label."""
    twins = {label: PatchedPolicy(points, each) for label, each in patches.items()}
    return (
        rollout_sweep(points, envs, SEEDS, patches, max_steps=20),
        paired_rollouts({"original": points.model, **twins}, envs, SEEDS, max_steps=20),
    )


# --- environments, seeds, label, infos, forward ---


@pytest.mark.parametrize("num_envs", [3, 8, 40])
def test_a_where_that_reads_its_rows_environments_is_the_same_in_a_sweep_and_in_twins(points, num_envs):
    envs = walks(num_envs)

    def to_the_right(context):
        return torch.tensor(envs.get_attr("place"))[context.environments].view(-1, 1) > 0

    patches = {
        name: zero_ablate(points.site("1", feature=range(*span)), where=to_the_right)
        for name, span in {"first": (0, 16), "second": (16, 32)}.items()
    }
    swept, twins = both_ways(points, patches, envs)
    assert all(same(swept[label], twins[label]) for label in twins)
    assert not same(swept["original"], swept["first"])


def test_an_edit_sees_the_label_seeds_environments_and_last_infos_of_each_row(points, site):
    envs, seen = walks(6), {}

    def note(way, region, *, context):
        places = [envs.envs[number].place for number in context.environments.tolist()]
        assert context.infos["place"].tolist() == places
        assert context.infos["inside"]["left"].tolist() == [envs.envs[n].left for n in context.environments.tolist()]
        for row, seed in zip(context.rows.tolist(), context.seeds.tolist(), strict=True):
            seen.setdefault((way, context.label, row), set()).add((seed, context.forward))
        return region

    swept = {label: edit(site, functools.partial(note, "sweep")) for label in "ab"}
    twins = {label: PatchedPolicy(points, edit(site, functools.partial(note, "twins"))) for label in "ab"}
    rollout_sweep(points, envs, SEEDS, swept, max_steps=20)
    paired_rollouts(twins, envs, SEEDS, max_steps=20)
    assert seen == {
        (w, label, n): {(seed, 0)} for w in ("sweep", "twins") for label in "ab" for n, seed in enumerate(SEEDS)
    }


def test_values_per_row_are_those_of_the_regions_rows(points):
    seen = []

    def note(region, *, context):
        seen.append((context.seeds.tolist(), context.environments.tolist(), len(context.uniform((2,)))))
        return region

    rollout(PatchedPolicy(points, edit(points.site("1", batch=[1, -1]), note)), walks(4), SEEDS[:4], max_steps=1)
    assert seen == [([8, 16], [1, 3], 2)]


def test_forward_counts_the_calls_of_the_model_within_a_step_and_the_forwards_within_a_method(site):
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, observations):
            return self.inner(observations)

        def generate(self, observations):
            return self(observations) + self(observations) + self(observations)

    seen = []

    def note(region, *, context):
        seen.append((context.step, context.forward))
        return region

    inner = nn.Linear(4, 2)
    twin = PatchedPolicy(Twice(inner), edit(hook_points(Twice(inner), torch.zeros(2, 4)).site("inner"), note))
    rollout(lambda x: twin(x) + twin(-x), walks(1), [0], max_steps=2)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
    seen.clear()
    twin.generate(torch.zeros(1, 4))
    twin(torch.zeros(1, 4))
    assert seen == [(None, 0), (None, 1), (None, 2), (None, 0)]


def test_outside_a_rollout_a_row_is_its_own_environment_and_has_no_seed(points, site):
    seen = []

    def note(region, *, context):
        seen.append((context.environments.tolist(), context.label, context.step, context.forward))
        return region * (context.seeds > 3)

    with pytest.raises(RolloutError) as caught, patched(points, edit(site, note)):
        points.model(torch.zeros(3, 4))
    assert seen == [([0, 1, 2], None, None, 0)]
    assert str(caught.value) == (
        "context.seeds at Site('1') is available only in a rollout, as in rollout() or rollout_sweep()."
    )


class Near:
    """Selects the rows by the places of the environments that it holds."""

    def __init__(self, envs):
        self.envs = envs

    def __call__(self, context):
        return torch.tensor(self.envs.get_attr("place"))[context.rows].view(-1, 1) > 0


def near(envs):
    return lambda context: torch.tensor(envs.get_attr("place"))[context.rows].view(-1, 1) > 0


def near_members(members):
    return lambda context: torch.tensor([members[row % 5].place > 0 for row in context.rows.tolist()]).view(-1, 1)


def near_in_a_comprehension(envs):
    return lambda context: torch.tensor([[envs.envs[n].place > 0] for _ in "a" for n in context.rows.tolist()])


def near_in_an_object(envs):
    world = SimpleNamespace(envs=envs)
    return lambda context: torch.tensor(world.envs.get_attr("place"))[context.rows].view(-1, 1) > 0


def all_if_discrete(envs):
    return lambda context: (context.rows >= 0).view(-1, 1) & bool(envs.single_action_space.n == 2)


BY_ROWS = {
    "function": near,
    "object": Near,
    "method": lambda envs: Near(envs).__call__,
    "list of environments": lambda envs: near_members(envs.envs),
    "rows in a comprehension": near_in_a_comprehension,
    "environments in an object": near_in_an_object,
    "spaces": all_if_discrete,
    "list of bare environments": lambda envs: near_members([each.unwrapped for each in envs.envs]),
}


@pytest.mark.parametrize("way", ["twin", "sweep"])
@pytest.mark.parametrize("kind", BY_ROWS)
def test_a_function_that_uses_the_environments_and_the_episodes_of_its_rows_is_refused(points, site, way, kind):
    envs = walks()
    patch = zero_ablate(site, where=BY_ROWS[kind](envs))
    with pytest.raises(RolloutError) as caught:
        if way == "sweep":
            rollout_sweep(points, envs, SEEDS, {"near": patch}, max_steps=9)
        else:
            rollout(PatchedPolicy(points, patch), envs, SEEDS, max_steps=9)
    assert str(caught.value) == (
        "A function in Patch(Site('1'), Set, where=...) uses the environments and context.rows, which contains "
        "episode numbers, not indices of sub-environments. Use context.environments instead, which contains "
        "the index of each episode's sub-environment. If the function needs anything else from the environments, such "
        "as their spaces, read it before the rollout, outside the function."
    )


# --- random draws ---


def noise(activation, *, context):
    return activation + 3 * context.uniform(activation.shape[1:]) - 1.5


RANDOM = {
    "resample per episode": lambda site: resample_ablate(site, torch.randn(50, 32), seed=2),
    "resample per step": lambda site: resample_ablate(site, torch.randn(50, 32), seed=2, per="step"),
    "uniform": lambda site: edit(site, noise),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_run_over_all_seeds_equals_two_runs_over_halves_in_any_order(points, site, name):
    patch = RANDOM[name](site)
    seeds = [4, 8, 15, 16, 23, 42]
    whole = play(points, patch, seeds)
    for cut in (seeds[:2], seeds[2:], seeds[::-1]):
        part = play(points, patch, cut, num_envs=2)
        for seed, actions in zip(part.seeds, part.actions, strict=True):
            np.testing.assert_array_equal(actions, whole.actions[seeds.index(seed)])


@pytest.mark.parametrize("name", RANDOM)
def test_another_sampling_seed_gives_other_noise_for_greedy_actions_too(points, site, name):
    patch = RANDOM[name](site)
    one, same_seed, other = (play(points, patch, greedy=True, sampling_seed=seed) for seed in (0, 0, 1))
    assert same(one, same_seed) and not same(one, other)
    plain = [rollout(points.model, walks(), SEEDS, max_steps=20, greedy=True, sampling_seed=n) for n in (0, 1)]
    assert same(*plain)


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_that_is_listed_twice_draws_twice(points, site, name):
    drawn = play(points, RANDOM[name](site), [8, 8], greedy=True)
    assert not np.array_equal(*drawn.actions)


def donors_of(points, site, **settings):
    """Return the first activation of each donor, by episode."""
    seen = {}

    def note(region, *, context):
        for row, activation in zip(context.rows.tolist(), region, strict=True):
            seen.setdefault(row, []).append(activation[0].item())
        return region

    play(points, [resample_ablate(site, torch.randn(500, 32), **settings), edit(site, note)])
    return [seen[row] for row in range(len(SEEDS))]


def test_resample_ablation_draws_once_per_episode_or_in_every_step(points, site):
    for default in ({}, {"per": "episode"}):
        assert {len({*donors}) for donors in donors_of(points, site, **default)} == {1}
    by_step = donors_of(points, site, per="step")
    assert all(len({*donors}) > 0.8 * len(donors) for donors in by_step)
    assert len({donors[0] for donors in by_step}) > 5


def test_uniform_numbers_depend_on_site_call_row_and_step_and_not_on_the_label(points):
    seen = {}

    def note(region, *, context):
        drawn = context.uniform((3,))
        assert torch.equal(drawn, context.uniform((3,)))
        assert drawn.dtype == region.dtype and drawn.shape == (len(region), 3)
        for row, numbers in zip(context.rows.tolist(), drawn.tolist(), strict=True):
            seen.setdefault((context.label, len(region[0]), row, context.step), numbers)
        return region

    patches = {label: [edit(points.site("1"), note), edit(points.site("0"), note), edit(points.site("2"), note)]
               for label in "ab"}  # fmt: skip
    rollout_sweep(points, walks(9), [4, 8], patches, max_steps=5)
    assert all(seen[("a", *key)] == seen[("b", *key)] for _, *key in seen)
    assert len({tuple(numbers) for numbers in seen.values()}) == len(seen) / 2
    numbers = np.array([*seen.values()])
    assert 0 <= numbers.min() < 0.2 and 0.8 < numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.1


def test_outside_a_rollout_uniform_numbers_depend_on_the_row(points, site):
    with patched(points, edit(site, noise)):
        whole, again, part = (points.model(torch.zeros(rows, 4)) for rows in (5, 5, 3))
    assert torch.equal(whole, again) and torch.allclose(part, whole[:3]) and len(whole[:, 0].unique()) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uniform_numbers_stay_below_one_in_every_dtype(dtype):
    drawn = []

    def draw(activation, *, context):
        drawn.append(context.uniform((20_000,)))
        return activation

    model = nn.Linear(1, 1).to(dtype)
    with patched(model, edit(Site(".out"), draw)):
        model(torch.zeros(5, 1, dtype=dtype))
    assert drawn[0].dtype == dtype and drawn[0].min() >= 0 and 0.99 < drawn[0].max() < 1
    assert abs(drawn[0].double().mean() - 0.5) < 0.01


# --- state ---


class Previous:
    """Puts the activation of the step before in place of each one."""

    def __init__(self):
        self.last = {}

    def __call__(self, activation, *, context):
        rows = context.rows.tolist()
        new = [self.last.get(row, each) if context.step else each for row, each in zip(rows, activation, strict=True)]
        self.last.update(zip(rows, activation, strict=True))
        return torch.stack(new)

    def method(self, activation):
        return activation


def test_a_callable_object_as_edit_under_two_labels_is_refused(points, site):
    previous = Previous()
    ways = [
        (previous, previous),
        (previous.method, previous.method),
        (functools.partial(previous), functools.partial(previous)),
        (previous, functools.partial(previous.method)),
    ]
    for one, two in ways:
        patches = {"one": edit(site, one), "two": edit(site, two)}
        for control in (False, True):
            one, two = ({label: patches[label]} for label in patches)
            given = {"patches": one, "controls": two} if control else {"patches": patches}
            with pytest.raises(EditError, match="is used under two labels, 'one' and 'two'"):
                rollout_sweep(points, walks(), SEEDS, max_steps=9, **given)
    with pytest.raises(EditError) as caught:
        rollout_sweep(points, walks(), SEEDS, dict.fromkeys(["one", "two"], edit(site, previous)), max_steps=9)
    assert str(caught.value) == (
        "Previous is used under two labels, 'one' and 'two', so the patches with these labels would share its "
        "state. Use a separate object for each label, or a plain function."
    )


def test_a_callable_object_as_where_under_two_labels_is_refused_in_sweeps_too(points, site):
    class Mask:
        def __call__(self, context):
            return True

    mask = Mask()
    patches = {"one": zero_ablate(site, where=mask), "two": Patch(site, Scale(2.0), mask)}
    for call in (
        lambda: rollout_sweep(points, walks(), SEEDS, patches, max_steps=9),
        lambda: sweep(points, torch.zeros(2, 4), patches=patches, metric=lambda output: output[:, 0]),
    ):
        with pytest.raises(EditError, match="Mask is used under two labels"):
            call()


def test_twins_that_share_a_callable_object_are_not_compared(points, site):
    twins = {
        label: PatchedPolicy(points, edit(site, shared)) for label, shared in dict.fromkeys("ab", Previous()).items()
    }
    with pytest.raises(EditError, match="Previous is used under two labels, 'a' and 'b'"):
        paired_rollouts(twins, walks(), SEEDS, max_steps=9)


def test_a_callable_object_as_edit_at_two_sites_is_refused(points, site):
    previous = Previous()
    with pytest.raises(EditError) as caught:
        PatchedPolicy(points, [edit(points.site("0"), previous), edit(site, previous)])
    assert str(caught.value) == (
        "Previous is the edit at both Site('0') and Site('1'), so the two patches would share the edit's state. Use a "
        "separate edit object for each patch, or a plain function."
    )
    for one, two in ((previous, previous), (previous.method, previous.method), (previous, previous.__call__)):
        with pytest.raises(EditError, match="would share the edit's state"):
            patched(points, [edit(site, one), edit(site, two)])


def test_two_methods_of_one_object_may_be_edits_of_one_label(points, site):
    class Replay:
        """Records one activation, and puts its negative in place of another."""

        def record(self, activation):
            self.last = activation
            return activation

        def replay(self, activation):
            return -self.last

    replay = Replay()
    twin = PatchedPolicy(points, [edit(points.site("0"), replay.record), edit(site, replay.replay)])
    assert torch.equal(twin(torch.ones(2, 4)), points.model[2](-points.model[0](torch.ones(2, 4))))


def test_functions_modules_and_edits_of_chanpatch_may_be_shared(points, site):
    shared = {
        "function": lambda region: -region,
        "partial": functools.partial(torch.mul, torch.tensor(-1.0)),
        "of torch": torch.neg,
        "module": nn.Hardtanh(),
        "method of a module": nn.Hardtanh().forward,
        "ours": Scale(-1.0),
    }
    for function in shared.values():
        patches = {label: [Patch(site, function), Patch(points.site("2"), function)] for label in "ab"}
        found = rollout_sweep(points, walks(), SEEDS, patches, max_steps=9)
        assert same(found["a"], found["b"]) and not same(found["a"], found["original"])


def test_objects_of_their_own_under_two_labels_equal_twins(points, site):
    patches = {label: edit(site, Previous()) for label in "ab"}
    swept = rollout_sweep(points, walks(9), SEEDS, patches, max_steps=20)
    twin = paired_rollouts({"a": PatchedPolicy(points, edit(site, Previous()))}, walks(), SEEDS, max_steps=20)["a"]
    assert same(swept["a"], twin) and same(swept["b"], twin) and not same(swept["original"], twin)


WHERE = {
    "object": lambda where: where,
    "method": lambda where: where.__call__,
    "partial": lambda where: functools.partial(where.selected, True),
}


@pytest.mark.parametrize("kind", WHERE)
def test_a_callable_object_as_where_of_several_patches_is_called_once_per_root_call(points, kind):
    class Alternating:
        """Selects every other forward."""

        def __init__(self):
            self.calls = 0

        def __call__(self, context):
            self.calls += 1
            return self.calls % 2 == 0

        def selected(self, even, context):
            return self(context) is even

    class Noting(Alternating):
        def __call__(self, context):
            noted.append(self.calls)
            return super().__call__(context)

    noted: list[int] = []  # a rollout restores attributes
    for way in ("twin", "sweep"):
        where = Alternating() if way == "twin" else Noting()
        patches = [zero_ablate(points.site(name), where=WHERE[kind](where)) for name in ("0", "2")]
        if way == "twin":
            twin = PatchedPolicy(points, patches)
            for calls in (1, 2, 3):
                assert twin(torch.ones(2, 4)).any().item() == (calls % 2 == 1)
                assert where.calls == calls
        else:
            rollout_sweep(points, walks(3), [4], {"alternating": patches}, max_steps=7)
            assert noted == [*range(7)]


def test_a_plain_function_as_where_is_called_for_each_patch(points):
    calls = []
    where = lambda context: not calls.append(context.label)  # noqa: E731
    patches = [zero_ablate(points.site(name), where=where) for name in ("0", "1")]
    rollout_sweep(points, walks(3), [4], {"a": patches, "b": patches}, max_steps=1)
    assert sorted(calls) == ["a", "a", "b", "b"]
