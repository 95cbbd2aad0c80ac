import numpy as np
from procgen_tools.maze import EnvState, on_distribution

from maze.environment.moved_walls import pairs_with_a_moved_wall
from maze.levels import draw_levels
from maze.paths import Direction, distances, first_steps
from maze.states import write_mazes

LEVELS = draw_levels(24, size=9, seed=7, cheese="in distribution")
CLEAN, CORRUPTED, KEPT = pairs_with_a_moved_wall(LEVELS, clean=Direction.UP, corrupted=Direction.RIGHT, seed=1)


def test_most_levels_give_a_pair():
    assert len(KEPT) == len(CLEAN) == len(CORRUPTED) >= 16
    assert (np.diff(KEPT) > 0).all()


def test_the_first_step_turns_and_nothing_but_one_wall_is_moved():
    for mazes, step in ((CLEAN, Direction.UP), (CORRUPTED, Direction.RIGHT)):
        first = first_steps(mazes, mazes.cheese)
        assert first[:, step].all() and (first.sum(axis=1) == 1).all()
    changed = CLEAN.free.astype(int) - CORRUPTED.free
    assert (changed.max(axis=(1, 2)) == 1).all() and (np.abs(changed).sum(axis=(1, 2)) == 2).all()
    assert (changed.sum(axis=(1, 2)) == 0).all()
    assert (CLEAN.mouse == CORRUPTED.mouse).all() and (CLEAN.cheese == CORRUPTED.cheese).all()


def test_both_mazes_are_ones_that_procgen_could_have_drawn():
    for mazes in (CLEAN, CORRUPTED):
        for state in write_mazes(mazes.moved(mouse=(0, 0)), [LEVELS[index] for index in KEPT]):
            complaints = []
            assert on_distribution(EnvState(state).full_grid(with_mouse=False), p=complaints.append), complaints


def test_every_square_can_still_be_reached():
    for mazes in (CLEAN, CORRUPTED):
        assert np.isfinite(distances(mazes, mazes.mouse)[mazes.free]).all()


def test_the_same_seed_gives_the_same_pairs():
    again = pairs_with_a_moved_wall(LEVELS, clean=Direction.UP, corrupted=Direction.RIGHT, seed=1)
    assert (again[0].grid == CLEAN.grid).all() and (again[1].grid == CORRUPTED.grid).all()
