import copy
from pathlib import Path

import numpy as np
import pytest
from studies import small_study

from chanpatch.statistics import auc, rank_correlation
from maze.analysis.cells import read_table
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


def test_opposite_directions_are_two_readings_of_the_same_mazes(tables):
    areas = {(row["direction"], row["square"], row["channel"]): row["auc"] for row in tables["channels"]}
    for (direction, square, channel), area in areas.items():
        opposite = Direction(3 - Direction[direction]).name
        if area is not None:
            assert area + areas[opposite, square, channel] == pytest.approx(1)


def test_the_activity_is_told_for_the_way_its_opposite_and_a_wall(tables):
    rows = [row for row in tables["activity"] if row["direction"] == "UP"]
    assert [(row["square"], row["kind"]) for row in rows] == [
        ("odd, even", part.WAY),
        ("odd, even", part.BACK),
        ("even, even", part.WAY),
        ("even, even", part.BACK),
        ("even, odd", part.WALL),
    ]
    assert rows[0]["n"] + rows[1]["n"] == rows[2]["n"] + rows[3]["n"] == rows[4]["n"] == 12


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


def test_every_channel_is_compared_between_the_two_kinds_of_passage(tables):
    areas = {(row["square"], row["direction"], row["channel"]): row for row in tables["channels"]}
    assert [row["channel"] for row in tables["passages"]] == list(LIVE)
    for row in tables["passages"]:
        folded = []
        for square, name in (("odd, even", "UP"), ("even, odd", "RIGHT")):
            told = areas[square, name, row["channel"]]
            assert [row[f"n_{name}"], row[f"auc_{name}_low"]] == [told["n"], told["auc_low"]]
            folded.append(max(told["auc"], 1 - told["auc"]))
        assert row["vertical_minus_horizontal"] == pytest.approx(folded[0] - folded[1])
        low, high = row["vertical_minus_horizontal_low"], row["vertical_minus_horizontal_high"]
        assert low is high is None or low <= row["vertical_minus_horizontal"] <= high  # None with few mazes


def test_the_two_kinds_of_passage_are_compared_by_how_well_each_channel_tells_one_way_from_the_other(tables):
    (row,) = tables["between"]
    told = [
        [abs(each["auc"] - 0.5) for each in tables["channels"] if (each["square"], each["direction"]) == passage]
        for passage in (("odd, even", "DOWN"), ("even, odd", "LEFT"))
    ]
    assert row["rank_correlation"] == pytest.approx(rank_correlation(*told))
    assert (row["live"], row["n_vertical"], row["n_horizontal"]) == (len(LIVE), 12, 12)
    changed = {**tables, "between": [row | {"rank_correlation": 0.42}]}
    assert "rank correlation 0.42" in part.finding(changed).follows


def test_the_comparison_of_two_kinds_of_square_stands_beside_that_of_two_axes_on_one_kind(tables):
    areas = [
        [
            abs(row["auc"] - 0.5)
            for row in tables["channels"]
            if (row["square"], row["direction"]) == ("even, even", way)
        ]
        for way in ("DOWN", "LEFT")
    ]
    expected = rank_correlation(*areas)
    assert part.axes_at_crossings(tables["channels"]) == pytest.approx(expected)
    told = part.finding(tables).follows
    assert f"between the two axes at (even, even) squares, {expected:.2f}." in told


def test_without_a_maze_at_crossings_the_two_axes_are_not_compared(tables):
    changed = copy.deepcopy(tables)
    for row in changed["channels"]:
        row["auc"] = None
    assert part.axes_at_crossings(changed["channels"]) is part.axes_at_crossings([]) is None
    assert "The two kinds of passage are not compared: too few mazes." in part.finding(changed).follows


def test_the_axes_of_the_committed_report_come_from_its_table():
    committed = Path(__file__).parents[2] / "docs" / "maze_study" / "imitation" / "parity" / "channels.csv"
    assert f"{part.axes_at_crossings(read_table(committed)):.2f}" == "0.07"
