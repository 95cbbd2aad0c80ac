import dataclasses
import struct

import numpy as np
import procgen_tools.maze
import pytest
from procgen_tools.maze import EnvState

from maze.environment.requirements import procgen_mazes
from maze.levels import draw_levels, observe
from maze.paths import decision_squares
from maze.states import CHEESE, FREE, WALL, StateError, mazes_from_pictures, read_mazes, write_mazes

LOOP = """
    ...#C
    .#.#.
    .....
    .#.#.
    M.###
"""


@pytest.fixture(scope="module")
def levels():
    """Fresh levels of every side, several of each."""
    return draw_levels(48, seed=11)


def test_a_read_maze_is_what_procgen_tools_parses(levels):
    mazes = read_mazes(levels)
    for index, state in enumerate(levels):
        oracle = EnvState(state)
        side = oracle.state_vals["maze_dim"].val
        assert mazes.size[index] == side
        np.testing.assert_array_equal(mazes.grid[index, :side, :side], oracle.inner_grid(with_mouse=False))
        assert (mazes.grid[index, side:] == WALL).all() and (mazes.grid[index, :, side:] == WALL).all()
        assert tuple(mazes.mouse[index] + (25 - side) // 2) == oracle.mouse_pos
        assert tuple(mazes.cheese[index]) == tuple(np.argwhere(oracle.inner_grid() == CHEESE)[0])
    assert len(set(mazes.size)) == 12


def test_writing_what_was_read_changes_no_byte(levels):
    assert write_mazes(read_mazes(levels), levels) == levels


def test_an_edit_gives_the_bytes_that_procgen_tools_gives(levels):
    mazes = read_mazes(levels)
    corner = np.stack([mazes.size - 1, mazes.size - 1], axis=1)
    edited = write_mazes(mazes.moved(cheese=corner, mouse=(2, 0)), levels)
    for before, after in zip(levels, edited, strict=True):
        oracle = EnvState(before)
        grid = oracle.full_grid(with_mouse=False)
        low = (25 - oracle.state_vals["maze_dim"].val) // 2
        grid[grid == CHEESE] = FREE
        grid[24 - low, 24 - low] = CHEESE
        grid[low + 2, low] = 25
        oracle.set_grid(grid)
        assert after == oracle.state_bytes
    # The oracle edits what it cached for these bytes, and would show the edited maze to the next test.
    procgen_tools.maze._parse_maze_state_bytes.cache_clear()


def test_procgen_keeps_every_byte_of_an_edited_state(levels):
    edited = write_mazes(read_mazes(levels).moved(mouse=(0, 0), facing_right=True), levels)
    environment = procgen_mazes(len(edited))
    environment.set_state(edited)
    assert environment.get_state() == edited


def test_an_edited_mouse_looks_like_one_that_walked_there(levels):
    environment = procgen_mazes(len(levels))
    environment.set_state(levels)
    rng = np.random.default_rng(0)
    first_episode = np.ones(len(levels), dtype=bool)
    seen = set()
    for _ in range(25):
        environment.act(rng.choice([0, 1, 2, 3, 5, 6, 7, 8, 4], size=len(levels)))
        _, observation, ended = environment.observe()
        first_episode &= ~ended
        walked = read_mazes(environment.get_state())[first_episode]
        base = [state for state, kept in zip(levels, first_episode, strict=True) if kept]
        placed = read_mazes(base).moved(mouse=walked.mouse, facing_right=walked.facing_right)
        np.testing.assert_array_equal(observe(write_mazes(placed, base)), observation["rgb"][first_episode])
        seen |= {(*cell, right) for cell, right in zip(walked.mouse.tolist(), walked.facing_right, strict=True)}
    assert first_episode.sum() > 20
    assert len(seen) > 20


def test_the_mouse_faces_the_last_horizontal_move_even_into_a_wall(levels):
    environment = procgen_mazes(len(levels))
    environment.set_state(levels)
    first_episode = np.ones(len(levels), dtype=bool)
    for action, facing_right in [(5, False), (7, True), (3, True), (1, False), (8, True), (0, False)]:
        environment.act(np.full(len(levels), action))
        first_episode &= ~environment.observe()[2]
        assert (read_mazes(environment.get_state()).facing_right[first_episode] == facing_right).all()
    assert first_episode.sum() > 20


def test_an_edit_changes_the_image_only_where_the_maze_changed(levels):
    mazes = read_mazes(levels)
    big = mazes.size >= 9
    base, mazes = [s for s, kept in zip(levels, big, strict=True) if kept], mazes[big]
    moved = mazes.moved(cheese=np.stack([mazes.size - 1, np.zeros_like(mazes.size)], axis=1), mouse=(2, 2))
    changed = (observe(base) != observe(write_mazes(moved, base))).any(axis=3)
    for index in range(len(mazes)):
        cells = [mazes.cheese[index], moved.cheese[index], mazes.mouse[index], moved.mouse[index]]
        allowed = np.zeros((64, 64), dtype=bool)
        for row, col in np.array(cells) + (25 - mazes.size[index]) // 2:
            low_row, low_col = 64 - (row + 1) * 2.56, col * 2.56
            rows, cols = (slice(max(int(low) - 1, 0), int(low) + 5) for low in (low_row, low_col))
            allowed[rows, cols] = True
        assert changed[index].any() and not (changed[index] & ~allowed).any()


def test_a_picture_is_read_with_its_lowest_line_as_row_0():
    mazes = mazes_from_pictures(LOOP)
    assert mazes.mouse.tolist() == [[0, 0]]
    assert mazes.cheese.tolist() == [[4, 4]]
    assert (mazes.grid[0, 0] == [FREE, FREE, WALL, WALL, WALL]).all()


def test_a_picture_is_drawn_as_it_was_read():
    assert mazes_from_pictures(LOOP).picture(0).split() == LOOP.split()


def test_a_picture_lands_in_the_middle_of_the_world(levels):
    (state,) = write_mazes(mazes_from_pictures(LOOP), levels[0])
    world = EnvState(state).full_grid()
    assert (world[10:15, 10:15] != WALL).sum() == (mazes_from_pictures(LOOP).grid != WALL).sum()
    assert (world != WALL).sum() == (world[10:15, 10:15] != WALL).sum()
    assert EnvState(state).mouse_pos == (10, 10)
    assert EnvState(state).state_vals["maze_dim"].val == 5


def test_the_image_of_a_picture_has_its_free_cells_and_walls_where_they_are_drawn(levels):
    pictures = mazes_from_pictures(LOOP, LOOP.replace("#.#.", "....", 1))
    first, second = observe(write_mazes(pictures, levels[0])).astype(int)
    rows, cols = np.nonzero(np.abs(first - second).any(axis=2))
    # The changed cell is row 3, col 1 of the maze and so row 13, col 11 of the world, 2.56 pixels each.
    changed = np.argwhere(pictures.grid[0] != pictures.grid[1]) + 10
    assert rows.min() >= 64 - (changed[:, 0].max() + 1) * 2.56 - 1
    assert rows.max() <= 64 - changed[:, 0].min() * 2.56 + 1
    assert cols.min() >= changed[:, 1].min() * 2.56 - 1
    assert cols.max() <= (changed[:, 1].max() + 1) * 2.56 + 1


def test_two_mazes_written_into_one_state_stay_two_mazes(levels):
    state = levels[0]
    before = bytearray(state)
    pair = mazes_from_pictures(LOOP, LOOP.replace("...#C", ".##.C"))
    first, second = write_mazes(pair, state)
    assert first != second
    assert state == before
    assert (read_mazes([first, second]).grid == pair.grid).all()


def test_mazes_of_mixed_sizes_keep_their_cells(levels):
    mazes = read_mazes(levels)
    small = mazes[mazes.size <= 7]
    alone = read_mazes([state for state, size in zip(levels, mazes.size, strict=True) if size <= 7])
    assert alone.grid.shape[-1] == 7
    np.testing.assert_array_equal(small.grid[:, :7, :7], alone.grid)
    np.testing.assert_array_equal(small.cheese, alone.cheese)


def test_moving_leaves_the_original_as_it_was(levels):
    mazes = read_mazes(levels)
    grid = mazes.grid.copy()
    mazes.moved(cheese=(0, 0), mouse=(2, 0))
    np.testing.assert_array_equal(mazes.grid, grid)


def test_without_cheese_the_cell_is_free(levels):
    bare = read_mazes(levels[:3]).without_cheese()
    assert set(np.unique(bare.grid)) == {FREE, WALL}
    assert observe(write_mazes(bare, levels[:3])).shape == (3, 64, 64, 3)
    with pytest.raises(StateError) as error:
        _ = bare.cheese
    assert str(error.value) == "Maze 0 of 3 has no cheese."


@pytest.fixture(params=[(7, 13), (13, 7), (25, 3)], ids=str)
def set_by_procgen_tools(request):
    """A level, and the same maze as `venv_from_grid` sets it: `set_grid` in a level of another side."""
    side, side_before = request.param
    (level,) = draw_levels(1, size=side, seed=5, cheese="out of distribution", mouse="decision square")
    other = EnvState(draw_levels(1, size=side_before, seed=6)[0])
    other.set_grid(EnvState(level).inner_grid(), pad=True)
    # The oracle edits what it cached for these bytes, and would show the edited maze to the next test.
    procgen_tools.maze._parse_maze_state_bytes.cache_clear()
    environment = procgen_mazes(1)
    environment.set_state([other.state_bytes])
    (state,) = environment.get_state()
    assert struct.unpack_from("<i", state, len(state) - 12) == (side_before,)
    return level, state


def test_a_maze_that_procgen_tools_set_is_read_with_the_side_of_its_walls(set_by_procgen_tools):
    level, state = set_by_procgen_tools
    expected, mazes = read_mazes([level]), read_mazes([state])
    assert mazes.picture(0) == expected.picture(0)
    np.testing.assert_array_equal(mazes.mouse, expected.mouse)
    assert decision_squares(mazes)[1].tolist() == [True]


def test_writing_what_was_read_of_a_maze_that_procgen_tools_set_changes_no_byte(set_by_procgen_tools):
    _, state = set_by_procgen_tools
    assert write_mazes(read_mazes([state]), [state]) == [state]


def test_a_maze_of_another_side_is_written_with_its_own_stored_side(set_by_procgen_tools):
    _, state = set_by_procgen_tools
    (written,) = write_mazes(mazes_from_pictures(LOOP), [state])
    assert EnvState(written).state_vals["maze_dim"].val == 5
    assert read_mazes([written]).picture(0) == mazes_from_pictures(LOOP).picture(0)


def test_procgen_plays_a_maze_alike_whatever_side_is_stored():
    levels = draw_levels(8, size=7, seed=3)
    stale = [state[:-12] + struct.pack("<i", 13) + state[-8:] for state in levels]
    actions = np.random.default_rng(0).integers(0, 15, (520, 8))  # to the end of the level and beyond
    played = []
    for states in (levels, stale):
        environment = procgen_mazes(8)
        environment.set_state(states)
        seen = []
        for action in actions:
            environment.act(action)
            reward, observation, first = environment.observe()
            seen.append((reward.tobytes(), observation["rgb"].tobytes(), first.tobytes()))
        played.append((seen, environment.get_state()))
    assert played[0] == played[1]


def test_a_mouse_that_procgen_tools_left_in_a_wall_is_refused(levels):
    big = next(state for state in levels if read_mazes([state]).size[0] == 25)
    state = EnvState(big)
    state.set_grid(EnvState(draw_levels(1, size=7, seed=5)[0]).inner_grid(with_mouse=False), pad=True)
    procgen_tools.maze._parse_maze_state_bytes.cache_clear()
    with pytest.raises(StateError) as error:
        read_mazes([state.state_bytes])
    assert str(error.value) == (
        "State 0: its mouse is at x 0.5, y 0.5 in the world, which is not a free cell of the maze. If the new grid "
        "has no mouse, procgen-tools' set_grid leaves the mouse where it was in the previous level: pass a grid with a "
        "mouse."
    )


def test_a_state_of_random_values_is_given_back_to_the_byte_or_refused(levels):
    """Writing what was read gives a state back or refuses it, whatever its grid, side and mouse."""
    rng = np.random.default_rng(0)
    outcomes = {"back": 0, "refused": 0}
    for number in range(600):
        state = bytearray(levels[number % len(levels)])
        (first,) = struct.unpack_from("<i", state, 84)
        (second,) = struct.unpack_from("<i", state, 92 + first)
        mouse_at = 164 + first + second
        kind = number % 4
        if kind == 0:
            struct.pack_into("<i", state, len(state) - 12, int(rng.integers(1, 13)) * 2 + 1)
        elif kind == 1:
            cell = int(rng.integers(625))
            struct.pack_into("<i", state, len(state) - 2512 + 4 * cell, int(rng.choice([CHEESE, WALL, FREE, 25, 0])))
        elif kind == 2:
            values = [*(np.arange(25) + 0.5), 3.7, -0.5, 1e30, np.nan, np.inf]
            struct.pack_into("<ff", state, mouse_at, *rng.choice(values, size=2))
        else:
            struct.pack_into("<i", state, mouse_at + 60, int(rng.choice([0, 1, 2, -1])))
        try:
            assert write_mazes(read_mazes([bytes(state)]), [bytes(state)]) == [bytes(state)]
            outcomes["back"] += 1
        except StateError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_a_maze_without_a_free_cell_on_its_border_is_refused():
    with pytest.raises(StateError) as error:
        mazes_from_pictures("""
            #####
            #.C.#
            #.#.#
            #M..#
            #####
        """)
    assert str(error.value) == (
        "Maze 0 (side 5, mouse at (1, 1)) cannot be a procgen maze: its free cells do not span a square with its side "
        "length."
    )


def test_an_empty_batch_is_read_and_written():
    assert write_mazes(read_mazes([]), []) == []


@pytest.mark.parametrize("length", [0, 10, 90, 3000])
def test_bytes_that_end_early_are_refused(levels, length):
    with pytest.raises(StateError) as error:
        read_mazes([levels[0], levels[0][:length]])
    if length < 2516:
        assert str(error.value) == f"State 1 is not a procgen maze state: it has only {length} bytes."
    else:
        assert str(error.value).startswith("State 1 is not a")


def test_a_wrong_end_mark_is_refused_before_anything_is_written(levels):
    broken = levels[0][:-4] + b"\0\0\0\0"
    side = read_mazes(levels[:1]).size[0]
    with pytest.raises(StateError) as error:
        write_mazes(read_mazes(levels[:1]), [broken])
    assert str(error.value) == (
        "State 0 is not a state of procgen's hard maze: end mark 0, world side 25, 625 and 625 cells, 1 entities, "
        f"maze side {side}; expected end mark -889271554, world side 25, 625 and 625 cells, 1 entity, "
        "an odd maze side of 3 to 25."
    )


def test_an_easy_maze_is_refused():
    from procgen import ProcgenGym3Env

    easy = ProcgenGym3Env(num=1, env_name="maze", distribution_mode="easy", rand_seed=0)
    with pytest.raises(StateError, match="world side 15"):
        read_mazes(easy.get_state())


def test_another_number_of_states_than_of_mazes_is_refused(levels):
    with pytest.raises(StateError) as error:
        write_mazes(read_mazes(levels[:2]), levels[:3])
    assert str(error.value) == (
        "2 mazes cannot be written into 3 states. Pass one state per maze, or the bytes of a single state."
    )


def test_a_cell_outside_or_in_a_wall_is_refused():
    mazes = mazes_from_pictures(LOOP)
    for change, message in [
        (
            dict(mouse=(0, 5)),
            "Maze 0 (side 5, mouse at (0, 5)) cannot be a procgen maze: its mouse is outside the maze or in a wall.",
        ),
        (dict(cheese=(-1, 0)), "Maze 0: the cheese cannot be put at (-1, 0), which is not a free cell."),
        (dict(cheese=(1, 1)), "Maze 0: the cheese cannot be put at (1, 1), which is not a free cell."),
        (
            dict(mouse=(1, 1)),
            "Maze 0 (side 5, mouse at (1, 1)) cannot be a procgen maze: its mouse is outside the maze or in a wall.",
        ),
        (
            dict(mouse=(4, 4)),
            "Maze 0 (side 5, mouse at (4, 4)) cannot be a procgen maze: its mouse is on the cheese.",
        ),
    ]:
        with pytest.raises(StateError) as error:
            mazes.moved(**change)
        assert str(error.value) == message
    with pytest.raises(TypeError, match="Cannot cast"):
        mazes.moved(mouse=(0.0, 1.0))


def test_every_fault_of_a_maze_is_named_at_once():
    maze = mazes_from_pictures(LOOP)
    with pytest.raises(StateError) as error:
        dataclasses.replace(maze, grid=np.full_like(maze.grid, 7), size=np.array([4]))
    assert str(error.value) == (
        "Maze 0 (side 4, mouse at (0, 0)) cannot be a procgen maze: its side length is not an odd number from 3 to 25; "
        "its grid contains codes other than 2 (cheese), 51 (wall) and 100 (free); its free cells do not span a square "
        "with its side length."
    )


def test_one_maze_is_not_indexed_with_a_number():
    with pytest.raises(TypeError) as error:
        mazes_from_pictures(LOOP)[0]
    assert str(error.value) == (
        "Mazes cannot be indexed with 0. Use a slice, a list of indices or a mask, such as mazes[[0]] for the first "
        "maze."
    )


def test_a_picture_that_is_no_maze_is_refused():
    with pytest.raises(StateError) as error:
        mazes_from_pictures(LOOP, "..C .#. ...")
    assert str(error.value) == (
        "Picture 1 is not a maze: expected a square of '#' (wall), '.' (free), 'C' (cheese) "
        "and exactly one 'M' (mouse), got ['..C', '.#.', '...']."
    )
