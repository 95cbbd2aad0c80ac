import copy

import numpy as np
import pytest
from studies import small_study

from maze.analysis.contrasts import drawn_pairs
from maze.analysis.forwards import SITE, level_sums
from maze.measurements import pair as part


@pytest.fixture(scope="module")
def study():
    return small_study(6, tuple(range(32)))


@pytest.fixture(scope="module")
def tables(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "AUTOMATIC_LEVELS", 8)
        patch.setattr(part, "BACKGROUND_LEVELS", 20)
        yield part.measure(study)


def test_the_first_pair_is_the_posts_in_four_rotations(study, tables):
    sums = [level_sums(study.points, SITE, pair.levels)[:, 7] for pair in drawn_pairs()[:4]]
    rows = [row for row in tables["pictures"] if row["pair"] == 0]
    assert [row["first_step_0"] for row in rows] == ["UP", "RIGHT", "DOWN", "LEFT"]
    np.testing.assert_allclose([[row["sum_0"], row["sum_1"]] for row in rows], sums, rtol=1e-4, atol=1e-4)


def test_every_pair_made_from_a_level_is_counted_once(tables):
    told = tables["told"][0]
    assert 0 <= told["falls"] <= told["pairs"] <= 8
    assert told["share"] == pytest.approx(told["falls"] / told["pairs"])
    assert sorted(row["channel"] for row in tables["automatic"]) == list(range(32))


@pytest.mark.parametrize(
    ("share_low", "swapped", "agrees", "changes"),
    [
        (0.6, False, "yes", "wall changes"),
        (0.6, True, "in part", "wall changes"),
        (0.4, False, "in part", "reliably"),
        (0.4, True, "undecided", "reliably"),
    ],
)
def test_the_finding_agrees_when_the_up_side_is_higher_everywhere(tables, share_low, swapped, agrees, changes):
    changed = copy.deepcopy(tables)
    changed["told"][0] |= {"share_low": share_low, "share_high": 0.9}
    for row in changed["pictures"]:
        row |= {"sum_0": 5.0, "sum_1": 1.0} if row["first_step_0"] == "UP" else {"sum_0": 1.0, "sum_1": 5.0}
    if swapped:
        changed["pictures"][0] |= {"sum_0": 1.0, "sum_1": 5.0}
    told = part.finding(changed)
    assert told.agrees == agrees
    assert changes in told.follows


def test_the_figure_draws_all_pairs_in_each_rotation(tables):
    axes = part.figure(tables).axes
    assert [len(each.lines) for each in axes[:4]] == [5, 5, 5, 5]
