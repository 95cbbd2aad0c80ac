import copy

import numpy as np
import pytest
import torch
from studies import from_files, shipped_points, small_study

from chanpatch import PatchedPolicy, resample_ablate, zero_ablate
from chanpatch.statistics import mean_interval, wilson_interval
from maze.analysis import effects
from maze.analysis.cells import shown
from maze.analysis.effects import ablation, level_batches, p_reached, reference_of
from maze.analysis.exact import Chains, first_hits
from maze.analysis.forwards import SITE, activations, frames
from maze.analysis.labels import LabelledChannel
from maze.analysis.tables import action_tables
from maze.levels import draw_levels
from maze.measurements import PARTS
from maze.measurements import ablation as part
from maze.paths import Direction
from maze.policy.network import ACTIONS
from maze.states import read_mazes

RANKED = (7, 8, 24, 30, 23, 16)
PLACE = part.PLACES[0]


@pytest.fixture(scope="module", autouse=True)
def small_mazes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "SIZE", 9)
        patch.setattr(effects, "REFERENCE_LEVELS", 5)
        yield


@pytest.fixture(scope="module")
def study():
    study = small_study(3, RANKED)
    study.__dict__["labels"] = [
        LabelledChannel({7: "UP", 23: "UP", 16: "LEFT or DOWN"}.get(channel)) for channel in range(32)
    ]
    return study


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def row_of(tables, ablated, kind="zero", cheese=PLACE):
    (row,) = (
        row for row in tables["effects"] if (row["ablated"], row["kind"], row["cheese"]) == (ablated, kind, cheese)
    )
    return row


def found_by_hand(policy, level):
    """P(cheese within 256 steps) by the powers of one dense matrix."""
    chains = Chains.of([level])
    inputs = frames(chains.as_levels(slice(None)))
    shares = torch.cat([policy(batch)[0].probs for batch in inputs.split(64)]).double().detach().numpy()
    end = len(chains)
    matrix = np.zeros((end + 1, end + 1))
    matrix[end, end] = 1
    for state in range(end):
        for action, share in enumerate(shares[state] / shares[state].sum()):
            move = next((move for move, actions in ACTIONS.items() if action in actions), 4)
            matrix[state, chains.following[state, move]] += share
    return np.linalg.matrix_power(matrix, 256)[chains.start[0], end]


def test_the_effect_of_zeroed_channels_is_that_of_a_dense_matrix_of_the_patched_policy(study):
    levels = study.levels("by hand", 5, size=9, cheese=PLACE)
    half = list(range(16))
    twin = PatchedPolicy(study.points, zero_ablate(study.points.site(SITE, channel=half)))
    ablations = {"zero half": ablation(study.points, "zero", half, torch.empty(0), seed=0)}
    found = p_reached(study.points, levels, ablations)
    expected = np.array([[found_by_hand(policy, level) for level in levels] for policy in (study.points.model, twin)])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 0.01


def test_resampling_draws_the_donors_of_a_forward_whose_rows_are_the_levels():
    points, levels = shipped_points(), draw_levels(6, size=5, seed=3, cheese="in distribution")
    reference = activations(points, draw_levels(5, size=9, seed=4, mouse="anywhere"), SITE)[SITE]
    chains = Chains.of(levels)
    intervention = ablation(points, "resample", [7, 8], reference[None], seed=7)
    table = action_tables(points, chains, {"resampled": intervention})["resampled"]
    patch = resample_ablate(points.site(SITE, channel=[7, 8]), reference, seed=7)
    first = frames(levels)
    expected = PatchedPolicy(points, patch).distribution(first).probs
    np.testing.assert_allclose(table[chains.start], expected.detach(), atol=1e-5)


def test_levels_take_turns_among_the_reference_sets():
    points, level = shipped_points(), np.array([0, 1, 2, 4])
    sets = torch.rand(3, 2, 32, 8, 8)
    (patch,) = ablation(points, "mean", [7, 8], sets, seed=0)(level)
    torch.testing.assert_close(patch.edit.value, sets[[0, 1, 2, 1]][:, :, 7:9].mean(dim=1))
    (patch,) = ablation(points, "resample", [7, 8], sets, seed=0)(level)
    for row, number in zip(patch.edit.value, [0, 1, 2, 1], strict=True):
        assert any(torch.equal(row, donor[7:9]) for donor in sets[number])


def test_the_reference_sets_are_the_clusters_of_an_interval():
    found = np.random.default_rng(0).random((2, 40)).round(3)
    (row,) = part._rows([("mean", "channel 7")], found, {}, (), PLACE)
    expected = mean_interval(found[1] - found[0], clusters=np.arange(40) % 20)
    assert (row["effect_low"], row["effect_high"]) == pytest.approx((expected.low, expected.high))
    assert reference_of("zero", 40) is None


def test_a_draw_per_step_averages_the_probabilities_over_the_donors(study):
    levels, sets = study.levels("per step", 3, size=5, cheese=PLACE), torch.rand(1, 4, 32, 8, 8) * 9
    found = part.per_step(study, levels, [(7,), (8, 24)], sets, seed=5)
    for group, each in zip([(7,), (8, 24)], found, strict=True):
        draws = {str(draw): ablation(study.points, "resample", group, sets, seed=5 + draw) for draw in range(10)}
        ((chains, tables),) = level_batches(study.points, levels, draws)
        expected = first_hits(chains, tables[1:].mean(axis=0), [chains.cheese])[chains.start, 0]
        np.testing.assert_allclose(each, expected, atol=1e-6)


def test_all_groups_are_ablated_in_three_ways_in_the_posts_place_and_zeroed_elsewhere(tables):
    per_step = [row for row in tables["effects"] if row["kind"] == part.PER_STEP]
    assert {row["ablated"] for row in per_step} == {"channel 7", "channel 8", "channel 24", "channel 30", "top 6"}
    assert len(tables["effects"]) - len(per_step) == (3 + 1 + 1) * (len(RANKED) + 1)
    assert {(row["cheese"], row["kind"]) for row in tables["effects"] if row["cheese"] != PLACE} == {
        (place, "zero") for place in part.PLACES[1:]
    }
    assert {row["ablated"] for row in tables["effects"]} == {*(f"channel {each}" for each in RANKED), "top 6"}


def test_the_reference_of_means_and_donors_is_named_in_the_method():
    words = "come from 20 sets of 100 levels of size 15, cheese in distribution, mouse anywhere."
    assert words in PARTS["ablation"].method


def test_the_effect_is_the_modified_share_minus_the_original(tables):
    for row in tables["effects"]:
        assert row["effect"] == pytest.approx(row["modified"] - row["original"])
        assert row["effect_low"] is row["effect_high"] is None  # of three levels


def test_the_three_places_of_the_cheese_are_in_the_same_mazes(study):
    mazes = [read_mazes(study.levels("ablation", size=9, cheese=place)) for place in part.PLACES]
    for other in mazes[1:]:
        np.testing.assert_array_equal(other.free, mazes[0].free)


def test_the_up_channel_is_ranked_by_increase_among_channels_of_no_other_direction(tables):
    assert {row_of(tables, f"channel {each}")["role"] for each in (8, 24, 30)} == {"LEFT", "DOWN", "RIGHT"}
    assert (row_of(tables, "channel 23")["role"], row_of(tables, "channel 16")["role"]) == (
        "control",
        "other direction",
    )
    row = row_of(tables, "channel 7")
    assert row["rank"] == 1 + (row_of(tables, "channel 23")["effect"] >= row["effect"])
    assert (row["controls"], row["rank_p"]) == (1, None)
    assert {each["rank"] for each in tables["effects"] if each["role"] != "UP"} == {None}


def test_a_channel_that_is_the_same_on_all_reference_levels_is_not_a_control():
    found = np.array([[0.5, 0.5], *([0.5 + each / 10] * 2 for each in (2, 0, 3, 1))])
    ablated = [("zero", f"channel {each}") for each in range(4)]
    rows = part._rows(ablated, found, {"channel 0": "UP"}, {"channel 0", "channel 2", "channel 3"}, "top left")
    assert [(row["rank"], row["controls"]) for row in rows] == [(2, 2), *[(None, None)] * 3]


def test_channels_of_other_directions_do_not_add_to_the_controls():
    ablated = [("zero", f"channel {each}") for each in range(25)]
    found = 0.5 + np.arange(26)[:, None] / 100 * np.ones(2)
    roles = {"channel 24": "UP"} | {f"channel {each}": part.OTHER for each in range(5)}
    row = part._rows(ablated, found, roles, {name for _, name in ablated}, "top left")[-1]
    assert (row["rank"], row["controls"], row["rank_p"]) == (1, 19, pytest.approx(1 / 20))


def test_the_counts_of_the_walks_add_up_to_the_levels(tables):
    for row in tables["walks"]:
        assert row["both"] + row["only_modified"] + row["only_original"] + row["neither"] == row["n"] == 3


def test_shares_of_walks_and_means_of_both_policies_have_their_intervals(tables):
    for row in tables["walks"]:
        for name in part.OUTCOMES:
            share = wilson_interval(row[name], row["n"])
            assert [row[f"{name}_share{end}"] for end in ("", "_low", "_high")] == [
                share.estimate,
                share.low,
                share.high,
            ]
    for name in ("original", "modified"):
        for row in tables["effects"]:
            assert row[name] is not None and row[f"{name}_low"] is row[f"{name}_high"] is None  # of three levels


def test_a_policy_with_one_live_channel_is_measured_without_controls():
    study = small_study(1, (7,), best=dict.fromkeys(Direction, 7))
    tables = part.measure(study)
    row = row_of(tables, "channel 7")
    assert (row["role"], row["rank"], row["controls"]) == ("LEFT, DOWN, UP, RIGHT", None, None)
    assert "rank" not in part.finding(tables).ours
    part.figure(tables)


@pytest.fixture
def helpful(tables):
    """The tables of a policy that finds the cheese more often by every ablation, most of all in the post's place."""
    changed = copy.deepcopy(tables)
    for kind in ("zero", "mean", "resample"):
        row_of(changed, "channel 7", kind).update(effect=0.2, effect_low=0.1, effect_high=0.3)
    for row in changed["across"]:
        row.update(difference=0.2, difference_low=0.1, difference_high=0.3)
    return changed


@pytest.mark.parametrize(
    ("effect", "low", "high", "agrees"),
    [(0.2, 0.1, 0.3, "yes"), (0.2, -0.1, 0.3, "undecided"), (-0.2, -0.3, -0.1, "no")],
)
def test_the_finding_agrees_when_zeroing_the_up_channel_helps(helpful, effect, low, high, agrees):
    row_of(helpful, "channel 7").update(effect=effect, effect_low=low, effect_high=high)
    finding = part.finding(helpful)
    assert finding.agrees == agrees
    assert shown(row_of(helpful, "channel 7"), "effect", "+.3f") in finding.ours


def test_the_other_ablations_are_listed_with_their_intervals_and_decide_nothing(helpful):
    row_of(helpful, "channel 7", "mean").update(effect=-0.2, effect_low=-0.3, effect_high=-0.1)
    finding = part.finding(helpful)
    assert finding.agrees == "yes"
    assert "Other ablations: mean -0.200 (-0.300 to -0.100), resample +0.200" in finding.follows


def test_the_finding_names_the_channel_that_changes_most_with_its_label_and_whether_it_was_chosen(tables):
    for channel, named in ((23, "Channel 23 (UP, not chosen by the rule)"), (30, "chosen for RIGHT)")):
        changed = copy.deepcopy(tables)
        row_of(changed, f"channel {channel}").update(effect=-0.9, effect_low=-0.95, effect_high=-0.85)
        summary = part.finding(changed).follows
        assert named in summary and "has the largest effect, -0.900 (-0.950 to -0.850)." in summary


def test_what_was_chosen_comes_first_in_the_table(tables):
    roles = list(dict.fromkeys(row["role"] for row in tables["effects"]))
    assert roles[-2:] == [part.OTHER, part.CONTROL] and len(roles) == 7


def test_the_finding_gives_the_rank_by_increase(tables):
    changed = copy.deepcopy(tables)
    row_of(changed, "channel 7").update(rank=2, rank_p=0.1)
    assert "rank 2 of 2 by increase (p = 0.1)." in part.finding(changed).ours


def test_the_finding_and_the_figure_are_made_from_files(tables, tmp_path):
    read = from_files(tables, tmp_path)
    assert part.finding(read) == part.finding(tables)
    part.figure(read)


def test_the_best_predictors_are_ranked_among_sets(tables):
    assert "sets" not in tables  # all live channels are in the group
    row = {"kind": "zero", "ablated": "top 16", "n": 9, "effect": -0.3, "effect_low": -0.4, "effect_high": -0.2}
    row |= {"rank": 5, "controls": 19, "rank_p": 0.25, "controls_lowest": -0.4, "controls_highest": 0.1}
    assert "zero -0.300 (-0.400 to -0.200), rank 5 of 20 (p = 0.25)" in part.finding({**tables, "sets": [row]}).follows
