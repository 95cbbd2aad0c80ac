import random

import numpy as np
import pytest
import torch
from procgen_tools.maze import EnvState, on_distribution

from maze.command import UserError
from maze.environment.requirements import procgen_mazes
from maze.levels import (
    CHEESE_PLACES,
    cheese_squares,
    draw_levels,
    observe,
    policy_input,
    random_squares,
)
from maze.paths import decision_squares
from maze.states import FREE, StateError, read_mazes


@pytest.fixture(scope="module")
def by_place():
    return {place: read_mazes(draw_levels(40, seed=1, size=11, cheese=place)) for place in CHEESE_PLACES}


def test_the_same_seed_gives_the_same_levels_and_another_seed_others():
    assert draw_levels(5, seed=7, size=9) == draw_levels(5, seed=7, size=9)
    assert not set(draw_levels(5, seed=7, size=9)) & set(draw_levels(5, seed=8, size=9))


@pytest.mark.parametrize("mouse", ["start", "anywhere", "decision square"])
def test_the_first_levels_are_the_same_however_many_are_drawn(mouse):
    arguments = dict(seed=3, size=7, cheese="out of distribution", mouse=mouse)
    assert draw_levels(20, **arguments)[:3] == draw_levels(3, **arguments)


def test_levels_have_the_size_that_was_asked_for():
    for size in (3, 13, 25):
        assert (read_mazes(draw_levels(10, seed=0, size=size)).size == size).all()


def test_levels_are_mazes_that_procgen_draws():
    for state in draw_levels(12, seed=4, cheese="bottom right", mouse="anywhere"):
        complaints = []
        assert on_distribution(EnvState(state).full_grid(with_mouse=False), p=complaints.append), complaints


def test_the_cheese_is_where_it_was_asked_for(by_place):
    region = {place: (mazes.cheese >= 6).all(axis=1) for place, mazes in by_place.items()}
    assert region["in distribution"].all()
    assert not region["out of distribution"].any()
    assert 0 < region["as drawn"].sum() < 40
    assert (by_place["bottom right"].cheese == (0, 10)).all()
    assert (by_place["top left"].cheese == (10, 0)).all()
    assert (by_place["top right"].cheese == (10, 10)).all()


def test_the_same_mazes_are_used_for_every_place_of_the_cheese(by_place):
    free = [mazes.free for mazes in by_place.values()]
    assert all((free[0] == other).all() for other in free)


def test_random_cheese_takes_every_square_of_its_region():
    cheese = read_mazes(draw_levels(300, seed=0, size=7, cheese="in distribution")).cheese
    even = {(row, col) for row in (2, 4, 6) for col in (2, 4, 6)}  # free in every maze
    assert even <= set(map(tuple, cheese.tolist()))


def test_the_cheese_is_as_far_from_the_corner_as_was_asked_for():
    mazes = read_mazes(draw_levels(40, seed=0, size=9, cheese=(4, 6.5)))
    distance = np.hypot(*(8 - mazes.cheese).T)
    assert distance.min() == 4 and 6 < distance.max() < 6.5


def test_the_cheese_is_never_on_the_start_square():
    mazes = read_mazes(draw_levels(200, seed=0, size=3, cheese="in distribution"))
    assert not cheese_squares(mazes, "in distribution")[:, 0, 0].any()
    assert mazes.cheese.any(axis=1).all()


def test_mazes_too_small_for_cheese_outside_the_region_are_passed_over():
    assert read_mazes(draw_levels(60, seed=0, cheese="out of distribution")).size.min() == 7


def test_the_mouse_is_where_it_was_asked_for():
    assert not read_mazes(draw_levels(10, seed=0)).mouse.any()
    anywhere = read_mazes(draw_levels(60, seed=0, size=9, mouse="anywhere"))
    assert len(set(map(tuple, anywhere.mouse.tolist()))) > 20
    assert (anywhere.mouse != anywhere.cheese).any(axis=1).all()
    deciding = read_mazes(draw_levels(10, seed=0, size=9, cheese="out of distribution", mouse="decision square"))
    cells, exists = decision_squares(deciding)
    assert exists.all() and (cells == deciding.mouse).all()


def test_random_squares_are_equally_likely():
    candidates = np.zeros((4000, 3, 3), dtype=bool)
    candidates[:, [0, 1, 2, 2], [1, 1, 0, 2]] = True
    rows, cols = random_squares(candidates, np.random.default_rng(0)).T
    counts = np.bincount(rows * 3 + cols, minlength=9)
    assert (counts[[1, 4, 6, 8]] > 900).all() and counts.sum() == counts[[1, 4, 6, 8]].sum()


def test_a_maze_without_candidates_is_named():
    with pytest.raises(UserError) as error:
        random_squares(np.array([[[True]], [[False]]]), np.random.default_rng(0))
    assert str(error.value) == "Maze 1 of 2 has no candidate square."


def test_observations_are_what_procgen_shows_after_a_reset():
    environment = procgen_mazes(8, seed=6)
    expected = environment.observe()[1]["rgb"]
    np.testing.assert_array_equal(observe(environment.get_state()), expected)


def test_more_states_than_sub_environments_are_observed_in_order():
    states = draw_levels(70, seed=6)
    frames = observe(states)
    assert frames.shape == (70, 64, 64, 3) and frames.dtype == np.uint8
    np.testing.assert_array_equal(frames[66:], observe(states[66:]))
    assert observe([]).shape == (0, 64, 64, 3)


def test_bytes_that_are_no_state_do_not_reach_procgen():
    with pytest.raises(StateError):
        observe([b"not a state"])


def test_the_policys_input_is_what_procgen_tools_feeds_it():
    from procgen_tools.maze import wrap_venv

    environment = procgen_mazes(3, seed=2)
    states = environment.get_state()
    expected = wrap_venv(environment).reset()
    given = policy_input(observe(states))
    assert given.dtype == np.float32 and given.flags.c_contiguous
    np.testing.assert_allclose(given, expected, atol=1e-7)


def test_global_random_generators_are_not_touched():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draw_levels(3, seed=0, cheese="in distribution", mouse="anywhere")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(size=4), "size must be an odd number from 3 to 25, as in procgen's hard mazes; got 4."),
        (dict(size=27), "size must be an odd number from 3 to 25, as in procgen's hard mazes; got 27."),
        (dict(seed=2**31), "seed must be between 0 and 2147483647; got 2147483648."),
        (
            dict(size=5, cheese="out of distribution"),
            "Mazes with size=5 have no square outside the top right 5x5.",
        ),
        (
            dict(cheese="top right", mouse="decision square"),
            "With the cheese in the top right corner, a maze has no decision square.",
        ),
        (
            dict(cheese=(34, 40)),
            "cheese is (34, 40), but no square's distance (in cells) from the top right corner is in this range.",
        ),
        (
            dict(size=7, cheese=(8.4, 9)),  # only the start
            "cheese is (8.4, 9), but no square's distance (in cells) from the top right corner is in this range.",
        ),
        (dict(mouse="here"), "mouse must be one of 'start', 'anywhere', 'decision square'; got 'here'."),
        (
            dict(cheese="there"),
            "cheese must be one of 'as drawn', 'in distribution', 'out of distribution', "
            "'top left', 'top right', 'bottom right'; got 'there'.",
        ),
    ],
)
def test_levels_that_cannot_exist_are_refused(request_, message):
    with pytest.raises(UserError) as error:
        draw_levels(1, **{"seed": 0, **request_})
    assert str(error.value) == message


def test_the_free_squares_of_a_drawn_level_hold_no_mouse():
    mazes = read_mazes(draw_levels(5, seed=0))
    assert (mazes.grid[:, 0, 0] == FREE).all()
