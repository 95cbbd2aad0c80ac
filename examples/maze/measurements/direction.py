"""Does one direction of relu3 carry the preference for the corner?

Method: Size {SIZE}, cheese out of distribution. The direction is the difference in mean channel sums between decision
squares whose corner is UP and others, each over its standard deviation, on {FITTED} other levels. Its component is
removed at every place of relu3, as are those of random directions.

The post: Not in the post.

Limits: The direction is defined by the first step to the corner, not by a goal that the network has.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chanpatch import HookPoints, edit
from chanpatch.controls import random_vectors
from chanpatch.patching import Project
from chanpatch.statistics import mean_interval, rank_among
from maze.analysis.cells import Row, Table, Tables, Values, above, column, shown, verdict
from maze.analysis.cheese_removed import without_cheese
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import SETS, p_reached
from maze.analysis.estimates import intervals, primary, share
from maze.analysis.forwards import SITE, level_sums
from maze.analysis.part import SPLITS, Finding, Study, towards_corner
from maze.analysis.tables import Intervention
from maze.paths import Direction

SIZE = 25
FITTED = 500  # levels that the direction is computed from
LOOP = 100  # levels for P(cheese) over whole episodes, at most
CLAIM = "without the direction, the cheese is chosen more often than without random directions"
OWN, RANDOM = "the corner is UP", "random direction"


def measure(study: Study) -> dict[str, Table]:
    """The choice on decision squares, and P(cheese) over episodes, with the direction and random ones projected out."""
    own = corner_up(study)
    directions = torch.cat([own[None], random_vectors(own, count=SETS, seed=study.seed_for("direction random"))])
    levels = study.levels("direction squares", size=SIZE, cheese=SPLITS[1], mouse="decision square")
    seen = without_cheese(study.points, levels)
    before, *after = (seen.odds(each) for each in (seen.shown, *(Project(each)(seen.shown) for each in directions)))
    changes = [each - before for each in after]
    names = [OWN, *(f"{RANDOM} {number}" for number in range(1, SETS + 1))]
    choices = []
    for name, odds, change in zip(("nothing", *names), (before, *after), (None, *changes), strict=True):
        changed = None if change is None else mean_interval(change)
        row = {"projected": name, "n": len(odds), **intervals(to_cheese=share((odds > 0).sum(), len(odds)))}
        choices.append(row | intervals(log_odds_change=changed))
    start = study.levels("direction starts", min(study.n, LOOP), size=SIZE, cheese=SPLITS[1])
    named = {name: projection(study.points, each) for name, each in zip(names, directions, strict=True)}
    episodes = []
    original, *found = p_reached(study.points, start, named)
    for name, each in zip(names, found, strict=True):
        estimates = intervals(p_cheese=mean_interval(each), effect=mean_interval(each - original))
        episodes.append({"projected": name, "n": len(start), **estimates})
    ranks = [_ranked("to_cheese", column(choices[1:], "to_cheese")), _ranked("p_cheese", column(episodes, "effect"))]
    claim = primary(CLAIM, changes[0] - np.mean(changes[1:], axis=0), seed=study.seed_for("direction flips"))
    return {"choices": choices, "episodes": episodes, "ranks": ranks, "primary": claim}


def corner_up(study: Study) -> Tensor:
    """Mean channel sums where the corner is UP minus elsewhere, over their standard deviation: (1, channel, 1, 1)."""
    levels = study.levels("direction fit", FITTED, size=SIZE, cheese=SPLITS[1], mouse="decision square")
    sums, is_up = level_sums(study.points, SITE, levels), towards_corner(Direction.UP, levels)
    deviation = sums.std(axis=0)
    difference = (sums[is_up].mean(axis=0) - sums[~is_up].mean(axis=0)) / np.where(deviation > 0, deviation, np.inf)
    return torch.from_numpy(difference).float().view(1, -1, 1, 1)


def projection(points: HookPoints, direction: Tensor) -> Intervention:
    """Remove the component along a direction of channels at every place of relu3."""
    return [edit(points.site(SITE), Project(direction))]


def _ranked(measured: str, values: Values) -> Row:
    """The rank of the own direction's value among those of random directions, the largest first."""
    own, *others = values.tolist()
    rank = rank_among(own, others, alternative="greater")
    ends = {"random_lowest": min(others), "random_highest": max(others)}
    return {"measure": measured, "own": own, "rank": rank.rank, "controls": rank.controls, "p": rank.p, **ends}


def finding(tables: Tables) -> Finding:
    nothing, own = tables["choices"][:2]
    (episodes, *_), (choice, loop) = tables["episodes"], tables["ranks"]
    return Finding(
        f"With the direction projected out, {shown(own, 'to_cheese', '.0%')} of the mice on decision squares take the "
        f"first step to the cheese instead of {shown(nothing, 'to_cheese', '.0%')} (n={own['n']}); with random "
        f"directions, {choice['random_lowest']:.0%} to {choice['random_highest']:.0%} do. P(cheese) over episodes "
        f"changes by {shown(episodes, 'effect', '+.3f')} (n={episodes['n']}), rank {loop['rank']} of "
        f"{loop['controls'] + 1}.",
        verdict(above(own, "log_odds_change"), choice["rank"] == 1, above(episodes, "effect"), loop["rank"] == 1),
        "One direction carries much of the preference for the corner.",
    )


figure = chart(
    Panel("choices", "projected", "to_cheese", "first step to the cheese, percent", scale=100, line=None),
    Panel("episodes", "projected", "effect", "change of P(cheese), points", scale=100),
)
