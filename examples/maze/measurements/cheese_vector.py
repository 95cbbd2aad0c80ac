"""The cheese vector: the cheese's part of the activation, subtracted so that the mouse ignores the cheese."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chanpatch.statistics import equivalent
from maze.analysis.cells import Row, Table, Tables, above, below, cells, chosen, keyed, shown, verdict
from maze.analysis.effects import mean_intervals
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import Chains
from maze.analysis.part import SPLITS, Finding, Part, Study
from maze.analysis.steering import (
    CONTROLS,
    MOST_LEVELS,
    OWN,
    SIZE,
    difference_vectors,
    measured,
    ranking_text,
    vector_figure,
)
from maze.analysis.tables import action_tables
from maze.states import read_mazes

COEFFICIENT = -1.0
UNSEEN = "cheese not shown"  # the same levels without the cheese in the picture
MARGIN = 0.05  # of P(cheese): within it of `UNSEEN`, the mouse ignores the cheese


def measure(study: Study) -> dict[str, Table]:
    """Every level's cheese vector subtracted, its controls, and the cheese left out of the picture."""
    levels = study.levels("cheese-vector", min(study.n, MOST_LEVELS), size=SIZE, cheese=SPLITS[1])
    mazes = read_mazes(levels)
    vectors = difference_vectors(study.points, levels, mazes, mazes.without_cheese())

    def unseen(chains: Chains) -> Any:  # the states and the end of the episode stay; only the picture changes
        return action_tables(study.points, replace(chains, mazes=chains.mazes.without_cheese()))[ORIGINAL]

    tables, values, names = measured(
        study, "cheese-vector", levels, vectors, COEFFICIENT, "found", unseen_name=UNSEEN,
        unseen=unseen,
    )  # fmt: skip
    own, without = (values["found"][1 + names.index(name)] for name in (OWN, UNSEEN))
    (left,) = mean_intervals((own - without)[None])
    ignoring = {"n": len(own), **cells("own_minus_unseen", left), "margin": MARGIN}
    ignoring["equivalent"] = bool(equivalent(left, MARGIN))
    rank = tables.pop("ranked")
    return {**tables, "ignoring": [ignoring], "ranked": rank}


def finding(tables: Tables) -> Finding:
    found, choice = (keyed(chosen(tables["effects"], measure=name), "intervention") for name in ("found", "to_cheese"))
    own, unseen = found[OWN], found[UNSEEN]
    against = chosen(tables["against"], measure="found")
    lower = [below(row, "own_minus_control") for row in against]
    less = below(own, "effect")
    (left,) = tables["ignoring"]
    squares = (
        f"At the decision square (n={choice[OWN]['n']}), P(first to the cheese) is {choice[OWN]['original']:.1%} "
        f"before, {choice[OWN]['modified']:.1%} after, and {choice[UNSEEN]['modified']:.1%} with the cheese not shown."
        if choice
        else "No level has a decision square."
    )
    controls = "; ".join(f"{name} {shown(found[name], 'effect', '+.3f')}" for name in CONTROLS)
    return Finding(
        f"P(cheese) {own['original']:.3f} becomes {own['modified']:.3f}, effect {shown(own, 'effect', '+.3f')}, "
        f"n={own['n']}; with the cheese not shown {shown(unseen, 'effect', '+.3f')}. {squares}",
        verdict(less, *((*lower, _ignores(left)) if less else ())),
        f"With the vector P(cheese) is {shown(left, 'own_minus_unseen', '+.3f')} higher than with the cheese not "
        f"shown: the interval is {'' if left['equivalent'] else 'not '}within {MARGIN:g}. Controls: {controls}. The "
        f"own vector lowers P(cheese) by more than {lower.count(True)} of the {len(CONTROLS)} controls, interval of "
        f"the paired difference below 0. {ranking_text(tables)}",
        "It does not follow that the vector is the cheese and nothing else: it was computed with the mouse on the "
        "first square and is added everywhere.",
    )


def _ignores(left: Row) -> bool | None:
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
    figure=vector_figure,
    finding=finding,
)
