import numpy as np
import pytest
from procgen_tools.maze import EnvState, on_distribution

from maze.environment.pairs import contrastive_pairs, rotated, rotations
from maze.levels import draw_levels, observe
from maze.paths import Direction, first_steps
from maze.states import FREE, WALL, mazes_from_pictures, read_mazes, write_mazes


def moved_wall(pair):
    """The cell of the wall that only the first maze has, and of that which only the second has."""
    walls = pair.grid == WALL
    return np.concatenate([np.argwhere(walls[0] & ~walls[1]), np.argwhere(walls[1] & ~walls[0])])


def test_the_two_mazes_differ_by_one_moved_wall():
    pair = contrastive_pairs()[0]
    assert (pair.grid[0] != pair.grid[1]).sum() == 2
    assert moved_wall(pair).tolist() == [[3, 4], [4, 3]]
    assert (pair.mouse[0] == pair.mouse[1]).all() and (pair.cheese[0] == pair.cheese[1]).all()


@pytest.mark.parametrize("number", range(5))
def test_the_way_to_the_cheese_starts_differently_in_each_maze_of_each_rotation(number):
    names = []
    for pair in rotations(contrastive_pairs()[number]):
        steps = first_steps(pair, pair.cheese)
        assert (steps.sum(axis=1) == 1).all()
        names.append(" / ".join(Direction(step).name for step in steps.argmax(axis=1)))
    assert names == ["UP / RIGHT", "RIGHT / DOWN", "DOWN / LEFT", "LEFT / UP"]


def test_the_way_to_every_other_square_is_the_same_in_both_mazes():
    for pair in rotations(contrastive_pairs()[0]):
        goal = np.zeros(pair.grid.shape[1:], dtype=bool)
        goal[tuple(pair.cheese[0])] = True
        for square in np.argwhere((pair.grid == FREE).all(axis=0)):
            if (square != pair.mouse[0]).any():
                one, other = first_steps(pair, square)
                assert (one == other).all()


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("number", range(5))
def test_both_mazes_are_ones_that_procgen_could_have_drawn(number, turn):
    for state in write_mazes(rotations(contrastive_pairs()[number])[turn], draw_levels(1, seed=0)[0]):
        complaints = []
        assert on_distribution(EnvState(state).full_grid(with_mouse=False), p=complaints.append), complaints


def test_the_cheese_stays_in_the_top_right_5x5():
    assert all((pair.cheese >= pair.size[:, None] - 5).all() for pair in rotations(contrastive_pairs()[0]))


def test_four_quarter_turns_are_none():
    start = read_mazes(draw_levels(20, seed=2, size=9, mouse="anywhere"))
    turned = start
    for _ in range(4):
        turned = rotated(turned)
    assert [turned.picture(i) for i in range(20)] == [start.picture(i) for i in range(20)]


def test_a_quarter_turn_turns_the_picture_clockwise():
    assert rotated(mazes_from_pictures("..C .#. M#.")).picture(0).split() == ["M..", "##.", "..C"]
    pictures = mazes_from_pictures("...C. .##.. .#... .#.## M#...")
    turned = np.rot90(np.array([list(line) for line in pictures.picture(0).split()]), k=-1)
    assert rotated(pictures).picture(0).split() == ["".join(row) for row in turned]


def test_a_turn_turns_the_directions_with_it():
    mazes = read_mazes(draw_levels(20, seed=3, size=9, mouse="anywhere"))
    after = {Direction.UP: "RIGHT", Direction.RIGHT: "DOWN", Direction.DOWN: "LEFT", Direction.LEFT: "UP"}
    before, then = first_steps(mazes, mazes.cheese), first_steps(rotated(mazes), rotated(mazes).cheese)
    assert [after[Direction(step)] for step in before.argmax(axis=1)] == [
        Direction(step).name for step in then.argmax(axis=1)
    ]


def test_the_two_images_differ_only_at_the_moved_wall():
    base = draw_levels(1, seed=0)[0]
    for pair in rotations(contrastive_pairs()[0]):
        first, second = observe(write_mazes(pair, base)).astype(int)
        rows, cols = np.nonzero((first != second).any(axis=2))
        cells = moved_wall(pair) + 9
        assert len(rows) > 0
        for row, col in zip(rows, cols, strict=True):
            near = np.abs((64 - row) / 2.56 - 0.5 - cells[:, 0]) + np.abs(col / 2.56 - 0.5 - cells[:, 1])
            assert near.min() < 2
