import copy

import numpy as np
import pytest
import torch
from studies import from_files, shipped_points, small_study

from maze.analysis.cells import shown
from maze.analysis.exact import Chains
from maze.analysis.steering import (
    BLOCK,
    CONTROLS,
    OWN,
    against_controls,
    difference_vectors,
    steered,
)
from maze.analysis.tables import action_tables
from maze.levels import observe, policy_input
from maze.measurements import cheese_vector as part
from maze.states import read_mazes, write_mazes


@pytest.fixture(scope="module")
def study():
    return small_study(4, (7,))


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


@pytest.fixture(scope="module")
def vectors(study):
    levels = study.levels("vectors", size=7, cheese="out of distribution")
    mazes = read_mazes(levels)
    return levels, difference_vectors(study.points, levels, mazes, mazes.without_cheese())


def test_with_its_own_vector_subtracted_the_first_square_looks_as_if_there_were_no_cheese(study, vectors):
    levels, differences = vectors
    chains = Chains.of(levels)
    intervention = steered(study.points, differences, -1.0, seed=0)[OWN]
    table = action_tables(study.points, chains, {OWN: intervention}, site=BLOCK)[OWN]
    unseen = policy_input(observe(write_mazes(chains.mazes.without_cheese(), levels)))
    expected = study.points.model(torch.from_numpy(unseen))[0].probs
    np.testing.assert_allclose(table[chains.start], expected.detach(), atol=1e-4)


def test_controls_have_the_norm_of_each_levels_own_vector_or_are_another_ones(vectors):
    _, differences = vectors
    level = np.arange(len(differences))
    added = {
        name: each(level)[0].edit.vector for name, each in steered(shipped_points(), differences, -1.0, seed=0).items()
    }
    norm = differences.flatten(1).norm(dim=1)
    other, shuffled, random = (added[name] for name in CONTROLS)
    torch.testing.assert_close(other[1:], differences[:-1])
    torch.testing.assert_close(shuffled.flatten(1).norm(dim=1), norm)
    torch.testing.assert_close(random.flatten(1).norm(dim=1), norm)
    torch.testing.assert_close(shuffled.sum(dim=1), differences.sum(dim=1), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(shuffled, differences)


def test_own_minus_control_is_the_mean_difference_over_levels():
    values = {"found": np.array([[0.5, 0.5], [0.1, 0.3], [0.4, 0.4], [0.5, 0.5], [0.2, 0.4]])}
    rows = against_controls(values, [OWN, *CONTROLS])
    assert [row["control"] for row in rows] == list(CONTROLS)
    assert [row["own_minus_control"] for row in rows] == pytest.approx([-0.2, -0.3, -0.1])


def test_leaving_the_cheese_out_of_the_picture_changes_only_what_the_mouse_sees(tables):
    row = next(row for row in tables["effects"] if (row["measure"], row["intervention"]) == ("found", part.UNSEEN))
    assert row["n"] == 4
    assert row["modified"] < row["original"]


@pytest.mark.parametrize(
    ("effect_high", "beyond_high", "left", "agrees"),
    [
        (-0.1, -0.1, 0.02, "yes"),
        (-0.1, -0.1, 0.3, "in part"),
        (-0.1, 0.1, 0.02, "in part"),
        (0.1, -0.1, 0.02, "undecided"),
    ],
)
def test_the_finding_agrees_when_less_cheese_is_found_than_with_every_control_as_if_it_were_not_shown(
    tables, effect_high, beyond_high, left, agrees
):
    changed = copy.deepcopy(tables)
    (own,) = (row for row in changed["effects"] if (row["measure"], row["intervention"]) == ("found", OWN))
    own |= {"effect_low": -0.2, "effect_high": effect_high}
    for row in changed["against"]:
        row |= {"own_minus_control_low": -0.2, "own_minus_control_high": beyond_high}
    for row in changed["ignoring"]:
        row |= {"own_minus_unseen_low": left - 0.01, "own_minus_unseen_high": left + 0.01, "equivalent": left < 0.04}
    finding = part.finding(changed)
    assert finding.agrees == agrees
    assert shown(own, "effect", "+.3f") in finding.ours


def test_what_the_vector_leaves_of_the_cheese_is_its_difference_from_not_showing_it(tables):
    modified = {row["intervention"]: row["modified"] for row in tables["effects"] if row["measure"] == "found"}
    (row,) = tables["ignoring"]
    assert row["own_minus_unseen"] == pytest.approx(modified[OWN] - modified[part.UNSEEN])
    assert row["own_minus_unseen_low"] is None and not row["equivalent"]  # of four levels


def test_without_decision_squares_the_finding_says_so(tables):
    fewer = [row for row in tables["effects"] if not row["measure"].startswith("to_")]
    assert "decision square" not in part.finding({**tables, "effects": fewer}).ours


def test_the_finding_and_the_figure_are_made_from_files(tables, tmp_path):
    read = from_files(tables, tmp_path)
    assert part.finding(read) == part.finding(tables)
    part.figure(read)


def test_the_own_vector_is_ranked_among_random_ones(tables):
    (row,) = tables["ranked"]
    own = next(each for each in tables["effects"] if (each["measure"], each["intervention"]) == ("found", OWN))
    assert (row["controls"], row["n"], row["effect"]) == (19, own["n"], pytest.approx(own["effect"]))
    assert row["rank_p"] == pytest.approx(row["rank"] / 20)
    changed = {**tables, "ranked": [row | {"rank": 3, "rank_p": 0.15}]}
    assert "rank 3 of 20 (p = 0.15)" in part.finding(changed).follows
