import copy

import numpy as np
import pytest
import torch
from studies import from_files, shipped_points

from chanpatch import channel_sums, mean_ablate, patched
from chanpatch.controls import matched_channels
from chanpatch.statistics import Interval
from maze.analysis.decision_squares import DISTANCES, Decisions
from maze.analysis.forwards import SITE, activations
from maze.analysis.labels import LabelledChannel
from maze.analysis.part import Study
from maze.analysis.push_ablation import Ablation, MatchedSets, ablate_push
from maze.analysis.selection import Selection
from maze.levels import observe, policy_input
from maze.measurements import hypothesis as part
from maze.measurements.hypothesis import BASE, OWN, PUSH, Pushes, towards_cheese
from maze.paths import Direction


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "SIZE", 9)
        patch.setattr(part, "REFERENCE", 8)
        patch.setattr("maze.analysis.part.SELECTION_LEVELS", 100)
        patch.setattr("maze.analysis.part.LABEL_LEVELS", 60)
        yield Study(shipped_points(), {}, 12, seed=0)


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def seen(cheese, corner, moves, sums):
    n = len(cheese)
    return Decisions(
        np.array(cheese), np.array(corner), np.array(moves, dtype=float), np.array(sums), np.ones((n, len(DISTANCES)))
    )


def test_a_push_is_the_weighted_sum_of_the_standardised_sums():
    rng = np.random.default_rng(0)
    weights, mean, deviation = rng.random((4, 3)), rng.random(3), rng.random(3) + 1
    some = seen([0, 3], [2, 1], np.ones((2, 4)), rng.random((2, 3)))
    expected = [
        [
            sum(weights[way, c] * (some.sums[level, c] - mean[c]) / deviation[c] for c in range(3))
            for way in (some.cheese[level], some.corner[level])
        ]
        for level in range(2)
    ]
    np.testing.assert_allclose(Pushes(weights, mean, deviation)(some), expected)


def labelled(label, area):
    return LabelledChannel(label, label, auc_choice=area and Interval(area, area - 0.1, area + 0.1, 0.95))


def test_a_channel_of_two_directions_pushes_for_both_and_one_without_label_for_none():
    sums = np.random.default_rng(0).normal(size=(40, 3))
    sums[:, 2] = 1.0
    selection = Selection(SITE, sums, np.zeros(40), np.empty(0), np.empty(0), {}, (0, 1), (0, 1))
    pushes = Pushes.of(selection, [labelled("UP", 0.9), labelled("LEFT or DOWN", 0.75), labelled(None, None)])
    np.testing.assert_allclose(pushes.weights, [[0, 0.25, 0], [0, 0.25, 0], [0.4, 0, 0], [0, 0, 0]])
    assert pushes.deviation[2] == 1


@pytest.mark.parametrize(("label", "area"), [("DOWN or UP", 0.7), ("UP", 0.45), ("UP", None)])
def test_a_channel_that_tells_no_more_than_the_walls_do_pushes_for_no_direction(label, area):
    selection = Selection(SITE, np.ones((4, 1)), np.zeros(4), np.empty(0), np.empty(0), {}, (0,), (0,))
    assert not Pushes.of(selection, [labelled(label, area)]).weights.any()


def test_towards_the_cheese_is_its_share_of_the_two_ways():
    some = seen([0, 0, 0], [1, 1, 1], [[0.2, 0.6, 0.2, 0], [1, 0, 0, 0], [0, 0, 1, 0]], np.zeros((3, 1)))
    np.testing.assert_allclose(towards_cheese(some), [0.25, 1, 0.5])


def test_accuracy_counts_levels_on_which_the_mouse_goes_one_of_the_two_ways():
    moves = [[0.9, 0.1, 0, 0], [0.4, 0.6, 0, 0], [0.1, 0.2, 0.7, 0]]
    some = seen([0] * 3, [1] * 3, moves, np.zeros((3, 1)))
    told = {BASE: np.ones(3, dtype=bool), PUSH: np.array([True, False, True])}
    base, push = part._scored("in", some, told)
    assert (base["n"], base["went_elsewhere"], base["accuracy"], push["accuracy"]) == (2, 1, 0.5, 1.0)
    assert push["gain"] == 0.5 and base["gain"] is None
    assert base["sampled"] == pytest.approx((0.9 + 0.4 + 1 / 3) / 3)
    assert push["sampled"] == pytest.approx((0.9 + 0.6 + 1 / 3) / 3)


def test_the_policys_own_probabilities_predict_its_likeliest_moves(tables):
    own = [row for row in tables["predictions"] if row["predictor"] == OWN]
    assert len(own) == 2 and all(row["accuracy"] == 1 for row in own)


def test_mice_that_all_go_one_way_leave_nothing_to_separate(study):
    pushes = Pushes(np.ones((4, 32)), np.zeros(32), np.ones(32))
    some = seen([0] * 5, [1] * 5, [[1.0, 0, 0, 0]] * 5, np.random.default_rng(0).random((5, 32)))
    row = part._against_controls("in", some, pushes, study)
    assert (row["auc"], row["rank"]) == (None, None)


def test_without_any_channel_nothing_is_ablated(study):
    levels = study.levels("nothing", 4, size=9, mouse="decision square")
    some = part.at_decision_squares(study.points, levels)
    done = ablate_push(study.points, levels, some, lambda cheese, corner: [], None, None)
    assert np.array_equal(done.towards, towards_cheese(some) > 0.5) and done.affected == 0
    row = part._ablated(done.towards, done)
    assert (row["n_with_channels"], row["change"]) == (0, 0.0)


def observations(study, count=20):
    return torch.from_numpy(policy_input(observe(study.levels("background", count, size=9, mouse="anywhere"))))


@pytest.mark.parametrize("channels", [(7,), (7, 16, 26)])
def test_controls_are_19_different_sets_of_as_many_other_live_channels(study, channels):
    background = observations(study)
    sums = channel_sums(study.points, background, SITE)
    dead = set(np.flatnonzero(np.ptp(sums, axis=0) == 0))
    sets = [dict(site.indices)["channel"] for site in MatchedSets(study.points, background, seed=0).of(channels)]
    assert len({frozenset(each) for each in sets}) == 19
    for each in sets:
        assert len(set(each)) == len(channels) and not set(each) & (dead | set(channels))


def test_controls_of_several_channels_are_nearer_than_random_sets(study):
    background, channels = observations(study), (7, 16, 26)
    near = MatchedSets(study.points, background, seed=0).of(channels)
    site = study.points.site(SITE, channel=list(channels))
    every = matched_channels(study.points, site, background, count=19, seed=0)  # among all, as the pool is so large
    assert every.pool == every.live
    assert np.mean(list(near.values())) < 0.75 * np.mean(every.apart)


def test_where_few_other_channels_are_live_there_are_fewer_controls_and_no_p(study):
    few = MatchedSets(study.points, observations(study), seed=0)
    most = tuple(np.flatnonzero(np.ptp(channel_sums(study.points, few.background, SITE), axis=0)).tolist())[:-3]
    assert len(few.of(most)) == 0
    before = np.array([True, False, True])
    row = part._ablated(before, Ablation(~before, np.stack([before, before]), 3, 0.5))
    assert (row["controls"], row["rank"], row["rank_p"]) == (2, 1, None)
    assert row["why_no_p"] == "fewer than 19 controls"
    assert "rank 1 of 3, no p-value: fewer than 19 controls" in part._beside(row)
    alone = part._ablated(before, Ablation(~before, np.empty((0, 3), dtype=bool), 3, np.nan))
    assert (alone["controls"], alone["rank"], alone["why_no_p"]) == (0, None, "there are no other channels")
    assert part._beside(alone) == "no other channels to compare with"


def test_an_ablated_push_and_its_controls_are_those_of_a_loop(study):
    levels = study.levels("loop", 12, size=9, mouse="decision square")
    some = part.at_decision_squares(study.points, levels)
    background = study.levels("background", 20, size=9, mouse="anywhere")
    reference, sets = activations(study.points, background, SITE), MatchedSets(study.points, observations(study), 0)
    done = ablate_push(study.points, levels, some, lambda cheese, corner: [7, 16, cheese], sets, reference)
    controls = range(-1, len(done.controls))
    for level, (cheese, corner) in enumerate(zip(some.cheese, some.corner, strict=True)):
        channels = 7, 16, int(cheese)
        sites = [study.points.site(SITE, channel=list(channels)), *sets.of(channels)]
        for number in controls:
            with patched(study.points, mean_ablate(sites[number + 1], reference)):
                (moves,) = part.at_decision_squares(study.points, levels[level : level + 1]).moves
            told = done.towards if number < 0 else done.controls[number]
            assert told[level] == (moves[cheese] > moves[corner])
    assert len(done.controls) == 19 and (done.controls != done.towards).any()


def test_the_rank_of_a_push_counts_the_controls_that_change_as_much(tables):
    for row in tables["ablations"]:
        key = row["split"], row["ablated"]
        others = [each["change"] for each in tables["ablation_controls"] if (each["split"], each["ablated"]) == key]
        assert row["controls"] == len(others) == 19
        assert row["rank"] == 1 + sum(abs(each) >= abs(row["change"]) - 1e-12 for each in others)
        if row["why_no_p"]:
            assert row["rank_p"] is None and "is at the edge of its pool" in row["why_no_p"]
        else:
            assert row["rank_p"] == row["rank"] / 20
        assert row["controls_median"] == pytest.approx(np.median(others))


def test_the_channels_of_a_push_are_those_of_no_other_way():
    weights = np.array([[0.2, 0.3, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.4], [0.0] * 3])
    assert Pushes(weights, np.zeros(3), np.ones(3)).only(0, 1) == [0]


def test_figure_and_finding_are_made_from_the_files(tables, tmp_path):
    back = from_files(tables, tmp_path)
    assert part.finding(back) == part.finding(tables)
    assert len(part.figure(back).axes) == 2


def test_the_finding_changes_with_the_cells_it_is_made_of(tables):
    changed = copy.deepcopy(tables)
    for row in changed["controls"]:
        row |= {"auc": 0.8, "auc_low": 0.7, "auc_high": 0.9, "rank": 1, "rank_p": 0.01}
    for row in changed["predictions"]:
        row |= {"gain_low": 0.1, "gain_high": 0.3}
    found = part.finding(changed)
    assert found.agrees == "yes" and "rank 1 of 100" in found.ours
    for row in changed["controls"]:
        row |= {"rank": 77, "rank_p": 0.77}
    found = part.finding(changed)
    assert found.agrees == "in part" and "rank 77 of 100" in found.ours
    for row in changed["controls"]:
        row["rank_p"] = 0.01
    for row in changed["predictions"]:
        if row["predictor"] == PUSH:
            row["gain_low"] = -0.1
    assert part.finding(changed).agrees == "in part"
    for row in changed["controls"]:
        row |= {"auc": None, "auc_low": None, "auc_high": None, "rank": None}
    assert part.finding(changed).agrees == "not comparable"


def test_without_channels_for_any_direction_the_hypothesis_is_not_tested(tables):
    changed = copy.deepcopy(tables)
    changed["channels"][0]["count"] = 0
    for row in changed["channels"][1:]:
        row["count"] = 1
    assert f"No channel stands for {Direction.LEFT.name}, whose" in part.finding(changed).ours
    for row in changed["channels"]:
        row["count"] = 0
    assert part.finding(changed).agrees == "not comparable"
