import copy
from collections import deque

import numpy as np
import pytest
from studies import small_study

from maze.measurements import random_mazes as part
from maze.paths import MOVES, Direction
from maze.states import WALL, mazes_from_pictures, read_mazes

BLOCKED = """
    .#C
    ###
    M#.
"""


@pytest.fixture(scope="module")
def study():
    return small_study(14, tuple(range(32)))


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


@pytest.fixture(scope="module")
def mazes(study):
    return read_mazes(study.levels("random mazes 0.5", size=25, cheese="in distribution", mouse="anywhere"))


def steps_to_cheese(maze):
    """Breadth first, square by square."""
    free, start, goal = maze.free[0], tuple(maze.mouse[0]), tuple(maze.cheese[0])
    found, queue = {start: 0}, deque([start])
    while queue:
        here = queue.popleft()
        for move in MOVES:
            there = tuple(np.add(here, move))
            inside = all(0 <= each < len(free) for each in there)
            if inside and free[there] and there not in found:
                found[there] = found[here] + 1
                queue.append(there)
    return found.get(goal)


def test_edited_mazes_have_a_way_and_keep_mouse_and_cheese(mazes):
    edited, kept = part.randomised(mazes, 0.5, np.random.default_rng(0))
    assert len(mazes) >= len(kept) == len(edited) > 0
    for index, level in enumerate(kept):
        assert steps_to_cheese(edited[[index]]) is not None
        np.testing.assert_array_equal(edited.mouse[index], mazes.mouse[level])
        np.testing.assert_array_equal(edited.cheese[index], mazes.cheese[level])


def test_half_of_the_squares_that_are_made_random_change(mazes):
    edited, kept = part.randomised(mazes, 0.4, np.random.default_rng(1))
    changed = (edited.grid == WALL) != (mazes.grid[kept] == WALL)
    assert changed.mean() == pytest.approx(0.2, abs=0.03)


def test_a_share_of_zero_changes_nothing(mazes):
    edited, kept = part.randomised(mazes, 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(edited.grid, mazes.grid)
    assert len(kept) == len(mazes)


def test_a_maze_that_stays_without_a_way_is_left_out_after_all_tries():
    mazes = mazes_from_pictures(BLOCKED)
    edited, kept = part.randomised(mazes, 0.0, np.random.default_rng(0))
    assert (len(edited), len(kept)) == (0, 0)


def test_the_unedited_mazes_have_a_way_as_long(mazes):
    mazes = mazes[:6]
    way = np.array([4, 9, 2, 17, 6, 11], dtype=np.float32)
    matched = part._as_far(mazes, way, np.random.default_rng(0))
    assert [steps_to_cheese(matched[[index]]) for index in range(len(mazes))] == way.tolist()
    np.testing.assert_array_equal(matched.grid, mazes.grid)


def test_the_behaviour_counts_the_likeliest_legal_move_by_hand(study):
    levels = study.levels("behaviour", 5, size=9, cheese="in distribution", mouse="anywhere")
    readings = part.Readings.of(study.points, levels)
    right, chance = 0, []
    for level in range(5):
        legal = [move for move in Direction if readings.legal[level, move]]
        right += readings.first[level, max(legal, key=lambda move, level=level: readings.moves[level, move])]
        chance.append(1 / len(legal))
    cells = part._behaviour(readings)
    assert (cells["right"], cells["chance"]) == (pytest.approx(right / 5), pytest.approx(np.mean(chance)))
    ways = [steps_to_cheese(read_mazes([level])) for level in levels]
    assert cells["steps"] == pytest.approx(np.mean(ways))


def test_the_differences_are_from_mazes_with_as_long_a_way(tables):
    compared = [row for row in tables["areas"] if None not in (row["auc"], row["matched"])]
    assert compared
    for row in compared:
        assert row["minus_matched"] == pytest.approx(row["auc"] - row["matched"])


def test_the_finding_reads_the_largest_share(tables):
    changed = copy.deepcopy(tables)
    for row in changed["areas"]:
        row |= {
            "auc": 0.7,
            "auc_low": 0.6,
            "auc_high": 0.8,
            "minus_matched_low": -0.2,
            "minus_matched_high": 0.1,
        }
        row |= {"walls": 0.61, "beyond_walls_low": 0.05, "beyond_walls_high": 0.2}
        if row["share"] == 0.5 and row["direction"] == "UP":
            row |= {"auc": 0.4321, "beyond_walls_low": -0.3, "minus_matched_low": -0.2, "minus_matched_high": -0.05}
    finding = part.finding(changed)
    assert finding.agrees == "not comparable"
    assert "0.432" in finding.ours
    assert "(at most 0.61) for LEFT, DOWN, RIGHT." in finding.follows
    assert "equal path lengths for UP." in finding.follows


def test_mazes_without_any_area_are_drawn_and_told(tables):
    empty = copy.deepcopy(tables)
    for row in empty["areas"]:
        row |= {name: None for name in row if name.startswith(("auc", "minus", "matched"))}
    assert "too few mazes" in part.finding(empty).ours
    assert part.figure(empty).axes
