import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from maze.environment.vector_env import MazeVectorEnv
from maze.levels import draw_levels, observe, policy_input
from maze.paths import MOVES, Direction, shortest_paths
from maze.policy.network import ACTIONS, NO_MOVE
from maze.states import StateError, read_mazes


@pytest.fixture(scope="module")
def levels():
    return draw_levels(6, seed=1, size=7)


def walked(levels, seeds, steps, generator):
    """Everything that a random walk returns, as one list of arrays."""
    environment = MazeVectorEnv(levels, num_envs=len(seeds))
    observation, _ = environment.reset(seed=seeds)
    rng = np.random.default_rng(generator)
    seen = [observation]
    for _ in range(steps):
        seen += [*environment.step(rng.integers(15, size=len(seeds)))[:4], environment.mouse_cells()]
    return seen


def test_a_seed_is_the_index_of_a_level(levels):
    environment = MazeVectorEnv(levels, num_envs=3)
    observation, info = environment.reset(seed=[4, 0, 4])
    np.testing.assert_array_equal(observation, policy_input(observe([levels[i] for i in (4, 0, 4)])))
    assert info["level"].tolist() == [4, 0, 4]


def test_one_seed_starts_consecutive_levels(levels):
    environment = MazeVectorEnv(levels, num_envs=3)
    observation, info = environment.reset(seed=2)
    np.testing.assert_array_equal(observation, policy_input(observe(levels[2:5])))
    assert info["level"].tolist() == [2, 3, 4]


def test_without_a_seed_levels_are_random_and_repeat_after_the_same_seed(levels):
    environment = MazeVectorEnv(levels, num_envs=3)
    drawn = []
    for _ in range(2):
        environment.reset(seed=0)
        drawn.append([environment.reset()[1]["level"].tolist() for _ in range(4)])
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn[0]))) > 1


def test_spaces_describe_what_comes_and_goes(levels):
    environment = MazeVectorEnv(levels, num_envs=2)
    observation, _ = environment.reset(seed=0)
    assert environment.observation_space.contains(observation)
    assert environment.single_observation_space.shape == (3, 64, 64)
    assert environment.single_action_space.n == 15
    environment.action_space.seed(0)
    observation, reward, terminated, truncated, info = environment.step(environment.action_space.sample())
    assert environment.observation_space.contains(observation)
    assert reward.dtype == np.float64 and terminated.dtype == truncated.dtype == bool
    assert reward.shape == terminated.shape == truncated.shape == (2,)
    assert info == {}
    assert environment.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


def test_the_same_seeds_and_actions_give_the_same_trajectory_past_the_end_of_episodes():
    small = draw_levels(6, seed=1, size=3)
    first, second = (walked(small, [0, 1, 2, 5], 60, generator=0) for _ in range(2))
    assert any(arrays.dtype == bool and arrays.any() for arrays in first)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_reset_forgets_what_was_before(levels):
    environment = MazeVectorEnv(levels, num_envs=2)
    fresh, _ = environment.reset(seed=[0, 1])
    for _ in range(20):
        environment.step(np.full(2, 7))
    again, _ = environment.reset(seed=[0, 1])
    np.testing.assert_array_equal(fresh, again)
    assert not environment.mouse_cells().any()


def test_a_trajectory_does_not_depend_on_what_runs_beside_it(levels):
    environment = MazeVectorEnv(levels, num_envs=1)
    alone, _ = environment.reset(seed=[3])
    crowd = MazeVectorEnv(levels, num_envs=4)
    beside, _ = crowd.reset(seed=[1, 3, 0, 0])
    for step in range(40):
        np.testing.assert_array_equal(alone[0], beside[1])
        action = (5, 7, 3, 1)[step % 4]
        alone, *_ = environment.step(np.array([action]))
        beside, *_ = crowd.step(np.array([8, action, 5, 2]))


def test_the_cheese_terminates_with_reward_10_and_another_level_is_shown(levels):
    mazes = read_mazes(levels)
    (path,) = shortest_paths(mazes[[0]], mazes[[0]].cheese)
    environment = MazeVectorEnv(levels, num_envs=2)
    environment.reset(seed=[0, 0])
    for before, after in zip(path[:-1], path[1:], strict=True):
        np.testing.assert_array_equal(environment.mouse_cells(), [before, (0, 0)])
        move = Direction(int((after - before == MOVES).all(axis=1).argmax()))
        observation, reward, terminated, truncated, _ = environment.step([ACTIONS[move][0], NO_MOVE])
        arrived = bool((after == path[-1]).all())
        assert terminated.tolist() == [arrived, False]
        assert reward.tolist() == [10.0 * arrived, 0.0]
        assert not truncated.any()
    assert (observation[0] != observation[1]).any()
    assert (observation[0] != policy_input(observe(levels[:1]))[0]).any()


def test_500_steps_truncate(levels):
    environment = MazeVectorEnv(levels, num_envs=1)
    environment.reset(seed=0)
    ends = []
    for step in range(1, 502):
        _, reward, terminated, truncated, _ = environment.step([NO_MOVE])
        assert not terminated.any() and not reward.any()
        if truncated.any():
            ends.append(step)
    assert ends == [500]


def test_a_finished_sub_environment_that_does_not_move_stays_at_the_start_of_the_next_level(levels):
    mazes = read_mazes(levels)
    (path,) = shortest_paths(mazes[[0]], mazes[[0]].cheese)
    environment = MazeVectorEnv(levels, num_envs=1)
    environment.reset(seed=0)
    for before, after in zip(path[:-1], path[1:], strict=True):
        move = Direction(int((after - before == MOVES).all(axis=1).argmax()))
        following, *_ = environment.step([ACTIONS[move][0]])
    for _ in range(10):
        observation, reward, terminated, truncated, _ = environment.step([NO_MOVE])
        np.testing.assert_array_equal(observation, following)
        assert not (reward.any() or terminated.any() or truncated.any())
        assert not environment.mouse_cells().any()


def test_a_seed_that_no_level_has_is_refused(levels):
    environment = MazeVectorEnv(levels, num_envs=2)
    for seed, message in [
        ([0, 6], "A seed is the index of a level and must be 0 to 5; got 6."),
        ([-1, 0], "A seed is the index of a level and must be 0 to 5; got -1."),
        (5, "A seed is the index of a level and must be 0 to 5; got 6."),
        ([1], "Expected 2 seeds, one per sub-environment; got 1."),
    ]:
        with pytest.raises(IndexError) as error:
            environment.reset(seed=seed)
        assert str(error.value) == message


@pytest.mark.parametrize("actions", [[0], [0, 15], [-1, 0], [0.0, 1.0], [[0, 1]]])
def test_actions_that_do_not_exist_are_refused(levels, actions):
    environment = MazeVectorEnv(levels, num_envs=2)
    environment.reset(seed=0)
    with pytest.raises(ValueError) as error:
        environment.step(actions)
    assert str(error.value) == f"Expected 2 actions, each 0 to 14; got {actions}."


def test_levels_are_checked_when_the_environment_is_made(levels):
    with pytest.raises(StateError):
        MazeVectorEnv([b"not a state"], num_envs=1)
    with pytest.raises(ValueError) as error:
        MazeVectorEnv([], num_envs=1)
    assert str(error.value) == "Expected at least one level and one sub-environment; got 0 and 1."


def test_an_environment_is_closed_once_and_for_all(levels):
    environment = MazeVectorEnv(levels, num_envs=1)
    environment.close()
    environment.close()
    assert environment.closed
