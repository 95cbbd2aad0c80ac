import copy

import numpy as np
import pytest
from studies import BEST, small_study

from maze.channels import channel_sums
from maze.parts import sums as part
from maze.paths import Direction, first_steps, legal_moves
from maze.states import read_mazes
from maze.tables import SITE


@pytest.fixture(scope="module")
def study():
    return small_study(20, tuple(range(32)))


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def test_the_sums_are_of_mazes_in_which_the_direction_is_legal(study, tables):
    levels = study.levels("sums in distribution", 60, size=25, cheese="in distribution", mouse="anywhere")
    mazes = read_mazes(levels)
    legal = legal_moves(mazes)[np.arange(60), Direction.UP, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    chosen = np.flatnonzero(legal)[:20]
    rows = [row for row in tables["sums"] if (row["direction"], row["split"]) == ("UP", "in distribution")]
    sums = channel_sums(study.points, SITE, [levels[index] for index in chosen])[:, BEST[Direction.UP]]
    np.testing.assert_allclose([row["sum"] for row in rows], sums, rtol=1e-4, atol=1e-4)
    labels = first_steps(mazes, mazes.cheese)[chosen, Direction.UP]
    np.testing.assert_array_equal([row["is_it"] for row in rows], labels)


def test_too_few_mazes_for_a_threshold_are_said_in_the_table_and_the_finding():
    few = part.measure(small_study(3, tuple(range(32))))
    assert all(row["quantity"].startswith("not measured") for row in few["transfer"])
    assert part.finding(few).agrees == "not comparable"
    assert part.figure(few).axes


@pytest.mark.parametrize(
    ("fit", "shifted", "drop", "agrees"),
    [(0.9, 0.7, 0.2, "yes"), (0.9, 0.7, 0.0, "in part"), (0.5, 0.5, 0.0, "undecided"), (0.3, 0.3, -0.2, "no")],
)
def test_the_finding_agrees_when_the_area_drops_and_stays_above_chance(tables, fit, shifted, drop, agrees):
    changed = copy.deepcopy(tables)
    for row in changed["transfer"]:
        if row["quantity"] == "AUC":
            for name, value in (("fit", fit), ("shifted", shifted), ("drop", drop)):
                row |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
    told = part.finding(changed)
    assert told.agrees == agrees
    assert ("no direction in both sets" in told.follows) == (fit <= 0.5)


def test_the_figure_has_a_column_of_marks_per_label_and_split(tables):
    axes = part.figure(tables).axes
    for each in axes:
        counts = [int(text.get_text().removeprefix("n=")) for text in each.texts]
        assert len(counts) == 4
        assert counts[0] + counts[1] == counts[2] + counts[3] == 20
