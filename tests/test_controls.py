"""Controls, and how far a patch leads off distribution, against the same written out by hand."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import Model, build
from torch import Tensor, nn

from chanpatch import (
    HookPoints,
    Site,
    edit,
    hook_points,
    mean_ablate,
    patch_in,
    resample_ablate,
    run_with_cache,
    steer,
    sweep,
    zero_ablate,
)
from chanpatch.controls import matched_channels, off_distribution, random_sets, random_vectors
from chanpatch.errors import ChanpatchError, EditError, SiteError, StatisticsError
from chanpatch.statistics import rank_among

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(40, 1, 4, 4, generator=GENERATOR)
AXES = dict.fromkeys(["**", "**.in"], ("batch", "channel", "row", "col"))
RAMP = torch.arange(32.0) + torch.arange(32.0) ** 2 / 1000  # steeper and steeper, so that no two are equally far
SEVERAL = [[0.0, 0.0], [0.0, 100.0], [1.0, 100.0], [100.0, -33.0], [103.0, -33.0]]  # in the first row, in the others


class Ramp(nn.Module):
    """The absolute image plus a number per channel, but three are dead: one at 0, one at 5, one that sees no input."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        channels = image.abs() + RAMP.view(1, 32, 1, 1)
        channels[:, 3], channels[:, 17] = 0.0, 5.0
        channels[:, 30] = torch.arange(16.0).view(4, 4) / 3
        return self.ramp(channels)


class Rows(nn.Module):
    """The image plus one number in the first row and another one in the rest, in each of five channels."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.rows(image + torch.tensor(SEVERAL)[:, [0, 1, 1, 1]].view(1, 5, 4, 1))


POINTS = hook_points(Ramp(), IMAGES[:2], axes=AXES)
SUMS = (IMAGES.abs().sum((2, 3)) + 16 * RAMP).double().numpy()
LIVE = set(range(32)) - {3, 17, 30}


def channels(site: Site) -> tuple[int, ...]:
    return dict(site.indices)["channel"]


def test_controls_are_among_the_nearest_live_channels_in_mean_activation() -> None:
    found = matched_channels(POINTS, POINTS.site("ramp", channel=16), IMAGES, count=3, seed=0)
    assert len(set(found)) == 3
    assert all(len(channels(site)) == 1 for site in found)
    assert {channels(site)[0] for site in found} <= {12, 13, 14, 15, 18, 19}  # 17 is dead


def test_dead_channels_are_never_controls() -> None:
    every = matched_channels(POINTS, POINTS.site("ramp", channel=10), IMAGES, count=28, seed=0)
    assert sorted(channels(site)[0] for site in every) == sorted(LIVE - {10})


def test_a_control_for_several_channels_has_one_near_each_of_them_and_none_of_theirs() -> None:
    site = POINTS.site("ramp", channel=[4, 22])
    for seed in range(20):
        found = matched_channels(POINTS, site, IMAGES, count=2, seed=seed)
        assert len(set(found)) == 2
        for low, high in map(channels, found):
            assert low in (1, 2, 5, 6) and high in (20, 21, 23, 24)


@pytest.mark.parametrize(("size", "count"), [(1, 4), (2, 6), (3, 4), (4, 1)])
def test_every_set_of_the_other_live_channels_can_be_a_control(size: int, count: int) -> None:
    points = hook_points(nn.Identity(), IMAGES.expand(-1, 4 + size, -1, -1), axes=AXES)
    background = IMAGES.expand(-1, 4 + size, -1, -1) + torch.arange(4.0 + size).view(-1, 1, 1)
    found = matched_channels(points, points.site(".out", channel=range(size)), background, count=count, seed=0)
    every = itertools.combinations(range(size, 4 + size), size)
    assert sorted(map(channels, found)) == list(every)


def test_the_mean_is_of_the_region_alone_and_controls_have_its_other_indices() -> None:
    points = hook_points(Rows(), IMAGES[:2], axes=AXES)
    for region, near in (({"row": 0}, (1, 2)), ({}, (3, 4))):
        site = points.site("rows", channel=0, **region)
        drawn = {matched_channels(points, site, IMAGES, count=1, seed=seed)[0] for seed in range(20)}
        assert drawn == {points.site("rows", channel=channel, **region) for channel in near}


def test_controls_depend_on_the_seed_and_on_neither_batches_nor_the_order_of_inputs() -> None:
    site = POINTS.site("ramp", channel=10)

    def drawn(background: Any, seed: int = 0, **more: int) -> tuple[Site, ...]:
        return matched_channels(POINTS, site, background, count=5, seed=seed, **more).sites

    assert drawn(IMAGES) == drawn(iter(IMAGES.flip(0).split(7))) == drawn(IMAGES, batch_size=3)
    assert len({drawn(IMAGES, seed) for seed in range(5)}) > 1


def test_controls_tell_how_near_they_are_in_spreads_of_the_other_live_channels() -> None:
    means = SUMS.mean(axis=0) / 16
    for target in ([16], [22, 4]):
        found = matched_channels(POINTS, POINTS.site("ramp", channel=target), IMAGES, count=3, seed=0)
        unit = np.std([means[channel] for channel in LIVE - set(target)])
        for control, apart in zip(found, found.apart, strict=True):
            pairs = zip(sorted(target), sorted(channels(control)), strict=True)  # these are far enough from each other
            assert apart == pytest.approx(np.mean([abs(means[one] - means[other]) for one, other in pairs]) / unit)
        assert (found.pool, found.live) == (6, 29 - len(target))
        assert [record["apart"] for record in found.to_records()] == list(found.apart)
    lines = repr(found).splitlines()
    assert lines[0] == "3 controls, drawn from the 6 nearest of 27 other live channels"
    assert lines[1].split() == ["site", "apart"] and len(lines) == 6
    assert lines[5] == f"No p-values: {found.no_p}"
    assert found.to_pandas()["site"].tolist() == list(map(repr, found))


EDGE = "at least 3 of the 19 controls must have a {} mean activation than {!r}, but the number of such controls is {}"


def ranked_by_mean(channels: int) -> HookPoints:
    """Hook points of a model whose feature 0 has the largest mean, feature 1 the second largest."""
    return hook_points(nn.Identity(), torch.zeros(2, channels), axes={".out": ("batch", "feature")})


@pytest.mark.parametrize(("feature", "side"), [(0, "larger"), (1, "larger"), (59, "smaller")])
def test_at_the_edge_of_its_pool_an_effect_has_a_rank_and_no_p_and_the_reason_is_said(feature: int, side: str) -> None:
    points = ranked_by_mean(60)
    background = torch.linspace(60, 1, 60) * torch.linspace(0.5, 1.5, 9).unsqueeze(1)
    site = points.site(".out", feature=feature)
    found = matched_channels(points, site, background, count=19)
    means = [60.0 - dict(control.indices)["feature"][0] for control in found]
    beyond = sum(mean > 60 - feature if side == "larger" else mean < 60 - feature for mean in means)
    assert found.no_p == EDGE.format(side, site, beyond)
    effects = means
    rank = found.rank(60.0 - feature, effects)
    assert (rank.rank, rank.p, rank.no_p) == (rank_among(60.0 - feature, effects).rank, None, found.no_p)
    controls = found.patches(zero_ablate)
    assert [patch.site for patch in controls] == list(found)

    def total(output: torch.Tensor) -> torch.Tensor:
        return output.sum(dim=1)

    result = sweep(points, background, patches=zero_ablate(site), controls=controls, metric=total)
    assert result.ranks() == [
        replace(rank_among(result.effect()[0], result.controls.effect()), p=None, no_p=found.no_p)
    ]
    assert f"No p-values: {found.no_p}" in repr(result) and f"No p-values: {found.no_p}" in repr(found)
    assert result.top(1).to_records()[0]["no_p"] == found.no_p


@pytest.mark.parametrize(
    "form",
    [
        lambda found: [zero_ablate(control) for control in found],
        lambda found: found.patches(zero_ablate)[:],
        lambda found: tuple(found.patches(zero_ablate)),
        lambda found: iter(found.patches(zero_ablate)),
        lambda found: {f"control {number}": patch for number, patch in enumerate(found.patches(zero_ablate))},
        lambda found: {repr(control): [edit(control, torch.zeros_like)] for control in found},
        lambda found: [zero_ablate(site) for site in pickle.loads(pickle.dumps(found.sites))],
    ],
)
def test_controls_at_an_edge_have_no_p_in_any_form(form: Any) -> None:
    points = ranked_by_mean(60)
    background = torch.linspace(60, 1, 60) * torch.linspace(0.5, 1.5, 9).unsqueeze(1)
    found = matched_channels(points, points.site(".out", feature=0), background, count=19)
    patch = zero_ablate(points.site(".out", feature=0))
    for other in (points, hook_points(nn.Identity(), torch.zeros(3, 60), axes={".out": ("batch", "feature")})):
        result = sweep(other, background, patches=patch, controls=form(found), metric=lambda output: output.sum(dim=1))
        assert result.no_p == found.no_p and result.to_records()[0]["p"] is None


def test_amid_its_pool_an_effect_has_a_p_which_may_be_one_sided() -> None:
    points = ranked_by_mean(60)
    background = torch.linspace(60, 1, 60) * torch.linspace(0.5, 1.5, 9).unsqueeze(1)
    found = matched_channels(points, points.site(".out", feature=30), background, count=19)
    assert found.no_p == "" and "No p-values" not in repr(found)
    effects = np.linspace(-3, -1, 19)
    assert found.rank(0.5, effects).p == 1
    assert found.rank(0.5, effects, alternative="greater").p == 1 / 20


def test_equal_means_are_on_both_sides() -> None:
    points = ranked_by_mean(60)
    background = torch.ones(60) * torch.linspace(0.5, 1.5, 9).unsqueeze(1)
    assert matched_channels(points, points.site(".out", feature=0), background, count=19).no_p == ""


def test_controls_that_are_drawn_among_all_channels_say_that_they_are_not_matched() -> None:
    found = matched_channels(POINTS, POINTS.site("ramp", channel=16), IMAGES, count=19, seed=0)
    assert (found.pool, found.live) == (28, 28)
    assert repr(found).startswith(
        "19 controls, drawn from the 28 nearest of 28 other live channels, so the controls are not matched; use a "
        "smaller count for closer controls"
    )


def test_every_model_has_matched_channels(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(3))
    axis = "channel" if "channel" in points[model.site].axes else "feature"
    (control,) = matched_channels(points, points.site(model.site, **{axis: 2}), model.inputs(9), count=1, seed=0)
    assert dict(control.indices)[axis] != (2,)


def test_random_vectors_have_the_norm_of_every_row_and_other_directions() -> None:
    vector = torch.randn(2, 8, 5, 5, generator=GENERATOR) * torch.tensor([1.0, 7.0]).view(2, 1, 1, 1)
    drawn = random_vectors(vector, count=50, seed=0)
    assert drawn.shape == (50, 2, 8, 5, 5) and drawn.dtype == vector.dtype
    torch.testing.assert_close(drawn.flatten(2).norm(dim=2), vector.flatten(1).norm(dim=1).expand(50, 2))
    cosine = torch.cosine_similarity(drawn.flatten(2), vector.flatten(1), dim=2)
    assert cosine.abs().max() < 4 / 200**0.5 and abs(cosine.mean()) < 4 / 200**0.5 / 100**0.5


def test_random_directions_are_uniform_and_the_seed_decides_them() -> None:
    drawn = random_vectors(torch.tensor([[3.0, 4.0]]), count=4000, seed=0)[:, 0]
    quadrants = torch.bincount((drawn[:, 0] > 0).long() + 2 * (drawn[:, 1] > 0).long(), minlength=4)
    assert ((quadrants - 1000).abs() < 120).all()
    torch.testing.assert_close(drawn.square().mean(0), torch.tensor([12.5, 12.5]), rtol=0.05, atol=0)
    again, other = (random_vectors(torch.tensor([[3.0, 4.0]]), count=4000, seed=seed)[:, 0] for seed in (0, 1))
    assert torch.equal(again, drawn) and not torch.equal(other, drawn)


def test_a_zeroed_channel_that_is_never_near_zero_lies_far_off_distribution() -> None:
    meter = off_distribution(POINTS, zero_ablate(POINTS.site("ramp", channel=20)), IMAGES[:8], IMAGES)
    mean, std = SUMS[:, 20].mean(), SUMS[:, 20].std(ddof=1)
    (record,) = meter.to_records()
    assert record["site"] == "Site('ramp', channel=20)"
    expected = {"z": -mean / std, "absolute_z": mean / std, "outside": 1.0, "patched": 0.0, "mean": mean, "std": std}
    expected |= {"lowest": SUMS[:, 20].min(), "highest": SUMS[:, 20].max()}
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert record["z"] < -50
    assert (meter.inputs, meter.background) == (8, 40)


def test_an_ablation_from_the_background_itself_stays_on_distribution() -> None:
    site = POINTS.site("ramp", channel=20)
    _, cache = run_with_cache(POINTS, IMAGES, sites=site)
    for patch, absolute_z in (
        (mean_ablate(site, cache), 0.0),
        (patch_in(site, cache), np.abs(SUMS[:, 20] - SUMS[:, 20].mean()).mean() / SUMS[:, 20].std(ddof=1)),
    ):
        meter = off_distribution(POINTS, patch, IMAGES, IMAGES)
        assert meter.outside.tolist() == [0.0]
        assert meter.z[0] == pytest.approx(0.0, abs=1e-3)
        assert meter.absolute_z[0] == pytest.approx(absolute_z, abs=1e-3)
    assert off_distribution(POINTS, resample_ablate(site, cache, seed=0), IMAGES, IMAGES).outside.tolist() == [0.0]


def test_all_patches_are_applied_and_the_table_has_the_farthest_channel_first() -> None:
    site = POINTS.site("ramp", channel=[1, 2], row=0)
    patches = [steer(site, torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)), zero_ablate(POINTS.site("ramp", channel=25))]
    meter = off_distribution(POINTS, patches, IMAGES, IMAGES)
    assert [channels(each)[0] for each in meter.sites] == [1, 2, 25]
    printed = [line.split(")")[0] for line in repr(meter).splitlines()[2:]]
    assert printed == [f"Site('ramp', channel={channel}" + ", row=0" * (channel < 25) for channel in (25, 2, 1)]
    row = IMAGES.abs()[:, 0, 0].sum(1).double().numpy()
    np.testing.assert_allclose(meter.z[:2], np.array([4.0, -12.0]) / row.std(ddof=1), rtol=1e-4)
    shares = [((row + shift < row.min()) | (row + shift > row.max())).mean() for shift in (4.0, -12.0)]
    assert meter.outside[:2].tolist() == shares


def test_a_channel_that_never_varies_has_no_z_but_is_outside_once_it_changes() -> None:
    site = POINTS.site("ramp", channel=[17, 20])
    changed = off_distribution(POINTS, zero_ablate(site), IMAGES, IMAGES)
    assert channels(changed.sites[0]) == (17,) and np.isnan(changed.z[0]) and changed.outside[0] == 1.0
    assert "channel=17" in repr(changed).splitlines()[-1]
    left = off_distribution(POINTS, steer(site, torch.zeros(1, 1, 1, 1)), IMAGES, IMAGES, batch_size=7)
    assert left.outside.tolist() == [0.0, 0.0]


def test_neither_batches_nor_their_order_change_the_distance() -> None:
    patch = zero_ablate(POINTS.site("ramp", channel=[1, 20]))
    whole = off_distribution(POINTS, patch, IMAGES, IMAGES)
    cut = off_distribution(POINTS, patch, IMAGES, iter(IMAGES.flip(0).split(7)))
    for one, other in zip(whole.to_records(), cut.to_records(), strict=True):
        assert one.pop("site") == other.pop("site")
        assert one == pytest.approx(other, rel=1e-6)


def test_the_distance_is_measured_on_every_model_and_leaves_it_as_it_was(model: Model) -> None:
    points = hook_points(model.module, *model.inputs(3))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    meter = off_distribution(points, zero_ablate(points.site(model.site)), model.inputs(5), model.inputs(9))
    np.testing.assert_array_equal(meter.patched, 0.0)
    assert (meter.inputs, meter.background) == (5, 9)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_the_distances_print_as_a_table() -> None:
    lines = repr(off_distribution(POINTS, zero_ablate(POINTS.site("ramp")), IMAGES[:8], IMAGES)).splitlines()
    assert lines[0] == "32 channels: sums over 8 patched inputs and 40 background inputs"
    assert lines[1].split() == ["site", "z", "absolute_z", "outside", "patched", "mean", "std", "lowest", "highest"]
    assert len(lines) == 23 and lines[-1] == "... 12 more"


ATTENTION = build("attention")
UNNAMED = hook_points(ATTENTION.module, *ATTENTION.inputs(2))
LSTM = hook_points(nn.LSTM(3, 4), torch.randn(70, 10, 3))
BATCH_ON_AXIS_1 = (
    "The batch axis of the model's first input is axis 1, but inputs are split into batches along axis 0. Wrap the "
    "model in a module whose inputs have the batch axis first."
)
WITH_NAN = IMAGES.clone()
WITH_NAN[9, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: matched_channels(LSTM, ".out[0]", torch.randn(70, 10, 3), count=1, seed=0),
            StatisticsError,
            BATCH_ON_AXIS_1,
        ),
        (
            lambda: off_distribution(LSTM, zero_ablate(LSTM.site(".out[0]")), torch.randn(70, 10, 3), []),
            StatisticsError,
            BATCH_ON_AXIS_1,
        ),
        (
            lambda: off_distribution(POINTS, [], IMAGES, IMAGES),
            StatisticsError,
            "The argument patches= is empty. Pass at least one patch.",
        ),
        (
            lambda: matched_channels(POINTS, "ramp", IMAGES, count=1, seed=0, batch_size=0),
            StatisticsError,
            "batch_size must be a whole number, at least 1; got 0.",
        ),
        (
            lambda: matched_channels(POINTS, POINTS.site("ramp", channel=1), WITH_NAN, count=1, seed=0, batch_size=4),
            StatisticsError,
            "background[9] produces a non-finite activation at Site('ramp'). Leave out either that input or that site.",
        ),
        (
            lambda: off_distribution(POINTS, zero_ablate(POINTS.site("ramp")), IMAGES, WITH_NAN, batch_size=4),
            StatisticsError,
            "background[9] produces a non-finite activation at Site('ramp'). Leave out either that input or that site.",
        ),
        (
            lambda: off_distribution(POINTS, steer(POINTS.site("ramp"), torch.zeros(1, 1, 1, 1)), WITH_NAN, IMAGES),
            StatisticsError,
            "inputs[9] produces a non-finite activation at Site('ramp'). Leave out either that input or that site.",
        ),
        (
            lambda: matched_channels(POINTS, POINTS.site("ramp", channel=1), IMAGES, count=29, seed=0),
            SiteError,
            "Site('ramp', channel=1) has 28 other live channels (3 of 32 are dead: constant over the background), "
            "too few for count=29: each control must be a different set of size 1. Use a smaller count, or a site that "
            "selects fewer channels.",
        ),
        (
            lambda: matched_channels(POINTS, POINTS.site("ramp", channel=range(16)), IMAGES, count=1, seed=0),
            SiteError,
            "Site('ramp', channel=0:16) has 14 other live channels (3 of 32 are dead: constant over the background), "
            "too few for count=1: each control must be a different set of size 16. Use a smaller count, or a site that "
            "selects fewer channels.",
        ),
        (
            lambda: matched_channels(POINTS, "ramp", IMAGES, count=0, seed=0),
            StatisticsError,
            "count must be a whole number, at least 1; got 0.",
        ),
        (
            lambda: matched_channels(POINTS, "ramp", IMAGES[:1], count=1, seed=0),
            StatisticsError,
            "background must have at least 2 inputs, to measure how much activations vary; got 1.",
        ),
        (
            lambda: off_distribution(POINTS, zero_ablate(POINTS.site("ramp")), IMAGES, []),
            StatisticsError,
            "background must have at least 2 inputs, to measure how much activations vary; got 0.",
        ),
        (
            lambda: off_distribution(POINTS, zero_ablate(POINTS.site("ramp")), IMAGES[:0], IMAGES),
            StatisticsError,
            "The argument inputs= is empty. Pass at least one input.",
        ),
        (
            lambda: random_vectors(torch.zeros(1, 3), count=2, seed=0),
            EditError,
            "vector must have at least one axis and be floating point, finite and nonzero; got torch.float32 with "
            "shape (1, 3). Use contrast(...).steering_vector(site), for example.",
        ),
        (
            lambda: random_vectors([3.0, 4.0], count=2, seed=0),  # type: ignore[arg-type]
            EditError,
            "vector must be a tensor with the region's axes; got list.",
        ),
        (
            lambda: random_vectors(torch.ones(1, 3), count=0, seed=0),
            StatisticsError,
            "count must be a whole number, at least 1; got 0.",
        ),
    ],
)
def test_controls_that_do_not_exist_are_refused(call: Any, error: type[ChanpatchError], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_model_is_traced_with_the_inputs_that_it_gets() -> None:
    model, images = torch.nn.Conv2d(3, 8, 3), torch.randn(6, 3, 5, 5)
    points, site = hook_points(model, images), Site(".out", channel=0)
    drawn = [matched_channels(each, site, iter([images]), count=2, seed=0) for each in (model, points)]
    assert drawn[0] == drawn[1]
    meters = [off_distribution(each, zero_ablate(site), images, images) for each in (model, points)]
    assert meters[0].to_records() == meters[1].to_records()


def test_controls_of_neither_a_model_nor_its_hook_points_are_refused() -> None:
    nothing: Any = []
    for call in (
        lambda: matched_channels(nothing, Site("ramp", channel=0), IMAGES, count=1, seed=0),
        lambda: off_distribution(nothing, zero_ablate(Site("ramp")), IMAGES, IMAGES),
    ):
        with pytest.raises(TypeError, match=r"^Expected HookPoints or a torch\.nn\.Module, not list\.$"):
            call()


def test_a_site_without_channels_has_no_controls() -> None:
    points = hook_points(ATTENTION.module, *ATTENTION.inputs(2), axes={"embed": ("batch", "row", "position")})
    with pytest.raises(
        SiteError, match=r"Site\('embed'\) has axes \(batch, row, position\). Controls need a batch axis"
    ):
        matched_channels(points, "embed", ATTENTION.inputs(9), count=1, seed=0)
    with pytest.raises(SiteError, match="Name these axes with hook_points"):
        off_distribution(UNNAMED, zero_ablate(UNNAMED.site(".out")), ATTENTION.inputs(9), ATTENTION.inputs(9))


def test_random_sets_are_different_sets_of_equal_size_other_than_the_tested_ones() -> None:
    tested = [(0, 1, 2), (9, 8, 7)]
    sets = random_sets(range(10), 3, count=19, seed=1, other_than=tested)
    assert len({*sets}) == 19 and not {*sets} & {(0, 1, 2), (7, 8, 9)}
    assert all(len({*each}) == 3 and [*each] == sorted(each) for each in sets)
    assert sets == random_sets(range(10), 3, count=19, seed=1, other_than=tested)


def test_if_hardly_more_sets_exist_there_are_fewer() -> None:
    assert sorted(random_sets((4, 5, 6), 2, count=19, other_than=[(5, 4)])) == [(4, 6), (5, 6)]
    assert random_sets((4, 5), 2, count=19, other_than=[(4, 5)]) == []


def test_a_single_set_in_place_of_a_list_of_sets_is_refused() -> None:
    with pytest.raises(StatisticsError) as error:
        random_sets(range(9), 2, count=1, other_than=(3, 4))  # type: ignore[arg-type]
    assert str(error.value) == "other_than must contain sets of channels, such as [(3, 4)]; got [3, 4]."


def test_a_set_larger_than_the_channels_is_refused() -> None:
    with pytest.raises(StatisticsError) as error:
        random_sets((1, 2), 3, count=1)
    assert str(error.value) == "size must be at most 2, the number of channels to draw from; got 3."
