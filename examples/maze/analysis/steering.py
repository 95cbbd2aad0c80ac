"""Steering vectors of single mazes after block 2's first residual block, and their controls.

A vector is the difference of the activations on two pictures of a level, the mouse on its first square. It is added in
every state of the level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chanpatch import HookPoints, steer
from chanpatch.controls import random_vectors
from maze.analysis.cells import Row, Table, Tables, cells, chosen
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import (
    DESTINATIONS,
    Values,
    destinations,
    effect_rows,
    joined,
    level_batches,
    mean_intervals,
    measured_on,
    rank_text,
    ranked_cells,
)
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import Chains
from maze.analysis.forwards import activations
from maze.analysis.off_distribution import METERED, absolute_z, background, mouse_anywhere
from maze.analysis.part import Study
from maze.analysis.tables import Intervention
from maze.states import Mazes, read_mazes, write_mazes

BLOCK = "embedder.block2.res1"  # its output is that of its resadd
SIZE = 11
MOST_LEVELS = 500
OWN = "own vector"
CONTROLS = ("another level's", "channels shuffled", "random of the same norm")
RANDOM = 19  # random vectors to rank the own one among: as many as a p-value takes
RANKED = 100  # levels of that ranking


def difference_vectors(points: HookPoints, levels: Sequence[bytes], with_it: Mazes, without_it: Mazes) -> Tensor:
    """The activation on one picture of each level minus that on another: (level, channel, row, col)."""
    one, other = (activations(points, write_mazes(each, levels), BLOCK)[BLOCK] for each in (with_it, without_it))
    return one - other


def steered(points: HookPoints, vectors: Tensor, coefficient: float, *, seed: int) -> dict[str, Intervention]:
    """Every level's own vector added, and the controls, vectors without the own one's information on the level."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(vectors.shape[:2], generator=generator).argsort(dim=1)[:, :, None, None]
    others = (vectors.roll(1, dims=0), vectors.gather(1, order.expand_as(vectors)), _random(vectors, 1, seed)[0])
    named = {OWN: vectors, **dict(zip(CONTROLS, others, strict=True))}
    return {name: added(points, each, coefficient) for name, each in named.items()}


def added(points: HookPoints, vectors: Tensor, coefficient: float) -> Intervention:
    """Add its vector to every level, times the coefficient."""
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
    *,
    others: Mapping[str, Intervention] | None = None,
    unseen: Callable[[Chains], Any] | None = None,
    unseen_name: str = "",
) -> tuple[dict[str, Table], dict[str, Values], list[str]]:
    """The tables of a part about a vector, every measure on every level, and the names of the interventions.

    Args:
        study: the study.
        purpose: name of the part, for the seeds.
        levels: the levels.
        vectors: (level, channel, row, col).
        coefficient: coefficient of the vectors.
        measure: which of `DESTINATIONS` the random vectors are ranked by.
        others: further interventions.
        unseen: function from chains to the table of a policy without an intervention.
        unseen_name: its name.
    """
    interventions = steered(study.points, vectors, coefficient, seed=study.seed_for(f"{purpose} controls"))
    interventions |= others or {}
    batches = []
    for chains, tables in level_batches(study.points, levels, {ORIGINAL: (), **interventions}, site=BLOCK):
        more = [] if unseen is None else [unseen(chains)[None]]
        batches.append(destinations(chains, np.concatenate([tables, *more])))
    values = joined(batches)
    names = [*interventions, *([unseen_name] if unseen else [])]
    far, usual = far_from_usual(study, interventions, levels), background(SIZE, "as drawn")
    effects = [
        row | {"absolute_z": far.get(row["intervention"]), "absolute_z_against": usual}
        for row in effect_rows(values, names)
    ]
    rank = ranked(study, levels, vectors, coefficient, measure, seed=study.seed_for(f"{purpose} random"))
    return {"effects": effects, "against": against_controls(values, names), "ranked": [rank]}, values, names


def against_controls(values: Mapping[str, Values], names: Sequence[str]) -> Table:
    """The effect of the own vector minus that of each control, over the same levels; arguments as `effect_rows`."""
    rows: Table = []
    for measure, known in measured_on(values):
        own = known[1 + names.index(OWN)]
        others = np.stack([known[1 + names.index(name)] for name in CONTROLS])
        for name, interval in zip(CONTROLS, mean_intervals(own - others), strict=True):
            row = {"measure": measure, "control": name, "n": len(own)}
            rows.append(row | cells("own_minus_control", interval))
    return rows


def ranked(
    study: Study, levels: Sequence[bytes], vectors: Tensor, coefficient: float, measure: str, *, seed: int
) -> Row:
    """The rank of the own vectors' effect among `RANDOM` sets of random vectors of the same norms."""
    levels, own = levels[:RANKED], vectors[:RANKED]
    interventions = {
        str(number): added(study.points, each, coefficient)
        for number, each in enumerate([own, *_random(own, RANDOM, seed)])
    }
    batches = level_batches(study.points, levels, {ORIGINAL: (), **interventions}, site=BLOCK)
    values = joined([destinations(*batch) for batch in batches])[measure]
    effect, *controls = mean_intervals(values[1:] - values[0])
    return {"measure": measure, "n": len(levels), **ranked_cells(effect, [each.estimate for each in controls])}


def ranking_text(tables: Tables) -> str:
    """The rank of the own vector among random ones, and how far off distribution all vectors go, in words."""
    (row,) = tables["ranked"]
    rows = [row for row in chosen(tables["effects"], measure=row["measure"]) if row["intervention"] in (OWN, *CONTROLS)]
    far = ", ".join(f"{row['absolute_z']:.1f} with {row['intervention']}" for row in rows)
    return (
        f"Among random vectors of the same norm, on {row['n']} of the levels: {rank_text(row)}. Mean absolute z of the "
        f"channel sums (0.8 is usual): {far}."
    )


def far_from_usual(
    study: Study, interventions: Mapping[str, Intervention], levels: Sequence[bytes]
) -> dict[str, float]:
    """The mean absolute z over the channels of `BLOCK` under each vector, with the mouse anywhere in the levels."""
    some = mouse_anywhere(levels[:METERED], study.seed_for("metered mouse"))
    size = int(read_mazes(levels[:1]).size[0])
    usual = study.levels("metered usual", METERED, size=size, cheese="as drawn", mouse="anywhere")
    channels = {name: absolute_z(study.points, each, some, usual) for name, each in interventions.items()}
    return {name: float(np.nanmean(list(each.values()))) for name, each in channels.items()}


vector_figure = chart(
    Panel("effects", "measure", "effect", "change of the probability", "intervention", names=DESTINATIONS), size=(9, 5)
)
