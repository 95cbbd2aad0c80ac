"""Steering vectors of single mazes after block 2's first residual block, and their controls.

A vector is the difference between the activations on two pictures of a level, with the mouse on the first square. The
vector is added in every state of the level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chanpatch import HookPoints, steer
from chanpatch.controls import random_vectors
from maze.analysis import effects
from maze.analysis.cells import Table, Tables, Values
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals
from maze.analysis.exact import Chains
from maze.analysis.forwards import activations
from maze.analysis.part import Study
from maze.analysis.tables import Intervention
from maze.states import Mazes, write_mazes

BLOCK = "embedder.block2.res1"  # the same output as its resadd
SIZE = 11
MOST_LEVELS = 500
OWN = "own vector"
CONTROLS = ("another level's", "channels shuffled", "random of the same norm")
RANDOM = 19  # random vectors to rank the own vector among: as many as a p-value requires
RANKED = 100  # levels for that ranking


def difference_vectors(points: HookPoints, levels: Sequence[bytes], with_it: Mazes, without_it: Mazes) -> Tensor:
    """The activation on one picture of each level minus that on another: (level, channel, row, col)."""
    one, other = (activations(points, write_mazes(each, levels), BLOCK)[BLOCK] for each in (with_it, without_it))
    return one - other


def steered(points: HookPoints, vectors: Tensor, coefficient: float, *, seed: int) -> dict[str, Intervention]:
    """Add every level's own vector, or a control: a vector without the own vector's information on the level."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(vectors.shape[:2], generator=generator).argsort(dim=1)[:, :, None, None]
    others = (vectors.roll(1, dims=0), vectors.gather(1, order.expand_as(vectors)), _random(vectors, 1, seed)[0])
    named = {OWN: vectors, **dict(zip(CONTROLS, others, strict=True))}
    return {name: added(points, each, coefficient) for name, each in named.items()}


def added(points: HookPoints, vectors: Tensor, coefficient: float) -> Intervention:
    """Add each level's vector times the coefficient."""
    site = points.site(BLOCK)
    return lambda level: [steer(site, vectors[level], coefficient)]


def _random(vectors: Tensor, count: int, seed: int) -> Tensor:
    return random_vectors(vectors, count=count, seed=seed) if vectors.any() else vectors.expand(count, *vectors.shape)


def measured(
    study: Study,
    purpose: str,
    levels: Sequence[bytes],
    vectors: Tensor,
    coefficient: float,
    measure: str,
    others: Mapping[str, Intervention],
    pictures: Mapping[str, Callable[[Chains], Any]],
) -> tuple[dict[str, Table], dict[str, Values], list[str]]:
    """The tables of a part about a vector, every measure on every level, and the names of the interventions.

    Args:
        study: the study.
        purpose: name of the part, for the seeds.
        levels: the levels.
        vectors: (level, channel, row, col).
        coefficient: coefficient of the vectors.
        measure: the key in `DESTINATIONS` that the random vectors are ranked by.
        others: further interventions.
        pictures: functions from chains to the policy's table on other pictures of the levels, by name.
    """
    interventions = steered(study.points, vectors, coefficient, seed=study.seed_for(f"{purpose} controls")) | others
    batches = effects.level_batches(study.points, levels, interventions, site=BLOCK)
    values = effects.joined(
        effects.destinations(chains, np.stack([*tables, *(each(chains) for each in pictures.values())]))
        for chains, tables in batches
    )
    names = [*interventions, *pictures]
    some, own = levels[:RANKED], vectors[:RANKED]
    random = enumerate([own, *_random(own, RANDOM, study.seed_for(f"{purpose} random"))])
    tries = {str(number): added(study.points, each, coefficient) for number, each in random}
    reached = effects.joined(
        effects.destinations(*batch) for batch in effects.level_batches(study.points, some, tries, site=BLOCK)
    )[measure]
    rank = {"measure": measure, "n": len(some), **effects.ranked_cells(reached[1:] - reached[0])}
    return (
        {"effects": effects.effect_rows(values, names), "against": against_controls(values, names), "ranked": [rank]},
        values,
        names,
    )


def against_controls(values: Mapping[str, Values], names: Sequence[str]) -> Table:
    """The effect of the own vector minus that of each control, over the same levels; arguments as in `effect_rows`."""
    rows = []
    for measure, known in effects.measured_on(values):
        own = known[1 + names.index(OWN)]
        others = np.stack([known[1 + names.index(name)] for name in CONTROLS])
        for name, interval in zip(CONTROLS, effects.mean_intervals(own - others), strict=True):
            row = {"measure": measure, "control": name, "n": len(own)}
            rows.append(row | intervals(own_minus_control=interval))
    return rows


def ranking_text(tables: Tables) -> str:
    """The rank of the own vector among random vectors, in words."""
    (row,) = tables["ranked"]
    return f"Among random vectors of the same norm (n={row['n']}), the effect is {effects.rank_text(row)}."


figure = chart(
    Panel("effects", "measure", "effect", "change of the probability", "intervention", names=effects.DESTINATIONS),
    size=(9, 5),
)
