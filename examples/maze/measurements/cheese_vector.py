"""Does the mouse ignore the cheese when the cheese's part of the activation is subtracted?

Method: Size 11, cheese outside the top right 5x5. Activation at block2.res1.resadd with the cheese minus without,
the mouse on its first square, subtracted in every state; P(cheese) is computed, not sampled. The verdict: P(cheese) is
within {MARGIN:g} of P(cheese) with the cheese not shown, if the latter is lower than P(cheese) by more than {MARGIN:g}.

The post: Not in the post. In the work it builds on, subtracting the vector made the mouse ignore the cheese.

Limits: The vector may contain more than the cheese: the vector was computed with the mouse on the first square and is
added everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chanpatch.statistics import equivalent
from maze.analysis import steering
from maze.analysis.cells import Row, Table, Tables, above, below, chosen, keyed, shown, verdict
from maze.analysis.effects import mean_intervals
from maze.analysis.estimates import intervals
from maze.analysis.exact import ORIGINAL, Chains
from maze.analysis.part import SPLITS, Finding, Study
from maze.analysis.steering import CONTROLS, OWN
from maze.analysis.tables import action_tables
from maze.states import read_mazes

UNSEEN = "cheese not shown"  # the same levels without the cheese in the picture
MARGIN = 0.05  # difference in P(cheese) from `UNSEEN` up to which the mouse ignores the cheese


def measure(study: Study) -> dict[str, Table]:
    """Every level's cheese vector subtracted, its controls, and the cheese left out of the picture."""
    levels = study.levels("cheese-vector", min(study.n, steering.MOST_LEVELS), size=steering.SIZE, cheese=SPLITS[1])
    mazes = read_mazes(levels)
    vectors = steering.difference_vectors(study.points, levels, mazes, mazes.without_cheese())

    def unseen(chains: Chains) -> Any:  # only the picture changes, not the states or the end of the episode
        return action_tables(study.points, replace(chains, mazes=chains.mazes.without_cheese()))[ORIGINAL]

    tables, values, names = steering.measured(
        study, "cheese-vector", levels, vectors, -1.0, "found", {}, {UNSEEN: unseen}
    )
    own, without = (values["found"][1 + names.index(name)] for name in (OWN, UNSEEN))
    (left,) = mean_intervals((own - without)[None])
    ignoring = {"n": len(own), **intervals(own_minus_unseen=left), "margin": MARGIN}
    return {**tables, "ignoring": [ignoring | {"equivalent": bool(equivalent(left, MARGIN))}]}


def finding(tables: Tables) -> Finding:
    found, choice = (keyed(chosen(tables["effects"], measure=name), "intervention") for name in ("found", "to_cheese"))
    own, unseen = found[OWN], found[UNSEEN]
    against = chosen(tables["against"], measure="found")
    lower = [below(row, "own_minus_control") for row in against]
    (left,) = tables["ignoring"]
    squares = (
        f" At the decision square (n={choice[OWN]['n']}), P(first to the cheese) {choice[OWN]['original']:.1%} becomes "
        f"{choice[OWN]['modified']:.1%}, and {choice[UNSEEN]['modified']:.1%} with the cheese not shown."
        if choice
        else ""
    )
    return Finding(
        f"P(cheese) {own['original']:.3f} becomes {own['modified']:.3f}, effect {shown(own, 'effect', '+.3f')}, "
        f"n={own['n']}; with the cheese not shown {shown(unseen, 'effect', '+.3f')}.{squares}",
        verdict(_ignores(left) if below(unseen, "effect", -MARGIN) else None),
        f"The vector leaves P(cheese) {shown(left, 'own_minus_unseen', '+.3f')} higher than with the cheese not shown, "
        f"and lowers it by more than {lower.count(True)} of {len(CONTROLS)} controls. {steering.ranking_text(tables)}",
    )


def _ignores(left: Row) -> bool | None:
    if left["equivalent"]:
        return True
    beyond = above(left, "own_minus_unseen", MARGIN) or below(left, "own_minus_unseen", -MARGIN)
    return False if beyond else None


figure = steering.figure
