"""Is the corner the mouse's default, with no cheese in the picture?

Method: Size {SIZE}, mouse on the decision square, the same picture with and without the cheese. Log odds: log of the
probability of the first step to the cheese over that of the first step to the corner. The channel of the corner's
direction is compared between the two pictures.

The post: Footnote 9 suspects that the mouse first learned to go to the corner, and then corrects this for the cheese.

Limits: Pictures without cheese never occurred in training.
"""

from __future__ import annotations

import numpy as np

from chanpatch.statistics import bootstrap_interval, difference_interval, mean_interval, rank_correlation
from maze.analysis.cells import Row, Table, Tables, Values, above, below, keyed, shown, verdict
from maze.analysis.cheese_removed import CheeseRemoved, without_cheese
from maze.analysis.decision_squares import DIRECTIONS, Probes, thresholds
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, primary, share
from maze.analysis.part import SPLITS, Finding, Study
from maze.paths import Direction

SIZE = 25
KEPT = 0.8  # least fraction above the threshold if the channel of the corner ignores the cheese
CLAIM = "with the cheese removed, the first step to the corner is likelier than that to the cheese"
PICTURES = ("cheese shown", "cheese removed", "shown minus removed")


def measure(study: Study) -> dict[str, Table]:
    """Log odds of cheese against corner by picture, and the corner's channel with and without the cheese."""
    probes = thresholds(study, DIRECTIONS)
    odds, channels, effects = [], [], []
    for split in SPLITS:
        levels = study.levels(f"default squares {split}", size=SIZE, cheese=split, mouse="decision square")
        seen = without_cheese(study.points, levels)
        pictures = [seen.odds(seen.shown), seen.odds(seen.removed)]
        effects.append(pictures[0] - pictures[1])
        for name, each in zip(PICTURES, (*pictures, effects[-1]), strict=True):
            to_cheese = share((each > 0).sum(), len(each)) if name != PICTURES[2] else None
            row = {"split": split, "picture": name, "n": len(each)}
            odds.append(row | intervals(log_odds=mean_interval(each), to_cheese=to_cheese))
        channels.append({"split": split} | _corners_channel(study, seen, probes, study.seed_for("default correlation")))
    ratio = _ratio(*effects, study.seed_for("default ratio"))
    claim = primary(CLAIM, pictures[1], seed=study.seed_for("default flips"))  # out of distribution, the last split
    return {"odds": odds, "channels": channels, "ratio": [ratio], "primary": claim}


def _ratio(inside: Values, outside: Values, seed: int) -> Row:
    """The cheese's effect on the log odds in distribution, against that out of distribution."""
    both = np.stack([np.concatenate([inside, outside]), np.arange(len(inside) + len(outside)) < len(inside)], axis=1)

    def ratio(rows: Values) -> Values:
        first = rows[:, 1] == 1
        return rows[first, 0].mean() / rows[~first, 0].mean()

    difference = difference_interval(mean_interval(inside), mean_interval(outside))
    estimates = intervals(ratio=bootstrap_interval(both, ratio, seed=seed), difference=difference)
    return {"n_in": len(inside), "n_out": len(outside), **estimates}


def _corners_channel(study: Study, seen: CheeseRemoved, probes: Probes, seed: int) -> Row:
    """The channel of the corner's direction, shown and removed: rank correlation by direction, and whether it stays."""
    every = np.arange(len(seen.corner))
    channel = np.array([study.channel(Direction(direction)) for direction in seen.corner])
    shown_sums, removed_sums = (sums[every, channel] for sums in seen.sums)
    high = still = 0
    for direction, probe in probes.items():
        if probe:
            rows = seen.corner == direction
            before, after = (probe.predict(sums[rows]) for sums in (shown_sums, removed_sums))
            high, still = high + int(before.sum()), still + int((before & after).sum())
    sample = np.stack([shown_sums, removed_sums, seen.corner], axis=1)
    correlation = bootstrap_interval(
        sample, lambda rows: np.asarray(rank_correlation(*rows.T)), resamples=999, seed=seed
    )
    return {"n": len(every), "high": high} | intervals(correlation=correlation, stays_high=share(still, high))


def finding(tables: Tables) -> Finding:
    odds = keyed(tables["odds"], "split", "picture")
    channels, (ratio,) = keyed(tables["channels"], "split"), tables["ratio"]
    (inside, inside_removed, _), (outside, outside_removed, _) = (
        [odds[split, picture] for picture in PICTURES] for split in SPLITS
    )
    out = channels[SPLITS[1]]
    removed = f"{shown(outside_removed, 'log_odds', '+.1f')} out of distribution"
    return Finding(
        f"With the cheese removed, the log odds of cheese against corner are {removed} and "
        f"{shown(inside_removed, 'log_odds', '+.1f')} in distribution (n={outside['n']} each): the mouse goes to the "
        f"corner. With the cheese shown they are {shown(outside, 'log_odds', '+.1f')} and "
        f"{shown(inside, 'log_odds', '+.1f')}. The channel of the corner's direction stays above its threshold in "
        f"{shown(out, 'stays_high', '.0%')} of {out['high']} squares.",
        verdict(
            below(inside_removed, "log_odds"),
            below(outside_removed, "log_odds"),
            above(ratio, "ratio", 1.0),
            above(out, "stays_high", KEPT),
        ),
        f"The corner is the default. The cheese moves the log odds {shown(ratio, 'ratio', '.1f')} times as far in "
        "distribution as out of it.",
    )


figure = chart(
    Panel("odds", ("split", "picture"), "log_odds", "log odds, cheese against corner"),
    Panel(
        "channels", "split", {"correlation": "correlation", "stays high": "stays_high"}, "corner's channel", line=None
    ),
)
