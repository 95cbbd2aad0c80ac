import copy

import numpy as np
import pytest
import torch
from studies import from_files, small_study

from maze.analysis.cells import shown
from maze.analysis.exact import Chains
from maze.analysis.steering import BLOCK, OWN, added, difference_vectors
from maze.analysis.tables import action_tables
from maze.levels import draw_levels, observe, policy_input
from maze.measurements import corner_vector as part
from maze.paths import distances, top_right
from maze.states import mazes_from_pictures, read_mazes, write_mazes

THROUGH_THE_CORNER = """
    C....
    ####.
    .....
    .####
    M....
"""


@pytest.fixture(scope="module")
def study():
    return small_study(4, (7,))


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def test_one_wall_cuts_off_the_corner():
    mazes = read_mazes(draw_levels(5, size=9, seed=0, cheese="out of distribution"))
    walled = part.without_corner(mazes)
    assert ((walled.grid != mazes.grid).sum(axis=(1, 2)) == 1).all()
    assert np.isinf(distances(walled, top_right(walled))[:, 0, 0]).all()


def test_levels_whose_cheese_lies_behind_the_corner_are_left_out():
    base = draw_levels(1, size=5, seed=0)[0]
    levels = write_mazes(mazes_from_pictures(THROUGH_THE_CORNER), base)
    open_levels = draw_levels(3, size=3, seed=0, cheese="bottom right")
    assert part._with_free_cheese(levels) == []
    assert set(part._with_free_cheese(open_levels)) <= set(open_levels)


def test_with_the_vector_subtracted_the_first_square_looks_as_if_the_corner_were_walled_off(study):
    levels = study.levels("vectors", size=7, cheese="bottom right")
    mazes = read_mazes(levels)
    walled = part.without_corner(mazes)
    vectors = difference_vectors(study.points, levels, mazes, walled)
    chains = Chains.of(levels)
    intervention = added(study.points, vectors, -1.0)
    table = action_tables(study.points, chains, {OWN: intervention}, site=BLOCK)[OWN]
    expected = study.points.model(torch.from_numpy(policy_input(observe(write_mazes(walled, levels)))))[0].probs
    np.testing.assert_allclose(table[chains.start], expected.detach(), atol=1e-4)


@pytest.mark.parametrize(
    ("effect_low", "beyond_low", "agrees"), [(0.1, 0.1, "yes"), (0.1, -0.1, "in part"), (-0.1, 0.1, "undecided")]
)
def test_the_finding_agrees_when_the_corner_is_passed_more_often_than_with_the_controls(
    tables, effect_low, beyond_low, agrees
):
    changed = copy.deepcopy(tables)
    (own,) = (row for row in changed["effects"] if (row["measure"], row["intervention"]) == ("corner", OWN))
    own |= {"effect_low": effect_low, "effect_high": 0.2}
    for row in changed["against"]:
        low = beyond_low if row["control"] in part.JUDGES else -1.0
        row |= {"own_minus_control_low": low, "own_minus_control_high": 0.2}
    finding = part.finding(changed)
    assert finding.agrees == agrees
    assert shown(own, "effect", "+.3f") in finding.ours


def test_the_finding_and_the_figure_are_made_from_files(tables, tmp_path):
    read = from_files(tables, tmp_path)
    assert part.finding(read) == part.finding(tables)
    part.figure(read)


def test_the_own_vector_is_ranked_among_random_ones(tables):
    (row,) = tables["ranked"]
    own = next(each for each in tables["effects"] if (each["measure"], each["intervention"]) == ("corner", OWN))
    assert (row["controls"], row["n"], row["effect"]) == (19, own["n"], pytest.approx(own["effect"]))
    changed = {**tables, "ranked": [row | {"rank": 3, "rank_p": 0.15}]}
    assert "rank 3 of 20 (p = 0.15)" in part.finding(changed).follows
