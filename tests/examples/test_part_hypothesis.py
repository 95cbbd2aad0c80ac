import copy

import numpy as np
import pytest
from studies import from_files, shipped_points

from chanpatch import mean_ablate, patched
from chanpatch.controls import random_sets
from chanpatch.statistics import Interval
from maze.analysis.decision_squares import DISTANCES, Decisions
from maze.analysis.forwards import SITE, activations
from maze.analysis.labels import LabelledChannel
from maze.analysis.part import Study
from maze.analysis.selection import Selection
from maze.measurements import hypothesis as part
from maze.measurements.hypothesis import BASE, PUSH, Pushes, prefers_cheese
from maze.paths import Direction


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "SIZE", 9)
        patch.setattr(part.effects, "REFERENCE_LEVELS", 2)
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


def test_a_mouse_prefers_the_cheese_if_its_first_step_is_likelier_than_that_to_the_corner():
    some = seen([0, 0, 0], [1, 1, 1], [[0.2, 0.6, 0.2, 0], [1, 0, 0, 0], [0, 0, 1, 0]], np.zeros((3, 1)))
    assert prefers_cheese(some).tolist() == [False, True, False]


def test_accuracy_counts_levels_on_which_the_mouse_goes_one_of_the_two_ways():
    moves = [[0.9, 0.1, 0, 0], [0.4, 0.6, 0, 0], [0.1, 0.2, 0.7, 0]]
    some = seen([0] * 3, [1] * 3, moves, np.zeros((3, 1)))
    as_predicted = {BASE: np.ones(3, dtype=bool), PUSH: np.array([True, False, True])}
    base, push = part._scored("in", some, as_predicted)
    assert (base["n"], base["went_elsewhere"], base["accuracy"], push["accuracy"]) == (2, 1, 0.5, 1.0)
    assert push["gain"] == 0.5 and base["gain"] is None


def test_mice_that_all_go_one_way_leave_nothing_to_separate(study):
    pushes = Pushes(np.ones((4, 32)), np.zeros(32), np.ones(32))
    some = seen([0] * 5, [1] * 5, [[1.0, 0, 0, 0]] * 5, np.random.default_rng(0).random((5, 32)))
    row = part._against_controls("in", some, pushes, study)
    assert (row["auc"], row["rank"]) == (None, None)


def test_without_any_channel_nothing_is_ablated(study):
    levels = study.levels("nothing", 4, size=9, mouse="decision square")
    some = part.at_decision_squares(study.points, levels)
    pushes = Pushes(np.zeros((4, 32)), np.zeros(32), np.ones(32))
    after = part.ablate_push(study, levels, some, pushes, 0, None)
    before = prefers_cheese(some)
    assert np.array_equal(after, np.tile(before, (20, 1)))
    assert part._ablated(before, after)["change"] == 0.0


def test_with_few_controls_there_is_no_p_value_and_without_controls_no_rank():
    before = np.array([True, False, True])
    row = part._ablated(before, np.stack([~before, before, before]))
    assert (row["controls"], row["rank"], row["rank_p"]) == (2, 1, None)
    assert part._beside(row) == "rank 1 of 3"
    assert part._beside(row | {"rank_p": 0.05}) == "rank 1 of 3, p = 0.05"
    alone = part._ablated(before, ~before[None])
    assert (alone["controls"], alone["rank"]) == (None, None)
    assert part._beside(alone) == "no other sets to compare with"


@pytest.mark.parametrize("goal", [0, 1])
def test_an_ablated_push_and_its_controls_are_those_of_a_loop(study, goal):
    levels = study.levels("loop", 12, size=9, mouse="decision square")
    some = part.at_decision_squares(study.points, levels)
    background = activations(study.points, study.levels("background", 21, size=9, mouse="anywhere"), SITE)
    references = background[SITE].view(3, 7, 32, 8, 8)
    weights = np.zeros((4, 32))
    weights[np.arange(4), [8, 24, 7, 30]] = weights[np.arange(4), [23, 16, 10, 13]] = 0.3
    pushes = Pushes(weights, np.zeros(32), np.ones(32))
    after = part.ablate_push(study, levels, some, pushes, goal, references)
    for level, (cheese, corner) in enumerate(zip(some.cheese, some.corner, strict=True)):
        channels = np.flatnonzero(weights[corner if goal else cheese]).tolist()
        seed = study.seed_for("hypothesis others")
        sets = random_sets(study.selection.live, 2, count=19, seed=seed, other_than=[channels])
        for number, each in enumerate([channels, *sets]):
            with patched(study.points, mean_ablate(study.points.site(SITE, channel=list(each)), references[level % 3])):
                (moves,) = part.at_decision_squares(study.points, levels[level : level + 1]).moves
            assert after[number, level] == (moves[cheese] > moves[corner])
    assert len(after) == 20 and (after[1:] != after[0]).any()


def test_the_channels_of_a_push_are_those_of_no_other_way():
    weights = np.array([[0.2, 0.3, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.4], [0.0] * 3])
    assert Pushes(weights, np.zeros(3), np.ones(3)).only(0, 1) == [0]


def test_figure_and_finding_are_made_from_the_files(tables, tmp_path):
    back = from_files(tables, tmp_path)
    assert part.finding(back) == part.finding(tables)
    assert len(part.figure(back).axes) == 2


@pytest.mark.parametrize(("low", "high", "agrees"), [(0.1, 0.3, "yes"), (-0.1, 0.3, "undecided"), (-0.3, -0.1, "no")])
def test_the_gain_of_the_larger_push_out_of_distribution_decides(tables, low, high, agrees):
    changed = copy.deepcopy(tables)
    for row in changed["predictions"]:
        decides = (row["split"], row["predictor"]) == ("out of distribution", PUSH)
        row |= {"gain_low": low if decides else 0.1, "gain_high": high if decides else 0.3}
    for row in changed["controls"]:
        row |= {"rank": 77, "rank_p": 0.77, "controls": 99}
    found = part.finding(changed)
    assert found.agrees == agrees and "rank 77 of 100" in found.ours


def test_without_channels_for_any_direction_the_hypothesis_is_not_tested(tables):
    changed = copy.deepcopy(tables)
    changed["channels"][0]["count"] = 0
    for row in changed["channels"][1:]:
        row["count"] = 1
    assert f"No channel stands for {Direction.LEFT.name}, whose" in part.finding(changed).ours
    for row in changed["channels"]:
        row["count"] = 0
    assert part.finding(changed).agrees == "undecided"
