"""Which channels differ most over a pair like the post's, and which directions does each of them stand for?

Method: Mean absolute difference of the sums at relu3 over the four rotations of our first pair, which is like the
post's, in {contrasts.TEXTURES} textures and both facings. Per channel, the direction or union of directions is chosen
on one half of the squares with at least three legal moves and tested on the other half. The AUC on squares with a
choice is over random squares of the selection mazes, from which a move inside the union and a move outside the union
are legal. The verdict: of the first {READ} channels, more than half stand for a direction, or two that are not
opposite, with the AUC's interval above {KNOWS:g}.

The post: 121 UP, 21 DOWN or LEFT, 80 LEFT, 35 UP or LEFT, 112 LEFT, 73 RIGHT, 71 UP, 7 UP or RIGHT, 123 DOWN, 17 DOWN,
read from the pictures of the pair.

Limits: The result does not show that the pair finds such channels, as channels that rank lower also stand for
directions. The pictures of one pair are one independent observation, so the differences have no p-value.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from chanpatch import contrast
from chanpatch.statistics import Interval, bootstrap_interval, rank_correlation
from maze.analysis import contrasts
from maze.analysis.cells import Row, Table, Tables, above, column, shown, verdict
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, one_by_one
from maze.analysis.forwards import SITE, channel_of, frames
from maze.analysis.labels import is_reading
from maze.analysis.part import Finding, Study

TOP = 16
READ = 10  # channels that the post gives a label
KNOWS = 0.7  # AUC on squares with a choice above which a label means more than the walls
BACKGROUND_LEVELS = 200


def measure(study: Study) -> dict[str, Table]:
    """Every live channel with its difference, its label and its AUC, and the agreement between the rankings."""
    pairs = contrasts.drawn_pairs()
    firsts = [pair for pair in pairs if pair.number == 0]
    size = int(pairs[0].mazes.size[0])
    background = frames(study.levels("ranking background", BACKGROUND_LEVELS, size=size, mouse="anywhere"))
    by_first, by_five = (_differences(study, which, background) for which in (firsts, pairs))
    channels, five = (
        sorted(study.selection.live, key=lambda channel: -of[channel]["absolute"].estimate)
        for of in (by_first, by_five)
    )
    rows = []
    for rank, channel in enumerate(channels, 1):
        label = study.labels[channel]
        rows.append(
            {
                "rank": rank,
                "channel": channel,
                "pairs": 1,
                **intervals(**by_first[channel]),
                "rank_five_pairs": five.index(channel) + 1,
                "n_five_pairs": len(pairs) // len(firsts),
                **intervals(absolute_five_pairs=by_five[channel]["absolute"]),
                "label": label.label,
                "candidate": label.candidate,
                "n": label.n,
                **intervals(auc=label.auc),
                "adjusted_p": None if np.isnan(label.adjusted_p) else label.adjusted_p,
                "n_choice": label.n_choice,
                **intervals(auc_choice=label.auc_choice),
            }
        )
    return {"ranking": rows, "agreement": _agreement(rows, study.seed_for("ranking bootstrap"))}


def _differences(study: Study, pairs: list[contrasts.DrawnPair], background: Tensor) -> dict[int, dict[str, Interval]]:
    """Per channel the mean absolute difference of sums over all pictures, also in standard deviations.

    The pictures of a pair are one observation, so a single pair has no interval.
    """
    clean, corrupted = (frames([pair.levels[side] for pair in pairs]) for side in range(2))
    clusters = [pair.number for pair in pairs]
    result = contrast(study.points, clean, corrupted, SITE, background=background, absolute=True, clusters=clusters)
    effect = Interval(result.effect(), result.low, result.high, 0.95)
    absolute = Interval(result.absolute, result.low * result.std, result.high * result.std, 0.95)
    rows = zip(map(channel_of, result.sites), one_by_one(absolute), one_by_one(effect), strict=True)
    return {channel: {"absolute": one, "effect": other} for channel, one, other in rows}


def _agreement(rows: Table, seed: int) -> Table:
    """Rank correlations over the channels, with bootstrap intervals over channels."""
    scored = [row for row in rows if row["auc_choice"] is not None]
    table = []
    for one, other in (
        ("absolute", "auc_choice"),
        ("absolute_five_pairs", "auc_choice"),
        ("absolute", "absolute_five_pairs"),
    ):
        values = np.stack([column(scored, one), column(scored, other)], axis=1).astype(np.float64)
        interval = bootstrap_interval(values, lambda sample: rank_correlation(*sample.T), seed=seed, resamples=1999)
        table.append({"of": one, "with": other, "channels": len(scored), **intervals(spearman=interval)})
    return table


def _is_read(row: Row) -> bool:
    """Whether a channel stands for a direction, or two that are not opposite, beyond the walls."""
    return is_reading(row["label"]) and above(row, "auc_choice", KNOWS) is True


def finding(tables: Tables) -> Finding:
    top, rest = tables["ranking"][:READ], tables["ranking"][READ:]
    labels = ", ".join(f"{row['channel']} {row['label'] or 'no label'}{_auc(row)}" for row in top)
    read = sum(map(_is_read, top))
    pair, five = tables["agreement"][:2]
    return Finding(
        f"{read} of the first {len(top)} stand for a direction, or two that are not opposite, with an AUC above "
        f"{KNOWS:g} on squares with a choice. By our pair: {labels}.",
        verdict(read > len(top) / 2),
        f"The differences have rank correlation {shown(pair, 'spearman', '.2f')} with these AUCs for one pair and "
        f"{shown(five, 'spearman', '.2f')} for five (n={pair['channels']} channels). By the same rule, "
        f"{sum(map(_is_read, rest))} of the {len(rest)} live channels that the pair ranks lower stand for a direction.",
    )


def _auc(row: Row) -> str:
    return "" if row["label"] is None or row["auc_choice"] is None else f" {row['auc_choice']:.2f}"


_NAMED, _TOP = ("channel", "label"), {"rank": lambda rank: rank <= TOP}
figure = chart(
    Panel("ranking", _NAMED, "absolute", "mean absolute difference of sums, our pair", where=_TOP),
    Panel("ranking", _NAMED, "auc_choice", "AUC on squares with a choice", where=_TOP, line=0.5),
    Panel("ranking", "absolute", "auc_choice", "AUC on squares with a choice", along=True, line=0.5),
    size=(5, 6),
)
