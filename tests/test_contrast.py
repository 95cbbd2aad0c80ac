"""Contrastive pairs against the same differences written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from models import Model, build

from chanpatch import contrast, hook_points, patched, run_with_cache, steer
from chanpatch._moments import Moments
from chanpatch.contrast import Contrast
from chanpatch.errors import ContrastError, SiteError

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
    np.testing.assert_allclose(by_channel(result, result.effect), difference.mean(0) / spread, rtol=1e-4, atol=1e-5)
    assert (np.diff(np.abs(result.effect)) <= 0).all()
    assert ((result.low <= result.effect) & (result.effect <= result.high)).all()


def test_neither_batch_size_nor_a_stream_of_batches_changes_the_numbers() -> None:
    whole = contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=BACKGROUND, batch_size=100)
    cut = contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=iter(BACKGROUND.split(7)), batch_size=5)
    assert cut.background == whole.background == 50
    np.testing.assert_allclose(cut.std, whole.std, rtol=1e-5)
    np.testing.assert_allclose(cut.effect, whole.effect, rtol=1e-4)


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
    assert {repr(site) for site in result.top(2).sites} <= {
        f"Site('{name}', channel={channel})" for name in ("0", "1", ".out") for channel in (1, 3)
    }
    dead = [row for row, site in enumerate(result.sites) if "channel=0" in repr(site)]
    assert np.isnan(result.effect[dead]).all()
    assert min(dead) > len(result) - 7  # channels that never vary come last


def test_a_search_leaves_out_what_cannot_be_reduced_and_says_why() -> None:
    attention = build("attention")
    points = hook_points(attention.module, *attention.inputs(2))
    result = contrast(points, *attention.inputs(8), *attention.inputs(8))
    assert set(result.skipped) == {".out"}
    assert "Name them" in result.skipped[".out"]
    assert "Left out: " in repr(result)


def test_signed_differences_of_enough_pairs_have_p_values_and_absolute_ones_none() -> None:
    signed = contrast(POINTS, CLEAN, CORRUPTED, "conv1")
    assert not signed.no_p
    assert ((signed.p > 0) & (signed.p <= 1)).all()
    assert (signed.p_holm >= signed.p_bh).all() and (signed.p_bh >= signed.p).all()
    for result in (
        contrast(POINTS, CLEAN, CORRUPTED, "conv1", absolute=True),
        contrast(POINTS, CLEAN[:5], CORRUPTED[:5], "conv1"),
        contrast(POINTS, CLEAN, CORRUPTED, "conv1", clusters=np.repeat(range(3), 4)),
    ):
        assert np.isnan(result.p).all() and np.isnan(result.p_holm).all()
        assert f"No p-values: {result.no_p}" in repr(result)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    model = torch.nn.Identity()
    rng = torch.Generator().manual_seed(3)
    one, other = (torch.randn(20, 400, generator=rng) for _ in range(2))
    points = hook_points(model, one[:2], axes={".out": ("batch", "feature")})
    p = contrast(points, one, other, ".out").p
    assert 0.02 < (p < 0.05).mean() < 0.09
    assert 0.4 < (p < 0.5).mean() < 0.6


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


def test_top_keeps_the_first_rows_with_their_sites_and_records() -> None:
    result = contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=BACKGROUND)
    top = result.top(3)
    assert len(top) == 3
    assert top.to_records() == result.to_records()[:3]
    assert top.sites[0] == POINTS.site("conv1", channel=dict(top.sites[0].indices)["channel"][0])


def test_the_plot_shows_the_largest_effects_and_names_their_unit_and_number() -> None:
    result = contrast(POINTS, CLEAN, CORRUPTED, background=BACKGROUND)
    pyplot.switch_backend("Agg")
    axes = result.plot()
    dots = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert dots == result.effect[:20].tolist()
    assert axes.get_xlabel().replace("\n", " ") == result.effect_label
    assert result.effect_label == (
        "difference of clean and corrupted, n = 12 pairs (in standard deviations over 50 background inputs)"
    )
    pyplot.close(axes.figure)
    without = contrast(POINTS, CLEAN, CORRUPTED, "conv1", absolute=True)
    assert without.effect_label == "absolute difference of clean and corrupted, n = 12 pairs"


def test_the_batch_may_stand_on_another_axis_inside_the_model(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(3))
    result = contrast(points, model.inputs(7), model.inputs(7), model.site)
    assert result.pairs == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((CLEAN, CORRUPTED[:5]), ContrastError, "clean has 12 inputs and corrupted 5: give one of each per pair."),
        ((CLEAN[:0], CORRUPTED[:0]), ContrastError, "clean has 0 inputs and corrupted 0: give one of each per pair."),
    ],
)
def test_pairs_that_are_none_are_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        contrast(POINTS, *arguments, "conv1")
    assert str(caught.value) == message


def test_clusters_that_do_not_fit_and_reductions_that_leave_too_much_are_refused() -> None:
    with pytest.raises(ContrastError, match=r"clusters has shape \(3,\), but there are 12 pairs: give each a label."):
        contrast(POINTS, CLEAN, CORRUPTED, "conv1", clusters=[0, 1, 2])
    with pytest.raises(SiteError, match="it must leave the batch and one axis"):
        contrast(POINTS, CLEAN, CORRUPTED, "conv1", reduce=("b c h w -> b c h", "sum"))
    with pytest.raises(ContrastError, match="background holds no inputs"):
        contrast(POINTS, CLEAN, CORRUPTED, "conv1", background=[])
