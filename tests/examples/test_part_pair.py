import copy

import numpy as np
import pytest
from studies import small_study

from maze.analysis import contrasts
from maze.analysis.forwards import SITE, level_sums
from maze.environment.pairs import contrastive_pairs, rotations
from maze.levels import draw_levels
from maze.measurements import pair as part
from maze.states import write_mazes


@pytest.fixture(scope="module")
def study():
    return small_study(6, tuple(range(32)))


@pytest.fixture(scope="module")
def tables(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "AUTOMATIC_LEVELS", 8)
        patch.setattr(part, "BACKGROUND_LEVELS", 20)
        patch.setattr(contrasts, "TEXTURES", 2)
        yield part.measure(study)


def test_our_first_pair_is_averaged_over_textures_and_facings_in_four_rotations(study, tables):
    mazes = rotations(contrastive_pairs()[0])
    levels = [
        write_mazes(turned.moved(facing_right=facing), base)
        for turned in mazes
        for base in draw_levels(2, size=7, seed=0)
        for facing in (False, True)
    ]
    sums = level_sums(study.points, SITE, [each for pair in levels for each in pair])[:, 7].reshape(4, 4, 2)
    rows = [row for row in tables["pictures"] if row["pair"] == 0]
    assert [row["first_step_0"] for row in rows] == ["UP", "RIGHT", "DOWN", "LEFT"]
    assert {row["n"] for row in rows} == {4}
    np.testing.assert_allclose([[row["sum_0"], row["sum_1"]] for row in rows], sums.mean(axis=1), rtol=1e-4, atol=1e-4)


def test_every_pair_made_from_a_level_is_counted_once(tables):
    counted = tables["falls"][0]
    assert 0 <= counted["falls"] <= counted["pairs"] <= 8
    assert counted["share"] == pytest.approx(counted["falls"] / counted["pairs"])
    assert sorted(row["channel"] for row in tables["automatic"]) == list(range(32))


@pytest.mark.parametrize(
    ("low", "high", "agrees", "changes"),
    [(0.6, 0.9, "yes", "wall changes"), (0.4, 0.9, "undecided", "reliably"), (0.1, 0.4, "no", "reliably")],
)
def test_the_finding_agrees_when_the_up_side_is_higher_in_most_pairs_from_levels(tables, low, high, agrees, changes):
    changed = copy.deepcopy(tables)
    changed["falls"][0] |= {"share_low": low, "share_high": high}
    counted = part.finding(changed)
    assert counted.agrees == agrees
    assert changes in counted.follows


def test_the_figure_draws_all_pairs_in_each_rotation(tables):
    axes = part.figure(tables).axes
    assert [len(each.lines) for each in axes[:4]] == [5, 5, 5, 5]
