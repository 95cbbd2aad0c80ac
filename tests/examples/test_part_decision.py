import copy

import numpy as np
import pytest
from studies import from_files, shipped_points

from maze.analysis.decision_squares import DISTANCES, Decisions, at_decision_squares
from maze.analysis.part import Study
from maze.measurements import decision as part
from maze.paths import Direction

GOES = {"UP": [0, 0, 1, 0], "RIGHT": [0, 0, 0, 1]}


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "SIZE", 9)
        patch.setattr(part, "MOST_DRAWN", 3)
        patch.setattr("maze.analysis.part.SELECTION_LEVELS", 80)
        patch.setattr("maze.analysis.decision_squares.THRESHOLD_LEVELS", 80)
        yield Study(shipped_points(), {}, 6, seed=0)


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def seen(goes, cheese, corner):
    n = len(goes)
    return Decisions(
        np.array([Direction[each] for each in cheese]),
        np.array([Direction[each] for each in corner]),
        np.array([GOES[each] for each in goes], dtype=float),
        np.zeros((n, 1)),
        np.ones((n, len(DISTANCES))),
    )


def test_a_square_is_counted_by_what_lies_there_and_whether_the_mouse_goes():
    some = seen(("UP", "UP", "RIGHT", "RIGHT"), ("UP", "RIGHT", "UP", "RIGHT"), ("RIGHT", "UP", "RIGHT", "DOWN"))
    rows = {(row["leads_to"], row["goes"]): row["count"] for row in part._squares({}, some, Direction.UP, 4)}
    assert rows == {
        ("cheese", True): 1,
        ("cheese", False): 1,
        ("corner", True): 1,
        ("corner", False): 0,
        ("neither", True): 0,
        ("neither", False): 1,
    }


def test_without_accepted_levels_there_are_no_shares():
    nothing = seen(("UP",), ("UP",), ("RIGHT",)).rows([])
    assert {row["share"] for row in part._squares({}, nothing, Direction.UP, 9)} == {None}
    row = part._choices({}, nothing, Direction.UP, 9)
    assert (row[part.CHOSEN], row["goes"], row["to_cheese"]) == (0.0, None, None)


def test_distance_that_explains_everything_leaves_no_matched_difference():
    near = seen(("UP",) * 20, ("UP",) * 20, ("RIGHT",) * 20)
    far = seen(("UP",) * 20, ("RIGHT",) * 20, ("UP",) * 20)
    for each, distance in ((near, 4), (far, 40)):
        each.distances[:] = distance
    order = [*range(15), *range(20, 25)], [*range(15, 20), *range(25, 40)]
    both = part.squares.joined([near, far])
    rows = {row["matched_on"]: row for row in part._matched("all", both.rows(order[0]), both.rows(order[1]), seed=0)}
    assert rows["nothing"]["difference"] == pytest.approx(0.5) and rows["nothing"]["difference_low"] > 0
    assert (rows["both"]["difference"], rows["both"]["n_in"], rows["both"]["n_out"]) == (0, 20, 20)


def test_accepted_levels_are_the_first_past_the_threshold(study, tables):
    for threshold in tables["thresholds"]:
        direction = Direction[threshold["direction"]]
        levels = [
            level
            for number in range(part.MOST_DRAWN)
            for level in study.levels(
                f"decision {part.SPLITS[0]} {number}", size=part.SIZE, cheese=part.SPLITS[0], mouse="decision square"
            )
        ]
        every = at_decision_squares(study.points, levels)
        assert threshold["accepts"] == "above"
        (row,) = (
            row
            for row in tables["choices"]
            if (row["direction"], row["squares"], row["split"]) == (direction.name, "accepted", part.SPLITS[0])
        )
        past = np.flatnonzero(every.sums[: row["drawn"], threshold["channel"]] > threshold["threshold"])
        drawn = past[-1] + 1 if len(past) == study.n else row["drawn"]
        assert (row["n"], row["drawn"]) == (len(past), drawn)
        if len(past):
            assert row["to_cheese"] == pytest.approx((every.chosen == every.cheese)[past].mean())


def test_the_counts_of_every_table_are_its_levels(tables):
    for row in tables["choices"]:
        key = row["direction"], row["split"], row["squares"]
        counts = [
            cell["count"] for cell in tables["squares"] if (cell["direction"], cell["split"], cell["squares"]) == key
        ]
        assert len(counts) == 6 and sum(counts) == row["n"] <= row["drawn"]


def test_figure_and_finding_are_made_from_the_files(tables, tmp_path):
    back = from_files(tables, tmp_path)
    assert part.finding(back) == part.finding(tables)
    assert len(part.figure(back).axes) == 3


@pytest.mark.parametrize(
    ("accepted", "drawn", "helps"),
    [
        (1000, 3000, False),  # n is there
        (66, 1000, True),  # n will be
        (240, 6000, False),  # `ENOUGH` is, and 20 n levels would hold some 800
        (120, 3000, True),  # `ENOUGH` will be
        (6, 1000, True),  # `FEWEST` may be
        (1, 2000, False),  # 20 n levels would hold some 10, and 60 at best
    ],
)
def test_levels_are_drawn_while_they_help(monkeypatch, accepted, drawn, helps):
    monkeypatch.setattr(part, "MOST_DRAWN", 20)
    assert part._helps(accepted, drawn, 1000) == helps


def test_no_more_than_n_levels_are_waited_for(monkeypatch):
    monkeypatch.setattr(part, "MOST_DRAWN", 20)
    assert part._helps(19, 20, 20) and not part._helps(20, 20, 20) and not part._helps(0, 100_000, 20)


def test_the_finding_changes_with_the_cells_it_is_made_of(tables):
    changed = copy.deepcopy(tables)
    for row in changed["choices"]:
        least = 0.95 if row["split"] == part.SPLITS[0] else 0.2
        row |= {"n": 999, "goes_low": 0.9, "goes_high": 1.0, "to_cheese_low": least, "to_cheese_high": least + 0.05}
    for row in changed["matched"]:
        row |= {"difference": 0.5, "difference_low": 0.4, "difference_high": 0.6}
    found = part.finding(changed)
    assert found.agrees == "yes" and "n=999" in found.ours
    for row in changed["matched"]:
        row["difference_low"] = -0.1
    assert part.finding(changed).agrees == "in part"


def test_every_rate_of_acceptance_says_what_it_is_a_rate_of(tables):
    assert "accepted_of_random_squares" in tables["thresholds"][0]
    assert "accepted_of_decision_squares" in tables["choices"][0]


def test_few_levels_on_a_side_are_not_judged(tables):
    changed = copy.deepcopy(tables)
    for row in changed["choices"]:
        row |= {"goes_low": 0.9, "goes_high": 1.0, "to_cheese_low": 0.95, "to_cheese_high": 1.0}
        row["n"] = part.FEWEST - (row["split"] == part.SPLITS[1])
    for row in changed["matched"]:
        row |= {"difference": 0.5, "difference_low": 0.4, "difference_high": 0.6}
    found = part.finding(changed)
    assert found.agrees == "undecided" and "fewer than 100, so this is not judged" in found.ours


def test_a_mouse_that_misses_the_cheese_in_distribution_does_not_agree_in_full(tables):
    inside = {"n": 500, "to_cheese_low": 0.7, "to_cheese_high": 0.8}
    outside = {"n": 500, "goes_low": 0.9, "goes_high": 1.0, "to_cheese_low": 0.4, "to_cheese_high": 0.6}
    assert part._claims(inside, outside, {"difference_low": 0.4, "difference_high": 0.6}) == [False, True, None, True]


def test_a_policy_without_thresholds_is_not_comparable(study, monkeypatch):
    monkeypatch.setattr("maze.analysis.decision_squares.thresholds", lambda _, directions: dict.fromkeys(directions))
    tables = part.measure(study)
    found = part.finding(tables)
    assert found.agrees == "not comparable" and "has no threshold" in found.ours
    assert part.figure(tables).axes
