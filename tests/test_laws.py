"""The laws, each over every model fixture. Other models obey them in test_unfamiliar_models.py."""

from __future__ import annotations

import copy
import io
import pickle
import random
import threading
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import pytest
import torch
from models import Model
from torch import Tensor, nn

from chanpatch import (
    PatchedPolicy,
    Site,
    edit,
    hook_points,
    patch_in,
    patched,
    recording,
    resample_ablate,
    run_with_cache,
    steer,
    zero_ablate,
)
from chanpatch.engine.hooks import Station
from chanpatch.engine.moments import forward_context
from chanpatch.engine.paths import leaves
from chanpatch.errors import (
    ChanpatchError,
    ConcurrencyError,
    EditError,
    HookPointError,
    SiteError,
    TraceMismatchError,
    UnreachedError,
)
from chanpatch.patching import Add, Context


def tensors(output: Any) -> list[Tensor]:
    return [tensor for _, tensor in leaves(output)]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def unchanged(activation: Tensor) -> Tensor:
    return activation


def hooks(module: nn.Module) -> list[object]:
    return [
        hook
        for each in module.modules()
        for registry in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks)
        for hook in registry.values()
    ]


class Interrupted(Exception):
    """Raised by a test's own edit."""


def interrupted(activation: Tensor) -> Tensor:
    raise Interrupted


# Law 1: an identity edit is bit-exact and leaves the very object in place.


def test_an_identity_edit_at_every_hook_point_changes_no_bit(model: Model) -> None:
    inputs = model.inputs(3)
    points = hook_points(model.module, *inputs)
    plain = model.module(*inputs)
    with patched(points, [edit(points.site(name), unchanged) for name, point in points.items() if not point.read_only]):
        assert same(model.module(*inputs), plain)


def test_an_identity_edit_leaves_the_very_object_in_place(model: Model) -> None:
    inputs = model.inputs(3)
    points = hook_points(model.module, *inputs)
    seen = []
    inner = [module for module in model.module.modules() if module is not model.module]
    with ExitStack() as stack:
        for module in inner:  # others' hooks, before and after ours
            handle = module.register_forward_hook(lambda m, a, output: seen.append(output))
            stack.callback(handle.remove)
        stack.enter_context(
            patched(
                points, [edit(points.site(name), unchanged) for name, point in points.items() if not point.read_only]
            )
        )
        for module in inner:
            handle = module.register_forward_hook(lambda m, a, output: seen.append(output))
            stack.callback(handle.remove)
        model.module(*inputs)
    before, after = seen[::2], seen[1::2]
    assert seen
    assert all(one is other for one, other in zip(before, after, strict=True))


# Law 2: no trace.


def test_no_hook_is_left_when_a_context_closes(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    with patched(points, zero_ablate(points.site(model.site))), recording(points, model.site):
        assert hooks(model.module)
        model.module(*inputs)
    run_with_cache(points, *inputs, sites=model.site, stop=True)
    assert not hooks(model.module)


@pytest.mark.parametrize("raised", [Interrupted, KeyboardInterrupt])
def test_no_hook_is_left_when_the_forward_raises(model: Model, raised: type[BaseException]) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)

    def fails(activation: Tensor) -> Tensor:
        raise raised

    with pytest.raises(raised), patched(points, edit(points.site(model.site), fails)):
        model.module(*inputs)
    with pytest.raises(raised), recording(points, model.site):
        raise raised
    assert not hooks(model.module)
    assert same(model.module(*inputs), model.module(*inputs))


def test_hooks_of_others_stay_whatever_the_order_of_closing(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    calls = []
    module = model.module.get_submodule(points[model.site].module)
    first = module.register_forward_hook(lambda *_: calls.append("first"))
    one = patched(points, zero_ablate(points.site(model.site)))
    two = recording(points, model.site)
    one.__enter__()
    second = module.register_forward_hook(lambda *_: calls.append("second"))
    two.__enter__()
    model.module(*inputs)
    one.__exit__(None, None, None)
    two.__exit__(None, None, None)
    calls.clear()
    model.module(*inputs)
    assert calls[:2] == ["first", "second"]
    first.remove()
    second.remove()
    assert not hooks(model.module)


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def hook_flags(module: nn.Module) -> list[object]:
    return [
        flag
        for each in module.modules()
        for flags in (each._forward_pre_hooks_with_kwargs, each._forward_hooks_always_called)
        for flag in flags
    ]


def test_a_copy_made_inside_a_context_has_no_hook_of_ours_when_that_closes(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    plain = model.module(*inputs)
    with recording(points, model.site), patched(points, zero_ablate(points.site(model.site))):
        model.module(*inputs)
        copied = copy.deepcopy(model.module)
        again = copy.deepcopy(copied)
    assert not hooks(copied) + hook_flags(copied)
    for each in (copied, again, pickled(copied), pickled(again)):
        assert same(each(*inputs), plain)
        assert not hooks(each) + hook_flags(each)


def test_an_interrupt_while_a_context_is_entered_leaves_no_hook(plain_cnn: Model, monkeypatch: Any) -> None:
    on = Station.on

    def interrupted_after(module: nn.Module) -> None:
        on(module)
        raise KeyboardInterrupt

    context = patched(plain_cnn.module, zero_ablate(Site("conv1")))
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(Station, "on", interrupted_after)
        context.__enter__()
    assert not hooks(plain_cnn.module) + hook_flags(plain_cnn.module)


def test_an_interrupt_while_a_context_is_left_leaves_no_hook(plain_cnn: Model, monkeypatch: Any) -> None:
    plan, interrupts = Station.plan, [KeyboardInterrupt]

    def interrupted_once(station: Station) -> None:
        while interrupts:
            raise interrupts.pop()
        plan(station)

    with pytest.raises(KeyboardInterrupt), recording(plain_cnn.module, ["conv1", "conv2"]):
        plain_cnn.module(*plain_cnn.inputs(2))
        monkeypatch.setattr(Station, "plan", interrupted_once)
    assert not hooks(plain_cnn.module) + hook_flags(plain_cnn.module)


def test_a_copy_made_inside_a_context_keeps_the_hooks_of_others(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    hook = Counted()
    model.module.register_forward_hook(hook)
    with recording(points, model.site, allow_unreached=model.site):
        copied = copy.deepcopy(model.module)
    copied(*inputs)
    (kept,) = hooks(copied)
    assert (kept.calls, hook.calls) == (1, 0)


class Counted:
    """A hook that counts its calls."""

    calls = 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1


def test_a_copy_is_refused_as_long_as_what_it_was_copied_from_is_patched(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    with patched(points, zero_ablate(points.site(model.site))):
        model.module(*inputs)
        for copied in (copy.deepcopy(model.module), copy.deepcopy(copy.deepcopy(model.module))):
            with pytest.raises(ConcurrencyError, match="is a copy"):
                copied(*inputs)


@pytest.mark.parametrize("stored", [pickled, saved])
def test_a_patched_model_is_not_pickled_as_its_copy_would_run_without_the_patches(model: Model, stored: Any) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    plain = model.module(*inputs)
    with patched(points, zero_ablate(points.site(model.site))):
        with pytest.raises(ConcurrencyError) as caught:
            stored(model.module)
        model.module(*inputs)
    assert str(caught.value) == (
        "A module cannot be pickled while it is patched or recorded, because the pickled copy would run without "
        "patches. Close the context first, save the state_dict(), or pickle an entire PatchedPolicy."
    )
    assert same(stored(model.module)(*inputs), plain)


def test_tracing_leaves_generators_buffers_flags_and_gradients_as_they_were(model: Model) -> None:
    model.module.train()
    state = copy.deepcopy(model.module.state_dict())
    inputs = model.inputs(2)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    hook_points(model.module, *inputs)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())
    assert model.module.training
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_what_the_users_own_forward_changes_stays_changed(batch_norm: Model) -> None:
    batch_norm.module.train()
    points = hook_points(batch_norm.module, *batch_norm.inputs(4))
    before = batch_norm.module.norm.running_mean.clone()
    with patched(points, zero_ablate(points.site("fc"))):
        batch_norm.module(*batch_norm.inputs(4))
    assert not torch.equal(batch_norm.module.norm.running_mean, before)


# Law 3: nothing is written in place.


def test_an_inplace_module_downstream_cannot_corrupt_a_record(inplace_relu: Model) -> None:
    inputs = inplace_relu.inputs(2)
    expected = inplace_relu.module.conv1(*inputs)
    _, cache = run_with_cache(inplace_relu.module, *inputs, sites="conv1")
    assert (expected < 0).any()
    assert torch.equal(cache["conv1"], expected)


def test_an_inplace_module_downstream_cannot_corrupt_a_source(inplace_relu: Model) -> None:
    source = -torch.ones(1, 8, 6, 6)
    points = hook_points(inplace_relu.module, *inplace_relu.inputs(1))
    with patched(points, patch_in(points.site("conv1"), source)):
        inplace_relu.module(*inplace_relu.inputs(1))
    with patched(points, edit(points.site("conv1"), lambda activation: source)):
        inplace_relu.module(*inplace_relu.inputs(1))
    assert torch.equal(source, -torch.ones(1, 8, 6, 6))


def test_writing_into_a_record_changes_nothing_in_the_model(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    plain = model.module(*inputs)
    with recording(points, list(points)) as cache:
        output = model.module(*inputs)
        for site in cache:
            cache[site].zero_()
    assert same(output, plain)


def test_a_patch_never_writes_into_the_activation_it_reads(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    axis = "channel" if "channel" in points[model.site].axes else "feature"
    with recording(points, model.site, before=True) as cache, torch.no_grad():
        kept: list[Tensor] = []
        site = points.site(model.site, **{axis: 1})
        with patched(points, [edit(points.site(model.site), lambda a: kept.append(a) or a), zero_ablate(site)]):
            model.module(*inputs)
        if not any(getattr(module, "inplace", False) for module in model.module.modules()):
            assert torch.equal(kept[0], cache[model.site])


@pytest.mark.parametrize("inference", [False, True])
def test_an_edit_that_writes_in_place_is_an_error(model: Model, inference: bool) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    with (
        torch.inference_mode(inference),
        torch.no_grad(),
        pytest.raises(EditError, match="in place"),
        patched(points, edit(points.site(model.site), lambda activation: activation.add_(1))),
    ):
        model.module(*inputs)


# Law 4: one hook per module; patches in order of entry, then records.


def test_patches_apply_in_order_of_entry_and_records_see_all_of_them(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    site = points.site(model.site)
    with torch.no_grad():  # recurrent and attention modules compute otherwise when a graph is kept
        _, clean = run_with_cache(points, *inputs, sites=site)
    with recording(points, site) as outer, recording(points, site, before=True) as unpatched, torch.no_grad():
        with patched(points, edit(site, lambda a: a + 1)), recording(points, site) as middle:
            with patched(points, edit(site, lambda a: a * 2)), recording(points, site, before=True) as inner:
                model.module(*inputs)
    for record in (outer, middle):
        torch.testing.assert_close(record[site], (clean[site] + 1) * 2)
    for record in (unpatched, inner):
        assert torch.equal(record[site], clean[site])


def test_a_module_has_one_pair_of_hooks_however_many_contexts_are_open(plain_cnn: Model) -> None:
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(1))
    with ExitStack() as stack:
        for channel in range(4):
            stack.enter_context(patched(points, zero_ablate(points.site("conv1", channel=channel))))
            stack.enter_context(recording(points, "conv1"))
        assert len(plain_cnn.module.conv1._forward_hooks) == 1
        assert len(plain_cnn.module.conv1._forward_pre_hooks) == 1
        plain_cnn.module(*plain_cnn.inputs(1))


def test_recording_never_stops_a_forward_and_stop_ends_it_after_the_last_recorded_point(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    whole = {site.name: value for site, value in run_with_cache(points, *inputs, sites=list(points))[1].items()}
    first = next(iter(points))
    with recording(points, list(points), allow_unreached=list(points)) as outer:
        cache = run_with_cache(points, *inputs, sites=[first, model.site], stop=True)
    assert torch.equal(cache[model.site], whole[model.site])
    after = [
        name
        for name in list(points)[list(points).index(model.site) + 1 :]
        if points[name].module != points[model.site].module
    ]
    assert after
    assert not {site.name for site in outer} & set(after)


# Law 5: a region keeps all axes; several index lists mean their product.


def test_a_region_keeps_all_axes_and_index_lists_mean_their_product(plain_cnn: Model) -> None:
    inputs = plain_cnn.inputs(2)
    points = hook_points(plain_cnn.module, *inputs)
    site = points.site("conv1", channel=[5, 1], row=[0, -1, 3], col=2)
    _, cache = run_with_cache(points, *inputs, sites=["conv1", site])
    by_hand = cache["conv1"][:, [5, 1]][:, :, [0, 7, 3]][:, :, :, [2]]
    assert torch.equal(cache[site], by_hand)
    with patched(points, edit(site, lambda activation: activation + 7.0)):
        _, changed = run_with_cache(points, *inputs, sites="conv1")
    expected = cache["conv1"].clone()
    for channel in (5, 1):
        for row in (0, 7, 3):
            expected[:, channel, row, 2] += 7.0
    assert torch.equal(changed["conv1"], expected)


def test_a_single_index_on_any_axis_reads_and_writes_that_slice(model: Model) -> None:
    inputs = model.inputs(3)
    points = hook_points(model.module, *inputs)
    for axis in points[model.site].axes:
        site = points.site(model.site, **{axis: -1})
        with patched(points, zero_ablate(site)):
            _, cache = run_with_cache(points, *inputs, sites=[model.site])
        number = points[model.site].axes.index(axis)
        assert not cache[model.site].select(number, -1).any()
        assert cache[model.site].select(number, 0).any()


# Law 6: operands never broadcast silently.


def test_an_operand_with_fewer_axes_than_the_region_is_refused_when_the_patch_is_made(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(2))
    site = points.site(model.site)
    with pytest.raises(EditError, match="must have the region's length or length 1"):
        steer(site, torch.ones(points[model.site].shape[-1]))


def test_an_operand_with_the_wrong_batch_is_refused_in_the_forward(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(2))
    shape = points[model.site].shape
    patch = steer(points.site(model.site), torch.ones(3, *shape))
    with pytest.raises(EditError, match="must have the region's length or length 1"), patched(points, patch):
        model.module(*model.inputs(2))


# Law 7: a patch that never ran is an error.


def test_a_patch_that_never_ran_is_an_error_at_exit(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(2))
    with pytest.raises(UnreachedError), patched(points, zero_ablate(points.site(model.site))):
        pass
    with pytest.raises(UnreachedError), recording(points, model.site):
        pass


def test_an_unreached_patch_masks_no_exception_in_flight(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(2))
    with pytest.raises(Interrupted), patched(points, zero_ablate(points.site(model.site))):
        raise Interrupted


@pytest.mark.parametrize("raised", [KeyError("the user's own"), ValueError("the user's own")])
def test_nan_masks_no_exception_of_the_users_own_but_is_noted_in_it(plain_cnn: Model, raised: Exception) -> None:
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(1))
    with pytest.raises(type(raised)) as caught, patched(points, edit(points.site("conv1"), lambda a: a * 0 / 0)):
        plain_cnn.module.conv1(*plain_cnn.inputs(1))
        raise raised
    assert caught.value is raised
    if hasattr(raised, "__notes__"):
        assert "introduced NaN: at least one element is NaN only with the patch" in raised.__notes__[0]


def test_allow_unreached_names_exceptions(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(2))
    with patched(points, zero_ablate(points.site(model.site)), allow_unreached=[model.site]):
        pass


def test_selecting_no_rows_is_legal_and_counted(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    none = torch.zeros([1] * len(points[model.site].axes), dtype=torch.bool)
    plain = model.module(*inputs)
    with patched(points, zero_ablate(points.site(model.site), where=none)) as ledger:
        assert same(model.module(*inputs), plain)
    (record,) = ledger.to_records()
    assert (record["firings"], record["rows"], record["elements"]) == (1, 0, 0)


def test_the_ledger_counts_firings_rows_and_elements(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(2))
    with patched(points, zero_ablate(points.site(model.site))) as ledger:
        for rows in (2, 5):
            model.module(*model.inputs(rows))
    (record,) = ledger.to_records()
    elements = torch.Size(points[model.site].shape).numel()
    assert (record["firings"], record["rows"], record["elements"]) == (2, 7, 7 * elements)


# Law 8: faults are reported at the earliest call that can know, all at once.


def test_with_hook_points_all_faults_of_a_site_are_told_when_it_is_made(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(2))
    last = points[model.site].axes[-1]
    with pytest.raises(SiteError, match="no axis 'nothing'") as caught:
        points.site(model.site, **{"nothing": 0, last: 10_000})
    assert f"{last} 10000 is out of range" in str(caught.value)


def test_with_a_bare_model_names_are_checked_at_entry(model: Model) -> None:
    with (
        pytest.raises(HookPointError, match="No hook point named 'nothing'"),
        patched(model.module, zero_ablate(Site("nothing"))),
    ):
        raise AssertionError("the context was entered")


def test_with_a_bare_model_the_rest_is_checked_before_the_edit_runs(plain_cnn: Model) -> None:
    with (
        pytest.raises(SiteError, match="channel 64"),
        patched(plain_cnn.module, edit(Site("conv1", channel=64), interrupted)),
    ):
        plain_cnn.module(*plain_cnn.inputs(1))


def test_a_later_shape_may_differ_from_the_trace_in_the_batch_only(plain_cnn: Model) -> None:
    points = hook_points(plain_cnn.module.conv1, *plain_cnn.inputs(2))
    with patched(points, zero_ablate(points.site(".out", channel=1))):
        plain_cnn.module.conv1(*plain_cnn.inputs(5))
        with pytest.raises(TraceMismatchError, match=r"\(5, 8, 4, 4\).*\(any, 8, 8, 8\)"):
            plain_cnn.module.conv1(torch.randn(5, 3, 4, 4))


def test_a_call_that_the_trace_did_not_have_is_an_error(shared_module: Model) -> None:
    points = hook_points(shared_module.module, *shared_module.inputs(2))
    forward = shared_module.module.forward
    shared_module.module.forward = lambda vector: shared_module.module.relu(forward(vector))
    with (
        pytest.raises(TraceMismatchError, match="3 times.*2 times"),
        patched(points, zero_ablate(points.site("relu#0"))),
    ):
        shared_module.module(*shared_module.inputs(2))


# Law 9: a random edit's draw is a function of (seed, call, row) outside rollouts, and of (seed, sampling seed, episode
# seed, its repetition, call, and the step where asked) inside.


def test_a_random_edit_draws_the_same_for_a_row_however_the_rows_are_cut_and_ordered(model: Model) -> None:
    inputs = model.inputs(6)
    points = hook_points(model.module, *inputs)
    _, reference = run_with_cache(points, *model.inputs(20), sites=model.site)
    patch = resample_ablate(points.site(model.site), reference, seed=3)
    with patched(points, patch):
        whole = run_with_cache(points, *inputs, sites=model.site)[1][model.site]
        for rows in ([4, 2], [0], [5, 3, 1]):
            with forward_context(rows=rows):
                _, part = run_with_cache(points, *(each[rows] for each in inputs), sites=model.site)
            assert torch.equal(part[model.site], whole[rows])
    with patched(points, resample_ablate(points.site(model.site), reference, seed=4)):
        other = run_with_cache(points, *inputs, sites=model.site)[1][model.site]
    assert not torch.equal(other, whole)


def test_in_a_rollout_a_draw_goes_by_the_episode_and_by_the_step_where_asked(model: Model) -> None:
    inputs = model.inputs(6)
    points = hook_points(model.module, *inputs)
    _, reference = run_with_cache(points, *model.inputs(20), sites=model.site)
    episodes = {"seeds": np.array([4, 2**70, 15, 16, 23, 4], object), "repetitions": [0, 0, 0, 0, 0, 1]}

    def drawn(per: Literal["episode", "step"], rows: list[int], **changed: Any) -> Tensor:
        known = {"step": 1, "sampling_seed": 0, **episodes, **changed}
        patch = resample_ablate(points.site(model.site), reference, seed=3, per=per)
        with patched(points, patch), forward_context(rows=rows, **known):
            return run_with_cache(points, *(each[rows] for each in inputs), sites=model.site)[1][model.site]

    every = list(range(6))
    for per in ("episode", "step"):
        whole = drawn(per, every)
        for rows in ([4, 2], [0], [5, 3, 1]):
            assert torch.equal(drawn(per, rows), whole[rows])
        turned = drawn(per, every, seeds=episodes["seeds"][::-1], repetitions=[0, 0, 0, 0, 0, 1])
        assert torch.equal(turned[1:5], whole[[4, 3, 2, 1]])
        assert not torch.equal(drawn(per, every, sampling_seed=1), whole)
        assert not torch.equal(drawn(per, every, repetitions=[1] * 6), whole)
        assert torch.equal(drawn(per, every, step=2), whole) is (per == "episode")


def test_a_random_edit_of_some_rows_draws_for_them_what_it_draws_for_them_among_all(model: Model) -> None:
    inputs = model.inputs(6)
    points = hook_points(model.module, *inputs)
    _, reference = run_with_cache(points, *model.inputs(20), sites=model.site)
    with patched(points, resample_ablate(points.site(model.site), reference, seed=3)):
        _, whole = run_with_cache(points, *inputs, sites=model.site)
    some = points.site(model.site, batch=[3, 5])
    with patched(points, resample_ablate(some, reference[model.site], seed=3)):
        _, part = run_with_cache(points, *inputs, sites=model.site)
    assert torch.equal(part[model.site][[3, 5]], whole[model.site][[3, 5]])


def test_the_rows_of_a_context_are_those_of_the_region(plain_cnn: Model) -> None:
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    seen = []

    def note(activation: Tensor, *, context: Context) -> Tensor:
        seen.append(context.rows.tolist())
        return activation

    with patched(points, edit(points.site("conv1", batch=[3, -1]), note)):
        plain_cnn.module(*plain_cnn.inputs(6))
        with forward_context(rows=[10, 11, 12, 13, 14, 15, 16]):
            plain_cnn.module(*plain_cnn.inputs(7))
    assert seen == [[3, 5], [13, 16]]


# Law 10, two rollouts compared are paired, is in test_rollouts.py.


# Threads, and policies.


def test_a_context_refuses_to_be_used_from_another_thread(model: Model) -> None:
    inputs = model.inputs(1)
    points = hook_points(model.module, *inputs)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            model.module(*inputs)
        except ChanpatchError as error:
            caught.append(error)

    with patched(points, zero_ablate(points.site(model.site))):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        model.module(*inputs)
    assert [type(error) for error in caught] == [ConcurrencyError]


def test_a_twin_is_patched_and_the_original_never_is(model: Model) -> None:
    inputs = model.inputs(3)
    points = hook_points(model.module, *inputs)
    patch = steer(points.site(model.site), torch.ones([1] * len(points[model.site].axes)), 2.0)
    plain = model.module(*inputs)
    with patched(points, patch):
        expected = model.module(*inputs)
    twin = PatchedPolicy(points, patch)
    assert same(twin(*inputs), expected)
    assert same(model.module(*inputs), plain)
    assert not same(expected, plain)
    assert not hooks(model.module)
    assert isinstance(twin, type(model.module))
    assert list(twin.state_dict()) == list(model.module.state_dict())
    for one, other in zip(twin.parameters(), model.module.parameters(), strict=True):
        assert one is other


def test_only_the_changed_part_of_an_output_is_rebuilt(tuple_output: Model) -> None:
    inputs = tuple_output.inputs(3)
    points = hook_points(tuple_output.module, *inputs)
    distribution, value = tuple_output.module(*inputs)
    with patched(points, edit(points.site(".out[1]"), lambda a: a - 100.0)):
        same_distribution, changed = tuple_output.module(*inputs)
    assert torch.equal(changed, value - 100.0)
    assert torch.equal(same_distribution.logits, distribution.logits)


def test_gradients_flow_through_a_patch_to_its_operand_and_to_the_model(model: Model) -> None:
    inputs = model.inputs(2)
    points = hook_points(model.module, *inputs)
    vector = torch.zeros([1] * len(points[model.site].axes), requires_grad=True)
    with patched(points, edit(points.site(model.site), Add(vector))):
        sum(tensor.sum() for tensor in tensors(model.module(*inputs)) if tensor.requires_grad).backward()
    assert vector.grad is not None
    first = next(model.module.parameters())
    assert first.grad is not None
