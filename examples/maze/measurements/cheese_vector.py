"""The cheese vector: what the cheese adds to the activation, subtracted again, so that the mouse does not see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.statistics import equivalent
from maze.analysis.effects import destinations, effect_rows, joined, level_batches, mean_intervals
from maze.analysis.episodes import ORIGINAL
from maze.analysis.off_distribution import background
from maze.analysis.part import Cell, Finding, Part, Study, Table, Tables, above, below, interval_cells, shown, verdict
from maze.analysis.steering import (
    BLOCK,
    CONTROLS,
    OWN,
    against_controls,
    difference_vectors,
    far_from_usual,
    ranked,
    steered,
    told_far,
    told_rank,
    vector_figure,
)
from maze.analysis.tables import action_tables
from maze.environment.states import read_mazes

SIZE = 11
MOST_LEVELS = 500
COEFFICIENT = -1.0
UNSEEN = "cheese not shown"  # what ignoring it altogether would do
MARGIN = 0.05  # of P(cheese): what is no nearer to that than this ignores the cheese


def measure(study: Study) -> dict[str, Table]:
    """Where the mouse gets to with every level's cheese vector subtracted, with the controls, and without a cheese."""
    levels = study.levels("cheese-vector", min(study.n, MOST_LEVELS), size=SIZE, cheese="out of distribution")
    mazes = read_mazes(levels)
    vectors = difference_vectors(study.points, levels, mazes, mazes.without_cheese())
    interventions = steered(study.points, vectors, COEFFICIENT, seed=study.seed_for("cheese-vector controls"))
    batches = []
    for chains, tables in level_batches(study.points, levels, {ORIGINAL: (), **interventions}, site=BLOCK):
        # The same squares and moves, and the episode ends where the cheese is; it is left out of the picture only.
        unseen = action_tables(study.points, replace(chains, mazes=chains.mazes.without_cheese()))[ORIGINAL]
        batches.append(destinations(chains, np.concatenate([tables, unseen[None]])))
    values, names = joined(batches), [*interventions, UNSEEN]
    far = far_from_usual(study, interventions, levels)
    usual = background(SIZE, "as drawn")
    effects = [
        row | {"absolute_z": far.get(row["intervention"]), "absolute_z_against": usual}
        for row in effect_rows(values, names)
    ]
    return {
        "effects": effects,
        "against": against_controls(values, names),
        "ignoring": [_ignoring(values["found"], names)],
        "ranked": ranked(study, levels, vectors, COEFFICIENT, "found", seed=study.seed_for("cheese-vector random")),
    }


def _ignoring(found: NDArray[np.float64], names: Sequence[str]) -> dict[str, Cell]:
    """Whether the vector does what not showing the cheese does, within a margin."""
    own, unseen = (found[1 + names.index(name)] for name in (OWN, UNSEEN))
    (left,) = mean_intervals((own - unseen)[None])
    return {
        "n": len(own),
        **interval_cells("own_minus_unseen", left),
        "margin": MARGIN,
        "equivalent": bool(equivalent(left, MARGIN)),
    }


def figure(tables: Tables) -> Figure:
    """Where the mouse gets to under every vector."""
    return vector_figure(tables, f"vectors added with coefficient {COEFFICIENT:g} in every state; size {SIZE}")


def finding(tables: Tables) -> Finding:
    found = {row["intervention"]: row for row in tables["effects"] if row["measure"] == "found"}
    choice = {row["intervention"]: row for row in tables["effects"] if row["measure"] == "to_cheese"}
    own, unseen = found[OWN], found[UNSEEN]
    against = [row for row in tables["against"] if row["measure"] == "found"]
    beyond = [row["control"] for row in against if below(row, "own_minus_control")]
    less = below(own, "effect")
    (left,) = tables["ignoring"]
    squares = (
        "No level has a decision square."
        if not choice
        else f"At the decision square (n={choice[OWN]['n']}) the first way taken is that to the cheese in "
        f"{choice[OWN]['original']:.1%} before and {choice[OWN]['modified']:.1%} after, and in "
        f"{choice[UNSEEN]['modified']:.1%} where the cheese is not shown."
    )
    controls = "; ".join(f"{name} {shown(found[name], 'effect', '+.3f')}" for name in CONTROLS)
    return Finding(
        f"P(cheese) {own['original']:.3f} becomes {own['modified']:.3f}, effect {shown(own, 'effect', '+.3f')}, "
        f"n={own['n']}; with the cheese not shown at all {shown(unseen, 'effect', '+.3f')}. {squares}",
        verdict(less, *((*(below(row, "own_minus_control") for row in against), _ignores(left)) if less else ())),
        f"The vector leaves {shown(left, 'own_minus_unseen', '+.3f')} of P(cheese) more than not showing the cheese "
        f"does, {'' if left['equivalent'] else 'not '}all of the interval within {MARGIN:g}. Controls: {controls}. The "
        f"own vector lowers P(cheese) by more than {len(beyond)} of these {len(CONTROLS)} do, interval of the paired "
        f"difference below 0. {told_rank(tables['ranked'][0])} "
        f"{told_far([found[name] for name in (OWN, *CONTROLS)])}",
        "That the vector is the cheese and nothing else: it was computed with the mouse on the first square and is "
        "added everywhere. What not showing the cheese does is the most that it could do if it were.",
    )


def _ignores(left: Mapping[str, Any]) -> bool | None:
    if left["equivalent"]:
        return True
    beyond = above(left, "own_minus_unseen", MARGIN) or below(left, "own_minus_unseen", -MARGIN)
    return False if beyond else None


PART = Part(
    name="cheese-vector",
    question="Does the mouse ignore the cheese when the cheese's part of the activation is subtracted?",
    method=f"Size {SIZE}, cheese outside the top right 5x5. Activation at block2.res1.resadd with the cheese minus "
    "without, the mouse on its first square, subtracted in every state; P(cheese) is computed, not sampled.",
    post="Not in the post. In the work it builds on, subtracting the vector made the mouse ignore the cheese.",
    measure=measure,
    figure=figure,
    finding=finding,
)
