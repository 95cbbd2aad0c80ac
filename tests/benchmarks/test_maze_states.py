"""Editing the cheese and the mouse in state bytes, against procgen-tools' `EnvState` doing the same."""

import time

import numpy as np
import pytest

from maze.environment.requirements import policy_models
from maze.levels import draw_levels
from maze.states import CHEESE, FREE, read_mazes, write_mazes

TARGET = 50


def edited_by_procgen_tools(states):
    from procgen_tools.maze import MOUSE, EnvState, _parse_maze_state_bytes

    edited = []
    for state in states:
        _parse_maze_state_bytes.cache_clear()  # every state of a study is new to the cache
        maze = EnvState(state)
        grid = maze.full_grid(with_mouse=False)
        grid[grid == CHEESE] = FREE
        grid[19, 19], grid[7, 7] = CHEESE, MOUSE
        maze.set_grid(grid)
        edited.append(maze.state_bytes)
    _parse_maze_state_bytes.cache_clear()
    return edited


def edited_here(states):
    return write_mazes(read_mazes(states).moved(cheese=(14, 14), mouse=(2, 2)), states)


@pytest.fixture(scope="module")
def levels():
    policy_models()  # imports procgen-tools quietly
    return draw_levels(64, seed=0, size=15)


def test_editing_a_batch_of_states_is_at_least_50_times_as_fast(benchmark, levels):
    few = levels[:16]
    assert edited_here(few) == edited_by_procgen_tools(few)
    theirs = []
    for _ in range(3):
        start = time.perf_counter()
        edited_by_procgen_tools(few)
        theirs.append((time.perf_counter() - start) / len(few))
    benchmark(edited_here, levels)
    ours = benchmark.stats.stats.median / len(levels)
    ratio = float(np.median(theirs)) / ours
    benchmark.extra_info.update(
        microseconds_per_state=1e6 * ours,
        procgen_tools_milliseconds=1e3 * float(np.median(theirs)),
        ratio=ratio,
    )
    print(f"\n{1e6 * ours:.1f} us a state, procgen-tools {1e3 * np.median(theirs):.2f} ms: {ratio:.0f} times as fast")
    assert ratio >= TARGET
