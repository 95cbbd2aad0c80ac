import copy

import numpy as np
import pytest
from studies import small_study

from chanpatch.statistics import auc, rank_correlation
from maze.analysis.readings import Readings
from maze.measurements import parity as part
from maze.paths import Direction
from maze.states import read_mazes

LIVE = (3, 10, 13, 16, 27, 31)


@pytest.fixture(scope="module")
def study():
    return small_study(12, LIVE)


@pytest.fixture(scope="module", autouse=True)
def few_levels_to_choose_on():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "CHOICE_LEVELS", 40)
        patch.setattr(part, "RESAMPLES", 49)
        yield


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


@pytest.mark.parametrize(
    ("square", "parity", "axis"),
    [
        ("odd, even", (1, 0), (Direction.DOWN, Direction.UP)),
        ("even, odd", (0, 1), (Direction.LEFT, Direction.RIGHT)),
        ("even, even", (0, 0), (Direction.DOWN, Direction.UP)),
        ("even, even", (0, 0), (Direction.LEFT, Direction.RIGHT)),
    ],
)
def test_the_mouse_is_on_a_square_of_the_class_from_which_it_goes_on_or_back(study, square, parity, axis):
    levels = study.levels("parity test", 8, size=25, cheese="in distribution")
    readings = part._readings(study, levels, "parity test", axis, square)
    assert (readings.mazes.mouse % 2 == parity).all()
    assert readings.legal[:, axis].all()
    assert readings.first[:, axis].any(axis=1).all()
    np.testing.assert_array_equal(readings.mazes.grid, read_mazes(levels).grid)


def test_the_areas_and_what_is_lost_by_the_other_class_by_hand():
    rng = np.random.default_rng(0)
    first = np.zeros((30, 4), dtype=bool)
    first[:, Direction.UP] = np.arange(30) % 2 == 0
    first[:, Direction.DOWN] = ~first[:, Direction.UP]
    sums = rng.normal(size=(30, 32))
    sums[:, 10] += 3 * first[:, Direction.UP]
    sums[:, 16] += 1 * first[:, Direction.UP]
    test = Readings(None, sums, sums[:, :4], first, first)
    own, other = np.array([0.5, 0.9, 0.6, 0.7, 0.5, 0.4]), np.array([0.5, 0.6, 0.4, 0.9, 0.3, 0.2])
    cells = part._transfer(test, Direction.UP, LIVE, own, other, seed=0)
    areas = [auc(sums[:, channel], first[:, Direction.UP]).estimate for channel in LIVE]
    assert (cells["channel_own"], cells["channel_other"]) == (10, 16)
    assert cells["auc_own"] == pytest.approx(areas[1])
    assert cells["loss"] == pytest.approx(areas[1] - areas[3])
    assert cells["rank_own"] == pytest.approx(rank_correlation(areas, own))
    assert cells["rank_loss"] == pytest.approx(rank_correlation(areas, own) - rank_correlation(areas, other))
    assert cells["loss_low"] < cells["loss"] < cells["loss_high"]


def test_without_a_maze_of_either_kind_nothing_is_estimated():
    first = np.ones((5, 4), dtype=bool)
    test = Readings(None, np.zeros((5, 32)), np.zeros((5, 4)), first, first)
    cells = part._transfer(test, Direction.UP, LIVE, np.full(6, 0.5), np.full(6, 0.5), seed=0)
    assert cells["auc_own"] is None and cells["channel_own"] is None and cells["positives"] == 5


def with_one_channel_in_every_case(tables):
    changed = copy.deepcopy(tables)
    filled = {f"{name}{end}": 0.0 for name in ("auc_own", "loss", "rank_own", "rank_other", "rank_loss")
              for end in ("", "_low", "_high")}  # fmt: skip
    for row in changed["transfer"]:
        row |= filled | {"channel_own": 5, "channel_other": 5}
    return changed


def test_cases_in_which_both_classes_choose_one_channel_are_counted(tables):
    told = part.finding(with_one_channel_in_every_case(tables))
    assert "In 8 of 8 cases" in told.ours and "in 0. The" in told.ours


@pytest.mark.parametrize(("low", "worse"), [(0.125, 1), (-0.125, 0)])
def test_the_other_classs_channel_is_worse_only_beyond_the_interval(tables, low, worse):
    changed = with_one_channel_in_every_case(tables)
    row = next(row for row in changed["transfer"] if (row["direction"], row["square"]) == ("UP", "odd, even"))
    row |= {"channel_other": 7, "loss": 0.25, "loss_low": low, "loss_high": 0.5}
    told = part.finding(changed)
    assert "In 7 of 8 cases" in told.ours
    assert f"the other class's channel is worse, interval above 0, in {worse}." in told.ours


def test_opposite_directions_count_once_if_the_order_of_channels_differs(tables):
    changed = with_one_channel_in_every_case(tables)
    for row in changed["transfer"]:
        if row["direction"] in ("UP", "DOWN") and row["square"] == "odd, even":
            row["rank_loss_low"] = 0.1
    assert "in 1 of 4 cases of an axis and a class" in part.finding(changed).follows


def test_tables_without_estimates_are_drawn_and_told(tables):
    empty = copy.deepcopy(tables)
    for row in empty["transfer"]:
        row |= {name: None for name in row if name.startswith(("auc", "loss", "rank"))}
    assert part.finding(empty).agrees == "not comparable"
    assert part.figure(empty).axes
    assert part.figure(tables).axes


def by_hand(study, squares):
    """The rank correlation, between the two axes, of the distances of the channels' AUCs from a half."""
    levels = study.levels("parity test", size=part.SIZE, cheese="in distribution")
    areas = []
    for axis, square in zip(part.PASSAGES.values(), squares, strict=True):
        readings = part._readings(study, levels, "parity test", axis, square)
        areas.append([abs(auc(readings.sums[:, each], readings.first[:, axis[0]]).estimate - 0.5) for each in LIVE])
    return rank_correlation(*np.round(areas, 9))


def test_the_axes_are_compared_between_crossings_and_at_crossings_by_hand(study, tables):
    passages, crossings = tables["between"]
    assert passages["rank_correlation"] == pytest.approx(by_hand(study, part.PASSAGES))
    assert crossings["rank_correlation"] == pytest.approx(by_hand(study, [part.CROSSING] * 2))
    assert (passages["live"], passages["n_vertical"], passages["n_horizontal"]) == (len(LIVE), 12, 12)
    text = part.finding({**tables, "between": [passages | {"rank_correlation": 0.42}, crossings]}).follows
    assert "rank correlation 0.42" in text
    assert f"between the two axes at (even, even) squares, {crossings['rank_correlation']:.2f} (" in text


@pytest.mark.parametrize("row", [0, 1])
def test_without_enough_mazes_the_two_axes_are_not_compared(tables, row):
    changed = copy.deepcopy(tables)
    changed["between"][row]["rank_correlation"] = None
    assert "The two kinds of passage are not compared: too few mazes." in part.finding(changed).follows
