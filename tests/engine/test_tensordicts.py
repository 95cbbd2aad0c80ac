"""Policies that take and return TensorDicts, as TorchRL's do."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, tensorclass
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical

from chanpatch import (
    PatchedPolicy,
    channel_sums,
    contrast,
    hook_points,
    patched,
    recording,
    resample_ablate,
    run_with_cache,
    sweep,
    zero_ablate,
)
from chanpatch.errors import UnsupportedModelError

WRITTEN = 'module.0.out["hidden"]'


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), in_keys=["observation"], out_keys=["hidden"]),
        TensorDictModule(nn.Linear(8, 3), in_keys=["hidden"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical),
    )


def observed(rows: int, seed: int = 0) -> TensorDict:
    observations = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDict({"observation": observations}, batch_size=[rows])


@pytest.fixture(scope="module")
def points(policy):
    return hook_points(policy, observed(5))


def by_hand(policy: nn.Module, observations: Tensor, channel: int | None = None) -> Tensor:
    hidden = policy.module[0].module(observations).detach().clone()
    if channel is not None:
        hidden[:, channel] = 0
    return policy.module[1].module(hidden).detach()


def test_every_batch_axis_is_proved_and_the_tensordict_is_left_alone(policy):
    given = observed(5)
    points = hook_points(policy, given)
    assert {point.batch_axis for point in points.values()} == {0}
    assert points[WRITTEN].axes == ("batch", "feature") and points[WRITTEN].shape == (8,)
    assert list(given.keys()) == ["observation"]


def test_a_batch_of_batch_and_time_has_its_rows_along_the_first_axis():
    model = TensorDictModule(nn.Linear(4, 6), in_keys=["steps"], out_keys=["hidden"])
    points = hook_points(model, TensorDict({"steps": torch.randn(5, 7, 4)}, batch_size=[5, 7]))
    point = points['.out["hidden"]']
    assert (point.axes, point.shape) == (("batch", "axis1", "feature"), (7, 6))


@pytest.mark.parametrize("name", [WRITTEN, "module.0.module.1"])
def test_a_patch_reaches_the_tensordict_that_was_given(policy, points, name):
    given = observed(5)
    with patched(points, zero_ablate(points.site(name, feature=2))):
        returned = policy(given)
    assert returned is given
    assert torch.equal(given["hidden"][:, 2], torch.zeros(5))
    torch.testing.assert_close(given["logits"], by_hand(policy, given["observation"], channel=2))


def test_a_twin_patches_and_the_policy_does_not(policy, points):
    twin, given = PatchedPolicy(points, zero_ablate(points.site(WRITTEN, feature=2))), observed(5)
    torch.testing.assert_close(twin(given.clone())["logits"], by_hand(policy, given["observation"], channel=2))
    torch.testing.assert_close(policy(given.clone())["logits"], by_hand(policy, given["observation"]))
    torch.testing.assert_close(twin.distribution(given.clone()).logits, twin.get_dist(given.clone()).logits)


def test_an_input_of_a_module_that_writes_its_results_beside_it_is_not_patched(policy, points):
    given = observed(5)
    with pytest.raises(UnsupportedModelError, match="writes to its input TensorDict, in which a tensor"):
        with patched(points, zero_ablate(points.site('.in[0]["observation"]', feature=2))):
            policy(given)
    assert torch.equal(given["observation"], observed(5)["observation"])


@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_a_sweep_has_the_logits_of_the_loop_by_hand(policy, points, rows, strategy):
    given = observed(rows)
    patches = [zero_ablate(site) for site in points.site(WRITTEN).split("feature")]
    result = sweep(points, given, patches=patches, metric=lambda output: output["logits"][:, 1], strategy=strategy)
    expected = [by_hand(policy, given["observation"], channel)[:, 1] for channel in range(8)]
    torch.testing.assert_close(torch.from_numpy(result.values["metric"]), torch.stack(expected), check_dtype=False)
    assert list(given.keys()) == ["observation"]


@pytest.mark.parametrize("inputs", [lambda given: given, lambda given: (given,), lambda given: [given[:3], given[3:]]])
def test_sums_are_recorded_of_batches_that_are_cut_from_one(policy, points, inputs):
    given = observed(9)
    sums = channel_sums(points, inputs(given), WRITTEN, batch_size=4)
    expected = policy.module[0].module(given["observation"]).detach().double()
    torch.testing.assert_close(torch.from_numpy(sums), expected)


def test_pairs_of_tensordicts_are_contrasted(policy, points):
    clean, other = observed(6), observed(6, seed=1)
    result = contrast(points, clean, other, WRITTEN)
    hidden = policy.module[0].module
    expected = (hidden(clean["observation"]) - hidden(other["observation"])).mean(0).tolist()
    assert dict(zip(result.sites, result.difference, strict=True)) == pytest.approx(
        dict(zip(points.site(WRITTEN).split("feature"), expected, strict=True)), abs=1e-6
    )


def test_rows_of_a_tensordict_are_drawn(points):
    _, cache = run_with_cache(points, observed(6), sites=WRITTEN)
    site = points.site(WRITTEN, feature=2)
    with patched(points, resample_ablate(site, cache, seed=0)), recording(points, site) as drawn:
        points.model(observed(6))
    assert set(drawn[site].flatten().tolist()) <= set(cache[WRITTEN][:, 2].tolist())


def test_a_lazy_stack_of_tensordicts_is_patched(policy, points):
    given = LazyStackedTensorDict.lazy_stack([each for each in observed(5)])
    with patched(points, zero_ablate(points.site(WRITTEN, feature=2))):
        logits = policy(given)["logits"]
    torch.testing.assert_close(logits, by_hand(policy, observed(5)["observation"], channel=2))


@tensorclass
class Observation:
    image: Tensor


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, observation):
        return self.linear(observation.image)


def test_a_tensorclass_has_rows_too():
    points = hook_points(Reader(), Observation(image=torch.randn(5, 4), batch_size=[5]))
    assert points["linear"].axes == ("batch", "feature")


class Block(nn.Module):
    """Writes into what it was given and returns that, as TensorDictModules do."""

    def __init__(self, taken, written, features):
        super().__init__()
        self.linear, self.taken, self.written = nn.Linear(*features), taken, written

    def forward(self, given):
        given[self.written] = self.linear(given[self.taken])
        return given


KINDS = {
    "dict": dict,
    "UserDict": UserDict,
    "TensorDict": lambda entries: TensorDict(entries, batch_size=[16]),
    "lazy stack": lambda entries: LazyStackedTensorDict.lazy_stack([*TensorDict(entries, batch_size=[16])]),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("strategy", ["auto", "vmap", "resume", "loop"])
@pytest.mark.parametrize("count", [2, 8])
def test_what_modules_write_under_a_patch_does_not_reach_the_baseline_of_a_sweep(kind, strategy, count):
    torch.manual_seed(0)
    model = nn.Sequential(Block("observation", "hidden", (4, 8)), Block("hidden", "logits", (8, 3)))
    observations = torch.randn(16, 4)
    points = hook_points(model, kind({"observation": observations.clone()}))

    def metric(output, *, baseline):
        return output["logits"][:, 1] - baseline["logits"][:, 1]

    def effect(channel):
        hidden = model[0].linear(observations).detach()
        ablated = hidden.clone()
        ablated[:, channel] = 0
        return (model[1].linear(ablated) - model[1].linear(hidden))[:, 1].detach()

    given = kind({"observation": observations.clone()})
    patches = [zero_ablate(points.site("1.linear.in[0]", feature=channel)) for channel in range(count)]
    result = sweep(points, given, patches=patches, metric=metric, strategy=strategy)
    expected = torch.stack([effect(channel) for channel in range(count)])
    torch.testing.assert_close(torch.from_numpy(result.values["metric"]), expected, check_dtype=False)
    assert [*given.keys()] == ["observation"]


class ReusesItsOutput(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.__dict__["output"] = output

    def forward(self, observations):
        self.output["logits"] = self.head(self.linear(observations))
        return self.output


@pytest.mark.parametrize(
    "make", [dict, UserDict, lambda: TensorDict({}, batch_size=[])], ids=["dict", "UserDict", "td"]
)
@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_a_container_that_is_returned_again_is_compared_with_what_it_held_then(make, strategy):
    model, observations = ReusesItsOutput(make()), torch.randn(12, 4)
    points = hook_points(model, observations)
    result = sweep(
        points,
        observations,
        patches=[zero_ablate(site) for site in points.site("linear").split("feature")],
        metric=lambda output, *, baseline: output["logits"][:, 0] - baseline["logits"][:, 0],
        strategy=strategy,
    )
    hidden = model.linear(observations).detach().double()
    expected = -(hidden * model.head.weight[0].detach().double()).T
    torch.testing.assert_close(torch.from_numpy(result.values["metric"]).double(), expected, atol=1e-5, rtol=1e-4)


@tensorclass
class Filled:
    image: Tensor
    hidden: Tensor | None = None


class Filling(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, given):
        given.hidden = self.linear(given.image)
        return given


@pytest.mark.parametrize("strategy", ["auto", "loop", "vmap"])
def test_a_tensorclass_is_neither_written_into_nor_shared(strategy):
    model, images = Filling(), torch.randn(12, 4)
    given = Filled(image=images.clone(), batch_size=[12])
    points = hook_points(model, given)
    assert given.hidden is None
    result = sweep(
        points,
        given,
        patches=[zero_ablate(site) for site in points.site("linear").split("feature")],
        metric=lambda output, *, baseline: (output.hidden - baseline.hidden).sum(-1),
        strategy=strategy,
    )
    expected = -model.linear(images).detach().T
    torch.testing.assert_close(torch.from_numpy(result.values["metric"]), expected, check_dtype=False)
    assert given.hidden is None


def test_a_patched_input_in_a_lazy_stack_stays_the_callers(policy, points):
    given = LazyStackedTensorDict.lazy_stack([*observed(5)])
    site = points.site('.in[0]["observation"]', feature=2)
    with patched(points, zero_ablate(site)):
        returned = policy(given)
    assert torch.equal(given["observation"], observed(5)["observation"])
    observations = given["observation"] * torch.tensor([1.0, 1, 0, 1])
    torch.testing.assert_close(returned["logits"], by_hand(policy, observations))


@pytest.mark.parametrize(
    "kind", [dict, lambda entries: TensorDict(entries, batch_size=[5])], ids=["dict", "TensorDict"]
)
def test_a_patch_of_a_nested_entry_leaves_the_outer_container_the_callers(kind):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, given):
            given["agent"]["hidden"] = self.linear(given["agent"]["observation"])
            return given

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, given):
            given["logits"] = self.linear(given["agent"]["hidden"])
            return given

    def made():
        return kind({"agent": kind({"observation": torch.ones(5, 4)})})

    model = nn.Sequential(Nested(), Head())
    points = hook_points(model, made())
    twin, given = PatchedPolicy(points, zero_ablate(points.site('0.out["agent"]["hidden"]', feature=1))), made()
    assert twin(given) is given and {*given.keys()} == {"agent", "logits"}
    assert torch.equal(given["agent"]["hidden"][:, 1], torch.zeros(5))
    expected = model[1].linear(given["agent"]["hidden"])
    torch.testing.assert_close(given["logits"], expected)


def test_a_locked_tensordict_that_a_module_returns_is_patched():
    class Locking(Block):
        def forward(self, given):
            return super().forward(given).lock_()

    model, given = Locking("observation", "hidden", (4, 6)), observed(5)
    points = hook_points(model, given)
    with patched(points, zero_ablate(points.site('.out["hidden"]', feature=0))):
        hidden = model(given.clone())["hidden"]
    assert torch.equal(hidden[:, 0], torch.zeros(5)) and hidden[:, 1:].abs().min() > 0


def test_a_tensordict_without_entries_may_be_an_input():
    class Fills(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, output, observations):
            output["hidden"] = self.linear(observations)
            return output

    points = hook_points(Fills(), TensorDict({}, batch_size=[5]), torch.randn(5, 4))
    assert points["linear"].axes == ("batch", "feature")


def test_sums_are_recorded_of_a_tensordict_that_has_no_batch_size(policy, points):
    given = TensorDict({"observation": observed(6)["observation"]}, batch_size=[])
    model = Block("observation", "hidden", (4, 6))
    sums = channel_sums(hook_points(model, given), given, "linear", batch_size=4)
    torch.testing.assert_close(torch.from_numpy(sums), model.linear(given["observation"]).detach().double())
