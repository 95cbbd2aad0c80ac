"""Contrastive pairs against the same differences written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from models import Model, build
from torch import Tensor, nn

from chanpatch import contrast, hook_points, patched, run_with_cache, steer, zero_ablate
from chanpatch.channels import Moments
from chanpatch.contrasts import Contrast
from chanpatch.errors import ContrastError, SiteError
from chanpatch.statistics import max_t_test, sign_flip_test

CNN = build("plain_cnn")
POINTS = hook_points(CNN.module, *CNN.inputs(2))
GENERATOR = torch.Generator().manual_seed(0)
CLEAN = torch.randn(12, 3, 8, 8, generator=GENERATOR)
CORRUPTED = CLEAN + torch.randn(12, 3, 8, 8, generator=GENERATOR) * 0.1
BACKGROUND = torch.randn(50, 3, 8, 8, generator=GENERATOR)


def sums(images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return CNN.module.conv1(images).sum((2, 3)).double().numpy()


def by_channel(result: Contrast, values: np.ndarray) -> np.ndarray:
    """Values of one hook point's rows in the order of its channels."""
    channels = [dict(site.indices)["channel"][0] for site in result.sites]
    return values[np.argsort(channels)]


def test_differences_effects_and_spread_are_those_written_by_hand() -> None:
    result = contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=BACKGROUND)
    difference = sums(CLEAN) - sums(CORRUPTED)
    spread = sums(BACKGROUND).std(axis=0, ddof=1)
    np.testing.assert_allclose(by_channel(result, result.difference), difference.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_channel(result, result.absolute), np.abs(difference).mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_channel(result, result.std), spread, rtol=1e-5)
    np.testing.assert_allclose(by_channel(result, result.effect()), difference.mean(0) / spread, rtol=1e-4, atol=1e-5)
    assert ((result.low <= result.effect()) & (result.effect() <= result.high)).all()


def test_neither_batch_size_nor_a_stream_of_batches_changes_the_numbers() -> None:
    whole = contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=BACKGROUND, batch_size=100)
    cut = contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=iter(BACKGROUND.split(7)), batch_size=5)
    assert cut.background == whole.background == 50
    np.testing.assert_allclose(cut.std, whole.std, rtol=1e-5)
    np.testing.assert_allclose(cut.effect(), whole.effect(), rtol=1e-4)


ROWS = dict.fromkeys(["**", "**.in"], ("batch", "channel", "col"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_effects_are_taken_in_double_precision_and_depend_on_neither_batches_nor_order(dtype: torch.dtype) -> None:
    rows = torch.randn(90, 3, 500, generator=GENERATOR).mul(1000).to(dtype)  # sums overflow in half precision
    rows[:, 0] += 1000
    clean, corrupted, background = rows.split(30)
    points = hook_points(nn.ReLU(), clean[:2], axes=ROWS)
    one, other, usual = (part.relu().double().sum(2).numpy() for part in (clean, corrupted, background))
    whole = contrast(points, clean, corrupted, ".out", background=background, batch_size=100)
    spread = usual.std(axis=0, ddof=1)
    np.testing.assert_allclose(by_channel(whole, whole.difference), (one - other).mean(0), rtol=1e-10)
    np.testing.assert_allclose(by_channel(whole, whole.effect()), (one - other).mean(0) / spread, rtol=1e-10)
    order = torch.randperm(30, generator=GENERATOR)
    cut = contrast(
        points, clean[order], corrupted[order], ".out", background=iter(background.flip(0).split(7)), batch_size=4
    )
    np.testing.assert_allclose(cut.effect(), whole.effect(), rtol=1e-10)
    for name in ("difference", "absolute", "std"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=1e-10)


def test_a_channel_that_is_constant_up_to_rounding_has_no_effect_and_ranks_last() -> None:
    class Softmax(nn.Module):
        def forward(self, image: Tensor) -> Tensor:  # sums to 1 in its first channel
            return torch.cat([image.flatten(2).softmax(2).view_as(image), image], dim=1)

    points = hook_points(Softmax(), CLEAN[:2, :1], axes={".out": ("batch", "channel", "row", "col")})
    result = contrast(points, CLEAN[:, :1], CORRUPTED[:, :1], ".out", background=BACKGROUND[:, :1])
    assert 0 < result.std[0] < 1e-6
    assert np.isnan([result.effect()[0], result.low[0], result.high[0]]).all()
    assert dict(result.top(2).sites[1].indices)["channel"] == (0,)


def test_a_norm_is_that_of_each_channel_over_its_positions() -> None:
    result = contrast(POINTS, CLEAN, CORRUPTED, "conv1", reduce="norm")
    with torch.no_grad():
        one, other = (CNN.module.conv1(images).double().square().sum((2, 3)).sqrt() for images in (CLEAN, CORRUPTED))
    np.testing.assert_allclose(by_channel(result, result.difference), (one - other).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[1, 1, 98], [50, 50], [3] * 33 + [1]])
def test_moments_depend_neither_on_the_cuts_nor_on_the_order(cuts: list[int]) -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(1e4, 1e-2, size=(100, 5))
    parts = [Moments.of(part) for part in np.split(rng.permutation(sample), np.cumsum(cuts)[:-1])]
    merged = sum(parts[1:], start=parts[0])
    assert merged.count == 100
    np.testing.assert_allclose(merged.mean, sample.mean(0), rtol=1e-10)
    np.testing.assert_allclose(merged.std, sample.std(0, ddof=1), rtol=1e-10)


def test_a_feature_that_moves_one_channel_is_found_there_among_all_hook_points() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1, bias=False), torch.nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]).view(4, 1, 1, 1))
        model[0].weight[3] = 1e-3
    dim = torch.rand(8, 1, 4, 4, generator=GENERATOR)
    result = contrast(hook_points(model, dim[:2]), dim + 1, dim, background=torch.rand(30, 1, 4, 4) * 3)
    assert {repr(site) for site in result.top(2).sites} == {"Site('0', channel=1)", "Site('0', channel=3)"}
    assert np.isnan(result.effect()[[0, 2]]).all() and len(result) == 4  # channels that never vary rank last


def test_a_search_tests_the_same_activations_once_and_lists_where_else_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Dropout())).eval()
    points = hook_points(model, CLEAN[:2])
    result = contrast(points, CLEAN, CORRUPTED)
    assert {site.name for site in result.sites} == {"0", "1.0"} and len(result) == 8
    assert result.skipped == {
        name: f"Site('{name}') has the same activations as Site('1.0')." for name in ("1.1", "1", ".out")
    }
    assert len(contrast(points, CLEAN, CORRUPTED, ["1.0", "1.1"])) == 8  # what is named is compared


def test_layers_and_directions_of_a_recurrent_state_are_compared_each_by_itself() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
    clean, corrupted = torch.randn(2, 9, 5, 6)
    points = hook_points(model, clean[:2])
    with torch.no_grad():
        one, other = (model(sequence)[1][0].double().numpy() for sequence in (clean, corrupted))
    by_hand = (one - other).mean(axis=1)  # (layer, feature)
    for sites in (".out[1][0]", "all"):
        result = contrast(points, clean, corrupted, sites)
        rows = {repr(site): row for row, site in enumerate(result.sites) if site.name == ".out[1][0]"}
        assert len(rows) == 16
        for layer in range(4):
            for feature in range(4):
                site = points.site(".out[1][0]", layer=layer, feature=feature)
                assert result.difference[rows[repr(site)]] == pytest.approx(by_hand[layer, feature], rel=1e-4)
    zero_ablate(result.sites[0])


def test_the_strongest_of_many_channels_can_be_significant() -> None:
    model = nn.Identity()
    one, other = torch.randn(2, 40, 1500, generator=torch.Generator().manual_seed(0))
    one[:, 7] += 10
    points = hook_points(model, one[:2], axes={".out": ("batch", "feature")})
    result = contrast(points, one, other, ".out")
    assert repr(result.top(1).sites[0]) == "Site('.out', feature=7)"
    assert result.p[7] == 1 / 10_000 and result.low[7] > 0
    assert "<0.001" in repr(result).splitlines()[2]
    again = contrast(points, one, other, ".out")
    np.testing.assert_array_equal(again.p, result.p)


def test_an_interval_excludes_zero_exactly_if_its_corrected_p_is_at_most_the_level_also_after_top() -> None:
    model, generator = nn.Identity(), torch.Generator().manual_seed(0)
    points = hook_points(model, torch.zeros(2, 12), axes={".out": ("batch", "feature")})
    for pairs in (6, 10, 30):
        one, other = torch.randn(2, pairs, 12, generator=generator)
        one += torch.linspace(0, 2, 12)
        result = contrast(points, one, other, ".out", background=3 * torch.randn(20, 12, generator=generator))
        np.testing.assert_array_equal((result.low > 0) | (result.high < 0), result.p <= 0.05)
        expected = max_t_test((one - other).double().numpy())
        np.testing.assert_allclose(result.p, expected.p)
        np.testing.assert_allclose(result.low * result.std, expected.interval.low, rtol=1e-5)
        first = result.top(1)
        assert (first.p, first.low) == (result.p[np.argmax(np.abs(result.effect()))], result.low.flat[
            np.argmax(np.abs(result.effect()))
        ])  # fmt: skip


def test_intervals_of_few_pairs_are_marked_and_withheld_ones_say_why() -> None:
    lines = repr(contrast(POINTS, CLEAN[:8], CORRUPTED[:8], "conv1")).splitlines()
    assert lines[2].split("  ")[-4].endswith("(few)") or "(few)" in lines[2]
    assert "few: an interval over fewer than ten independent rows." in lines
    clean = torch.rand(12, 4) * (torch.arange(4) < 3)
    clean[:7, 2] = 0
    points = hook_points(nn.Identity(), clean[:2], axes={".out": ("batch", "feature")})
    result = contrast(points, clean, torch.zeros(12, 4), ".out")
    assert result.note.tolist() == ["", "", *["fewer than 6 of the 12 rows have a nonzero value"] * 2]
    assert np.isnan(result.low[2:]).all() and result.p[3] == 1
    assert " -  " in repr(result) and "No interval (-): fewer than 6 of the 12 rows have a nonzero value." in repr(
        result
    )


@pytest.mark.parametrize("side", ["clean", "corrupted", "background"])
def test_a_number_that_is_not_finite_is_refused_with_its_input(side: str) -> None:
    inputs = {"clean": CLEAN, "corrupted": CORRUPTED, "background": BACKGROUND}
    inputs[side] = inputs[side].clone()
    inputs[side][9, 0, 0, 0] = torch.nan
    with pytest.raises(ContrastError) as caught:
        contrast(POINTS, inputs["clean"], inputs["corrupted"], "conv1", background=inputs["background"], batch_size=4)
    assert str(caught.value) == (
        f"{side}[9] produces a non-finite activation at Site('conv1'). Leave out either that input or that site."
    )


def test_a_search_leaves_out_what_cannot_be_reduced_and_says_why() -> None:
    attention = build("attention")
    points = hook_points(attention.module, *attention.inputs(2))
    result = contrast(points, *attention.inputs(8), *attention.inputs(8))
    assert set(result.skipped) == {".out"}
    assert "Name these axes" in result.skipped[".out"]
    assert "Skipped " in repr(result)


def test_signed_differences_of_enough_pairs_have_p_values_and_absolute_ones_none() -> None:
    signed = contrast(POINTS, CLEAN, CORRUPTED, "conv1")
    assert not signed.no_p
    assert ((signed.p > 0) & (signed.p <= 1)).all()
    assert (signed.p >= sign_flip_test(sums(CLEAN) - sums(CORRUPTED))).all()
    for result in (
        contrast(POINTS, CLEAN, CORRUPTED, "conv1", absolute=True),
        contrast(POINTS, CLEAN[:5], CORRUPTED[:5], "conv1"),
        contrast(POINTS, CLEAN, CORRUPTED, "conv1", clusters=np.repeat(range(3), 4)),
    ):
        assert np.isnan([result.p, result.low, result.high]).all()
        assert set(result.note) == {result.no_p}
        assert f"No p-values: {result.no_p}" in repr(result)


def test_a_steering_vector_is_the_mean_difference_of_whole_activations_and_steers() -> None:
    result = contrast(POINTS, CLEAN, CORRUPTED, "conv1", batch_size=5)
    vector = result.steering_vector("conv1")
    with torch.no_grad():
        expected = (CNN.module.conv1(CLEAN) - CNN.module.conv1(CORRUPTED)).mean(0, keepdim=True)
    torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)
    site = POINTS.site("conv1")
    with patched(POINTS, steer(site, vector, coefficient=-1.0)):
        _, cache = run_with_cache(POINTS, CLEAN, sites="conv1")
    torch.testing.assert_close(cache["conv1"], CNN.module.conv1(CLEAN) - vector)


def test_rows_are_in_execution_order_and_top_has_the_largest_with_their_sites_and_records() -> None:
    result = contrast(POINTS, CLEAN, CORRUPTED, ["fc", "conv1"], background=BACKGROUND)
    channels = [*POINTS.site("conv1").split("channel"), *POINTS.site("fc").split("feature")]
    assert [*result.sites] == channels
    largest = np.argsort(-np.abs(result.effect()), kind="stable")[:3]
    top = result.top(3)
    assert top.to_records() == [result.to_records()[row] for row in largest]
    assert top.sites == tuple(channels[row] for row in largest)
    assert repr(result).splitlines()[2].startswith(repr(top.sites[0]))


def test_the_plot_shows_the_largest_effects_and_names_their_unit_and_number() -> None:
    result = contrast(POINTS, CLEAN, CORRUPTED, background=BACKGROUND)
    pyplot.switch_backend("Agg")
    axes = result.plot()
    dots = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert dots == result.top(20).effect().tolist()
    assert axes.get_xlabel().replace("\n", " ") == result.effect_label
    assert result.effect_label == (
        "difference between clean and corrupted, n = 12 pairs (in standard deviations over 50 background inputs)"
    )
    pyplot.close(axes.figure)
    without = contrast(POINTS, CLEAN, CORRUPTED, "conv1", absolute=True)
    assert without.effect_label == "absolute difference between clean and corrupted, n = 12 pairs"


def test_the_batch_may_stand_on_another_axis_inside_the_model(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(3))
    result = contrast(points, model.inputs(7), model.inputs(7), model.site)
    assert result.pairs == 7


LSTM = hook_points(nn.LSTM(3, 4), torch.randn(70, 10, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: contrast(POINTS, CLEAN, CORRUPTED[:5], "conv1"),
            "clean and corrupted must have the same number of inputs, at least 1; got 12 and 5.",
        ),
        (
            lambda: contrast(POINTS, CLEAN[:0], CORRUPTED[:0], "conv1"),
            "clean and corrupted must have the same number of inputs, at least 1; got 0 and 0.",
        ),
        (
            lambda: contrast(POINTS, CLEAN, CORRUPTED, "conv1", clusters=[0, 1, 2]),
            "clusters must have one label for each of the 12 rows (inputs or pairs); got shape (3,).",
        ),
        (
            lambda: contrast(POINTS, CLEAN, CORRUPTED, "conv1", clusters=[*"aabbccddeef", None]),
            "clusters[11] must be a label; got None. Label this input or pair, or leave it out.",
        ),
        (
            lambda: contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=[]),
            "background must have at least 2 inputs, to measure how much activations vary; got 0.",
        ),
        (
            lambda: contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=CLEAN[:1]),
            "background must have at least 2 inputs, to measure how much activations vary; got 1.",
        ),
        (
            lambda: contrast(POINTS, CLEAN, CORRUPTED, "conv1", batch_size=0),
            "batch_size must be a whole number, at least 1; got 0.",
        ),
        (
            lambda: contrast(LSTM, torch.randn(70, 10, 3), torch.randn(70, 10, 3), ".out[0]"),
            "The batch axis of the model's first input is axis 1, but inputs are split into batches along axis 0. Wrap "
            "the model in a module whose inputs have the batch axis first.",
        ),
        (
            lambda: contrast(POINTS.select("conv1"), CLEAN, CORRUPTED, reduce=("b c h w -> b c h", "sum")),
            "No hook point can be compared (number of hook points: 1). The first one was skipped because: "
            "reduce=('b c h w -> b c h', 'sum') leaves axes (batch, channel, row) at Site('conv1'), but must keep "
            "the batch axis and at most one other axis.",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ContrastError) as caught:
        call()
    assert str(caught.value) == message


def test_a_site_with_a_row_of_the_batch_is_refused() -> None:
    with pytest.raises(SiteError) as caught:
        contrast(POINTS, CLEAN, CORRUPTED, POINTS.site("conv1", batch=0))
    assert str(caught.value) == (
        "Site('conv1', batch=0) selects rows of the batch, but every input is used. Omit batch= from the site, and "
        "pass only the inputs to use."
    )


def test_a_reduction_that_leaves_too_much_is_refused() -> None:
    with pytest.raises(SiteError) as caught:
        contrast(POINTS, CLEAN, CORRUPTED, "conv1", reduce=("b c h w -> b c h", "sum"))
    assert str(caught.value) == (
        "reduce=('b c h w -> b c h', 'sum') leaves axes (batch, channel, row) at Site('conv1'), but must keep the "
        "batch axis and at most one other axis."
    )


def test_a_model_is_traced_with_the_clean_inputs():
    both = [contrast(each, CLEAN, CORRUPTED, "relu1") for each in (POINTS.model, POINTS)]
    assert str(both[0]) == str(both[1])


def test_what_is_neither_a_model_nor_its_hook_points_is_refused():
    with pytest.raises(TypeError, match=r"^Expected HookPoints or a torch\.nn\.Module, not list\.$"):
        contrast([], torch.zeros(3, 4), torch.zeros(3, 4))


def test_differences_at_the_level_of_rounding_have_neither_a_small_p_nor_an_interval():
    corrupted = 1 + torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    clean = corrupted * (1 + torch.tensor([2e-7, 0.0, 1e-3]))
    points = hook_points(nn.Identity(), clean, axes={".out": ("batch", "feature")})
    result = contrast(points, clean, corrupted, ".out")
    assert result.p[:2].tolist() == [1, 1] and result.p[2] < 0.001
    assert result.note.tolist() == ["fewer than 6 of the 12 rows have a nonzero value"] * 2 + [""]
