"""What a sweep returns and refuses: labels, metrics, effects, controls, errors, interrupts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from models import Model, vectors
from torch import Tensor, nn

from chanpatch import (
    HookPoints,
    Site,
    edit,
    errors,
    hook_points,
    mean_ablate,
    patch_in,
    patched,
    resample_ablate,
    run_with_cache,
    steer,
    zero_ablate,
)
from chanpatch.metrics import kl_divergence
from chanpatch.patching import Scale
from chanpatch.statistics import mean_interval, rank_among
from chanpatch.statistics.flips import ranked_interval
from chanpatch.sweeps import SweepInterrupted, SweepResult, attribution, path_patch, sweep

ROWS = 12


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def points() -> HookPoints:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    return hook_points(model, *vectors(ROWS))


def first(output: Tensor) -> Tensor:
    return output[:, 0]


def zeroed(points: HookPoints, name: str = "1") -> list[Any]:
    return [zero_ablate(site) for site in points.site(name).split("feature")]


def swept(points: HookPoints, **options: Any) -> SweepResult:
    return sweep(points, *vectors(ROWS), **{"patches": zeroed(points), "metric": first, **options})


def test_patches_without_labels_are_labelled_by_their_sites(points: HookPoints) -> None:
    both = [zero_ablate(points.site("0")), zero_ablate(points.site("1", feature=2))]
    assert swept(points, patches=[both[1], both]).labels == ("1, feature=2", "0 + 1, feature=2")


def test_a_single_patch_is_a_sweep_of_one(points: HookPoints) -> None:
    result = swept(points, patches=zero_ablate(points.site("1")))
    assert result.labels == ("1",)
    assert result.groups[0].strategy == "loop"


def test_labels_and_rows_are_in_the_order_given(points: HookPoints) -> None:
    patches = dict(reversed(list(enumerate([*zeroed(points), *zeroed(points, "0")]))))
    result = swept(points, patches=patches)
    assert result.labels == tuple(range(15, -1, -1))
    assert [patch for each in result.patches for patch in each] == list(patches.values())


def test_two_patches_with_one_label_are_an_error(points: HookPoints) -> None:
    site = points.site("1", feature=3)
    with pytest.raises(errors.SweepError, match="Two of the patches have the same site, 1, feature=3,.*Pass a dict"):
        swept(points, patches=[zero_ablate(site), edit(site, Scale(2.0))])


def test_no_patches_are_an_error(points: HookPoints) -> None:
    with pytest.raises(errors.SweepError, match="There are no patches"):
        swept(points, patches=[])
    with pytest.raises(errors.SweepError, match="In `patches`, the label 'nothing' has no patches"):
        swept(points, patches={"nothing": []})


def test_what_is_no_patch_is_an_error(points: HookPoints) -> None:
    with pytest.raises(TypeError, match="Expected a Patch, such as .*; got Site"):
        swept(points, patches={"site": [points.site("1")]})
    with pytest.raises(TypeError, match="Expected a Patch, such as .*; got Site"):
        swept(points, patches=points.site("1").split("feature"))


def test_all_unknown_sites_are_named_at_once(points: HookPoints) -> None:
    with pytest.raises(errors.HookPointError, match="(?s)2 errors.*conv1.*conv2"):
        swept(points, patches=[zero_ablate(Site("conv1")), zero_ablate(Site("conv2"))])


def test_the_baseline_is_the_unpatched_metric(points: HookPoints) -> None:
    with torch.no_grad():
        expected = points.model(*vectors(ROWS))[:, 0]
    torch.manual_seed(0)
    points = hook_points(points.model, *vectors(ROWS))
    inputs = vectors(ROWS)
    result = sweep(points, *inputs, patches=zeroed(points), metric=first)
    with torch.no_grad():
        expected = points.model(*inputs)[:, 0]
    np.testing.assert_array_equal(result.baseline["first"], expected.double())


def test_several_metrics_are_measured_in_one_sweep(points: HookPoints) -> None:
    def change(output: Tensor, *, baseline: Tensor) -> Tensor:
        return (output - baseline).abs().sum(1)

    inputs = vectors(ROWS)
    result = sweep(points, *inputs, patches=zeroed(points), metric={"first": first, "change": change})
    with torch.no_grad():
        clean = points.model(*inputs)
        with patched(points, zeroed(points)[3]):
            output = points.model(*inputs)
    np.testing.assert_allclose(result.values["first"][3], first(output), rtol=1e-6)
    np.testing.assert_allclose(result.values["change"][3], change(output, baseline=clean), rtol=1e-6)
    assert not result.baseline["change"].any()


def test_with_several_metrics_one_has_to_be_named(points: HookPoints) -> None:
    result = swept(points, metric={"first": first, "second": lambda output: output[:, 1]})
    with pytest.raises(
        errors.MetricError, match="The sweep has several metrics: 'first', 'second'. Pass the name of one metric as"
    ):
        result.effect()
    with pytest.raises(errors.MetricError, match="This sweep has no metric 'third'"):
        result.effect("third")
    np.testing.assert_array_equal(result.effect("first"), swept(points).effect() * 0 + result.effect("first"))


def test_a_metric_may_be_one_number_for_all_inputs(points: HookPoints) -> None:
    result = swept(points, metric=lambda output: float(output.mean()))
    assert result.values["metric"].shape == (8, 1)
    assert np.isnan(result.interval().low).all()
    assert "nan" not in repr(result)
    assert "No interval (-): 1 independent row, fewer than 6." in repr(result)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda output: output,
            "returned a torch.float32 tensor of shape \\(12, 4\\). A metric must return one number",
        ),
        (lambda output: "much", "returned str. A metric must return one number per input"),
        (lambda output: output[:0, 0], "returned no numbers. Pass at least one input"),
        (lambda output: output[:, 0] * 1j, "returned a torch.complex64 tensor .* Use .real or .abs\\(\\)."),
        ({}, "metric is an empty mapping"),
        ({"first": 0}, "The metric 'first' must be a function of the model's output; got int"),
    ],
)
def test_a_metric_that_is_none_is_an_error(points: HookPoints, metric: Any, message: str) -> None:
    with pytest.raises(errors.MetricError, match=message):
        swept(points, metric=metric)


def test_a_metric_with_fewer_numbers_for_a_patched_output_is_an_error(points: HookPoints) -> None:
    clean = []

    def shrinking(output: Tensor) -> Tensor:
        clean.append(output)
        return output[:, 0] if len(clean) == 1 else output[:1, 0]

    with pytest.raises(errors.MetricError, match="returned 1 numbers for a patched output, but 12 for the unpatched"):
        swept(points, metric=shrinking)


def test_the_effect_is_the_mean_change_with_a_paired_interval(points: HookPoints) -> None:
    result = swept(points)
    changes = result.values["first"] - result.baseline["first"]
    expected = ranked_interval(changes.T, seed=0)
    np.testing.assert_array_equal(result.effect(), changes.mean(1))
    np.testing.assert_array_equal(result.interval().low, expected.low)
    np.testing.assert_array_equal(result.interval().high, expected.high)


def test_top_rows_have_the_largest_absolute_effects(points: HookPoints) -> None:
    result = swept(points)
    order = np.argsort(-np.abs(result.effect()))[:3]
    top = result.top(3)
    assert top.labels == tuple(result.labels[row] for row in order)
    np.testing.assert_array_equal(top.effect(), result.effect()[order])


def test_rows_of_top_keep_the_intervals_that_hold_for_all_patches_of_the_sweep(points: HookPoints) -> None:
    result = swept(points, metric={"first": first, "second": lambda output: output[:, 1]})
    for name in ("first", "second"):
        order = np.argsort(-np.abs(result.effect(name)), kind="stable")
        for top in (result.top(3, name).top(1, name), result.top(1, name)):
            assert (top.interval(name).low, top.interval(name).high) == (
                result.interval(name).low[order[0]],
                result.interval(name).high[order[0]],
            )
    alone = mean_interval(result.differences("first").T)
    assert (result.interval("first").high - result.interval("first").low >= alone.high - alone.low).all()


@pytest.mark.parametrize("verb", [mean_ablate, resample_ablate])
def test_a_sweep_says_that_one_reference_is_held_fixed(points: HookPoints, verb: Any) -> None:
    note = "Intervals ignore the sampling error in the reference of a mean or resample ablation."
    cache = run_with_cache(points, *vectors(20), sites=["1"], stop=True)
    ablated = sweep(points, *vectors(ROWS), patches=verb(points.site("1", feature=0), cache), metric=first)
    assert note in repr(ablated).splitlines()
    paired = patch_in(points.site("1", feature=0), cache["1"][:ROWS, :1])
    for patch in (zero_ablate(points.site("1")), paired):
        assert note not in repr(sweep(points, *vectors(ROWS), patches=patch, metric=first))


def test_effects_are_ranked_among_those_of_controls(points: HookPoints) -> None:
    controls = {number: steer(points.site("0"), torch.full((1, 1), number / 10)) for number in range(19)}
    inputs = vectors(ROWS)
    result = sweep(points, *inputs, patches=zeroed(points), metric=first, controls=controls)
    alone = sweep(points, *inputs, patches=controls, metric=first)
    assert result.controls is not None
    np.testing.assert_allclose(result.controls.effect(), alone.effect(), atol=1e-6)
    assert result.ranks() == [rank_among(effect, result.controls.effect()) for effect in result.effect()]
    records = result.to_records()
    assert [record["control"] for record in records] == [False] * 8 + [True] * 19
    assert records[0]["p"] == (result.ranks()[0].rank) / 20  # type: ignore[union-attr]


def test_with_few_controls_there_is_a_rank_and_no_p(points: HookPoints) -> None:
    result = swept(points, controls=zeroed(points, "0"))
    assert result.to_records()[0]["p"] is None
    assert "fewer than 19 controls" in result.to_records()[0]["no_p"]
    assert "No p-values: fewer than 19 controls" in repr(result)


def test_a_record_has_what_a_figure_needs(points: HookPoints) -> None:
    result = swept(points)
    record = result.to_records()[2]
    assert record["label"] == "1, feature=2"
    assert (record["effect"], record["low"], record["high"]) == (
        result.effect()[2],
        result.interval().low[2],
        result.interval().high[2],
    )


def test_records_become_a_data_frame(points: HookPoints) -> None:
    import pandas

    result = swept(points)
    pandas.testing.assert_frame_equal(result.to_pandas(), pandas.DataFrame(result.to_records()))


def test_a_figure_shows_the_effects_of_one_metric(points: HookPoints) -> None:
    import matplotlib

    matplotlib.use("Agg")
    ax = swept(points, metric={"first": first, "second": lambda output: output[:, 1]}).plot("second")
    assert len(ax.get_yticklabels()) == 8


def test_the_table_says_how_many_rows_it_does_not_show(points: HookPoints) -> None:
    lines = repr(swept(points, patches=dict(enumerate(zeroed(points) * 4)))).splitlines()
    assert lines[0] == "32 patches, first over 12 inputs"
    assert "... 12 more" in lines
    assert lines[-1] == "fold at '1': the 2 patches checked (of 32) agree with the loop"


def test_nan_is_an_error_that_names_the_label(points: HookPoints) -> None:
    patches: dict[str, Any] = {f"fine {number}": patch for number, patch in enumerate(zeroed(points))}
    patches["broken"] = edit(points.site("1", feature=2), lambda activation: activation / 0 * 0)
    for strategy in ("auto", "loop"):
        with pytest.raises(errors.NaNError, match="'broken': Patch.*introduced NaN"):
            swept(points, patches=dict(reversed(patches.items())), strategy=strategy)


def test_nan_that_a_later_patch_brings_is_an_error_too(points: HookPoints) -> None:
    broken = edit(points.site("2"), lambda activation: activation / 0 * 0)
    with pytest.raises(errors.NaNError, match="Site\\('2'\\).*introduced NaN"):
        swept(points, patches={number: [patch, broken] for number, patch in enumerate(zeroed(points))})


def test_an_edit_that_fails_is_named(points: HookPoints) -> None:
    patches = {**dict(enumerate(zeroed(points))), "short": edit(points.site("1"), lambda activation: activation[:1])}
    with pytest.raises(errors.EditError, match="'short': The edit in Patch.*returned a tensor with shape"):
        swept(points, patches=patches)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_an_error_of_the_users_own_is_raised_as_it_is_and_names_the_patch(points: HookPoints, strategy: Any) -> None:
    def broken(activation: Tensor) -> Tensor:
        raise ValueError("nothing to see")

    patches = {**dict(enumerate(zeroed(points))), "broken": edit(points.site("1"), broken), "last": zeroed(points)[0]}
    with pytest.raises(ValueError, match="nothing to see") as caught:
        swept(points, patches=patches, strategy=strategy)
    assert caught.value.__notes__ == ["Raised by the patch 'broken' in a sweep."]


def test_a_patch_that_never_ran_is_an_error(points: HookPoints) -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.short = nn.Linear(6, 4), nn.Linear(6, 4), False

        def forward(self, vector: Tensor) -> Tensor:
            return self.used(vector) if self.short else self.used(vector) + self.unused(vector)

    detour = Detour()
    traced = hook_points(detour, *vectors(ROWS))
    detour.short = True
    with pytest.raises(errors.UnreachedError, match="'unused': the patch at 'unused' never ran in the sweep"):
        sweep(traced, *vectors(ROWS), patches=[zero_ablate(Site("unused"))], metric=first)


def test_a_model_is_traced_with_the_inputs_of_the_sweep(points: HookPoints) -> None:
    patches = [zero_ablate(Site("1", feature=number)) for number in range(3)]
    (inputs,) = vectors(ROWS)
    both = [sweep(each, inputs, patches=patches, metric=first) for each in (points.model, points)]
    assert np.array_equal(*(result.values["first"] for result in both))


def traces(model: nn.Module) -> list[Any]:
    return [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)]  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("strategy", ["vmap", "resume", "loop"])
def test_nothing_is_left_of_a_sweep_that_fails(model: Model, error: type[BaseException], strategy: Any) -> None:
    inputs = model.inputs(ROWS)
    points = hook_points(model.module, *inputs)
    state, left = torch.get_rng_state(), []

    def failing(activation: Tensor) -> Tensor:
        left.append(activation)
        raise error

    def broken(output: Any) -> float:
        return 0.0

    patches = {number: edit(points.site(model.site), failing) for number in range(5)}
    with pytest.raises(error):
        sweep(points, *inputs, patches=patches, metric=broken, strategy=strategy)
    assert left
    assert not traces(model.module)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupt_keeps_what_is_done(points: HookPoints) -> None:
    measured: list[Tensor] = []

    def interrupted(output: Tensor) -> Tensor:
        if len(measured) == 6:
            raise KeyboardInterrupt
        measured.append(output[:, 0])
        return output[:, 0]

    inputs = vectors(ROWS)
    with pytest.raises(KeyboardInterrupt, match="5 of 8 patches finished") as stopped:
        sweep(points, *inputs, patches=zeroed(points), metric=interrupted)
    assert isinstance(stopped.value, SweepInterrupted)
    partial, whole = stopped.value.partial, sweep(points, *inputs, patches=zeroed(points), metric=first)
    assert whole.complete
    assert not partial.complete
    assert repr(partial).startswith("INTERRUPTED before all patches were run. 5 patches")
    rows = [whole.labels.index(label) for label in partial.labels]
    np.testing.assert_array_equal(partial.values["interrupted"], whole.values["first"][rows])


@pytest.mark.parametrize("done", [0, 2])
def test_an_interrupt_before_the_first_control_leaves_a_result_that_prints(points: HookPoints, done: int) -> None:
    measured: list[Tensor] = []

    def interrupted(output: Tensor) -> Tensor:
        if len(measured) == 1 + done:  # the first is the baseline
            raise KeyboardInterrupt
        measured.append(output)
        return output[:, 0]

    controls = [zero_ablate(points.site("2", feature=0))]
    with pytest.raises(SweepInterrupted) as stopped:
        sweep(points, *vectors(ROWS), patches=zeroed(points), controls=controls, metric=interrupted, strategy="loop")
    partial = stopped.value.partial
    assert f"{done} patches" in repr(partial)
    assert [record["rank"] for record in partial.to_records()] == [None] * done


def test_an_interrupt_before_the_first_patch_is_an_interrupt(points: HookPoints) -> None:
    def interrupted(output: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        swept(points, metric=interrupted)
    assert not isinstance(stopped.value, SweepInterrupted)


def test_a_bar_counts_the_patches(points: HookPoints, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    import tqdm.auto

    bars = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[misc, name-defined]
        def close(self) -> None:
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    swept(points, progress=True)
    assert bars[0] == (8, 8)
    bars.clear()
    swept(points, progress=False)
    assert not bars


def by_layer_and_token(points: HookPoints) -> dict[Any, Any]:
    sites = {(layer, n): points.site(str(layer), feature=n) for layer in (1, 0) for n in (2, 0, 1)}
    return {label: zero_ablate(site) for label, site in sites.items() if label != (0, 1)}


def test_labels_with_two_parts_make_a_grid_with_nan_in_its_holes(points: HookPoints) -> None:
    result = swept(points, patches=by_layer_and_token(points))
    grid = result.grid()
    assert (grid.rows, grid.cols) == ((0, 1), (0, 1, 2))  # numbers are sorted
    for row, col in np.ndindex(2, 3):
        expected = (
            np.full(ROWS, np.nan) if (row, col) == (0, 1) else result.differences()[result.labels.index((row, col))]
        )
        np.testing.assert_array_equal(grid.differences[row, col], expected)
    turned = result.grid(rows=-1, cols=0)
    assert (turned.rows, turned.cols) == ((0, 1, 2), (0, 1))
    np.testing.assert_array_equal(turned.effect(), grid.effect().T)
    assert grid.to_records()[0] == {"row": 0, "col": 0, "effect": result.effect()[result.labels.index((0, 0))]}
    assert len(grid.to_records()) == 5


def test_a_grid_is_for_one_metric_and_for_effects_without_inputs_too(points: HookPoints) -> None:
    patches = by_layer_and_token(points)
    result = swept(points, patches=patches, metric={"a": first, "b": lambda output: output[:, 1]})
    assert np.nanmax(np.abs(result.grid(metric="b").effect())) == np.abs(result.effect("b")).max()
    assert result.grid(metric="b").effect_label == "mean change (b, 12 inputs)"
    with pytest.raises(errors.MetricError, match="The sweep has several metrics: 'a', 'b'"):
        result.grid()
    estimated = attribution(points, *vectors(ROWS), patches=patches, metric=first)
    assert estimated.grid().differences.shape == (2, 3, 1)
    np.testing.assert_array_equal(estimated.grid().effect()[1, 2], estimated.effect()[estimated.labels.index((1, 2))])


def test_labels_with_three_parts_are_an_xarray_of_three_dimensions(points: HookPoints) -> None:
    patches = {(1, token, n): zero_ablate(points.site("1", feature=n)) for n in (5, 3) for token in ("The", "cat")}
    patches[1, "The", 7] = zero_ablate(points.site("1", feature=7))
    result = swept(points, patches=patches)
    array = result.to_xarray(("layer", "token", "feature"))
    assert array.dims == ("layer", "token", "feature") and array.shape == (1, 2, 3)
    assert array.coords["feature"].values.tolist() == [3, 5, 7] and array.coords["token"].values[0] == "The"
    for label, effect in zip(result.labels, result.effect(), strict=True):
        assert array.sel(dict(zip(array.dims, label, strict=True))).item() == effect
    assert np.isnan(array.sel(token="cat", feature=7).item()) and array.name == result.effect_label
    assert result.to_xarray(("layer", "token", "feature"), metric="first").equals(array)


def test_a_heat_map_has_tokens_on_its_axis_in_place_of_positions(points: HookPoints) -> None:
    pyplot.switch_backend("Agg")
    axes = swept(points, patches=by_layer_and_token(points)).grid().plot(cols=["The", " cat", "The"])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["The", " cat", "The"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    pyplot.close(axes.figure)


def test_labels_that_make_no_grid_are_refused(points: HookPoints) -> None:
    site = points.site("1", feature=0)
    doubled = swept(points, patches={(0, "a", 1): zero_ablate(site), (0, "a", 2): zero_ablate(site)})
    with pytest.raises(errors.StatisticsError) as caught:
        doubled.grid()
    assert str(caught.value) == (
        "The labels (0, 'a', 1) and (0, 'a', 2) have the same parts at indices 0, 1, so both effects belong in the "
        "same cell. Choose parts that distinguish the labels, or use to_xarray() with all parts."
    )
    assert doubled.grid(cols=2).effect().shape == (1, 2)
    for result, label in ((swept(points), "'1, feature=0'"), (doubled, "(0, 'a', 1)")):
        with pytest.raises(errors.StatisticsError) as caught:
            result.grid(cols=3)
        assert str(caught.value) == (
            f"The label {label} must be a tuple with parts at indices 0, 3. Pass a dict whose keys are such tuples, as "
            "in {(layer, position): patch}."
        )


def test_a_baseline_of_the_users_own_is_kept(points: HookPoints) -> None:
    theirs = torch.randn(ROWS, 4)
    metric = functools.partial(kl_divergence, baseline=theirs)
    inputs = vectors(ROWS)
    result = sweep(points, *inputs, patches=zeroed(points), metric=metric)
    with torch.no_grad():
        np.testing.assert_allclose(result.baseline["metric"], kl_divergence(points.model(*inputs), baseline=theirs))
        for row, patch in zip(result.values["metric"], zeroed(points), strict=True):
            with patched(points, patch):
                expected = kl_divergence(points.model(*inputs), baseline=theirs)
            np.testing.assert_allclose(row, expected, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["fold", "resume", "loop"])
def test_nan_is_let_through_where_it_is_meant(points: HookPoints, strategy: Any) -> None:
    broken = [edit(patch.site, lambda activation: activation * float("nan")) for patch in zeroed(points)]
    later = edit(points.site("2"), Scale(float("nan")))
    result = swept(points, patches=[[patch, later] for patch in broken], check_nan=False, strategy=strategy)
    assert np.isnan(result.values["first"]).all()
    assert {group.strategy for group in result.groups} == {strategy}


def test_the_table_says_that_the_metric_is_nan_without_any_patch(points: HookPoints) -> None:
    result = swept(points, metric=lambda output: output[:, 0].index_fill(0, torch.tensor([1, 2]), float("nan")))
    assert "metric is NaN on the unpatched output for 2 of 12 inputs." in str(result).splitlines()
    assert "without any patch" not in str(swept(points))


def test_a_metric_of_a_model_is_of_as_many_inputs_as_it_gets(points: HookPoints) -> None:
    with pytest.raises(errors.MetricError, match="returned 4 numbers for 12 inputs"):
        sweep(points.model, *vectors(ROWS), patches=zero_ablate(Site("0")), metric=lambda output: output.sum(0))


def test_inputs_are_counted_along_the_batch_axis_of_the_trace() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.last = nn.GRU(6, 8), nn.Linear(8, 4)

        def forward(self, *, sequence: Tensor) -> Tensor:
            return self.last(self.gru(sequence)[0][-1])

    sequence = torch.randn(5, ROWS, 6)
    points = hook_points(Last().eval(), sequence=sequence)
    patches = zeroed(points, "gru.out[0]")
    assert sweep(points, sequence=sequence, patches=patches, metric=first).values["first"].shape == (8, ROWS)
    with pytest.raises(errors.MetricError, match="returned 4 numbers for 12 inputs"):
        sweep(points, sequence=sequence, patches=patches, metric=lambda output: output[0])


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a fraction of a byte": (
        {"max_bytes": 1e6},
        errors.SweepError,
        "max_bytes must be a positive integer, such as 2**28; got 1000000.0.",
    ),
    "no bound": (
        {"max_bytes": None},
        errors.SweepError,
        "max_bytes must be a positive integer, such as 2**28; got None.",
    ),
    "no bytes": (
        {"max_bytes": 0},
        errors.SweepError,
        "max_bytes must be a positive integer, such as 2**28; got 0.",
    ),
    "a function that makes patches": (
        {"patches": zero_ablate},
        TypeError,
        "Expected a Patch, such as zero_ablate(Site('conv1')); got function.",
    ),
    "a metric of actions": (
        {"metric": {"logits": lambda output: output[0]}},
        errors.MetricError,
        "The metric 'logits' returned 4 numbers for 12 inputs. A metric must return one number per input, with shape "
        "(batch,), or a single number.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_swept_is_refused(points: HookPoints, fault: str) -> None:
    options, kind, message = FAULTS[fault]
    with pytest.raises(kind) as caught:
        swept(points, **options)
    assert str(caught.value) == message


def test_a_count_of_rows_below_zero_is_an_error(points: HookPoints) -> None:
    with pytest.raises(errors.StatisticsError) as caught:
        swept(points).top(-1)
    assert str(caught.value) == (
        "The first argument to top() must be the number of rows to return, at least 0; got -1. To choose a metric, "
        "pass metric='name'."
    )
    assert len(swept(points).top(0)) == 0


def writing_into_the_output(output: Tensor) -> Tensor:
    return output.mul_(2)[:, 0]


def writing_into_the_baseline(output: Tensor, *, baseline: Tensor) -> Tensor:
    return baseline.sub_(output)[:, 0]


@pytest.mark.parametrize("metric", [writing_into_the_output, writing_into_the_baseline])
def test_a_metric_that_writes_into_what_others_are_given_is_refused(metric: Any, points: HookPoints) -> None:
    with pytest.raises(errors.MetricError) as caught:
        swept(points, metric={"first": first, "writing": metric})
    assert str(caught.value) == (
        "The metric 'writing' modified the output or the baseline in place, but other metrics and patches use the "
        "same tensors. Return new tensors: output - baseline instead of output.sub_(baseline)."
    )
    with pytest.raises(errors.MetricError, match="The metric modified the output or the baseline in place"):
        path_patch(points, *(vectors(ROWS)[0], -vectors(ROWS)[0]), "0", "2.in[0]", metric=metric)


@pytest.mark.parametrize(
    ("dtype", "shift", "note"),
    [
        (torch.float32, 0.0, "fewer than 6 of the 12 rows have a nonzero value"),
        (torch.float32, 0.3, "most of the 12 rows are equal"),
        (torch.float32, None, ""),
        (torch.float64, 0.0, ""),
    ],
)
def test_differences_at_the_level_of_rounding_count_as_equal(dtype: Any, shift: float | None, note: str) -> None:
    inputs = torch.linspace(1, 2, 12, dtype=dtype).unsqueeze(1)
    points = hook_points(nn.Identity(), inputs, axes={".out": ("batch", "feature")})
    noise = 3e-7 * torch.rand(12, 1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    patch = edit(points.site(".out"), lambda x: x + noise * (1e4 if shift is None else 1) + (shift or 0.0))
    result = sweep(points, inputs, patches={"noise": patch}, metric=lambda output: output[:, 0])
    assert result.interval().note.tolist() == [note] and result.effect()[0] > 0


def test_an_effect_at_the_level_of_rounding_does_not_rank_before_controls_without_effect() -> None:
    inputs = torch.linspace(1, 2, 12).unsqueeze(1) * torch.ones(20)
    points = hook_points(nn.Identity(), inputs, axes={".out": ("batch", "feature")})
    first, *others = points.site(".out").split("feature")
    patch, controls = edit(first, lambda x: x * (1 + 2e-7)), [edit(site, torch.clone) for site in others]
    result = sweep(points, inputs, patches=patch, controls=controls, metric=lambda output: output[:, 0])
    assert result.effect()[0] > 0 and result.to_records()[0]["p"] == 1


class Unused(nn.Module):
    """Returns its second layer's output, and does not use the first layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.ignored, self.used = nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        self.ignored(inputs)
        return self.used(inputs)  # type: ignore[no-any-return]


def test_a_table_says_if_every_effect_at_a_hook_point_is_exactly_zero() -> None:
    points = hook_points(Unused().eval(), *vectors(ROWS))
    patches = [zero_ablate(points.site("ignored")), zero_ablate(points.site("used"))]
    options: dict[str, Any] = {"patches": patches, "metric": first}
    lines = repr(sweep(points, *vectors(ROWS), **options)).splitlines()
    note = "Every effect is exactly 0 at 'ignored'. Either the patches do not change the activation, or the model does "
    assert note + "not use the activation." in lines
    assert "exactly 0" not in repr(sweep(points, *vectors(ROWS), **{**options, "patches": patches[1]}))


def test_a_long_table_shows_the_largest_effects(points: HookPoints) -> None:
    result = swept(points, patches={n: patch for n, patch in enumerate(3 * zeroed(points))})
    shown = [int(line.split()[0]) for line in repr(result).splitlines()[2:22]]
    assert shown == [*result.top(20).labels] and "... 4 more" in repr(result)


@pytest.mark.parametrize("call", [lambda result: result.top("first"), lambda result: result.grid("first")])
def test_a_metric_in_the_place_of_a_number_is_an_error_that_shows_the_keyword(points: HookPoints, call: Any) -> None:
    with pytest.raises(errors.StatisticsError) as caught:
        call(swept(points, patches={(n, 0): patch for n, patch in enumerate(zeroed(points))}))
    assert str(caught.value) in (
        "The first argument to top() must be the number of rows to return, at least 0; got 'first'. To choose a "
        "metric, pass metric='name'.",
        "rows and cols must be integers, the indices of two parts of each label, as in grid(rows=0, cols=1); got "
        "'first', 1. To choose a metric, pass metric='name'.",
    )
