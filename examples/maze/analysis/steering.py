"""Steering vectors of single mazes at the end of block 2's first residual block, and the controls for them.

A vector is the activation of one picture of a level minus that of another, the mouse on its first square. It is added
in every state of the level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from chanpatch import HookPoints, steer
from chanpatch.controls import random_vectors
from chanpatch.statistics import rank_among
from maze.analysis.effects import (
    DESTINATIONS,
    activations,
    destinations,
    draw_effects,
    joined,
    level_batches,
    mean_intervals,
)
from maze.analysis.episodes import ORIGINAL
from maze.analysis.off_distribution import METERED, absolute_z, mouse_anywhere
from maze.analysis.part import Study, Table, Tables, interval_cells, shown
from maze.analysis.tables import Intervention
from maze.environment.states import Mazes, read_mazes, write_mazes

BLOCK = "embedder.block2.res1"  # what comes out of it is what comes out of its resadd
OWN = "own vector"
CONTROLS = ("another level's", "channels shuffled", "random of the same norm")
RANDOM = 19  # vectors of the same norm that the own one is ranked among: as many as a p-value takes
RANKED = 100  # levels that this is done on

Values: TypeAlias = NDArray[np.float64]


def difference_vectors(points: HookPoints, levels: Sequence[bytes], with_it: Mazes, without_it: Mazes) -> Tensor:
    """The activation of one picture of each level minus that of another: (level, channel, row, col)."""
    return (
        activations(points, write_mazes(with_it, levels), BLOCK)
        - activations(points, write_mazes(without_it, levels), BLOCK)
    )[BLOCK]


def steered(points: HookPoints, vectors: Tensor, coefficient: float, *, seed: int) -> dict[str, Intervention]:
    """Every level's own vector added, and the controls: vectors that lack what the own one says of the level.

    Args:
        points: of the policy.
        vectors: (level, channel, row, col).
        coefficient: of them all.
        seed: of the controls.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(vectors.shape[:2], generator=generator).argsort(dim=1)[:, :, None, None]
    others = (
        vectors.roll(1, dims=0),
        vectors.gather(1, order.expand_as(vectors)),
        random_vectors(vectors, count=1, seed=seed)[0] if vectors.any() else vectors,
    )
    chosen = {OWN: vectors, **dict(zip(CONTROLS, others, strict=True))}
    return {name: added(points, each, coefficient) for name, each in chosen.items()}


def added(points: HookPoints, vectors: Tensor, coefficient: float) -> Intervention:
    """To every level its vector added, times the coefficient."""
    site = points.site(BLOCK)
    return lambda level: [steer(site, vectors[level], coefficient)]


def against_controls(values: Mapping[str, Values], names: Sequence[str]) -> Table:
    """How much more the own vector does than each control, over the same levels.

    Args:
        values: by measure, (1 + intervention, level), the original first.
        names: of the interventions, the own vector among them.
    """
    rows: Table = []
    for measure, of in values.items():
        known = of[:, np.isfinite(of[0])]
        if not known.shape[1]:
            continue
        own = known[1 + names.index(OWN)]
        others = np.stack([known[1 + names.index(name)] for name in CONTROLS])
        for name, interval in zip(CONTROLS, mean_intervals(own - others), strict=True):
            cells = interval_cells("own_minus_control", interval)
            rows.append({"measure": measure, "control": name, "n": len(own), **cells})
    return rows


def ranked(
    study: Study, levels: Sequence[bytes], vectors: Tensor, coefficient: float, measure: str, *, seed: int
) -> Table:
    """Where the own vectors' effect ranks among those of `RANDOM` sets of random ones of the same norms: one row.

    Args:
        study: of the policy.
        levels: of which the first `RANKED` are taken.
        vectors: (level, channel, row, col).
        coefficient: of them all.
        measure: on which effect, as `DESTINATIONS` names it.
        seed: of the random vectors.
    """
    levels, own = levels[:RANKED], vectors[:RANKED]
    drawn = random_vectors(own, count=RANDOM, seed=seed) if own.any() else own.expand(RANDOM, *own.shape)
    sets = {OWN: own, **{f"random {number}": each for number, each in enumerate(drawn)}}
    interventions = {name: added(study.points, each, coefficient) for name, each in sets.items()}
    batches = level_batches(study.points, levels, {ORIGINAL: (), **interventions}, site=BLOCK)
    values = joined([destinations(*batch) for batch in batches])[measure]
    effect, *controls = mean_intervals(values[1:] - values[0])
    others = [each.estimate for each in controls]
    rank = rank_among(effect.estimate, others)
    return [
        {
            "measure": measure,
            "n": len(levels),
            **interval_cells("effect", effect),
            "rank": rank.rank,
            "controls": rank.controls,
            "rank_p": rank.p,
            "controls_lowest": min(others),
            "controls_highest": max(others),
        }
    ]


def told_rank(row: Mapping[str, Any]) -> str:
    """A row of `ranked` in words."""
    return (
        f"On {row['n']} of the levels its effect, {shown(row, 'effect', '+.3f')}, ranks {row['rank']} of "
        f"{row['controls'] + 1} (p = {row['rank_p']:.2g}) among random vectors of the same norm, which have "
        f"{row['controls_lowest']:+.3f} to {row['controls_highest']:+.3f}."
    )


def far_from_usual(
    study: Study, interventions: Mapping[str, Intervention], levels: Sequence[bytes]
) -> dict[str, float]:
    """How far each vector leads the sums of `BLOCK` from those of other levels of this size: the mean over channels.

    Args:
        study: of the policy.
        interventions: at `BLOCK`.
        levels: of one size; the mouse is put anywhere in the first `METERED` of them, since vectors are added in every
            state.
    """
    some = mouse_anywhere(levels[:METERED], study.seed_for("metered mouse"))
    size = int(read_mazes(levels[:1]).size[0])
    usual = study.levels("metered usual", METERED, size=size, cheese="as drawn", mouse="anywhere")
    channels = {name: absolute_z(study.points, each, some, usual) for name, each in interventions.items()}
    return {name: float(np.nanmean(list(each.values()))) for name, each in channels.items()}


def told_far(rows: Sequence[Mapping[str, Any]]) -> str:
    """The absolute z of some rows of the effects, in words."""
    said = ", ".join(f"{row['absolute_z']:.1f} with {row['intervention']}" for row in rows)
    return f"Mean distance of the channels' sums from usual ones, in standard deviations (0.8 is usual): {said}."


def vector_figure(tables: Tables, title: str) -> Figure:
    """Where the mouse gets to under every vector."""
    drawn = Figure(figsize=(9, 5), layout="constrained")
    draw_effects(drawn.subplots(), tables["effects"], DESTINATIONS)
    drawn.suptitle(title)
    return drawn
