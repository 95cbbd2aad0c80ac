import copy

import numpy as np
import pytest
from studies import small_study

from chanpatch.statistics import auc
from maze.analysis.readings import Readings
from maze.measurements import sizes as part
from maze.paths import Direction, first_steps, legal_moves
from maze.states import read_mazes


@pytest.fixture(scope="module")
def study():
    return small_study(8, tuple(range(32)))


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def test_every_size_is_measured_on_the_levels_of_that_size_alone(study, tables):
    levels = study.levels("sizes in distribution", 12 * 8, cheese="in distribution", mouse="anywhere")
    mazes = read_mazes(levels)
    legal = legal_moves(mazes)[np.arange(len(mazes)), Direction.UP, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    for row in tables["sizes"]:
        if (row["direction"], row["split"]) == ("UP", "in distribution"):
            chosen = legal & (mazes.size == row["size"])
            labels = first_steps(mazes, mazes.cheese)[chosen, Direction.UP]
            assert (row["n"], row["positives"]) == (chosen.sum(), labels.sum())
            if 2 <= labels.sum() <= len(labels) - 2:
                sums = Readings.of(study.points, [levels[index] for index in np.flatnonzero(chosen)]).sums[:, 7]
                # Sums of other batches differ in the last bits, an area only where two of them tie.
                assert row["auc"] == pytest.approx(auc(sums, labels).estimate, abs=1e-6)


def test_the_largest_size_is_compared_with_the_others_and_not_with_itself(tables):
    for row in tables["sizes"]:
        if row["size"] == 25:
            assert row["minus_largest"] is None
    assert any(row["minus_largest"] is not None for row in tables["sizes"])


@pytest.mark.parametrize(("lowest", "agrees"), [(0.1, "yes"), (-0.1, "undecided"), (-0.4, "no")])
def test_the_lowest_difference_from_the_walls_in_distribution_decides(tables, lowest, agrees):
    changed = copy.deepcopy(tables)
    inside = [row for row in changed["sizes"] if row["split"] == "in distribution"]
    for row in changed["sizes"]:
        row |= {"auc": 0.9, "auc_low": 0.8, "auc_high": 0.95}
        low = 0.3 if row in inside else -0.9
        row |= {"beyond_walls": low + 0.1, "beyond_walls_low": low, "beyond_walls_high": low + 0.2}
    inside[7] |= {"beyond_walls": lowest + 0.1, "beyond_walls_low": lowest, "beyond_walls_high": lowest + 0.2}
    assert len(inside) == 40
    assert part.finding(changed).agrees == agrees
    assert f"in {39 + (lowest > 0)} of 40 cells in distribution" in part.finding(changed).follows


def test_cells_with_too_few_mazes_are_left_out(tables):
    empty = copy.deepcopy(tables)
    for row in empty["sizes"]:
        row |= {name: None for name in row if name.startswith(("auc", "minus"))}
    assert part.finding(empty).agrees == "not comparable"
    assert part.figure(empty).axes


def test_a_difference_beyond_its_interval_is_counted(tables):
    changed = copy.deepcopy(tables)
    for row in changed["sizes"]:
        row |= {name: None for name in row if name.startswith("minus")}
    row = next(row for row in changed["sizes"] if row["auc"] is not None)
    row |= {"minus_largest": 0.2, "minus_largest_low": 0.1, "minus_largest_high": 0.3}
    assert "lower in 0 cells and higher in 1 of 1" in part.finding(changed).follows
