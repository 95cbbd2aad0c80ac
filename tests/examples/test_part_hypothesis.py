import copy

import numpy as np
import pytest
from studies import from_files, shipped_points

from chanpatch.statistics import Interval
from maze.decision_squares import DISTANCES, Decisions
from maze.labels import LabelledChannel
from maze.part import Study
from maze.parts import hypothesis as part
from maze.parts.hypothesis import BASE, OWN, PUSH, Pushes, towards_cheese
from maze.paths import Direction
from maze.selection import Selection
from maze.tables import SITE


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "SIZE", 9)
        patch.setattr(part, "REFERENCE", 8)
        patch.setattr(part, "RESAMPLES", 99)
        patch.setattr("maze.part.SELECTION_LEVELS", 100)
        patch.setattr("maze.part.LABEL_LEVELS", 60)
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
    base, push = part._scored("in", some, told, seed=0)
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
    some_levels = study.levels("nothing", 4, size=9, mouse="decision square")
    some = part.at_decision_squares(study.points, some_levels)
    without = Pushes(np.zeros((4, 32)), np.zeros(32), np.ones(32))
    rows = part._ablated("in", some_levels, some, without, study, None)
    assert {(row["n_with_channels"], row["change"]) for row in rows} == {(0, 0.0)}


def test_the_channels_of_a_push_are_those_of_no_other_way():
    weights = np.array([[0.2, 0.3, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.4], [0.0] * 3])
    assert part._pushing(Pushes(weights, np.zeros(3), np.ones(3)), 0, 1) == [0]


def test_figure_and_finding_are_made_from_the_files(tables, tmp_path):
    back = from_files(tables, tmp_path)
    assert part.PART.finding(back) == part.PART.finding(tables)
    assert len(part.PART.figure(back).axes) == 2


def test_the_finding_changes_with_the_cells_it_is_made_of(tables):
    changed = copy.deepcopy(tables)
    for row in changed["controls"]:
        row |= {"auc": 0.8, "auc_low": 0.7, "auc_high": 0.9, "rank": 1, "rank_p": 0.01}
    for row in changed["predictions"]:
        row |= {"gain_low": 0.1, "gain_high": 0.3}
    found = part.PART.finding(changed)
    assert found.agrees == "yes" and "rank 1 of 100" in found.ours
    for row in changed["controls"]:
        row |= {"rank": 77, "rank_p": 0.77}
    found = part.PART.finding(changed)
    assert found.agrees == "in part" and "rank 77 of 100" in found.ours
    for row in changed["controls"]:
        row["rank_p"] = 0.01
    for row in changed["predictions"]:
        if row["predictor"] == PUSH:
            row["gain_low"] = -0.1
    assert part.PART.finding(changed).agrees == "in part"
    for row in changed["controls"]:
        row |= {"auc": None, "auc_low": None, "auc_high": None, "rank": None}
    assert part.PART.finding(changed).agrees == "not comparable"


def test_without_channels_for_any_direction_the_hypothesis_is_not_tested(tables):
    changed = copy.deepcopy(tables)
    changed["channels"][0]["count"] = 0
    for row in changed["channels"][1:]:
        row["count"] = 1
    assert f"No channel stands for {Direction.LEFT.name}, whose" in part.PART.finding(changed).ours
    for row in changed["channels"]:
        row["count"] = 0
    assert part.PART.finding(changed).agrees == "not comparable"
