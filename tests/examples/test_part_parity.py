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
    finding = part.finding(with_one_channel_in_every_case(tables))
    assert "In 8 of 8 cases" in finding.follows and finding.follows.endswith("in 0.")


@pytest.mark.parametrize(("low", "worse"), [(0.125, 1), (-0.125, 0)])
def test_the_other_classs_channel_is_worse_only_beyond_the_interval(tables, low, worse):
    changed = with_one_channel_in_every_case(tables)
    row = next(row for row in changed["transfer"] if (row["direction"], row["square"]) == ("UP", "odd, even"))
    row |= {"channel_other": 7, "loss": 0.25, "loss_low": low, "loss_high": 0.5}
    finding = part.finding(changed)
    assert "In 7 of 8 cases" in finding.follows
    assert f"the other class's channel is worse, interval above 0, in {worse}." in finding.follows


def test_tables_without_estimates_are_drawn_and_told(tables):
    empty = copy.deepcopy(tables)
    for row in empty["transfer"]:
        row |= {name: None for name in row if name.startswith(("auc", "loss", "rank"))}
    assert part.finding(empty).agrees == "not comparable"
    assert part.figure(empty).axes
    assert part.figure(tables).axes


def by_hand(study, axes, squares):
    """The rank correlation, between two classes, of the distances of the channels' AUCs from a half."""
    levels = study.levels("parity test", size=part.SIZE, cheese="in distribution")
    areas = []
    for axis, square in zip(axes, squares, strict=True):
        readings = part._readings(study, levels, "parity test", part.PASSAGES[axis], square)
        first = readings.first[:, part.PASSAGES[axis][0]]
        areas.append([abs(auc(readings.sums[:, each], first).estimate - 0.5) for each in LIVE])
    return rank_correlation(*np.round(areas, 9))


@pytest.mark.parametrize(
    ("compared", "axes", "squares"),
    [
        (part.BETWEEN[0], ("odd, even", "odd, even"), ("odd, even", "even, even")),
        (part.BETWEEN[1], ("even, odd", "even, odd"), ("even, odd", "even, even")),
        (part.BETWEEN[2], ("odd, even", "even, odd"), ("odd, even", "even, odd")),
        (part.BETWEEN[3], ("odd, even", "even, odd"), ("even, even", "even, even")),
    ],
)
def test_classes_with_one_axis_and_axes_with_one_class_are_compared_by_hand(study, tables, compared, axes, squares):
    (row,) = (row for row in tables["between"] if row["compared"] == compared)
    assert row["rank_correlation"] == pytest.approx(by_hand(study, axes, squares))
    assert (row["live"], row["n_one"], row["n_other"]) == (len(LIVE), 12, 12)
    changed = copy.deepcopy(tables)
    next(each for each in changed["between"] if each["compared"] == compared)["rank_correlation"] = 0.42
    assert " 0.42 (" in part.finding(changed).ours


@pytest.mark.parametrize("row", range(4))
def test_without_enough_mazes_nothing_is_compared(tables, row):
    changed = copy.deepcopy(tables)
    changed["between"][row]["rank_correlation"] = None
    assert part.finding(changed).ours == "Too few mazes."
