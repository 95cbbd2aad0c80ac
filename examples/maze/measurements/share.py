"""How much of the cheese's effect on the choice do the best channels carry?

Method: Size {SIZE}, mouse on the decision square. Some channels of relu3 get the activation from the same picture
without the cheese. The change of the log odds is divided by the change with all channels.

The post: The hypothesis is that several channels together push for an action.

Limits: Fractions of different sets do not add up, because the rest of the network is not linear.
"""

from __future__ import annotations

import numpy as np

from chanpatch.statistics import share_interval
from maze.analysis.cells import Table, Tables, above, keyed, shown, verdict
from maze.analysis.cheese_removed import mixed, without_cheese
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import SETS
from maze.analysis.estimates import intervals, primary, rank_cells
from maze.analysis.part import SPLITS, Finding, Study

SIZE = 25
BEST, RANDOM = "best channel of each direction", "random channels"
CLAIM = "the best channels carry more of the cheese's effect than random sets of as many channels"
LEAST = 0.25  # of the cheese's effect, if a few channels carry much of it


def measure(study: Study) -> dict[str, Table]:
    """The fraction for the best channels, and for random sets of as many live channels."""
    sets = study.best_and_random_sets("share sets", SETS)
    names = [BEST, *(f"{RANDOM} {number}" for number in range(1, len(sets)))]
    shares, ranks = [], []
    for split in SPLITS:
        levels = study.levels(f"share squares {split}", size=SIZE, cheese=split, mouse="decision square")
        seen = without_cheese(study.points, levels)
        before = seen.odds(seen.shown)
        total = seen.odds(seen.removed) - before
        parts = [seen.odds(mixed(seen.shown, seen.removed, channels)) - before for channels in sets]
        for name, channels, part in zip(names, sets, parts, strict=True):
            row = {"split": split, "set": name, "channels": " ".join(map(str, channels)), "n": len(part)}
            shares.append(row | intervals(share=share_interval(part, total)))
        own, *controls = (part.mean() / total.mean() for part in parts)
        rank = rank_cells(own, controls, increase=True)
        ranks.append({"split": split, **rank, "mean_of_random": float(np.mean(controls))})
    more = np.mean(parts[1:], axis=0) - parts[0]  # out of distribution, the last split; both lower the log odds
    return {"shares": shares, "ranks": ranks, "primary": primary(CLAIM, more, seed=study.seed_for("share flips"))}


def finding(tables: Tables) -> Finding:
    shares, ranks = keyed(tables["shares"], "split", "set"), keyed(tables["ranks"], "split")
    inside, outside = (shares[split, BEST] for split in SPLITS)
    rank = ranks[SPLITS[1]]
    p = "" if rank["rank_p"] is None else f", p = {rank['rank_p']:.2g}"
    return Finding(
        f"The {len(outside['channels'].split())} best channels carry {shown(outside, 'share', '.0%')} of the cheese's "
        f"effect on the log odds out of distribution and {shown(inside, 'share', '.0%')} in distribution "
        f"(n={outside['n']} each). Random sets of as many channels carry {rank['mean_of_random']:.0%} on average{p}.",
        verdict(above(outside, "share", LEAST), above(inside, "share", LEAST), rank["rank"] == 1),
        "The cheese acts through few channels, but not through these alone.",
    )


figure = chart(Panel("shares", "set", "share", "fraction of the cheese's effect", "split"))
