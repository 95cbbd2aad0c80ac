import numpy as np
import pytest
import torch
from studies import shipped_points

from maze.analysis.cells import cells
from maze.analysis.forwards import SITE
from maze.analysis.readings import Readings, area
from maze.levels import draw_levels, observe, policy_input
from maze.paths import Direction
from maze.policy.network import ACTIONS
from maze.states import read_mazes


@pytest.fixture(scope="module")
def levels():
    return draw_levels(6, size=9, seed=3, cheese="in distribution", mouse="anywhere")


@pytest.fixture(scope="module")
def readings(levels):
    return Readings.of(shipped_points(), levels)


def test_readings_are_the_sums_and_the_probabilities_of_the_policy(levels, readings):
    policy, recorded = shipped_points().model, []
    hook = policy.get_submodule(SITE).register_forward_hook(lambda module, inputs, output: recorded.append(output))
    with torch.no_grad():
        probabilities = policy(torch.from_numpy(policy_input(observe(levels))))[0].probs.double().numpy()
    hook.remove()
    np.testing.assert_allclose(readings.sums, recorded[0].double().sum(dim=(2, 3)).numpy(), rtol=1e-4, atol=1e-4)
    for direction in Direction:
        expected = probabilities[:, list(ACTIONS[direction])].sum(axis=1)
        np.testing.assert_allclose(readings.moves[:, direction], expected, atol=1e-5)


def test_in_a_tree_one_legal_move_is_the_first_step(levels, readings):
    assert (readings.first.sum(axis=1) == 1).all()
    assert (readings.legal | ~readings.first).all()
    np.testing.assert_array_equal(readings.mazes.mouse, read_mazes(levels).mouse)


def test_readings_of_some_levels_are_those_rows(readings):
    part = readings[np.array([4, 1])]
    assert len(part) == 2
    np.testing.assert_array_equal(part.sums, readings.sums[[4, 1]])
    np.testing.assert_array_equal(part.first, readings.first[[4, 1]])


def test_there_is_no_area_with_too_few_mazes_of_a_kind():
    labels = np.array([True, False, False])
    assert area(np.arange(3.0), labels) is None
    assert cells("auc", None) == {"auc": None, "auc_low": None, "auc_high": None}


def test_the_cells_are_over_mazes_in_which_the_direction_is_legal(readings):
    cells = readings.cells(27, Direction.UP)
    assert cells["n"] == readings.legal[:, Direction.UP].sum()
    assert cells["positives"] == readings.first[:, Direction.UP].sum()
