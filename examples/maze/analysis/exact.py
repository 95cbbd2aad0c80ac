"""A policy in a maze without sampling: every level as a Markov chain.

procgen's observation of a level depends only on the mouse's square and facing. So a policy without memory is a table
with one row of action probabilities per state, and P(cheese) is computed, not estimated:

    chains = Chains.of(levels)
    table = action_tables(points, chains)[ORIGINAL]                  # maze.analysis.tables
    found = first_hits(chains, table, [chains.cheese])[chains.start]  # (level, 1)

The states of all levels lie end to end. Tables of many interventions may be stacked, (intervention, state, action), and
every probability then has the same first axis.
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
from chanpatch.policies import Rollout
from maze.analysis.cells import Flags, Integers, Values
from maze.paths import MOVES, Direction, at_cells, decision_squares, direction_field, distances, legal_moves, top_right
from maze.policy.network import ACTION_COUNT, ACTIONS
from maze.states import CHEESE, WALL, Mazes, read_mazes, write_mazes

STEPS = 256  # at which an episode is cut
ORIGINAL = "original"  # the name of the policy without a patch
STAY = len(Direction)  # the fifth move: none

Table: TypeAlias = NDArray[np.floating[Any]]  # action probabilities (..., state, action=15)

_AT_ONCE = 100_000  # numbers carried through time together, few enough to stay in the processor's cache

_MOVE = np.full(ACTION_COUNT, STAY)  # the move of every action
for _direction, _actions in ACTIONS.items():
    _MOVE[list(_actions)] = _direction


@dataclass(frozen=True, eq=False)
class Chains:
    """The states of a batch of levels: the mouse's squares before the cheese, each with both facings.

    The cheese of every level is one more state, which no move leaves. The cheeses come last and have no row in a table.
    """

    levels: Sequence[bytes]  # procgen states, one per level
    mazes: Mazes  # the mazes
    level: Integers  # int (state,): level of every state but the cheeses
    cell: Integers  # int (state, 2): the mouse's cell
    facing_right: Flags  # bool (state,)
    following: Integers  # int (state, move=5): the next state after every `Direction`, and after `STAY`
    start: Integers  # int (level,): the first state

    @classmethod
    def of(cls, levels: Sequence[bytes]) -> Chains:
        """The states that the mouse can reach; raises StateError for bytes that are not a hard maze with cheese."""
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
        """The number of states without the cheeses."""
        return len(self.level)

    @property
    def cheese(self) -> Flags:
        """Whether a state is a cheese: bool (state + level,)."""
        return np.arange(len(self) + len(self.levels)) >= len(self)

    def at(self, cells: Integers) -> Flags:
        """Whether a state is at the cell of its level, (level, 2), with either facing: bool (state + level,)."""
        here = (self.cell == cells[self.level]).all(axis=1)
        return np.concatenate([here, (self.mazes.cheese == cells).all(axis=1)])

    def states_at(self, cells: Integers, facing_right: ArrayLike = False) -> Integers:
        """The state at a cell of every level: int (level,), -1 if the mouse cannot reach it before the cheese."""
        found = np.full(len(self.levels), -1)
        facing = np.broadcast_to(facing_right, len(self.levels))
        here = self.at(cells)[: len(self)] & (self.facing_right == facing[self.level])
        found[self.level[here]] = np.flatnonzero(here)
        return found

    def as_levels(self, states: slice) -> list[bytes]:
        """The given states as procgen states: the level of each, with the mouse at its cell."""
        level = self.level[states]
        mazes = self.mazes[level].moved(mouse=self.cell[states], facing_right=self.facing_right[states])
        return write_mazes(mazes, [self.levels[index] for index in level])


def move_probabilities(table: Table) -> Values:
    """The probability of every `Direction` and of `STAY`: (..., state, move=5)."""
    moves = np.asarray(table, dtype=np.float64) @ np.eye(STAY + 1)[_MOVE]
    return moves / moves.sum(axis=-1, keepdims=True)  # the sum is 1 in float32 only


def first_hits(chains: Chains, table: Table, goals: Sequence[Flags], *, steps: int = STEPS) -> Values:
    """The probability of reaching each goal before any other goal, from each state: (..., state + level, goal).

    Args:
        chains: the levels.
        table: table of one policy, or of several.
        goals: bool (state + level,) each, without overlap.
        steps: number of steps within which a goal counts.
    """
    goal = np.stack(goals, axis=1)
    moves = move_probabilities(table)
    moves[..., goal[: len(chains)].any(axis=1), :] = np.eye(STAY + 1)[STAY]  # a mouse at a goal stays
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


def cheese_and_corner(chains: Chains, table: Table, *, steps: int = STEPS) -> tuple[Values, Values]:
    """P(cheese) and P(corner before the cheese): (..., level) each, NaN if the cheese is in the corner."""
    corner = top_right(chains.mazes)
    found = first_hits(chains, table, [chains.cheese], steps=steps)[..., chains.start, 0]
    passed = first_hits(chains, table, [chains.at(corner)], steps=steps)[..., chains.start, 0]
    return found, np.where((chains.mazes.cheese == corner).all(axis=1), np.nan, passed)


def neither(chains: Chains, table: Table, *, steps: int = STEPS) -> Values:
    """The probability that the mouse reaches neither the cheese nor the top right corner: (..., level)."""
    goal = chains.cheese | chains.at(top_right(chains.mazes))
    return 1 - first_hits(chains, table, [goal], steps=steps)[..., chains.start, 0]


def decisions(chains: Chains, table: Table, *, steps: int = STEPS) -> Values:
    """The path that a mouse on the decision square, facing left, takes first: (..., level, 3).

    The last axis has the probabilities of the first square to the cheese, of the first square to the corner, and of
    neither within `steps`. NaN if a level has no decision square (see `paths.decision_squares`).
    """
    mazes = chains.mazes
    cells, exists = decision_squares(mazes)
    states = chains.states_at(cells)
    exists &= states >= 0
    goals = []
    for target in (mazes.cheese, top_right(mazes)):
        move = at_cells(direction_field(mazes, target), cells).argmax(axis=1)
        goals.append(chains.at(cells + MOVES[move]) & np.concatenate([exists[chains.level], exists]))
    taken = first_hits(chains, table, goals, steps=steps)[..., states, :]
    neither = np.maximum(1 - taken.sum(axis=-1, keepdims=True), 0)  # rounding
    return np.where(exists[:, None], np.concatenate([taken, neither], axis=-1), np.nan)


def greedy(table: Table) -> Values:
    """The table of the policy that takes the likeliest action, the first of equally likely actions."""
    return np.eye(table.shape[-1])[table.argmax(axis=-1)]


def walk(chains: Chains, table: Table, *, sampling_seed: int, steps: int = STEPS) -> Rollout:
    """One episode on every level, with the draws of `chanpatch.rollout` in procgen for `seeds=range(levels)`.

    So walks of two policies are paired with each other and with rollouts. A policy's last bits depend on the batch, so
    a draw next to the boundary between two actions can differ in procgen.
    """
    rows = torch.from_numpy(np.asarray(table, dtype=np.float64))

    def policy(state: torch.Tensor) -> Categorical:
        return Categorical(probs=rows[state])

    envs = _ChainsVectorEnv(chains)
    return rollout(policy, envs, range(len(chains.levels)), max_steps=steps, sampling_seed=sampling_seed)


class _ChainsVectorEnv(VectorEnv):
    """Levels as chains: the observation is the state, and the seed is the level."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, chains: Chains) -> None:
        self.chains, self.num_envs = chains, len(chains.levels)
        self.single_observation_space = Discrete(len(chains))
        self.single_action_space = Discrete(ACTION_COUNT)
        self._state = chains.start

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Integers, dict[str, Any]]:
        self._start = self._state = self.chains.start[np.asarray(seed)]
        return self._state, {}

    def step(self, actions: Integers) -> tuple[Integers, Values, Flags, Flags, dict[str, Any]]:
        following = self.chains.following[self._state, _MOVE[actions]]
        found = following >= len(self.chains)
        self._state = np.where(found, self._start, following)
        return self._state, 10.0 * found, found, np.zeros_like(found), {}


def _reachable_squares(mazes: Mazes) -> Integers:
    """Twice the number of every square that the mouse can reach before the cheese, else -1: (level, row, col)."""
    closed = replace(mazes, grid=np.where(mazes.grid == CHEESE, np.int32(WALL), mazes.grid))
    reachable = np.isfinite(distances(closed, mazes.mouse))
    square = np.full(reachable.shape, -1)
    square[reachable] = 2 * np.arange(np.count_nonzero(reachable))
    return square


def _batches(chains: Chains, width: int) -> Iterator[range]:
    """Yields consecutive levels whose states, with `width` numbers each, fit into the cache."""
    levels = len(chains.levels)
    together = max(1, _AT_ONCE * levels // (width * max(len(chains), 1)))
    for first in range(0, levels, together):
        yield range(first, min(first + together, levels))


def _carried(reached: Values, moves: Values, following: Integers, steps: int) -> Values:
    """The probabilities after further steps.

    `reached` has (state, policy, goal) with the states without moves last, `moves` the probabilities (move, state,
    policy, 1), and `following` the next states (move, state).
    """
    after, there = np.empty((2, moves.shape[1], *reached.shape[1:]))
    for _ in range(steps):
        np.multiply(moves[STAY], reached[: len(after)], out=after)
        for move in Direction:
            # The indices are in range. Only with clipping does numpy write into `there` without a copy.
            np.take(reached, following[move], axis=0, out=there, mode="clip")
            there *= moves[move]
            after += there
        reached[: len(after)] = after
    return reached
