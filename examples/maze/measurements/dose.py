"""Does the effect of the UP channel depend on its dose?

Method: Size {SIZE}, cheese in the bottom right corner. The channel is multiplied by a factor in every state. P(cheese
within 256 steps) is computed, not sampled.

The post: Only the factor 0: 52% instead of 40% of the mice find the cheese.

Limits: Factors above 1 give activations that the rest of the network may never have received.
"""

from __future__ import annotations

import numpy as np

from chanpatch import HookPoints, edit
from chanpatch.statistics import mean_interval
from maze.analysis.cells import Table, Tables, above, below, keyed, shown, verdict
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import mean_intervals, p_reached
from maze.analysis.estimates import intervals, primary
from maze.analysis.forwards import SITE
from maze.analysis.part import Finding, Study
from maze.analysis.tables import Intervention
from maze.paths import Direction

SIZE = 15
PLACE = "bottom right"  # of the cheese, as in the post
CLAIM = "the higher the factor, the lower P(cheese)"
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0)


def measure(study: Study) -> dict[str, Table]:
    """The effect of every factor on P(cheese), and the slope over the factors."""
    channel = study.channel(Direction.UP)
    levels = study.levels("dose levels", size=SIZE, cheese=PLACE)
    doses = {f"{factor:g}": scaled(study.points, channel, factor) for factor in FACTORS}
    found = p_reached(study.points, levels, doses)
    changes = found[1:] - found[0]
    effects = [None, *mean_intervals(changes)]
    rows = [
        {"channel": channel, "factor": factor, "n": len(levels)} | intervals(p_cheese=each, effect=effect)
        for factor, each, effect in zip((1.0, *FACTORS), mean_intervals(found), effects, strict=True)
    ]
    rows.sort(key=lambda row: row["factor"])
    centered = np.array(FACTORS) - 1.0
    slopes = centered @ changes / (centered @ centered)  # through no change at factor 1
    slope = {"channel": channel, "n": len(levels), **intervals(slope=mean_interval(slopes))}
    claim = primary(CLAIM, slopes, seed=study.seed_for("dose flips"))
    return {"doses": rows, "slope": [slope], "primary": claim}


def scaled(points: HookPoints, channel: int, factor: float) -> Intervention:
    """Multiply one channel of relu3 by a factor."""
    return [edit(points.site(SITE, channel=channel), lambda activation: activation * factor)]


def finding(tables: Tables) -> Finding:
    doses, (slope,) = keyed(tables["doses"], "factor"), tables["slope"]
    listed = ", ".join(f"{factor:g}: {doses[factor]['effect']:+.2f}" for factor in FACTORS)
    return Finding(
        f"Channel {slope['channel']} (UP) scaled from 0 to 3 changes P(cheese) by {listed} (n={slope['n']}).",
        verdict(below(slope, "slope"), above(doses[0.0], "effect"), below(doses[2.0], "effect")),
        f"The slope is {shown(slope, 'slope', '+.3f')} per unit of the factor, so zeroing is one end of a "
        "dose-response relation.",
    )


figure = chart(Panel("doses", "factor", "effect", "change of P(cheese), points", scale=100, along=True))
