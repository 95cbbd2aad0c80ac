import copy

import numpy as np
import pytest
import torch
from studies import from_files, shipped_points, small_study

from chanpatch import patched, zero_ablate
from chanpatch.statistics import benjamini_hochberg, rank_among
from maze.analysis.exact import Chains, first_hits
from maze.levels import policy_input
from maze.measurements import sweep as part

# The last convolution of all, whose suffix is short; 21 channels have ranks.
CHANNELS = [("embedder.block3.res2.conv2", channel) for channel in range(21)]

ALL_CHANNELS = part._channels


@pytest.fixture(scope="module", autouse=True)
def some_channels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "_channels", lambda points: iter(CHANNELS))
        yield


@pytest.fixture(scope="module")
def tables():
    return part.measure(small_study(3, (7,)))


def test_every_channel_of_every_convolution_is_swept():
    swept = list(ALL_CHANNELS(shipped_points()))
    assert len(swept) == len(set(swept)) == 5 * (16 + 32 + 32)
    assert set(CHANNELS) <= set(swept)


def test_the_effect_of_a_channel_is_that_of_the_patched_policy_run_state_by_state(tables):
    study = small_study(3, (7,))
    levels = study.levels("sweep", size=part.SIZE, cheese="bottom right")
    chains = Chains.of(levels)
    observations = torch.from_numpy(policy_input(chains.observations(slice(None))))
    found = {}
    for name, patches in (("plain", []), ("zeroed", [zero_ablate(study.points.site(CHANNELS[4][0], channel=4))])):
        with patched(study.points, patches), torch.no_grad():
            table = study.points.model(observations)[0].probs.numpy()
        found[name] = first_hits(chains, table, [chains.cheese])[chains.start, 0]
    row = tables["channels"][4]
    assert row["original"] == pytest.approx(found["plain"].mean(), abs=1e-5)
    assert row["effect"] == pytest.approx((found["zeroed"] - found["plain"]).mean(), abs=1e-5)


def test_a_channel_whose_change_is_rounding_is_dead_and_no_control():
    study = small_study(3, (7,))
    real = part._swept

    def with_a_dead_channel(*given):
        moves, plain = real(*given)
        moves[0] = plain + 1e-8 * np.sign(moves[0] - plain)
        return moves, plain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "_swept", with_a_dead_channel)
        first, second, *_ = part.measure(study)["channels"]
    assert (first["live"], first["p"], first["p_bh"], first["rank"]) == (False, None, None, None)
    assert second["live"] and second["controls"] == 19


def test_ranks_and_corrected_p_values_are_those_of_all_live_channels_by_hand(tables):
    rows = tables["channels"]
    assert all(row["live"] for row in rows)
    np.testing.assert_allclose([row["p_bh"] for row in rows], benjamini_hochberg([row["p"] for row in rows]))
    effects = [row["effect"] for row in rows]
    for number, row in enumerate(rows):
        rank = rank_among(effects[number], effects[:number] + effects[number + 1 :])
        assert (row["rank"], row["controls"]) == (rank.rank, 20)


def test_the_finding_counts_what_stands_after_correction_and_names_the_largest_gain(tables):
    changed = copy.deepcopy(tables)
    for row in changed["channels"]:
        row |= {"effect": 0.0, "p_bh": 0.5}
    changed["channels"][2] |= {"effect": 0.3, "effect_low": 0.2, "effect_high": 0.4, "p_bh": 0.01, "rank": 1}
    changed["channels"][3] |= {"effect": -0.1, "p_bh": 0.01}
    told = part.finding(changed)
    assert "for 1 and lowers it for 1" in told.ours
    assert "channel 2, +0.300 (+0.200 to +0.400), rank 1 of 21 live channels there" in told.ours
    assert "at 1 of 1 hook points: embedder.block3.res2.conv2." in told.follows


def test_without_live_channels_nothing_is_told(tables):
    dead = copy.deepcopy(tables)
    for row in dead["channels"]:
        row["live"] = False
    assert part.finding(dead).ours == "No channel changes anything."


def test_the_finding_and_the_figure_are_made_from_files(tables, tmp_path):
    read = from_files(tables, tmp_path)
    assert part.finding(read) == part.finding(tables)
    assert len(part.figure(read).axes) == 1
