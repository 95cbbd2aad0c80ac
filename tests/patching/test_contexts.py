"""Every verb against the same computation written out by hand."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.masked import masked_tensor

from chanpatch.engine.moments import forward_context
from chanpatch.errors import (
    BatchAxisError,
    EditError,
    HookPointError,
    NaNError,
    SiteError,
    TraceMismatchError,
    UnreachedError,
    UnsupportedModelError,
)
from chanpatch.patching import (
    Clamp,
    Patch,
    Project,
    Resample,
    Scale,
    Set,
    edit,
    mean_ablate,
    patch_in,
    patched,
    resample_ablate,
    run_with_cache,
    steer,
    zero_ablate,
)
from chanpatch.patching.edits import donor_rows
from chanpatch.registry import Site, hook_points


class Net(nn.Module):
    """A small network of which every step can be written out; `run` does, with a change after each step."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, image):
        return self.fc(self.conv(image).relu().sum((2, 3)))


def by_hand(net: Net, image: Tensor, change=lambda hidden: hidden) -> Tensor:
    """The forward of Net, with the output of the convolution changed."""
    hidden = change(F.conv2d(image, net.conv.weight, net.conv.bias))
    return F.linear(hidden.relu().sum((2, 3)), net.fc.weight, net.fc.bias)


def convolved(net: Net, image: Tensor) -> Tensor:
    return F.conv2d(image, net.conv.weight, net.conv.bias)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def image():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def other():
    return torch.randn(7, 3, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def points(net, image):
    return hook_points(net, image)


def put(hidden: Tensor, region: Any, new: Any) -> Tensor:
    """A copy with a region replaced, by torch's own indexing."""
    changed = hidden.clone()
    changed[region] = new
    return changed


def channel(number: int) -> tuple[Any, ...]:
    return (slice(None), slice(number, number + 1))


def check(points_or_model, patches, image, expected) -> None:
    model = getattr(points_or_model, "model", points_or_model)
    with patched(points_or_model, patches):
        torch.testing.assert_close(model(image), expected, rtol=0, atol=0)


# --- the verbs ---


def test_zero_ablate_sets_the_region_to_zero(net, points, image):
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(2), 0.0))
    check(points, zero_ablate(points.site("conv", channel=2)), image, expected)


def test_a_bare_model_is_patched_the_same(net, image):
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(2), 0.0))
    check(net, zero_ablate(Site("conv", channel=2)), image, expected)


def test_mean_ablate_sets_the_region_to_its_mean_over_the_reference_inputs(net, points, image, other):
    _, cache = run_with_cache(points, other, sites="conv")
    mean = convolved(net, other).mean(0)[2]
    expected = by_hand(net, image, lambda hidden: put(hidden, (slice(None), 2), mean))
    with patched(points, mean_ablate(points.site("conv", channel=2), cache)):
        torch.testing.assert_close(net(image), expected)


def test_mean_ablate_over_rows_and_columns_too_sets_one_number_per_channel(net, points, image, other):
    _, cache = run_with_cache(points, other, sites=points.site("conv", channel=[1, 2]))
    means = convolved(net, other).mean((0, 2, 3))

    def change(hidden):
        return put(put(hidden, channel(1), means[1]), channel(2), means[2])

    patch = mean_ablate(points.site("conv", channel=[1, 2]), cache, over=("batch", "row", "col"))
    with patched(points, patch):
        torch.testing.assert_close(net(image), by_hand(net, image, change))


def test_resample_ablate_puts_the_drawn_row_of_the_reference_in_place_of_each_row(net, points, image, other):
    _, cache = run_with_cache(points, other, sites="conv")
    donors = donor_rows(3, 0, torch.arange(4), 7)
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(2), convolved(net, other)[donors][:, 2:3]))
    check(points, resample_ablate(points.site("conv", channel=2), cache, seed=3), image, expected)


def test_patch_in_puts_the_activation_of_another_run_in_place(net, points, image):
    corrupted = image.flip(3)
    _, cache = run_with_cache(points, corrupted, sites="conv")
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(2), convolved(net, corrupted)[:, 2:3]))
    check(points, patch_in(points.site("conv", channel=2), cache), image, expected)


@pytest.mark.parametrize("number", [3, 3.0, np.float32(3.0)])
def test_patch_in_puts_one_number_everywhere_in_the_region(net, points, image, number):
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(2), 3.0))
    check(points, patch_in(points.site("conv", channel=2), number), image, expected)


def test_steer_adds_one_number_everywhere_in_the_region(net, points, image):
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(2), hidden[:, 2:3] + 2.0))
    check(points, steer(points.site("conv", channel=2), 1.0, coefficient=2.0), image, expected)


def test_of_a_tensor_of_the_whole_hook_point_the_verbs_take_the_region(net, points, image, other):
    site, whole = points.site("conv", channel=2, row=slice(1, 3)), convolved(net, other)
    region = whole[:, 2:3, 1:3]
    for verb in (mean_ablate, patch_in, steer, functools.partial(resample_ablate, seed=0)):
        (operand, *_), (expected, *_) = (vars(verb(site, each).edit).values() for each in (whole, region))
        assert torch.equal(operand, expected)


def test_a_tensor_that_fits_neither_the_region_nor_the_hook_point_is_refused(points):
    with pytest.raises(EditError, match=r"the value has shape \(7, 9, 8, 8\), but the region has axes"):
        patch_in(points.site("conv", channel=2), torch.zeros(7, 9, 8, 8))


def test_patching_in_all_of_another_run_gives_that_runs_output(net, points, image):
    corrupted = image.flip(3)
    output, cache = run_with_cache(points, corrupted, sites="conv")
    check(points, patch_in(points.site("conv"), cache), image, output)


def test_a_source_of_one_row_is_put_into_every_row(net, points, image, other):
    _, cache = run_with_cache(points, other[:1], sites="conv")
    expected = by_hand(net, image, lambda hidden: convolved(net, other[:1]).expand_as(hidden))
    check(points, patch_in(points.site("conv"), cache), image, expected)


def test_steer_adds_the_vector_times_the_coefficient(net, points, image):
    vector = torch.tensor([1.0, 0.0, -2.0, 3.0]).view(1, 4, 1, 1)
    expected = by_hand(net, image, lambda hidden: hidden + -1.5 * vector)
    check(points, steer(points.site("conv"), vector, -1.5), image, expected)


def test_steer_takes_a_difference_of_caches(net, points, image, other):
    clean, corrupted = (run_with_cache(points, x, sites="conv")[1] for x in (other, other.flip(2)))
    difference = (convolved(net, other).mean(0) - convolved(net, other.flip(2)).mean(0))[None]
    expected = by_hand(net, image, lambda hidden: hidden + difference)
    check(points, steer(points.site("conv"), clean.mean() - corrupted.mean()), image, expected)


def test_edit_applies_the_users_own_function(net, points, image):
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(1), hidden[:, 1:2].square()))
    check(points, edit(points.site("conv", channel=1), torch.square), image, expected)


@pytest.mark.parametrize(
    ("one", "change"),
    [
        (Set(2.0), lambda region: torch.full_like(region, 2.0)),
        (Scale(0.5), lambda region: region / 2),
        (Clamp(high=0.1), lambda region: region.minimum(torch.tensor(0.1))),
        (Project(torch.ones(1, 2, 1, 1)), lambda region: region - region.mean(1, keepdim=True)),
    ],
    ids=["Set", "Scale", "Clamp", "Project"],
)
def test_an_edit_object_gets_the_region_and_nothing_else(net, points, image, one, change):
    pair = (slice(None), [1, 3])
    expected = by_hand(net, image, lambda hidden: put(hidden, pair, change(hidden[:, [1, 3]])))
    with patched(points, edit(points.site("conv", channel=[1, 3]), one)):
        torch.testing.assert_close(net(image), expected)


def test_a_region_on_several_axes_is_their_product(net, points, image):
    def change(hidden):
        for number in (3, 0):
            for row in (0, 2):
                hidden = put(hidden, (slice(None), number, row, slice(1, 3)), 9.0)
        return hidden

    site = points.site("conv", channel=[3, 0], row=[0, 2], col=slice(1, 3))
    check(points, edit(site, Set(9.0)), image, by_hand(net, image, change))


def test_an_edit_sees_the_indices_in_the_order_they_were_named(net, points, image):
    site = points.site("conv", channel=[3, 0])
    operand = torch.tensor([30.0, 0.5]).view(1, 2, 1, 1)

    def change(hidden):
        return put(put(hidden, channel(3), 30.0), channel(0), 0.5)

    check(points, edit(site, Set(operand)), image, by_hand(net, image, change))


def test_patches_of_one_call_apply_in_the_order_given(net, points, image):
    site = points.site("conv", channel=0)
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(0), hidden[:, :1] * 2 + 1))
    check(points, [edit(site, Scale(2.0)), steer(site, torch.ones(1, 1, 1, 1))], image, expected)


def test_a_later_context_patches_what_an_earlier_one_left(net, points, image):
    site = points.site("conv", channel=0)
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(0), (hidden[:, :1] + 1) * 2))
    with patched(points, steer(site, torch.ones(1, 1, 1, 1))):
        check(points, edit(site, Scale(2.0)), image, expected)


def test_closing_a_context_takes_only_its_own_patches_off(net, points, image):
    outer = patched(points, zero_ablate(points.site("conv", channel=0)))
    inner = patched(points, zero_ablate(points.site("conv", channel=1)))
    outer.__enter__(), inner.__enter__()
    net(image)
    outer.__exit__(None, None, None)
    expected = by_hand(net, image, lambda hidden: put(hidden, channel(1), 0.0))
    torch.testing.assert_close(net(image), expected, rtol=0, atol=0)
    inner.__exit__(None, None, None)
    torch.testing.assert_close(net(image), by_hand(net, image), rtol=0, atol=0)


def test_the_input_of_a_module_is_patched_for_that_module_alone(residual_add):
    (image,) = residual_add.inputs(2)
    net = residual_add.module
    points = hook_points(net, image)
    stem = net.conv1(image)
    expected = net.fc(net.relu(stem + net.block(torch.zeros_like(stem))).amax((2, 3)))
    check(points, zero_ablate(points.site("block.in[0]")), image, expected)


def test_one_call_of_a_shared_module_is_patched_and_the_other_is_not(shared_module):
    (vector,) = shared_module.inputs(3)
    net = shared_module.module
    points = hook_points(net, vector)
    for call, expected in enumerate(
        [net.fc2(torch.zeros(3, 6)).relu(), torch.zeros(3, 6)],
    ):
        check(points, zero_ablate(points.site(f"relu#{call}")), vector, expected)


def test_the_other_name_of_a_shared_module_patches_the_same_place(shared_module):
    (vector,) = shared_module.inputs(3)
    points = hook_points(shared_module.module, vector)
    check(points, zero_ablate(points.site("tied")), vector, torch.zeros(3, 6))


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, *, vector, bonus):
        return self.fc(input=vector) + bonus


@pytest.mark.parametrize("name", ['.in["vector"]', 'fc.in["input"]'])
def test_a_keyword_input_is_patched_by_its_name(name):
    net, vector, bonus = Keyword(), torch.randn(2, 6), torch.randn(2, 4)
    points = hook_points(net, vector=vector, bonus=bonus)
    with patched(points, zero_ablate(points.site(name))):
        torch.testing.assert_close(net(vector=vector, bonus=bonus), net.fc.bias + bonus, rtol=0, atol=0)


def test_an_item_of_a_dict_input_is_patched_and_the_callers_dict_is_not():
    class Fused(nn.Module):
        def forward(self, observation):
            return observation["a"] + observation["b"]

    net, observation = Fused(), {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    points = hook_points(net, observation)
    with patched(points, zero_ablate(points.site('.in[0]["a"]'))):
        assert torch.equal(net(observation), torch.ones(2, 3))
    assert torch.equal(observation["a"], torch.ones(2, 3))


def test_a_tensor_inside_a_nested_output_is_patched_and_its_siblings_are_not(dict_output):
    (vector,) = dict_output.inputs(2)
    net = dict_output.module
    points = hook_points(net, vector)
    hidden = net.encoder.fc(vector).relu()
    expected = net.head(hidden + torch.zeros_like(hidden)) + hidden.mean(-1)[:, None]
    with patched(points, zero_ablate(points.site('encoder.out["layers"][1]'))):
        torch.testing.assert_close(net(vector)["logits"], expected, rtol=0, atol=0)


READ_ONLY = (
    "The tensor at '.out[0].logits' is inside a distribution, so it can be recorded but not patched. Patch the module "
    "that computes the tensor, or call tap('name', tensor) in the model's forward()."
)


def test_a_tensor_inside_a_distribution_is_recorded_but_not_patched(tuple_output):
    (vector,) = tuple_output.inputs(2)
    points = hook_points(tuple_output.module, vector)
    assert [name for name, point in points.items() if point.read_only] == [".out[0].logits"]
    (distribution, _), cache = run_with_cache(points, vector, sites=".out[0].logits")
    assert torch.equal(cache[".out[0].logits"], distribution.logits)
    with pytest.raises(UnsupportedModelError) as caught:
        zero_ablate(points.site(".out[0].logits"))
    assert str(caught.value) == READ_ONLY


def test_without_a_trace_a_patch_inside_a_distribution_is_refused_in_the_forward(tuple_output):
    with (
        pytest.raises(UnsupportedModelError) as caught,
        patched(tuple_output.module, zero_ablate(Site(".out[0].logits"))),
    ):
        tuple_output.module(*tuple_output.inputs(2))
    assert str(caught.value) == READ_ONLY


def test_a_nested_distribution_is_recorded():
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Linear(6, 2)

        def forward(self, vector):
            mean = self.mean(vector)
            return Independent(Normal(mean, mean.exp()), 1)

    net, vector = Gaussian(), torch.randn(3, 6)
    cache = run_with_cache(hook_points(net, vector), vector, sites=".out.base_dist.loc", stop=True)
    torch.testing.assert_close(cache[".out.base_dist.loc"], net.mean(vector))


# --- where ---


MASKS = {
    "some rows": torch.tensor([True, False, False, True]).view(4, 1, 1, 1),
    "some places": (torch.arange(4) > 1).view(1, 1, 4, 1),
    "every element": torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(5)) > 0,
    "one cell of each row": (torch.arange(16).view(1, 1, 4, 4) == torch.tensor([3, 0, 15, 7]).view(4, 1, 1, 1)),
    "nothing": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
}


@pytest.fixture(params=list(MASKS))
def mask(request):
    return MASKS[request.param]


def test_where_leaves_the_elements_that_it_does_not_choose(net, points, image, mask):
    def change(hidden):
        chosen = mask.expand(4, 1, 4, 4)
        return put(hidden, channel(1), torch.where(chosen, torch.zeros(()), hidden[:, 1:2]))

    check(points, zero_ablate(points.site("conv", channel=1), where=mask), image, by_hand(net, image, change))


def test_where_as_a_function_of_the_context_is_the_mask_it_returns(net, points, image, mask):
    def change(hidden):
        return put(hidden, channel(1), torch.where(mask.expand(4, 1, 4, 4), torch.zeros(()), hidden[:, 1:2]))

    patch = zero_ablate(points.site("conv", channel=1), where=lambda context: mask)
    check(points, patch, image, by_hand(net, image, change))


@pytest.mark.parametrize("chosen", [True, False])
def test_where_may_return_a_plain_bool_for_all_or_nothing(net, points, image, chosen):
    patch = zero_ablate(points.site("conv"), where=lambda context: chosen)
    check(points, patch, image, by_hand(net, image, lambda hidden: hidden * (not chosen)))
    with patched(points, patch) as ledger:
        net(image)
    (record,) = ledger.to_records()
    assert (record["firings"], record["rows"]) == (1, 4 * chosen)
    assert bool(record["elements"]) == chosen


def test_where_may_return_a_plain_bool_for_a_tensor_without_axes():
    model = nn.Identity()
    with patched(model, zero_ablate(Site(".out"), where=lambda context: context.call == 0)):
        assert model(torch.tensor(3.0)) == 0


def test_where_may_ask_for_the_inputs_of_the_root_call(net, points, image):
    bright = image.sum((1, 2, 3)) > 0

    def change(hidden):
        return torch.where(bright.view(4, 1, 1, 1), torch.zeros(()), hidden)

    patch = zero_ablate(points.site("conv"), where=lambda c: (c.inputs[0].sum((1, 2, 3)) > 0).view(-1, 1, 1, 1))
    check(points, patch, image, by_hand(net, image, change))
    assert bright.unique().numel() == 2


def test_where_may_ask_for_the_step_and_the_row_numbers(net, points, image):
    def late_odd_rows(context):
        return ((context.rows % 2 == 1) & (context.step == 3)).view(-1, 1, 1, 1)

    site = points.site("conv")
    odd = by_hand(net, image, lambda hidden: put(hidden, ([1, 3],), 0.0))
    with patched(points, zero_ablate(site, where=late_odd_rows)):
        for step, expected in ((2, by_hand(net, image)), (3, odd)):
            with forward_context(step=step, rows=[10, 11, 12, 13]):
                torch.testing.assert_close(net(image), expected, rtol=0, atol=0)


@pytest.mark.parametrize("counted", ["mask of rows", "mask of places", "function"])
def test_the_ledger_counts_the_rows_and_elements_that_where_chose(net, points, image, counted):
    rows, places = torch.tensor([True, False, True, True]).view(4, 1, 1, 1), (torch.arange(4) > 0).view(1, 1, 1, 4)
    where, chosen_rows, elements = {
        "mask of rows": (rows, 3, 3 * 2 * 16),
        "mask of places": (places, 4, 4 * 2 * 12),
        "function": (lambda context: rows & places, 3, 3 * 2 * 12),
    }[counted]
    with patched(points, zero_ablate(points.site("conv", channel=[0, 1]), where=where)) as ledger:
        net(image)
    record = ledger.to_records()[0]
    assert (record["firings"], record["rows"], record["elements"]) == (1, chosen_rows, elements)


def test_where_that_asks_for_rows_without_a_proved_batch_is_refused():
    points = hook_points(nn.Sequential(nn.Linear(6, 4)), torch.randn(6))
    patch = zero_ablate(points.site("0"), where=lambda context: context.rows > 0)
    with pytest.raises(BatchAxisError, match="needs a known batch axis"), patched(points, patch):
        points.model(torch.randn(6))


def test_row_numbers_that_do_not_fit_the_forward_are_refused(net, points, image):
    patch = edit(points.site("conv"), lambda activation, *, context: activation * (context.rows.sum() > 0))
    with (
        pytest.raises(
            TraceMismatchError, match="has 4 rows along its batch axis, but the model was called with 3 rows"
        ),
        patched(points, patch),
        forward_context(rows=[0, 1, 2]),
    ):
        net(image)


# --- the context of an edit ---


def test_an_edit_with_a_context_is_told_inputs_step_rows_and_call(shared_module):
    (vector,) = shared_module.inputs(3)
    points = hook_points(shared_module.module, vector)
    contexts = []

    def ask(activation, *, context):
        contexts.append((context.inputs[0] is vector, context.step, context.rows.tolist(), context.call))
        return activation

    with patched(points, [edit(points.site("relu#0"), ask), edit(points.site("relu#1"), ask)]):
        shared_module.module(vector)
        with forward_context(step=9, rows=torch.tensor([4, 5, 6])):
            shared_module.module(vector)
    assert contexts == [(True, None, [0, 1, 2], call) for call in (0, 1)] + [(True, 9, [4, 5, 6], c) for c in (0, 1)]


def test_an_edit_with_a_positional_parameter_called_context_gets_none(net, points, image):
    def halve(activation, context=2):
        return activation / context

    check(points, edit(points.site("conv"), halve), image, by_hand(net, image, lambda hidden: hidden / 2))


def test_a_random_edit_does_not_depend_on_the_order_of_the_rows(net, points, image, other):
    _, cache = run_with_cache(points, other, sites="conv")
    patch = resample_ablate(points.site("conv", channel=[1, 2]), cache, seed=0)
    order = [2, 0, 3, 1]
    with patched(points, patch):
        whole = net(image)
        with forward_context(rows=order):
            shuffled = net(image[order])
    torch.testing.assert_close(shuffled, whole[order])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_random_edit_does_not_depend_on_how_rows_are_cut_into_forwards(net, points, image, other, size):
    _, cache = run_with_cache(points, other, sites="conv")
    patch = resample_ablate(points.site("conv", channel=[1, 2]), cache, seed=0)
    with patched(points, patch):
        whole = net(image)
        parts = []
        for start in range(0, 4, size):
            with forward_context(rows=range(start, min(start + size, 4))):
                parts.append(net(image[start : start + size]))
    torch.testing.assert_close(torch.cat(parts), whole)


# --- gradients ---


CHANGES = {
    "set": (lambda site: edit(site, Set(1.0)), lambda region: torch.ones_like(region)),
    "scale": (lambda site: edit(site, Scale(-2.0)), lambda region: region * -2),
    "users own": (lambda site: edit(site, torch.tanh), torch.tanh),
    "identity": (lambda site: edit(site, lambda activation: activation), lambda region: region),
}


@pytest.mark.parametrize("name", list(CHANGES))
@pytest.mark.parametrize("chosen", [[2], [3, 0]], ids=["slice", "list"])
def test_gradients_through_a_patch_are_those_of_the_computation_written_out(net, points, image, name, chosen):
    patch, change = CHANGES[name]
    with patched(points, patch(points.site("conv", channel=chosen))):
        net(image).square().sum().backward()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    by_hand(net, image, lambda h: put(h, (slice(None), chosen), change(h[:, chosen]))).square().sum().backward()
    for one, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_gradients_flow_to_the_operand_of_a_patch(net, points, image):
    vector = torch.zeros(1, 4, 1, 1, requires_grad=True)
    with patched(points, steer(points.site("conv"), vector, 2.0)):
        net(image).sum().backward()
    expected = torch.zeros(1, 4, 1, 1, requires_grad=True)
    by_hand(net, image, lambda hidden: hidden + 2.0 * expected).sum().backward()
    torch.testing.assert_close(vector.grad, expected.grad)
    assert vector.grad.abs().sum() > 0


def test_gradients_are_masked_by_where(net, points, image):
    where = (torch.arange(4) < 2).view(4, 1, 1, 1)
    image.requires_grad_()
    with patched(points, zero_ablate(points.site("conv"), where=where)):
        net(image).sum().backward()
    assert not image.grad[:2].any()
    assert image.grad[2:].any()


# --- modes and dtypes ---


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_patch_works_in_every_gradient_mode(net, points, image, mode):
    with mode():
        expected = by_hand(net, image, lambda hidden: put(hidden, channel(2), 0.0))
        check(points, zero_ablate(points.site("conv", channel=2)), image, expected)


@pytest.mark.parametrize("verb", ["zero", "steer", "patch in"])
def test_a_model_in_float64_is_patched_in_float64(net, image, verb):
    net.double(), (image := image.double())
    points = hook_points(net, image)
    operand = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    patch, change = {
        "zero": (zero_ablate(points.site("conv")), torch.zeros_like),
        "steer": (steer(points.site("conv"), operand), lambda hidden: hidden + 1),
        "patch in": (patch_in(points.site("conv"), operand), torch.ones_like),
    }[verb]
    expected = by_hand(net, image, change)
    assert expected.dtype == torch.float64
    check(points, patch, image, expected)


def test_an_operand_of_another_dtype_is_refused_when_the_patch_is_made(net, image):
    points = hook_points(net.double(), image.double())
    with pytest.raises(EditError, match=r"float32 on cpu, but the region is torch.float64.*Convert the"):
        steer(points.site("conv"), torch.ones(1, 4, 1, 1))


def test_a_patch_under_autocast_is_in_the_dtype_of_the_forward(net, image):
    with torch.autocast("cpu", torch.bfloat16):
        points = hook_points(net, image)
        assert points["conv"].dtype == torch.bfloat16
        expected = by_hand(net, image, lambda hidden: put(hidden, channel(2), 0.0))
        check(points, zero_ablate(points.site("conv", channel=2)), image, expected)


def test_a_cache_recorded_under_autocast_is_patched_in_under_autocast(net, image):
    with torch.autocast("cpu", torch.bfloat16):
        output, cache = run_with_cache(net, image.flip(3), sites="conv")
        check(net, patch_in(Site("conv"), cache), image, output)


def test_a_model_in_train_mode_is_patched_with_its_own_random_numbers():
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 4))
    vector = torch.randn(5, 6)
    points = hook_points(net, vector)
    torch.manual_seed(3)
    dropped = F.dropout(net[0](vector))
    torch.manual_seed(3)
    check(points, zero_ablate(points.site("1", feature=0)), vector, net[2](put(dropped, (slice(None), 0), 0.0)))


def test_integers_are_patched_as_integers():
    net = nn.Sequential(nn.Embedding(9, 4))
    tokens = torch.tensor([[1, 2], [3, 4]])
    points = hook_points(net, tokens)
    check(points, zero_ablate(points.site("0.in[0]", axis1=1)), tokens, net(torch.tensor([[1, 0], [3, 0]])))


# --- refusals ---


def test_a_reference_of_integers_has_no_mean(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    with pytest.raises(EditError, match="must be floating-point; got torch.int64"):
        mean_ablate(points.site("fc"), torch.ones(2, 4, dtype=torch.long))


@pytest.mark.parametrize("verb", [mean_ablate, patch_in, steer])
def test_a_cache_that_holds_another_site_is_refused(net, points, image, verb):
    _, cache = run_with_cache(points, image, sites="fc")
    with pytest.raises(EditError, match=r"contains neither Site\('conv'\) nor its whole hook point"):
        verb(points.site("conv"), cache)


def test_rows_of_an_untraced_site_are_refused(net, image):
    with pytest.raises(BatchAxisError, match="identifies the batch axis"):
        resample_ablate(Site("conv"), torch.ones(4, 4, 4, 4), seed=0)


def test_a_mean_over_an_axis_that_does_not_exist_is_refused(points):
    with pytest.raises(SiteError, match=r"over= contains \['head'\]"):
        mean_ablate(points.site("conv"), torch.ones(2, 4, 4, 4), over=("head",))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda region: region[:, :1], "returned a tensor with shape"),
        (lambda region: region.double(), "returned a tensor with dtype torch.float64"),
        (lambda region: None, "returned NoneType"),
        (lambda region: region.to("meta"), "returned a tensor with device meta"),
    ],
    ids=["shape", "dtype", "none", "device"],
)
def test_a_result_that_does_not_fit_is_refused_and_nothing_is_written(net, points, image, bad, message):
    with pytest.raises(EditError, match=message), patched(points, edit(points.site("conv"), bad)):
        net(image)
    torch.testing.assert_close(net(image), by_hand(net, image), rtol=0, atol=0)


def kept_by_forward(module: nn.Module) -> list[Tensor]:
    """Return a list of the tensors that a module returned, before any hook."""
    kept, forward = [], module.forward

    def keeping(*args):
        kept.append(forward(*args))
        return kept[-1]

    module.forward = keeping
    return kept


def test_an_edit_that_raises_half_way_leaves_the_activation_as_it_was(net, points, image):
    kept = kept_by_forward(net.conv)

    def half(activation):
        activation[:, 0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), patched(points, [zero_ablate(points.site("conv", channel=1)),
                                                            edit(points.site("conv"), half)]):  # fmt: skip
        net(image)
    torch.testing.assert_close(kept[0], convolved(net, image), rtol=0, atol=0)


def test_the_activation_that_others_hold_is_never_written_to(net, points, image):
    kept = kept_by_forward(net.conv)
    with patched(points, [zero_ablate(points.site("conv", channel=1)), edit(points.site("conv", row=0), Scale(3.0))]):
        net(image)
    torch.testing.assert_close(kept[0], convolved(net, image), rtol=0, atol=0)


def test_the_operand_of_a_patch_is_never_written_to():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True))
    vector, source = torch.randn(2, 6), -torch.ones(1, 4)
    points = hook_points(net, vector)
    with patched(points, patch_in(points.site("0"), source)):
        assert not net(vector).any()
    assert torch.equal(source, -torch.ones(1, 4))


def test_a_source_with_the_rows_of_the_run_is_not_written_to_by_what_follows():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True))
    vector, source = torch.randn(2, 6), -torch.ones(2, 4)
    points = hook_points(net, vector)
    with torch.no_grad(), patched(points, patch_in(points.site("0"), source)):
        net(vector)
    assert torch.equal(source, -torch.ones(2, 4))


def test_nan_that_an_edit_brought_in_names_the_patch(net, points, image):
    with (
        pytest.raises(NaNError, match=r"Patch\(Site\('conv', channel=1\), Scale\) introduced NaN"),
        patched(
            points,
            [zero_ablate(points.site("conv", channel=0)), edit(points.site("conv", channel=1), Scale(float("nan")))],
        ),
    ):
        net(image)


@pytest.mark.parametrize("value", [float("nan"), torch.full((1, 1, 1, 1), float("nan"))])
def test_nan_that_is_set_names_the_patch(net, points, image, value):
    with pytest.raises(NaNError, match="Set"), patched(points, edit(points.site("conv"), Set(value))):
        net(image)


def test_nan_in_one_of_many_forwards_is_told_at_the_end_of_that_one(net, points, image):
    poison = [1.0, float("nan"), 1.0]
    with patched(points, edit(points.site("conv"), lambda region: region * poison.pop(0))):
        net(image)
        with pytest.raises(NaNError):
            net(image)
        net(image)


def test_nan_that_was_there_before_is_not_laid_on_the_patch(net, points, image):
    image[0, 0, 0, 0] = float("nan")
    with patched(points, edit(points.site("conv"), Scale(2.0))):
        assert net(image).isnan().any()


def test_nan_is_let_through_where_it_is_asked_for(net, points, image):
    with patched(points, edit(points.site("conv"), Set(float("nan"))), check_nan=False):
        assert net(image).isnan().all()


def test_a_parameter_gets_its_gradient_after_a_pass_without_gradients(net, points, image):
    learned, value = (torch.ones(4, 1, 4, 4, requires_grad=True) for _ in range(2))
    with patched(points, patch_in(points.site("conv", channel=2), learned), check_nan=False):
        with torch.no_grad():
            net(image)
        net(image).sum().backward()
    by_hand(net, image, lambda hidden: put(hidden, (slice(None), slice(2, 3)), value)).sum().backward()
    torch.testing.assert_close(learned.grad, value.grad)


@pytest.mark.parametrize("rows", [slice(1, 3), slice(-2, None), [False, True, True, False, False, False]], ids=str)
def test_a_tensor_of_the_whole_hook_point_is_cut_to_positions_along_a_free_axis(rows):
    model, longer = nn.Sequential(nn.Identity()), torch.randn(3, 6, 2)
    points = hook_points(model, torch.randn(2, 6, 2), free={"position": 1}, axes={"0": "batch position feature"})
    site, chosen = points.site("0", position=rows), longer[:, rows]
    assert torch.equal(patch_in(site, longer).edit.value, chosen)
    assert torch.equal(patch_in(site, chosen).edit.value, chosen)
    mean = mean_ablate(site, longer, over=("batch", "position")).edit.value
    torch.testing.assert_close(mean, chosen.mean((0, 1), keepdim=True))


def test_nan_in_elements_that_where_leaves_out_is_no_fault(net, points, image):
    odd = (torch.arange(4) % 2 == 1).view(4, 1, 1, 1)
    poison = torch.where(odd, 1.0, float("nan"))
    with patched(points, edit(points.site("conv"), lambda region: region * poison, where=odd)):
        torch.testing.assert_close(net(image), by_hand(net, image), rtol=0, atol=0)


def test_infinity_is_no_fault(points, net, image):
    with patched(points, edit(points.site("fc", feature=0), Set(float("-inf")))):
        assert net(image)[:, 0].isneginf().all()


def test_a_forward_that_has_another_shape_than_the_trace_is_refused(net, points):
    with (
        pytest.raises(TraceMismatchError, match=r"'conv' has shape \(4, 4, 6, 6\)"),
        patched(points, zero_ablate(points.site("conv"))),
    ):
        net(torch.randn(4, 3, 8, 8))


def test_a_bare_model_takes_any_shape(net):
    with patched(net, zero_ablate(Site("conv", channel=1))):
        net(torch.randn(4, 3, 8, 8)), net(torch.randn(2, 3, 6, 6))


def test_a_site_that_is_not_on_the_path_is_told_with_all_others(net):
    net.unused, net.also = nn.Linear(2, 2), nn.Linear(2, 2)
    with (
        pytest.raises(UnreachedError, match="patches at 'unused', 'also' never ran"),
        patched(net, [zero_ablate(Site(name)) for name in ("unused", "conv", "also")]),
    ):
        net(torch.randn(1, 3, 6, 6))


# --- at the call, and again at each entry ---


def test_patched_as_a_decorator_patches_every_call(net, image):
    patches = [zero_ablate(Site("conv", channel=1))]

    @patched(net, (patch for patch in patches))
    def run():
        return net(image)

    def zeroed(hidden):
        return torch.cat([hidden[:, :1], hidden[:, 1:2] * 0, hidden[:, 2:]], 1)

    for _ in range(2):
        torch.testing.assert_close(run(), by_hand(net, image, zeroed))


def test_one_context_may_be_entered_again_and_inside_itself(net, points, image):
    twice = patched(points, edit(points.site("fc"), lambda region: region + 1))
    expected = net(image)
    for _ in range(2):
        with twice as outer:
            torch.testing.assert_close(net(image), expected + 1)
            with twice:
                torch.testing.assert_close(net(image), expected + 2)
        assert outer.to_records()[0]["firings"] == 2
    torch.testing.assert_close(net(image), expected, rtol=0, atol=0)


@pytest.mark.parametrize("traced", [True, False])
def test_a_context_patches_the_module_that_is_there_when_it_is_entered(net, points, image, traced):
    site = points.site("fc", feature=2) if traced else Site("fc", feature=2)
    context = patched(points if traced else net, zero_ablate(site))
    net.fc = nn.Linear(4, 5)
    expected = by_hand(net, image)
    expected[:, 2] = 0
    with context:
        torch.testing.assert_close(net(image), expected)
    torch.testing.assert_close(net(image), by_hand(net, image))


def test_a_module_that_is_gone_when_the_context_is_entered_is_a_clear_error(net, image):
    context = patched(net, zero_ablate(Site("fc")))
    del net.fc
    with pytest.raises(HookPointError, match="No hook point named 'fc'"):
        context.__enter__()


def test_a_context_belongs_to_the_thread_that_enters_it(net, points, image):
    context = patched(points, edit(points.site("fc"), lambda region: region + 1))
    expected = net(image) + 1

    def run():
        with context:
            return net(image)

    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(run).result(), expected)


def test_patched_checks_its_patches_before_it_is_entered(net, points):
    with pytest.raises(HookPointError, match="convv"):
        patched(net, zero_ablate(Site("convv")))
    with pytest.raises(ValueError, match="allow_unreached"):
        patched(points, zero_ablate(Site("conv")), allow_unreached="fc")


# --- operands ---


def test_the_mean_may_be_taken_over_one_axis_named_as_it_is(net, points, image):
    patch = mean_ablate(points.site("conv"), convolved(net, image), over="batch")
    assert torch.equal(patch.edit.value, convolved(net, image).mean(0, keepdim=True))


def test_a_number_that_an_integer_region_cannot_hold_is_refused():
    model = nn.Sequential(nn.Identity())
    numbers = torch.arange(6).view(2, 3)
    for site in (Site("0"), hook_points(model, numbers).site("0")):
        with pytest.raises(EditError, match="must be an integer"), patched(model, Patch(site, Set(2.7))):
            model(numbers)
        with patched(model, Patch(site, Set(2.0))):
            assert model(numbers).tolist() == [[2, 2, 2], [2, 2, 2]]


def test_donors_are_drawn_along_the_batch_or_not_at_all(points):
    with pytest.raises(EditError, match="the batch is axis 0"):
        Patch(points.site("conv"), Resample(torch.zeros(1, 4, 1, 1), seed=0, batch_axis=1))


def test_a_mask_as_long_as_the_batch_is_advised_to_select_rows():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    patch = zero_ablate(Site("0"), where=lambda context: torch.arange(6) < 3)
    with (
        pytest.raises(EditError, match=r"mask.view\(6, 1, 1, 1\) selects along the 'batch' axis"),
        patched(model, patch),
    ):
        model(torch.randn(6, 3, 6, 6))


# --- writing ---


ALL = range(99)
REGIONS = [
    ({"channel": [2, 0]}, {2, 0}, ALL, ALL),
    ({"channel": [2, 0], "row": [0, 3]}, {2, 0}, {0, 3}, ALL),
    ({"channel": 1, "col": [3, 1]}, {1}, ALL, {3, 1}),
    ({"row": slice(1, 3)}, ALL, {1, 2}, ALL),
]


@pytest.mark.parametrize(("indices", "channels", "rows", "cols"), REGIONS)
def test_vmap_over_an_operand_writes_an_indexed_region_per_entry(net, image, indices, channels, rows, cols):
    def run(factor):
        with patched(net, Patch(Site("conv", **indices), Scale(factor))):
            return net(image)

    def scaled(hidden, factor):
        hidden = hidden.clone()
        for channel, row, col in itertools.product(*map(range, hidden.shape[1:])):
            if channel in channels and row in rows and col in cols:
                hidden[:, channel, row, col] *= factor
        return hidden

    factors = [0.0, 1.0, -2.0]
    found = torch.func.vmap(run)(torch.tensor(factors).view(3, 1, 1, 1, 1))
    for factor, output in zip(factors, found, strict=True):
        torch.testing.assert_close(output, by_hand(net, image, lambda hidden, f=factor: scaled(hidden, f)))


def test_gradients_flow_to_a_vector_that_is_added_to_listed_channels(net, image):
    vector = torch.zeros(1, 2, 1, 1, requires_grad=True)
    with patched(net, steer(Site("conv", channel=[3, 1]), vector)):
        net(image).sum().backward()
    hidden = convolved(net, image).detach().requires_grad_()
    F.linear(hidden.relu().sum((2, 3)), net.fc.weight, net.fc.bias).sum().backward()
    torch.testing.assert_close(vector.grad.flatten(), hidden.grad.sum((0, 2, 3))[[3, 1]])


def test_an_indexed_region_keeps_the_memory_format_of_its_tensor(net, image):
    net.to(memory_format=torch.channels_last)
    strides = []
    net.conv.register_forward_hook(lambda module, args, output: strides.append(output.stride()))
    net(image)
    for channel in ([2, 0], slice(1, 3)):
        with patched(net, edit(Site("conv", channel=channel), lambda activation: activation * 1.0)):
            net.conv._forward_hooks.move_to_end(next(iter(net.conv._forward_hooks)))
            net(image)
    assert strides == [strides[0]] * 3


class Sparse(nn.Module):
    def forward(self, vector):
        return vector.to_sparse()


def test_a_sparse_tensor_can_be_patched_as_a_whole_only():
    model = nn.Sequential(Sparse())
    with patched(model, edit(Site("0"), lambda activation: activation * 2)):
        assert torch.equal(model(torch.eye(2)).to_dense(), 2 * torch.eye(2))
    with pytest.raises(UnsupportedModelError, match="part of a sparse_coo tensor"):
        with patched(model, zero_ablate(Site("0", axis0=1))):
            model(torch.eye(2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_a_masked_tensor_can_be_patched_as_a_whole_by_a_function_of_ones_own():
    model, masked = nn.Identity(), masked_tensor(torch.arange(4.0), torch.arange(4) > 1)
    with patched(model, edit(Site(".out"), lambda activation: activation * 2)):
        assert torch.equal(model(masked).to_tensor(-1.0), torch.tensor([-1.0, -1.0, 4.0, 6.0]))


def test_a_model_without_values_is_patched_by_a_function_of_ones_own():
    model = nn.Sequential(nn.Linear(4, 3, device="meta"))
    with patched(model, edit(Site("0"), lambda activation: activation * 2)) as ledger:
        assert model(torch.zeros(2, 4, device="meta")).is_meta
    assert [record["elements"] for record in ledger.to_records()] == [6]


@pytest.mark.parametrize("feature", [1, slice(0, 2), [0, 2]], ids=str)
def test_complex_regions_have_the_gradients_of_the_same_computation_by_hand(feature):
    linear, vector = nn.Linear(4, 3, dtype=torch.complex64), torch.randn(2, 4, dtype=torch.complex64)
    mask = torch.zeros(3, dtype=torch.bool)
    mask[feature] = True

    def gradients(run):
        linear.zero_grad()
        run().abs().square().sum().backward()
        return [parameter.grad.clone() for parameter in linear.parameters()]

    expected = gradients(lambda: torch.where(mask, (2 + 1j) * linear(vector), linear(vector)))
    patch = edit(Site("0", feature=feature), lambda activation: (2 + 1j) * activation)
    model = nn.Sequential(linear)
    with patched(model, patch):
        for found, by_hand in zip(gradients(lambda: model(vector)), expected, strict=True):
            assert torch.allclose(found, by_hand)


def test_a_context_that_was_closed_may_be_opened_again_but_not_closed_again(net, points, image):
    context = patched(points, zero_ablate(points.site("conv")))
    for _ in range(2):
        with context:
            net(image)
        with pytest.raises(RuntimeError, match="This context was never entered, or is already closed"):
            context.__exit__(None, None, None)


def test_data_parallel_over_several_devices_is_refused():
    model = nn.DataParallel(nn.Linear(3, 2))
    model.device_ids = [0, 1]  # what torch sets where there are two GPUs
    with pytest.raises(UnsupportedModelError, match="is a DataParallel over 2 devices, which runs copies"):
        patched(model, zero_ablate(Site("module")))


def _without_grad(net: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images)


def _in_inference_mode(net: Any, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return net(images).clone()


def _in_vmap(net: Any, images: Tensor) -> Tensor:
    return torch.func.vmap(net)(torch.stack([images, -images]))


def _with_gradients(net: Any, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(net(images).square().sum(), images)[0]


def _differentiated(net: Any, images: Tensor) -> Tensor:
    return torch.func.grad(lambda images: net(images).square().sum())(images)


MODES = [_without_grad, _in_inference_mode, _in_vmap, _with_gradients, _differentiated]


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("indices", [{"channel": 1}, {"channel": [3, 1]}, {"channel": [3, 1], "row": slice(1, 3)}])
def test_a_number_is_set_alike_in_every_mode_of_one_context_after_the_other(net, image, first, indices):
    site, modes = Site("conv", **indices), (first, *MODES, first)
    with patched(net, Patch(site, Set(0.5))) as ledger:
        found = [mode(net, image) for mode in modes]
    with patched(net, edit(site, lambda activation: torch.full_like(activation, 0.5))) as expected:
        torch.testing.assert_close(found, [mode(net, image) for mode in modes])
    assert ledger.to_records() == [{**expected.to_records()[0], "edit": "Set"}]


def test_newcomers_are_told_what_a_patch_is_and_how_an_edit_takes_its_context():
    model = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(TypeError, match="Expected a Patch, such as .*; got Site"):
        with patched(model, Site("0")):
            pass
    with pytest.raises(
        EditError, match=r"<lambda> has a parameter `context`\. .*: def function\(activation, \*, context\)"
    ):
        with patched(model, edit(Site("0"), lambda activation, context: activation)):
            pass
