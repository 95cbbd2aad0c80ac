"""What a policy does in a maze, without sampling: every level as a Markov chain, and what follows from it.

What procgen shows of a level depends on the mouse's square and on the way it faces, and on nothing else. So a
policy without memory is a table, one row of action probabilities per state (square, facing), and the
probability of reaching the cheese is computed, not estimated:

    chains = Chains.of(levels)
    table = action_tables(points, chains)[ORIGINAL]                  # maze.tables: the policy, once per state
    found = first_hits(chains, table, [chains.cheese])[chains.start]  # (level, 1)

The states of all levels lie end to end. Tables of many interventions may be stacked, (intervention, state, action):
then every probability comes with that axis in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import ArrayLike, NDArray
from torch.distributions import Categorical

from chanpatch import rollout
from maze.analysis.episodes import STEPS, Episodes, padded
from maze.environment.levels import observe
from maze.environment.paths import (
    MOVES,
    Direction,
    decision_squares,
    direction_field,
    distances,
    legal_moves,
    top_right,
)
from maze.environment.states import CHEESE, WALL, Mazes, read_mazes, write_mazes
from maze.policy.network import ACTION_COUNT, ACTIONS

STAY = len(Direction)  # the fifth move: none
NEAR_TIE = 1e-5  # a draw this close to the boundary between two actions may fall on its other side in procgen

Table: TypeAlias = NDArray[np.floating[Any]]  # action probabilities (..., state, action=15)

_AT_ONCE = 100_000  # numbers that are carried through time together: they stay in the processor's cache

_MOVE = np.full(ACTION_COUNT, STAY)  # the move of every action
for _direction, _actions in ACTIONS.items():
    _MOVE[list(_actions)] = _direction


@dataclass(frozen=True, eq=False)
class Chains:
    """The states of a batch of levels: where a mouse can be before it gets to the cheese, and what moves do there.

    A state is a square and a facing; squares behind the cheese have none, as the episode ends at the cheese. The
    cheese of every level is one more state, which no move leaves; these come last and have no row in a table.

    Attributes:
        levels: procgen states, one per level.
        mazes: read from them.
        level: int (state,), of every state but the cheeses.
        cell: int (state, 2), the mouse's.
        facing_right: bool (state,).
        following: int (state, move=5), where every `Direction` leads, and `STAY`.
        start: int (level,), the state in which each level starts.
    """

    levels: Sequence[bytes]
    mazes: Mazes
    level: NDArray[np.int64]
    cell: NDArray[np.int64]
    facing_right: NDArray[np.bool_]
    following: NDArray[np.int64]
    start: NDArray[np.int64]

    @classmethod
    def of(cls, levels: Sequence[bytes]) -> Chains:
        """The states that can be reached from the start of each level.

        Raises:
            StateError: bytes that are not a hard maze state, or a maze without cheese.
        """
        mazes = read_mazes(levels)
        square = _reachable_squares(mazes)
        level, row, col = (np.repeat(axis, 2) for axis in np.nonzero(square >= 0))
        cell = np.stack([row, col], axis=1)
        facing_right = np.arange(len(level)) % 2 == 1
        following = np.repeat(np.arange(len(level))[:, None], STAY + 1, axis=1)
        legal, field = legal_moves(mazes), square.copy()
        cheese = mazes.cheese
        field[np.arange(len(mazes)), cheese[:, 0], cheese[:, 1]] = len(level) + np.arange(len(mazes))
        for move in Direction:
            can = legal[level, move, row, col]
            there = field[level, row + can * MOVES[move, 0], col + can * MOVES[move, 1]]
            # A horizontal move turns the mouse, also against a wall.
            turned = {Direction.LEFT: 0, Direction.RIGHT: 1}.get(move, facing_right)
            following[:, move] = np.where(there < len(level), there + turned, there)
        chains = cls(levels, mazes, level, cell, facing_right, following, np.empty(0, dtype=np.int64))
        return replace(chains, start=chains.states_at(mazes.mouse, mazes.facing_right))

    def __len__(self) -> int:
        """The number of states, the cheeses not counted."""
        return len(self.level)

    @property
    def cheese(self) -> NDArray[np.bool_]:
        """Which states are cheeses: bool (state + level,)."""
        return np.arange(len(self) + len(self.levels)) >= len(self)

    def at(self, cells: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which states are at the cell of their level, with either facing: bool (state + level,).

        Args:
            cells: (level, 2).
        """
        here = (self.cell == cells[self.level]).all(axis=1)
        return np.concatenate([here, (self.mazes.cheese == cells).all(axis=1)])

    def states_at(self, cells: NDArray[np.int64], facing_right: ArrayLike = False) -> NDArray[np.int64]:
        """The state at the cell of every level: int (level,), -1 where the mouse cannot get there before the cheese.

        Args:
            cells: (level, 2).
            facing_right: bool (level,) or one for all.
        """
        found = np.full(len(self.levels), -1)
        facing = np.broadcast_to(facing_right, len(self.levels))
        here = self.at(cells)[: len(self)] & (self.facing_right == facing[self.level])
        found[self.level[here]] = np.flatnonzero(here)
        return found

    def observations(self, states: slice) -> NDArray[np.uint8]:
        """What procgen shows of some states: uint8 (state, row=64, col=64, channel=3)."""
        level = self.level[states]
        mazes = self.mazes[level].moved(mouse=self.cell[states], facing_right=self.facing_right[states])
        return observe(write_mazes(mazes, [self.levels[index] for index in level]))


def move_probabilities(table: Table) -> NDArray[np.float64]:
    """The probability of every move: (..., state, move=5), of each `Direction` and of `STAY`."""
    moves: NDArray[np.float64] = np.asarray(table, dtype=np.float64) @ np.eye(STAY + 1)[_MOVE]
    moves /= moves.sum(axis=-1, keepdims=True)  # to 1 in float32 only
    return moves


def first_hits(
    chains: Chains, table: Table, goals: Sequence[NDArray[np.bool_]], *, steps: int = STEPS
) -> NDArray[np.float64]:
    """The probability of coming to each goal, and to no other goal before, within a number of steps.

    Goes backwards in time: what is true of k steps from every state follows from what is true of k - 1.

    Args:
        chains: of the levels.
        table: of the policy, or of several.
        goals: bool (state + level,) each; no state is in two.
        steps: 256, unless you want it otherwise.

    Returns:
        (..., state + level, goal): from each state on; 1 where that is in the goal already.
    """
    goal = np.stack(goals, axis=1)
    moves = move_probabilities(table)
    moves[..., goal[: len(chains)].any(axis=1), :] = np.eye(STAY + 1)[STAY]  # who is there stays
    policies = moves.shape[:-2]
    moves = moves.reshape(-1, *moves.shape[-2:]).transpose(2, 1, 0)[..., None]  # (move, state, policy, 1)
    reached = np.tile(goal[:, None].astype(np.float64), (1, moves.shape[2], 1))
    for level in _batches(chains, moves[0, 0].size * goal.shape[1]):
        states = (chains.level >= level.start) & (chains.level < level.stop)
        here = np.concatenate([np.flatnonzero(states), len(chains) + np.arange(level.start, level.stop)])
        following = np.searchsorted(here, chains.following[states]).T
        reached[here] = _carried(reached[here], np.ascontiguousarray(moves[:, states]), following, steps)
    probabilities = np.moveaxis(reached, 1, 0).reshape(*policies, *goal.shape)
    return np.minimum(probabilities, 1)  # rounding


def cheese_and_corner(
    chains: Chains, table: Table, *, steps: int = STEPS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The probabilities that the mouse gets to the cheese, and that it passes the top right corner before.

    Returns:
        (..., level) each; the corner's is NaN where the cheese is in it.
    """
    corner = top_right(chains.mazes)
    found = first_hits(chains, table, [chains.cheese], steps=steps)[..., chains.start, 0]
    passed = first_hits(chains, table, [chains.at(corner)], steps=steps)[..., chains.start, 0]
    return found, np.where((chains.mazes.cheese == corner).all(axis=1), np.nan, passed)


def neither(chains: Chains, table: Table, *, steps: int = STEPS) -> NDArray[np.float64]:
    """The probability that the mouse gets neither to the cheese nor to the top right corner: (..., level)."""
    goal = chains.cheese | chains.at(top_right(chains.mazes))
    reached = first_hits(chains, table, [goal], steps=steps)[..., chains.start, 0]
    return 1 - reached


def decisions(chains: Chains, table: Table, *, steps: int = STEPS) -> NDArray[np.float64]:
    """Which way a mouse that stands on the decision square takes first: to the cheese, to the corner, or neither.

    It takes a way when it steps on its first square; it may step elsewhere and come back before. It starts facing
    left, as in a fresh level.

    Returns:
        (..., level, 3): probabilities of the first square to the cheese, of that to the corner, of neither within
        `steps`. NaN where a level has no decision square (see `paths.decision_squares`).
    """
    mazes = chains.mazes
    cells, exists = decision_squares(mazes)
    states = chains.states_at(cells)
    exists &= states >= 0
    every = np.arange(len(mazes))
    goals = []
    for target in (mazes.cheese, top_right(mazes)):
        move = direction_field(mazes, target)[every, :, cells[:, 0], cells[:, 1]].argmax(axis=1)
        goals.append(chains.at(cells + MOVES[move]) & np.concatenate([exists[chains.level], exists]))
    taken = first_hits(chains, table, goals, steps=steps)[..., states, :]
    neither = np.maximum(1 - taken.sum(axis=-1, keepdims=True), 0)  # rounding
    return np.where(exists[:, None], np.concatenate([taken, neither], axis=-1), np.nan)


def greedy(table: Table) -> NDArray[np.float64]:
    """The table of the policy that takes the likeliest action; of equally likely ones the first."""
    one_hot: NDArray[np.float64] = np.eye(table.shape[-1])[table.argmax(axis=-1)]
    return one_hot


def walk(chains: Chains, table: Table, *, sampling_seed: int, steps: int = STEPS) -> tuple[Episodes, NDArray[np.int64]]:
    """One episode on every level, with the very draws that `chanpatch.rollout` has for it in procgen.

    The draw behind an action and the inverse CDF are `chanpatch.rollout`'s own, so walks of two policies are
    paired with each other and with rollouts in procgen of `seeds=range(levels)`. The last bits of a policy's
    output depend on what else is in the batch; a draw within `NEAR_TIE` of the boundary between two actions can
    therefore go the other way in procgen. Such draws are counted.

    Args:
        chains: of the levels.
        table: of the policy.
        sampling_seed: of the draws.
        steps: at which an episode is cut.

    Returns:
        The episodes, and the number of near ties in each: int (level,).
    """
    rows = torch.from_numpy(np.asarray(table, dtype=np.float64))

    def policy(state: torch.Tensor) -> Categorical:
        return Categorical(probs=_with_edges(rows[state]))

    envs = _ChainsVectorEnv(chains)
    done = rollout(policy, envs, range(len(chains.levels)), max_steps=steps, sampling_seed=sampling_seed)
    actions = [taken // 3 for taken in done.actions]
    near_ties = np.array([np.count_nonzero(taken % 3 != 1) for taken in done.actions])
    return Episodes(done.terminated, done.lengths, padded(actions, steps)), near_ties


class _ChainsVectorEnv(VectorEnv):
    """Levels as chains: the observation is the state, the seed the index of the level.

    Actions are thirds of procgen's, as `_with_edges` cuts them.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, chains: Chains) -> None:
        self.chains, self.num_envs = chains, len(chains.levels)
        self.single_observation_space = Discrete(len(chains))
        self.single_action_space = Discrete(3 * ACTION_COUNT)
        self._state = chains.start

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[NDArray[np.int64], dict[str, Any]]:
        self._start = self.chains.start[np.asarray(seed)]
        self._state = self._start
        return self._state, {}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        following = self.chains.following[self._state, _MOVE[actions // 3]]
        found = following >= len(self.chains)
        self._state = np.where(found, self._start, following)
        return self._state, 10.0 * found, found, np.zeros_like(found), {}


def _with_edges(probabilities: torch.Tensor) -> torch.Tensor:
    """Every action's interval in three: what is near its lower boundary, the middle, what is near the upper one.

    Args:
        probabilities: (row, action).

    Returns:
        (row, 3 * action), in the order of the CDF, so `outcome // 3` is the action.
    """
    edge = (probabilities / 2).clamp(max=NEAR_TIE)
    return torch.stack([edge, probabilities - 2 * edge, edge], dim=-1).flatten(1)


def _reachable_squares(mazes: Mazes) -> NDArray[np.int64]:
    """Twice the number of every square that the mouse can be on before the cheese, else -1: (level, row, col)."""
    closed = replace(mazes, grid=np.where(mazes.grid == CHEESE, np.int32(WALL), mazes.grid))
    reachable = np.isfinite(distances(closed, mazes.mouse))
    square = np.full(reachable.shape, -1)
    square[reachable] = 2 * np.arange(np.count_nonzero(reachable))
    return square


def _batches(chains: Chains, width: int) -> Iterator[range]:
    """Consecutive levels whose states, with `width` numbers each, fit into the cache."""
    levels = len(chains.levels)
    together = max(1, _AT_ONCE * levels // (width * max(len(chains), 1)))
    for first in range(0, levels, together):
        yield range(first, min(first + together, levels))


def _carried(
    reached: NDArray[np.float64], moves: NDArray[np.float64], following: NDArray[np.int64], steps: int
) -> NDArray[np.float64]:
    """What is reached from every state after that many steps more.

    Args:
        reached: (state, policy, goal), states without moves last.
        moves: (move, state, policy, 1), probabilities.
        following: int (move, state).
        steps: how many.
    """
    after, there = np.empty((2, moves.shape[1], *reached.shape[1:]))
    for _ in range(steps):
        np.multiply(moves[STAY], reached[: len(after)], out=after)
        for move in Direction:
            # The indices are in range; only with clipping does numpy write into `there` without a copy.
            np.take(reached, following[move], axis=0, out=there, mode="clip")
            there *= moves[move]
            after += there
        reached[: len(after)] = after
    return reached
