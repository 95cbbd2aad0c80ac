from collections import deque

import numpy as np
import pytest

from maze.environment.requirements import procgen_mazes
from maze.levels import draw_levels
from maze.paths import (
    MOVES,
    Direction,
    decision_squares,
    direction_field,
    distances,
    first_steps,
    legal_moves,
    shortest_paths,
    top_right,
)
from maze.policy.network import ACTIONS
from maze.states import WALL, mazes_from_pictures, read_mazes, write_mazes

RING = """
    ..C
    .#.
    M..
"""
ISLAND = """
    C#.#.
    ##.#.
    ....#
    .#.##
    M.#..
"""


@pytest.fixture(scope="module")
def levels():
    return draw_levels(30, seed=5, mouse="anywhere")


@pytest.fixture(scope="module")
def mazes(levels):
    return read_mazes(levels)


def searched(grid, target):
    """Distances to `target` by a breadth-first search in plain Python."""
    found, front = {tuple(target): 0}, deque([tuple(target)])
    while front:
        row, col = front.popleft()
        for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            cell = (row + down, col + right)
            inside = 0 <= cell[0] < len(grid) and 0 <= cell[1] < len(grid)
            if inside and grid[cell] != WALL and cell not in found:
                found[cell] = found[row, col] + 1
                front.append(cell)
    return found


def test_distances_are_those_of_a_plain_search(mazes):
    for targets in (mazes.cheese, top_right(mazes), np.array((0, 0))):
        found = distances(mazes, targets)
        for index, target in enumerate(np.broadcast_to(targets, (len(mazes), 2))):
            expected = np.full(mazes.grid.shape[1:], np.inf)
            for cell, distance in searched(mazes.grid[index], target).items():
                expected[cell] = distance
            np.testing.assert_array_equal(found[index], expected)


def test_in_a_tree_exactly_one_move_leads_on_from_every_square_but_the_target(mazes):
    moves = direction_field(mazes, mazes.cheese).sum(axis=1)
    expected = mazes.free.astype(int)
    expected[np.arange(len(mazes)), mazes.cheese[:, 0], mazes.cheese[:, 1]] = 0
    np.testing.assert_array_equal(moves, expected)


def test_the_first_step_leads_one_step_nearer(mazes):
    steps = first_steps(mazes, mazes.cheese)
    assert (steps.sum(axis=1) == 1).all()
    for index, step in enumerate(steps):
        found = searched(mazes.grid[index], mazes.cheese[index])
        here = tuple(mazes.mouse[index])
        assert found[tuple(mazes.mouse[index] + MOVES[step.argmax()])] == found[here] - 1


def test_walking_a_path_in_procgen_ends_at_the_cheese_with_reward_10(levels, mazes):
    paths = shortest_paths(mazes, mazes.cheese)
    environment = procgen_mazes(len(levels))
    environment.set_state(levels)
    rewards = [[] for _ in levels]
    for step in range(max(map(len, paths)) - 1):
        actions = np.full(len(levels), 4)
        for index, path in enumerate(paths):
            if step < len(path) - 1:
                move = (path[step + 1] - path[step] == MOVES).all(axis=1).argmax()
                # Every action of a direction goes there, so they take turns.
                actions[index] = ACTIONS[Direction(move)][step % len(ACTIONS[Direction(move)])]
        environment.act(actions)
        reward, _, ended = environment.observe()
        for index, path in enumerate(paths):
            if step < len(path) - 1:
                rewards[index].append((reward[index], bool(ended[index])))
    for path, received in zip(paths, rewards, strict=True):
        assert received == [(0.0, False)] * (len(path) - 2) + [(10.0, True)]


def test_paths_start_at_the_mouse_and_take_as_many_steps_as_the_distance(mazes):
    paths = shortest_paths(mazes, top_right(mazes))
    for index, path in enumerate(paths):
        found = searched(mazes.grid[index], top_right(mazes)[index])
        assert tuple(path[0]) == tuple(mazes.mouse[index])
        assert [found[tuple(cell)] for cell in path] == list(range(len(path) - 1, -1, -1))


def test_the_decision_square_is_the_last_common_square_of_the_two_paths(mazes):
    start = mazes[mazes.cheese.any(axis=1)].moved(mouse=(0, 0))
    cells, exists = decision_squares(start)
    to_cheese, to_corner = (shortest_paths(start, goal) for goal in (start.cheese, top_right(start)))
    for index in range(len(start)):
        pairs = zip(to_cheese[index].tolist(), to_corner[index].tolist(), strict=False)
        common = [one for one, other in pairs if one == other]
        assert cells[index].tolist() == common[-1]
        parted = len(common) < min(len(to_cheese[index]), len(to_corner[index]))
        assert exists[index] == parted
    assert 0 < exists.sum() < len(start)


def test_a_decision_square_asks_for_two_different_moves(mazes):
    cells, exists = decision_squares(mazes)
    there = mazes[exists].moved(mouse=cells[exists])
    both = first_steps(there, there.cheese) & first_steps(there, top_right(there))
    assert not both.any()


def test_a_maze_whose_cheese_is_in_the_corner_has_no_decision_square():
    assert decision_squares(mazes_from_pictures(RING))[1].tolist() == [False]


def test_legal_moves_are_those_that_move_the_mouse_in_procgen(levels, mazes):
    legal = legal_moves(mazes)[np.arange(len(mazes)), :, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    environment = procgen_mazes(len(levels))
    for direction, actions in ACTIONS.items():
        for action in actions:
            bare = mazes.without_cheese()
            environment.set_state(write_mazes(bare, levels))
            environment.act(np.full(len(levels), action))
            walked = read_mazes(environment.get_state()).mouse
            expected = mazes.mouse + np.where(legal[:, [direction]], MOVES[direction], 0)
            np.testing.assert_array_equal(walked, expected)


def test_in_a_loop_both_ways_round_are_first_steps():
    ring = mazes_from_pictures(RING)
    assert first_steps(ring, ring.cheese)[0].tolist() == [False, False, True, True]
    assert shortest_paths(ring, ring.cheese)[0].tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2]]


def test_what_cannot_be_reached_is_infinitely_far_and_has_no_first_step():
    island = mazes_from_pictures(ISLAND)
    assert np.isinf(distances(island, island.cheese)[0, 0, 0])
    assert not first_steps(island, island.cheese).any()
    assert decision_squares(island)[1].tolist() == [False]
    with pytest.raises(ValueError) as error:
        shortest_paths(island, island.cheese)
    assert str(error.value) == "Maze 0: there is no path from the mouse at (0, 0) to (4, 0)."


def test_at_the_target_there_is_no_step_left():
    ring = mazes_from_pictures(RING)
    assert not first_steps(ring, (0, 0)).any()
    assert [path.tolist() for path in shortest_paths(ring, (0, 0))] == [[[0, 0]]]
