"""Records against the same activations taken by hand, and what a cache is."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import build
from torch import Tensor, nn

from chanpatch.errors import (
    BatchAxisError,
    ConcurrencyError,
    HookPointError,
    SiteError,
    TraceMismatchError,
    UnreachedError,
)
from chanpatch.patching import ActivationCache, edit, patch_in, patched, recording, run_with_cache, zero_ablate
from chanpatch.registry import Site, hook_points


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, tensor):
        self.calls += 1
        return tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.counted = Counted()
        self.fc = nn.Linear(4, 5)

    def forward(self, image):
        return self.fc(self.counted(self.relu(self.conv(image))).sum((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def image():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def points(net, image):
    return hook_points(net, image)


def convolved(net: Net, image: Tensor) -> Tensor:
    return F.conv2d(image, net.conv.weight, net.conv.bias).detach()


# --- what is recorded ---


def test_run_with_cache_returns_the_output_and_the_activation(net, points, image):
    output, cache = run_with_cache(points, image, sites="conv")
    torch.testing.assert_close(output, net(image), rtol=0, atol=0)
    assert torch.equal(cache["conv"], convolved(net, image))


def test_a_region_is_recorded_with_all_its_axes(net, points, image):
    site = points.site("conv", channel=[3, 0], row=-1)
    _, cache = run_with_cache(points, image, sites=site)
    assert torch.equal(cache[site], convolved(net, image)[:, [3, 0]][:, :, 3:4])


def test_sites_may_be_names_sites_or_hook_points(points, image):
    _, cache = run_with_cache(points, image, sites=["conv", points["relu"], points.site("fc", feature=0)])
    assert list(cache) == [points.site("conv"), points.site("relu"), points.site("fc", feature=0)]


def test_hook_points_mean_all_of_theirs(points, image):
    _, cache = run_with_cache(points, image, sites=points.select("**.in").values())
    assert [site.name for site in cache] == [name for name in points if ".in" in name]


def test_a_site_named_twice_is_recorded_once(points, image):
    _, cache = run_with_cache(points, image, sites=["conv", points.site("conv"), Site("conv", channel=range(4))])
    assert cache[Site("conv")].shape == (4, 4, 4, 4)
    assert len(cache) == 1


def test_keyword_inputs_go_to_the_model(net, image):
    _, cache = run_with_cache(net, image=image, sites="conv")
    assert torch.equal(cache["conv"], convolved(net, image))


def test_the_method_that_was_traced_is_the_one_that_is_run():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def value(self, vector):
            return self.fc(vector) * 2

    net, vector = Two(), torch.randn(2, 6)
    output, cache = run_with_cache(hook_points(net, vector, method="value"), vector, sites="fc")
    assert torch.equal(output, cache["fc"] * 2)


def test_the_input_of_a_module_is_recorded(points, net, image):
    _, cache = run_with_cache(points, image, sites="fc.in[0]")
    assert torch.equal(cache["fc.in[0]"], convolved(net, image).relu().sum((2, 3)))


def test_before_records_what_the_patches_found(net, points, image):
    with patched(points, zero_ablate(points.site("conv"))):
        with recording(points, "conv", before=True) as found, recording(points, "conv") as left:
            net(image)
    assert torch.equal(found["conv"], convolved(net, image))
    assert not left["conv"].any()


def test_several_forwards_are_joined_along_the_batch(net, points, image):
    with recording(points, ["conv", "fc"]) as cache:
        for rows in (image[:1], image[1:3], image[3:]):
            net(rows)
    torch.testing.assert_close(cache["conv"], convolved(net, image))
    assert cache["fc"].shape == (4, 5)


def test_forwards_are_joined_along_the_axis_that_is_the_batch():
    lstm = nn.LSTM(6, 4)
    points = hook_points(lstm, torch.randn(5, 2, 6), axes={".in[0]": ("position", "batch", "feature")})
    inputs = torch.randn(5, 3, 6)
    with recording(points, ".out[0]") as cache, torch.no_grad():
        lstm(inputs[:, :1]), lstm(inputs[:, 1:])
    torch.testing.assert_close(cache[".out[0]"], lstm(inputs)[0].detach())


def test_reading_a_cache_between_forwards_changes_nothing(net, points, image):
    with recording(points, "conv") as cache:
        for row in image:
            net(row[None])
            assert len(cache["conv"]) <= 4
    torch.testing.assert_close(cache["conv"], convolved(net, image))


def test_a_second_forward_is_not_joined_where_no_batch_is_proved():
    net = nn.Sequential(nn.Linear(6, 4))
    points = hook_points(net, torch.randn(6))
    with pytest.raises(BatchAxisError, match="recorded in two forward passes"), recording(points, "0"):
        net(torch.randn(6)), net(torch.randn(6))


# --- reductions ---


REDUCTIONS = {
    "sum": ("sum", lambda hidden: hidden.sum((2, 3)), ("batch", "channel")),
    "mean": ("mean", lambda hidden: hidden.mean((2, 3)), ("batch", "channel")),
    "max": ("max", lambda hidden: hidden.amax((2, 3)), ("batch", "channel")),
    "norm": ("norm", lambda hidden: hidden.square().sum((2, 3)).sqrt(), ("batch", "channel")),
    "einops sum": (("b c h w -> b c", "sum"), lambda hidden: hidden.sum((2, 3)), ("batch", "channel")),
    "einops rows": (("b c h w -> b h", "max"), lambda hidden: hidden.amax((1, 3)), ("batch", "row")),
    "einops over the batch": (("b c h w -> c", "mean"), lambda hidden: hidden.mean((0, 2, 3)), ("channel",)),
    "einops moved": (("b c h w -> c b", "sum"), lambda hidden: hidden.sum((2, 3)).T, ("channel", "batch")),
    "none": (None, lambda hidden: hidden, ("batch", "channel", "row", "col")),
}


@pytest.fixture(params=list(REDUCTIONS))
def reduction(request):
    return REDUCTIONS[request.param]


def test_a_reduction_is_the_same_reduction_of_the_activation(net, points, image, reduction):
    reduce, by_hand, axes = reduction
    _, cache = run_with_cache(points, image, sites="conv", reduce=reduce)
    torch.testing.assert_close(cache["conv"], by_hand(convolved(net, image)))
    assert cache.axes("conv") == axes


def test_a_reduction_of_a_region_reduces_only_it(net, points, image, reduction):
    reduce, by_hand, _ = reduction
    site = points.site("conv", channel=[2, 1], row=slice(1, 3))
    _, cache = run_with_cache(points, image, sites=site, reduce=reduce)
    torch.testing.assert_close(cache[site], by_hand(convolved(net, image)[:, [2, 1], 1:3]))


def test_reduced_forwards_are_joined_along_the_batch(net, points, image, reduction):
    reduce, by_hand, axes = reduction
    if "batch" not in axes:
        with pytest.raises(BatchAxisError), recording(points, "conv", reduce=reduce):
            net(image[:2]), net(image[2:])
        return
    with recording(points, "conv", reduce=reduce) as cache:
        net(image[:1]), net(image[1:])
    torch.testing.assert_close(cache["conv"], by_hand(convolved(net, image)))


def test_an_einops_pair_may_join_axes(net, points, image):
    _, cache = run_with_cache(points, image, sites="conv", reduce=("b c h w -> b (c h)", "sum"))
    torch.testing.assert_close(cache["conv"], einops.reduce(convolved(net, image), "b c h w -> b (c h)", "sum"))
    assert cache.batch_axis("conv") == 0


def test_a_reduction_of_a_vector_leaves_it_alone(net, points, image):
    _, cache = run_with_cache(points, image, sites="fc", reduce="sum")
    torch.testing.assert_close(cache["fc"], net(image).detach())


def test_a_sequence_is_reduced_over_its_positions(lstm_policy):
    (sequence,) = lstm_policy.inputs(3)
    points = hook_points(lstm_policy.module, sequence)
    _, cache = run_with_cache(points, sequence, sites="lstm.out[0]", reduce="mean")
    expected, _ = lstm_policy.module.lstm(lstm_policy.module.embed(sequence).tanh())
    torch.testing.assert_close(cache["lstm.out[0]"], expected.mean(1))


def test_axes_without_names_are_not_reduced_by_guessing():
    net = nn.Sequential(nn.Unflatten(1, (2, 3)))
    points = hook_points(net, torch.randn(2, 6))
    with pytest.raises(SiteError, match="has unnamed axes"), recording(points, "0", reduce="sum"):
        raise AssertionError("the context was entered")


@pytest.mark.parametrize("reduce", ["median", "b c -> b"])
def test_what_is_no_reduction_is_refused_at_entry(points, reduce):
    with (
        pytest.raises(SiteError, match="must be 'sum', 'mean', 'max', 'norm' or a pair"),
        recording(points, "conv", reduce=reduce),
    ):
        raise AssertionError("the context was entered")


# --- memory, devices, gradients ---


def test_a_record_is_a_copy_that_an_in_place_module_cannot_reach(net, points, image):
    _, cache = run_with_cache(points, image, sites=["conv", points.site("conv", channel=0)])
    assert (cache[Site("conv")] < 0).any()
    assert (cache[points.site("conv", channel=0)] < 0).any()


def test_a_record_holds_no_more_memory_than_its_numbers(net, points, image):
    site = points.site("conv", channel=2)
    _, cache = run_with_cache(points, image, sites=[site, points.site("conv", channel=[3, 1])])
    assert all(record.untyped_storage().nbytes() == record.nbytes for record in cache.values())


def test_sums_of_ten_thousand_inputs_keep_no_activation(points, net, image):
    held: list[weakref.ref] = []
    with recording(points, "conv", reduce="sum") as cache, torch.no_grad():
        net.conv.register_forward_hook(lambda module, args, output: held.append(weakref.ref(output)) or None)
        for _ in range(20):
            net(image.repeat(125, 1, 1, 1))
        assert sum(reference() is not None for reference in held) == 0
    assert len(held) == 20
    assert cache["conv"].shape == (10_000, 4)
    assert cache["conv"].untyped_storage().nbytes() == 10_000 * 4 * 4


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def _recorded(points, image):
    with recording(points, "conv") as cache:
        points.model(image)
    return cache["conv"]


def _run_to_the_end(points, image):
    return run_with_cache(points, image, sites="conv")[1]["conv"]


def _run_to_the_site(points, image):
    return run_with_cache(points, image, sites="conv", stop=True)["conv"]


def _patched_in(points, image):
    donor = torch.zeros(4, 4, 4, 4)
    with patched(points, patch_in(points.site("conv"), donor)):
        points.model(image)
    return donor


@pytest.mark.parametrize("run", [_recorded, _run_to_the_end, _run_to_the_site, _patched_in])
@pytest.mark.usefixtures("no_garbage_collector")
def test_a_tensor_is_freed_with_the_last_name_for_it_without_the_garbage_collector(points, image, run):
    tensor = run(points, image)
    alive = weakref.ref(tensor)
    del tensor
    assert alive() is None


def test_a_long_recording_does_not_grow_but_by_its_records(net, points, image):
    def forwards(count: int) -> int:
        for _ in range(count):
            net(image)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with recording(points, "conv", reduce="sum"), patched(points, zero_ablate(points.site("fc"))), torch.no_grad():
        forwards(5)
        tracemalloc.start()
        try:
            before = forwards(5)
            after = forwards(50)
        finally:
            tracemalloc.stop()
    assert (after - before) / 50 < 1000  # bytes of Python objects a forward: a tensor and its place in a list


def test_a_record_is_kept_where_it_is_asked_to_be(points, image):
    _, cache = run_with_cache(points, image, sites="conv", device="meta")
    assert cache["conv"].device.type == "meta"


def test_a_record_is_cut_from_the_graph_unless_asked_otherwise(points, image):
    assert not run_with_cache(points, image, sites="conv")[1]["conv"].requires_grad


@pytest.mark.parametrize("reduce", [None, "sum"])
def test_gradients_flow_through_a_record_that_is_not_detached(net, points, image, reduce):
    with recording(points, "conv", reduce=reduce, detach=False) as cache:
        net(image)
    cache["conv"].square().sum().backward()
    found = net.conv.weight.grad.clone()
    net.zero_grad()
    hidden = F.conv2d(image, net.conv.weight, net.conv.bias)
    (hidden if reduce is None else hidden.sum((2, 3))).square().sum().backward()
    torch.testing.assert_close(found, net.conv.weight.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_records_are_taken_in_every_gradient_mode(net, points, image, mode):
    with mode():
        _, cache = run_with_cache(points, image, sites=points.site("conv", channel=[2, 0]))
    assert torch.equal(cache["conv"], convolved(net, image)[:, [2, 0]])


def test_a_record_taken_under_autocast_has_the_dtype_of_the_forward(net, image):
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = run_with_cache(net, image, sites="conv")
    assert cache["conv"].dtype == torch.bfloat16


# --- stop ---


def test_stop_ends_the_forward_after_the_last_site(net, points, image):
    before = net.counted.calls
    cache = run_with_cache(points, image, sites=["conv", "relu"], stop=True)
    assert set(cache) == {points.site("conv"), points.site("relu")}
    assert net.counted.calls == before


def test_stop_runs_on_until_every_site_was_recorded(net, points, image):
    before = net.counted.calls
    run_with_cache(points, image, sites=["fc.in[0]", "conv"], stop=True)
    assert net.counted.calls == before + 1


def test_stop_at_a_call_that_comes_again_ends_at_the_call_that_is_meant(shared_module):
    (vector,) = shared_module.inputs(2)
    points = hook_points(shared_module.module, vector)
    cache = run_with_cache(points, vector, sites=["fc2", "relu#0"], stop=True)
    assert torch.equal(cache["relu#0"], shared_module.module.fc1(vector).relu().detach())


def test_stop_is_caught_by_no_model_that_catches_exceptions(image):
    class Careful(Net):
        def forward(self, image):
            try:
                return super().forward(image)
            except Exception:
                return self.counted(image)

    net = Careful()
    run_with_cache(net, image, sites="conv#0", stop=True)
    assert net.counted.calls == 0


def test_a_stopped_forward_leaves_the_model_as_it_was(net, points, image):
    expected = net(image)
    run_with_cache(points, image, sites="conv", stop=True)
    torch.testing.assert_close(net(image), expected, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_stop_records_what_a_patch_left(net, points, image):
    with patched(points, zero_ablate(points.site("conv"))):
        cache = run_with_cache(points, image, sites="conv", stop=True)
    assert not cache["conv"].any()


def test_a_run_inside_an_edit_stops_only_itself(net, points, image):
    """A stopped run within another stopped run of the same model ends the inner one."""
    found = []

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net
            self.after = Counted()

        def forward(self, image):
            found.append(run_with_cache(self.inner, image, sites="conv#0", stop=True))
            return self.after(self.inner(image))

    model = Asking()
    cache = run_with_cache(model, image, sites="inner.fc#0", stop=True)
    assert torch.equal(found[0]["conv#0"], convolved(net, image))
    assert cache["inner.fc#0"].shape == (4, 5)
    assert model.after.calls == 0


# --- the cache ---


def cache_of(points, image, *sites) -> ActivationCache:
    return run_with_cache(points, image, sites=sites or ["conv", "fc"])[1]


def test_a_name_will_do_for_a_key_where_one_site_of_that_hook_point_is_held(points, image):
    cache = cache_of(points, image)
    assert cache["conv"] is cache[Site("conv")] is cache[points["conv"]]


def test_a_name_of_several_sites_is_refused(points, image):
    cache = cache_of(points, image, points.site("conv", channel=0), points.site("conv", channel=1))
    with pytest.raises(HookPointError, match="2 sites at 'conv'"):
        cache["conv"]


def test_a_site_that_is_not_held_is_refused(points, image):
    with pytest.raises(HookPointError, match="not contain 'relu'. Sites in the cache: Site"):
        cache_of(points, image)["relu"]


def test_an_alias_finds_the_record(shared_module):
    points = hook_points(shared_module.module, *shared_module.inputs(2))
    cache = cache_of(points, *shared_module.inputs(2), "fc2")
    assert cache["tied"] is cache["fc2"]


def test_the_same_region_written_in_another_way_finds_the_record(points, image):
    cache = cache_of(points, image, points.site("conv", channel=3))
    assert cache[Site("conv", channel=-1)] is cache[Site("conv", channel=[3])]
    assert Site("conv", channel=-1) in cache
    assert Site("conv", channel=2) not in cache


def test_a_cache_is_a_mapping(points, image):
    cache = cache_of(points, image)
    assert len(cache) == 2
    assert [site.name for site in cache] == ["conv", "fc"]
    assert dict(cache.items())[points.site("fc")] is cache["fc"]
    assert "conv" in cache
    assert "relu" not in cache


OPERATIONS = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a / b,
}


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("other", ["cache", "number"])
def test_arithmetic_of_caches_is_that_of_their_activations(points, image, name, other):
    one, two = cache_of(points, image), cache_of(points, image.flip(3))
    operation = OPERATIONS[name]
    result = operation(one, two if other == "cache" else 3.0)
    for key in ("conv", "fc"):
        assert torch.equal(result[key], operation(one[key], two[key] if other == "cache" else 3.0))
        assert result.axes(key) == one.axes(key)


def test_a_mean_is_subtracted_from_every_row(points, image):
    cache = cache_of(points, image)
    centred = cache - cache.mean()
    torch.testing.assert_close(centred["fc"], cache["fc"] - cache["fc"].mean(0, keepdim=True))


def test_the_mean_keeps_the_batch_axis_with_length_one(points, net, image):
    mean = cache_of(points, image).mean()
    torch.testing.assert_close(mean["conv"], convolved(net, image).mean(0, keepdim=True))
    assert (mean.axes("conv"), mean.batch_axis("conv")) == (("batch", "channel", "row", "col"), 0)


def test_the_mean_is_over_the_axis_that_is_the_batch():
    lstm = nn.LSTM(6, 4)
    points = hook_points(lstm, torch.randn(5, 2, 6), axes={".in[0]": ("position", "batch", "feature")})
    cache = cache_of(points, torch.randn(5, 3, 6), ".out[0]")
    assert cache.mean()[".out[0]"].shape == (5, 1, 4)


def test_the_mean_is_refused_where_no_batch_is_proved():
    points = hook_points(nn.Sequential(nn.Linear(6, 4)), torch.randn(6))
    with pytest.raises(BatchAxisError, match="Cannot average"):
        cache_of(points, torch.randn(6), "0").mean()


def test_caches_of_different_sites_are_not_combined(points, image):
    with pytest.raises(SiteError, match=r"in both: Site\('fc'\)"):
        cache_of(points, image) + cache_of(points, image, "conv")


def test_caches_of_different_lengths_are_not_combined(points, image):
    with pytest.raises(SiteError, match=r"shape \(4, 4, 4, 4\) in one cache and \(3, 4, 4, 4\)"):
        cache_of(points, image) - cache_of(points, image[:3])


def test_caches_of_many_rows_and_of_one_are_not_combined(points, image):
    many, one = cache_of(points, image, "fc"), cache_of(points, image[:1], "fc")
    for first, second, shapes in ((many, one, ("(4, 5)", "(1, 5)")), (one, many, ("(1, 5)", "(4, 5)"))):
        with pytest.raises(SiteError) as caught:
            first - second
        assert str(caught.value) == (
            f"Site('fc') has shape {shapes[0]} in one cache and {shapes[1]} in the other. The shapes must be "
            "equal. Only the result of cache.mean() is broadcast, along the batch axis."
        )


def test_rows_less_their_mean_are_rows_again(points, image):
    centred = cache_of(points, image, "fc") - cache_of(points, image, "fc").mean()
    with pytest.raises(SiteError, match="Only the result of cache.mean"):
        centred - cache_of(points, image[:1], "fc")


def test_caches_without_a_batch_axis_repeat_nowhere():
    many, one = (
        ActivationCache({Site("a"): torch.ones(n, 2)}, {Site("a"): ("x", "y")}, {Site("a"): None}) for n in (3, 1)
    )
    with pytest.raises(SiteError, match="in one cache"):
        many - one


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_arithmetic_of_small_integers_does_not_wrap(dtype):
    site, large = Site("a"), torch.iinfo(dtype).max

    def cache(*numbers: int) -> ActivationCache:
        return ActivationCache({site: torch.tensor(numbers, dtype=dtype)}, {site: ("batch",)}, {site: 0})

    assert (cache(1, large) - cache(2, 0))[site].tolist() == [-1, large]
    assert (cache(1, large) + cache(1, large))[site].tolist() == [2, 2 * large]
    assert (cache(1, large) * 3)[site].tolist() == [3, 3 * large]
    assert (-cache(1, large))[site].tolist() == [-1, -large]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_caches_of_tokens_and_masks_have_differences_and_means(dtype):
    site = Site("a")
    one, two = (
        ActivationCache({site: torch.tensor(each, dtype=dtype)}, {site: ("batch",)}, {site: 0})
        for each in ([1, 0], [1, 1])
    )
    assert (one - two)[site].tolist() == [0, -1]
    assert (one - one.mean())[site].tolist() == [0.5, -0.5]


def test_a_cache_is_moved_and_cast_like_a_tensor(points, image):
    cache = cache_of(points, image)
    cast = cache.to(torch.float64)
    assert cast["conv"].dtype == torch.float64
    assert cache["conv"].dtype == torch.float32
    assert cast.axes("conv") == cache.axes("conv")


def test_records_hold_every_number_with_its_index_on_each_axis(points, net, image):
    site = points.site("conv", channel=[3, 0], row=0, col=slice(1, 3))
    cache = cache_of(points, image[:2], site)
    records = cache.to_records()
    values = convolved(net, image[:2])[:, [3, 0], :1, 1:3]
    expected = [
        {"site": repr(site), "batch": b, "channel": c, "row": 0, "col": w, "value": values[b, c, 0, w].item()}
        for b, c, w in itertools.product(range(2), range(2), range(2))
    ]
    assert records == expected


def test_records_of_a_single_axis_are_numbered_too(points, image):
    _, cache = run_with_cache(points, image, sites="conv", reduce=("b c h w -> c", "sum"))
    assert [record["channel"] for record in cache.to_records()] == [0, 1, 2, 3]


def test_records_of_no_axis_hold_the_number(points, image):
    _, cache = run_with_cache(points, image, sites="conv", reduce=("b c h w ->", "sum"))
    assert cache.to_records() == [{"site": "Site('conv')", "value": cache["conv"].item()}]


def test_a_cache_prints_its_sites_axes_and_shapes(points, image):
    assert repr(cache_of(points, image)) == (
        "ActivationCache of 2 sites\n"
        "site          axes                      shape          dtype\n"
        "Site('conv')  batch, channel, row, col  4 x 4 x 4 x 4  float32\n"
        "Site('fc')    batch, feature            4 x 5          float32"
    )


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(3, 3) for _ in range(11))
        self.head = nn.Linear(3, 2)

    def forward(self, vector):
        for layer in self.h:
            vector = layer(vector)
        return self.head(vector)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    vectors = torch.randn(4, 3)
    return run_with_cache(hook_points(Layers(), vectors), vectors, sites=["h.*", "h.*.in[0]", "head"])[1]


def test_a_notebook_completes_the_names_of_the_sites_in_a_cache(points, image, layers):
    two = cache_of(points, image, points.site("conv", channel=0), points.site("conv", channel=1), "fc")
    assert two._ipython_key_completions_() == ["conv", "fc"]
    assert layers._ipython_key_completions_()[-1] == "head" and "h.10.in[0]" in layers._ipython_key_completions_()


def test_a_pattern_selects_sites_in_the_order_in_which_they_ran(layers):
    assert [site.name for site in layers.select("h.*")] == [f"h.{number}" for number in range(11)]
    inputs = layers.select("h.*.in[0]")
    assert len(inputs) == 11 and torch.equal(inputs["h.1.in[0]"], layers["h.0"])
    assert inputs.axes("h.1.in[0]") == ("batch", "feature") and len(inputs.to_pandas()) == 11 * 12
    mean = layers.mean().select("h.*") - layers.select("h.*")
    assert torch.equal(mean["h.3"], layers["h.3"].mean(0) - layers["h.3"])
    with pytest.raises(HookPointError) as caught:
        layers.select("head").select("block.*")
    assert str(caught.value) == "No site in the cache matches 'block.*'. Sites: Site('head')."


def test_a_stack_has_the_layers_along_its_first_axis(layers):
    stacked = layers.select("h.*").stack()
    assert stacked.shape == (11, 4, 3) and torch.equal(stacked[10], layers["h.10"])
    with pytest.raises(SiteError) as caught:
        layers.stack()
    assert str(caught.value) == (
        "Only activations with equal shapes and axes can be stacked; got (4, 2) with axes (batch, feature), (4, 3) "
        "with axes (batch, feature). Select the sites first: cache.select('h.*.mlp').stack()."
    )
    with pytest.raises(SiteError, match=r"got no sites\. Select"):
        ActivationCache({}, {}, {}).stack()


def test_an_xarray_of_a_cache_has_its_sites_and_axes(layers):
    array = layers.select("h.*").to_xarray()
    assert array.dims == ("site", "batch", "feature") and array.coords["site"].values[3] == "Site('h.3')"
    np.testing.assert_array_equal(array.sel(site="Site('h.3')", batch=2), layers["h.3"][2].detach())
    assert layers.select("head").to(torch.bfloat16).to_xarray().dtype == np.float32


# --- refusals ---


def test_a_site_that_never_ran_is_an_error_that_names_it(net, image):
    net.unused = nn.Linear(2, 2)
    with (
        pytest.raises(UnreachedError, match="Nothing was recorded at 'unused'"),
        recording(net, ["conv", "unused"]),
    ):
        net(image)


def test_a_site_that_need_not_run_is_let_pass(net, image):
    net.unused = nn.Linear(2, 2)
    with recording(net, ["conv", "unused"], allow_unreached=["unused"]) as cache:
        net(image)
    assert "unused" not in cache


def test_a_forward_that_has_another_shape_than_the_trace_is_refused(net, points):
    with pytest.raises(TraceMismatchError, match="'conv' has shape"), recording(points, "conv"):
        net(torch.randn(4, 3, 8, 8))


def test_a_forward_in_another_thread_is_refused(net, points, image):
    with recording(points, "conv", allow_unreached=["conv"]), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ConcurrencyError, match="recorded in another thread"):
            pool.submit(net, image).result()


def test_an_edit_that_raises_masks_no_record(net, points, image):
    def fails(activation):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), recording(points, "fc"), patched(points, edit(points.site("conv"), fails)):
        net(image)


class Repeated(nn.Module):
    """Calls one ReLU twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(3, 3), nn.ReLU()

    def forward(self, vector):
        return self.relu(self.fc(self.relu(vector)) - 1)


def test_without_a_trace_stop_does_not_hide_that_a_module_is_called_again():
    for stop in (True, False):
        with pytest.raises(HookPointError, match="'relu' has no call index"):
            run_with_cache(Repeated(), torch.randn(2, 3), sites="relu", stop=stop)


def test_without_a_trace_stop_ends_the_forward_only_where_every_site_names_its_call(net, image):
    assert "conv" in run_with_cache(net, image, sites="conv", stop=True)
    assert net.counted.calls == 1
    assert "conv#0" in run_with_cache(net, image, sites="conv#0", stop=True)
    assert net.counted.calls == 1


def test_recording_as_a_decorator_records_anew_in_each_call(net, image):
    runs = recording(net, (name for name in ["conv"]))

    @runs
    def run():
        return net(image)

    run()
    run()  # with nothing recorded it would be an error


def test_recording_records_the_module_that_is_there_when_it_is_entered(net, image):
    context = recording(net, "fc")
    net.fc = nn.Linear(4, 5)
    with context as cache:
        output = net(image)
    torch.testing.assert_close(cache["fc"], output)


def test_recording_checks_its_sites_before_it_is_entered(points):
    with pytest.raises(HookPointError, match="No hook point named 'convv'"):
        recording(points, "convv")


def test_allow_unreached_takes_one_name_as_it_is(net, image):
    with recording(net, "conv", allow_unreached="conv") as cache:
        pass
    assert len(cache) == 0


def test_no_sites_to_record_are_an_error(net, points, image):
    for points_or_model in (net, points):
        with pytest.raises(SiteError, match="no sites to record"):
            run_with_cache(points_or_model, image, sites=[])


def test_a_cache_times_a_number_is_the_same_from_both_sides(points, image):
    cache = run_with_cache(points, image, sites="conv", stop=True)
    expected = cache["conv"]
    for found, factor in ((2 * cache, 2), (cache * 2.0, 2), (np.float64(2) * cache, 2), (-cache, -1)):
        assert torch.equal(found["conv"], expected * factor)
    assert torch.equal((1 + cache)["conv"], expected + 1)
    assert torch.equal(sum([cache, cache])["conv"], expected + expected)


@pytest.mark.parametrize("combine", [
    lambda cache: cache * torch.ones(4), lambda cache: torch.ones(4) * cache, lambda cache: cache + torch.ones(7, 4, 4),
    lambda cache: cache - torch.tensor(1.0),
])  # fmt: skip
def test_a_cache_is_not_combined_with_a_tensor(points, image, combine):
    with pytest.raises(TypeError):
        combine(run_with_cache(points, image, sites="conv", stop=True))


def test_an_ellipsis_in_a_pattern_keeps_the_batch_so_that_forwards_are_joined(net, points, image):
    with recording(points, "conv", reduce=("b c ... -> b c", "sum")) as cache:
        net(image)
        net(image)
    assert cache.axes("conv") == ("batch", "channel")
    assert torch.equal(cache["conv"], torch.cat([convolved(net, image).sum((2, 3))] * 2))


def test_an_ellipsis_that_is_kept_keeps_the_names_of_its_axes(net, points, image):
    cache = run_with_cache(points, image, sites="conv", reduce=("b c ... -> b ...", "max"), stop=True)
    assert cache.axes("conv") == ("batch", "row", "col")
    assert torch.equal(cache["conv"], convolved(net, image).amax(1))


@pytest.mark.parametrize("reduce", [("b c h w -> b c", "median"), ("b c -> b", "sum"), ("b c h w -> b d", "sum")])
def test_a_reduction_that_does_not_apply_is_refused_at_once(points, reduce):
    with pytest.raises(SiteError, match="cannot be applied to Site\\('conv'\\)"):
        recording(points, "conv", reduce=reduce)


def test_a_mean_of_flags_is_refused_at_once():
    class Positive(nn.Module):
        def forward(self, image):
            return image > 0

    points = hook_points(
        nn.Sequential(Positive()), torch.randn(2, 3, 4, 4), axes={"0": ("batch", "channel", "row", "col")}
    )
    with pytest.raises(SiteError, match="torch.bool region"):
        recording(points, "0", reduce="mean")


def test_a_record_of_an_index_list_is_its_own(net, points, image):
    cache = run_with_cache(points, image, sites=points.site("conv", channel=[2, 0]), stop=True)
    before = convolved(net, image)
    next(iter(cache.values())).zero_()
    assert torch.equal(run_with_cache(points, image, sites="conv", stop=True)["conv"], before)


def test_another_dtype_than_the_traced_one_is_an_error_that_names_both(net, points, image):
    net.double()
    with pytest.raises(TraceMismatchError, match="'conv' is torch.float64 in this forward pass, but torch.float32"):
        run_with_cache(points, image.double(), sites="conv")
    net.float()
    with pytest.raises(TraceMismatchError, match=r"bfloat16.*float32"), torch.autocast("cpu", torch.bfloat16):
        run_with_cache(points, image, sites="conv")


def test_a_trace_under_autocast_fits_forwards_under_autocast(net, image):
    with torch.autocast("cpu", torch.bfloat16):
        cache = run_with_cache(hook_points(net, image), image, sites="conv", stop=True)
    assert cache["conv"].dtype == torch.bfloat16


@pytest.mark.parametrize("indices", [{}, {"channel": [2, 0]}, {"row": slice(1, 3)}], ids=["whole", "list", "slice"])
def test_the_gradient_of_the_output_at_a_record_that_stays_in_the_graph_is_the_one_by_hand(indices):
    model = build("inplace_relu")
    points = hook_points(model.module, *model.inputs(2))
    inputs, site = model.inputs(2), points.site("conv1", **indices)
    with recording(points, site, detach=False) as cache:
        (found,) = torch.autograd.grad(model.module(*inputs).square().sum(), cache[site])
    activation = model.module.conv1(*inputs).detach().requires_grad_()
    output = model.module.relu2(model.module.conv2(activation.relu())).mean((2, 3))
    (by_hand,) = torch.autograd.grad(output.square().sum(), activation)
    for axis, index in indices.items():
        number = points["conv1"].axes.index(axis)
        by_hand = by_hand.index_select(number, torch.arange(by_hand.shape[number])[index])
    torch.testing.assert_close(found, by_hand)
    assert (cache[site] < 0).any()


def test_the_gradient_at_a_record_in_the_graph_is_of_what_follows_the_hook_point_alone() -> None:
    class UsesItsResult(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.inner(x)
            return hidden, 5 * hidden

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = UsesItsResult()

        def forward(self, x: Tensor) -> Tensor:
            hidden, fivefold = self.encoder(x)
            return 2 * hidden + fivefold

    model, inputs = Model(), torch.randn(4, 3)
    with recording(hook_points(model, inputs), "encoder.out[0]", detach=False) as cache:
        output = model(inputs)
    (gradient,) = torch.autograd.grad(output.sum(), cache["encoder.out[0]"])
    assert torch.equal(gradient, torch.full((4, 3), 2.0))


def test_what_is_written_in_place_downstream_does_not_change_a_record_in_the_graph() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True)), torch.randn(4, 3)
    with recording(hook_points(model, inputs), "0", detach=False) as cache:
        model(inputs)
    assert torch.equal(cache["0"], model[0](inputs))


def test_sums_of_half_precision_activations_do_not_overflow() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1)).half()
    nn.init.constant_(model[0].weight, 60.0)
    image = torch.full((2, 1, 64, 64), 1.0).half()
    with recording(hook_points(model, image), "0", reduce="sum") as cache, torch.no_grad():
        expected = model(image).double().sum(dim=(2, 3))
    torch.testing.assert_close(cache["0"].double(), expected)
