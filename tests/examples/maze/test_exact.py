from collections import defaultdict

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from chanpatch import PatchedPolicy, edit, hook_points, patch_in, rollout, steer, zero_ablate
from maze.analysis.exact import ORIGINAL, STAY, Chains, cheese_and_corner, decisions, first_hits, greedy, neither, walk
from maze.analysis.forwards import SITE, frames
from maze.analysis.tables import TOLERANCE, SuffixError, action_tables, suffix
from maze.environment.requirements import procgen_mazes
from maze.environment.vector_env import MazeVectorEnv
from maze.levels import draw_levels, observe, policy_input
from maze.paths import MOVES, Direction
from maze.policy.network import ACTION_COUNT, ACTIONS, load_policy
from maze.states import CHEESE, WALL, mazes_from_pictures, read_mazes, write_mazes

CORRIDOR = """
    ...
    ##.
    M.C
"""
FORK = """
    .....
    .####
    .....
    .#.##
    M#C..
"""


def levels_from(*pictures):
    return write_mazes(mazes_from_pictures(*pictures), draw_levels(1, size=3, seed=0)[0])


def always(chains, **shares):
    """The table that gives the same probabilities in every state, each to the first action of its direction."""
    row = np.zeros(ACTION_COUNT)
    for name, share in shares.items():
        row[ACTIONS[Direction[name]][0]] = share
    return np.tile(row, (len(chains), 1))


def random_table(chains, seed):
    return np.random.default_rng(seed).dirichlet(np.ones(ACTION_COUNT), len(chains))


@pytest.fixture(scope="module")
def points():
    policy = load_policy()[0].to(memory_format=torch.channels_last)
    return hook_points(policy, torch.from_numpy(policy_input(observe(draw_levels(2, size=9, seed=0)))))


@pytest.fixture(scope="module")
def small():
    return draw_levels(12, size=5, seed=2, cheese="in distribution")


def test_states_are_squares_before_the_cheese_with_two_facings():
    chains = Chains.of(levels_from(CORRIDOR, FORK))
    one, other = (set(map(tuple, chains.cell[chains.level == level].tolist())) for level in (0, 1))
    assert one == {(0, 0), (0, 1)}
    assert other == {*((row, 0) for row in range(4)), *((row, col) for row in (2, 4) for col in range(5)), (1, 2)}
    assert len(chains) == 2 * (2 + 14)
    assert not chains.facing_right[chains.start].any()


def test_moves_from_every_state_are_those_of_procgen(small):
    chains = Chains.of(small[:3])
    facing = chains.facing_right.astype(bool)
    states = write_mazes(
        chains.mazes[chains.level].moved(mouse=chains.cell, facing_right=facing),
        [small[level] for level in chains.level],
    )
    environment = procgen_mazes(len(chains))
    for action in range(ACTION_COUNT):
        move = next((move for move, actions in ACTIONS.items() if action in actions), STAY)
        environment.set_state(states)
        environment.act(np.full(len(chains), action))
        ended = environment.observe()[2].astype(bool)
        after, following = read_mazes(environment.get_state()), chains.following[:, move]
        np.testing.assert_array_equal(following >= len(chains), ended)
        np.testing.assert_array_equal(after.mouse[~ended], chains.cell[following[~ended]])
        np.testing.assert_array_equal(after.facing_right[~ended], chains.facing_right[following[~ended]])


def test_observations_are_those_that_procgen_shows_on_the_way(small):
    chains = Chains.of(small)
    shown = frames(chains.as_levels(slice(None))).numpy()
    environment = MazeVectorEnv(small, num_envs=len(small))
    observation, _ = environment.reset(seed=0)
    state, rng = chains.start, np.random.default_rng(0)
    running = np.ones(len(small), dtype=bool)
    for _ in range(40):
        np.testing.assert_array_equal(observation[running], shown[state[running]])
        move = rng.integers(STAY, size=len(small))
        observation, *_ = environment.step(np.array([ACTIONS[Direction(each)][0] for each in move]))
        state = chains.following[np.where(running, state, chains.start), move]
        running &= state < len(chains)
    assert 0 < running.sum() < len(small)


def test_a_mouse_that_always_goes_right_is_at_the_cheese_after_as_many_steps_as_the_way_is_long():
    chains = Chains.of(levels_from(CORRIDOR))
    table = always(chains, RIGHT=1.0)
    assert [cheese_and_corner(chains, table, steps=steps)[0].item() for steps in (1, 2, 256)] == [0, 1, 1]


def test_a_mouse_that_goes_right_half_of_the_time_gets_there_as_often_as_two_coins_of_k_show_heads():
    chains = Chains.of(levels_from(CORRIDOR))
    table = always(chains, RIGHT=0.5, UP=0.5)
    for steps in (2, 3, 10):
        expected = 1 - 0.5**steps - steps * 0.5**steps
        assert cheese_and_corner(chains, table, steps=steps)[0].item() == pytest.approx(expected, abs=1e-12)


def test_probabilities_are_those_of_a_distribution_carried_forward_in_plain_python(small):
    chains = Chains.of(small)
    table = random_table(chains, seed=1)
    found, corner = cheese_and_corner(chains, table, steps=30)
    for level in range(len(small)):
        last = (4, 4)
        expected, _ = carried(chains, table, level, steps=30, ends=())
        assert found[level] == pytest.approx(expected, abs=1e-12)
        if tuple(chains.mazes.cheese[level]) == last:
            assert np.isnan(corner[level])
        else:
            before, passed = carried(chains, table, level, steps=30, ends=(last,))
            assert corner[level] == pytest.approx(passed, abs=1e-12)
            assert neither(chains, table, steps=30)[level] == pytest.approx(1 - before - passed, abs=1e-12)


def carried(chains, table, level, steps, ends):
    """P(cheese) and P(one of the cells `ends` before) of one level, from its grid, without `chains.following`."""
    grid = chains.mazes.grid[level]
    of = {
        (*cell, facing): table[state]
        for state, (cell, facing) in enumerate(zip(chains.cell.tolist(), chains.facing_right.tolist(), strict=True))
        if chains.level[state] == level
    }
    masses, found, ended = {(0, 0, False): 1.0}, 0.0, 0.0
    for _ in range(steps):
        after = defaultdict(float)
        for (row, col, facing), mass in masses.items():
            for action, share in enumerate(of[row, col, facing]):
                move = next((MOVES[move] for move, actions in ACTIONS.items() if action in actions), (0, 0))
                there = (row + move[0], col + move[1])
                inside = all(0 <= index < len(grid) for index in there)
                there = there if inside and grid[there] != WALL else (row, col)
                if grid[there] == CHEESE:
                    found += mass * share
                elif there in ends:
                    ended += mass * share
                else:
                    after[(*there, move[1] > 0 if move[1] else facing)] += mass * share
        masses = after
    assert found + ended + sum(masses.values()) == pytest.approx(1)
    return found, ended


def test_in_the_long_run_the_mouse_gets_to_one_of_two_goals_with_probability_1(small):
    chains = Chains.of(small)
    corner = chains.at(np.full((len(small), 2), 4)) & ~chains.cheese
    table = np.ones((len(chains), ACTION_COUNT))
    hits = first_hits(chains, table, [chains.cheese, corner], steps=20_000)
    np.testing.assert_allclose(hits.sum(axis=1), 1, atol=1e-9)
    assert (hits >= 0).all()


def test_stacked_tables_give_what_each_gives_alone(small):
    chains = Chains.of(small)
    tables = np.stack([random_table(chains, seed=seed) for seed in range(5)])
    together, both = first_hits(chains, tables, [chains.cheese], steps=30), decisions(chains, tables, steps=30)
    for table, hits, taken in zip(tables, together, both, strict=True):
        np.testing.assert_array_equal(hits, first_hits(chains, table, [chains.cheese], steps=30))
        np.testing.assert_array_equal(taken, decisions(chains, table, steps=30))


def test_at_the_decision_square_the_chances_of_two_ways_are_in_proportion_when_other_moves_come_back():
    chains = Chains.of(levels_from(FORK))  # the other moves are down, where the mouse can only come back, and a wall
    table = always(chains, LEFT=0.3, DOWN=0.2, UP=0.1, RIGHT=0.4)
    to_cheese, to_corner, neither = decisions(chains, table, steps=5000)[0]
    assert to_cheese == pytest.approx(0.4 / (0.4 + 0.1), abs=1e-9)
    assert to_corner == pytest.approx(0.1 / (0.4 + 0.1), abs=1e-9)
    assert neither == pytest.approx(0, abs=1e-9)


def test_a_mouse_that_runs_into_a_wall_takes_neither_way():
    chains = Chains.of(levels_from(FORK))
    np.testing.assert_array_equal(decisions(chains, always(chains, LEFT=1.0)), [[0, 0, 1]])


def test_a_level_with_the_cheese_in_the_corner_has_no_decision():
    chains = Chains.of(draw_levels(3, size=7, seed=0, cheese="top right"))
    assert np.isnan(decisions(chains, always(chains, UP=1.0))).all()


def test_greedy_takes_the_likeliest_action_always():
    table = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
    np.testing.assert_array_equal(greedy(table), [[0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("name", [ORIGINAL, "zeroed"])
def test_200_walks_are_rollouts_in_procgen_action_by_action(points, walked, name):
    chains, tables, policies = walked
    done = rollout(
        policies[name], MazeVectorEnv(chains.levels, num_envs=100), range(200), max_steps=40, sampling_seed=5
    )
    walks = walk(chains, tables[name], sampling_seed=5, steps=40)
    same = np.array(list(map(np.array_equal, done.actions, walks.actions)))
    # A draw next to a boundary may fall on its other side in procgen, and the episode goes another way from there.
    assert same.sum() >= 199
    np.testing.assert_array_equal(walks.terminated[same], done.terminated[same])
    assert 0 < walks.terminated.sum() < 200


@pytest.mark.slow
def test_200_walks_through_levels_of_all_kinds_are_whole_rollouts_in_procgen_action_by_action(points):
    sides = (7, 9, 11, 13, 15)
    levels = [level for side in sides for level in draw_levels(40, size=side, seed=6, cheese="out of distribution")]
    chains = Chains.of(levels)
    (table,) = action_tables(points, chains).values()
    done = rollout(points.model, MazeVectorEnv(levels, num_envs=50), range(200), max_steps=256, sampling_seed=8)
    walks = walk(chains, table, sampling_seed=8)
    same = np.array(list(map(np.array_equal, done.actions, walks.actions)))
    assert same.sum() >= 199
    np.testing.assert_array_equal(walks.terminated[same], done.terminated[same])


@pytest.fixture(scope="module")
def walked(points):
    """50 levels, each four times: an episode has draws of its own, and a level's table is computed once."""
    levels = draw_levels(50, size=7, seed=4, cheese="bottom right")
    patches = [zero_ablate(points.site(SITE, channel=31))]
    tables = action_tables(points, Chains.of(levels), {ORIGINAL: (), "zeroed": patches})
    chains = Chains.of(levels * 4)
    tables = {name: np.tile(table, (4, 1)) for name, table in tables.items()}
    return chains, tables, {ORIGINAL: points.model, "zeroed": PatchedPolicy(points, patches)}


def test_walks_find_the_cheese_as_often_as_the_exact_probability_says(small):
    chains = Chains.of(small * 100)
    table = random_table(chains, seed=1)
    exact = cheese_and_corner(chains, table, steps=20)[0]
    found = walk(chains, table, sampling_seed=0, steps=20).terminated
    spread = np.sqrt((exact * (1 - exact)).sum())
    assert abs(found.sum() - exact.sum()) < 4 * spread


def test_tables_are_what_the_patched_policy_says_of_every_state(points, small):
    chains = Chains.of(small)
    interventions = {
        ORIGINAL: (),
        "zeroed": [zero_ablate(points.site(SITE, channel=31))],
        "two": [
            zero_ablate(points.site(SITE, channel=[3, 27])),
            edit(points.site("embedder.fc", feature=slice(0, 99)), torch.neg),
        ],
    }
    tables = action_tables(points, chains, interventions)
    some = np.random.default_rng(0).choice(len(chains), 40, replace=False)
    observations = frames(chains.as_levels(slice(None)))[some]
    for name, patches in interventions.items():
        expected = PatchedPolicy(points, patches).distribution(observations).probs
        np.testing.assert_allclose(tables[name][some], expected.detach().numpy(), atol=TOLERANCE, rtol=0)
    assert not np.allclose(tables["zeroed"], tables[ORIGINAL], atol=1e-3)
    assert not np.allclose(tables["zeroed"], tables["two"], atol=1e-3)


def test_an_intervention_may_be_a_function_of_the_level_of_every_state(points, small):
    chains = Chains.of(small[:4])
    site, donors = points.site(SITE, channel=[3, 27]), torch.rand(4, 2, 8, 8, generator=torch.manual_seed(0))
    early, vectors = points.site("embedder.block2"), torch.randn(4, 32, 1, 1, generator=torch.manual_seed(1))
    late = action_tables(points, chains, {"set": lambda level: [patch_in(site, donors[level])]})["set"]
    steered = action_tables(
        points, chains, {"steered": lambda level: [steer(early, vectors[level])]}, site="embedder.block2"
    )["steered"]
    observations = frames(chains.as_levels(slice(None)))
    for level in range(4):
        states = chains.level == level
        for table, patch in (
            (late, patch_in(site, donors[level : level + 1])),
            (steered, steer(early, vectors[level : level + 1])),
        ):
            expected = PatchedPolicy(points, patch).distribution(observations[states]).probs
            np.testing.assert_allclose(table[states], expected.detach(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("site", ["embedder.block1", "embedder.block3", SITE, "embedder.fc"])
def test_the_policy_runs_from_any_link_of_its_chain(points, small, site):
    chains = Chains.of(small[:1])
    table = action_tables(points, chains, site=site)[ORIGINAL]
    np.testing.assert_allclose(table, action_tables(points, chains)[ORIGINAL], atol=TOLERANCE, rtol=0)


def test_the_suffix_shares_the_weights_and_leaves_the_policy_alone(points):
    modules = dict(points.model.named_modules())
    rest = suffix(points, SITE)
    assert {id(weight) for weight in rest.parameters()} < {id(weight) for weight in points.model.parameters()}
    assert dict(points.model.named_modules()) == modules


def test_a_hook_point_inside_a_residual_block_is_refused(points, small):
    with pytest.raises(SuffixError) as error:
        action_tables(points, Chains.of(small[:1]), site="embedder.block3.res1.conv2")
    assert str(error.value) == (
        "original: run from 'embedder.block3.res1.conv2' on, the policy's action probabilities differ from those of "
        "the whole policy: the modules up to there do not form a chain."
    )


def test_a_patch_before_the_record_is_refused(points, small):
    patch = zero_ablate(points.site("embedder.block2", channel=3))
    with pytest.raises(SuffixError) as error:
        action_tables(points, Chains.of(small[:1]), {"early": [patch]})
    assert str(error.value) == (
        "early: the patch at Site('embedder.block2', channel=3) comes before 'embedder.relu3', the hook "
        "point of the record. Give an earlier hook point: site=..."
    )


def test_a_patch_that_depends_on_the_row_is_refused(points, small):
    patch = zero_ablate(points.site(SITE), where=lambda context: (context.rows % 2 == 0).view(-1, 1, 1, 1))
    with pytest.raises(SuffixError) as error:
        action_tables(points, Chains.of(small[:1]), {"rows": [patch]})
    assert str(error.value) == (
        "rows: run from 'embedder.relu3' on, the policy's action probabilities depend on the order of the states: a "
        "patch depends on more than activation and level."
    )


def test_a_policy_that_is_uniform_walks_at_random(small):
    class Uniform(torch.nn.Module):
        def forward(self, observations):
            return Categorical(logits=observations.new_zeros(len(observations), ACTION_COUNT))

    chains = Chains.of(small)
    done = rollout(Uniform(), MazeVectorEnv(small, num_envs=3), range(len(small)), max_steps=30, sampling_seed=1)
    table = np.full((len(chains), ACTION_COUNT), 1 / ACTION_COUNT)
    walks = walk(chains, table, sampling_seed=1, steps=30)
    assert all(map(np.array_equal, done.actions, walks.actions))
