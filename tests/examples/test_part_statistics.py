import copy

import numpy as np
import pytest
from studies import from_files, shipped_points

from maze.analysis.decision_squares import DISTANCES, Decisions
from maze.analysis.part import Study
from maze.measurements import statistics as part


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "RESAMPLES", 99)
        return part.measure(Study(shipped_points(), {}, 20, seed=0))


def seen(took, distance):
    """Mice that take the cheese or not, at some distances of the first kind."""
    n = len(took)
    distances = np.tile(np.asarray(distance, dtype=float)[:, None], (1, len(DISTANCES)))
    moves = np.eye(4)[np.where(took, 0, 1)]
    return Decisions(np.zeros(n, dtype=int), np.ones(n, dtype=int), moves, np.zeros((n, 1)), distances)


def test_accuracy_and_base_rate_are_those_of_the_levels_scored_on():
    fit, score = np.linspace(-2, 2, 21), np.array([-1.0, -0.9, 1.5, 1.6])
    took = np.array([False, True, True, True])
    row = part._score("one", seen(fit > -0.5, fit), seen(took, score), [0])
    assert (row["accuracy"], row["base"], row["always"]) == (0.75, 0.75, "cheese")
    assert row["gain"] == 0 and row["auc"] is None  # a single negative ranks nothing


def test_a_mouse_that_always_takes_the_cheese_is_predicted_by_the_base_rate():
    mice = seen(np.ones(6, dtype=bool), np.arange(6.0))
    row = part._score("one", mice, mice, [0])
    assert (row["accuracy"], row["base"], row["gain"], row["auc"]) == (1, 1, 0, None)
    assert abs(part._coefficients(mice, [0], seed=0)[0].estimate) < 1


def test_there_is_a_coefficient_for_every_distance_and_a_model_for_each_and_all(tables):
    assert [row["distance"] for row in tables["coefficients"]] == list(DISTANCES)
    assert [row["model"] for row in tables["scores"]] == [part.ALL, *DISTANCES]


def test_figure_and_finding_are_made_from_the_files(tables, tmp_path):
    back = from_files(tables, tmp_path)
    assert part.finding(back) == part.finding(tables)
    assert len(part.figure(back).axes) == 2


def test_the_finding_changes_with_the_cells_it_is_made_of(tables):
    changed = copy.deepcopy(tables)
    changed["scores"][0] |= {"base": 0.123, "gain_low": 0.1, "gain_high": 0.2}
    for row in changed["coefficients"]:
        row |= {"coefficient_low": -2.0, "coefficient_high": 1.0}
    changed["coefficients"][0]["coefficient_high"] = -1.0
    found = part.finding(changed)
    assert found.agrees == "yes" and "Base rate 0.123" in found.ours
    assert f"less often with a larger '{DISTANCES[0]}'" in found.follows and DISTANCES[1] not in found.follows
    changed["scores"][0] |= {"gain_low": -0.1}
    assert part.finding(changed).agrees == "undecided"
    changed["scores"][0] |= {"gain_low": -0.2, "gain_high": -0.1}
    assert part.finding(changed).agrees == "no"


def test_the_single_distance_that_is_told_is_chosen_on_the_levels_fitted_on(tables):
    changed = copy.deepcopy(tables)
    for place, row in enumerate(changed["coefficients"]):
        row["alone_coefficient"] = -9.0 if place == 2 else 1.0
    for row in changed["scores"]:
        row["accuracy"] = 0.5 if row["model"] == DISTANCES[2] else 0.9
    assert (
        f"'{DISTANCES[2]}', the single distance with the largest coefficient, predicts 0.500"
        in part.finding(changed).follows
    )
