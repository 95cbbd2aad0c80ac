"""The channels that differ most over the post's pair, their labels, and how well one pair ranks channels."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from chanpatch import contrast
from chanpatch.statistics import Interval, bootstrap_interval, rank_correlation
from maze.analysis.cells import Row, Table, Tables, above, cells, column, intervals, shown
from maze.analysis.channels import channel_of
from maze.analysis.drawing import Panel, chart
from maze.analysis.forwards import SITE, frames
from maze.analysis.labels import WAYS, is_reading
from maze.analysis.part import Finding, Part, Study
from maze.environment.pairs import contrastive_pairs, rotations
from maze.levels import draw_levels
from maze.states import Mazes, write_mazes

TOP = 16
READ = 10  # channels that the post gives a reading of
KNOWS = 0.7  # AUC on squares with a choice above which a reading is more than the walls
BACKGROUND_LEVELS = 200


def measure(study: Study) -> dict[str, Table]:
    """Every live channel with its difference, its label and its AUC, and the agreement of the rankings."""
    pairs = contrastive_pairs()
    background = frames(
        study.levels("ranking background", BACKGROUND_LEVELS, size=int(pairs[0].size[0]), mouse="anywhere")
    )
    by_post, by_five = (_differences(study, which, background) for which in (pairs[:1], pairs))
    channels, five = (
        sorted(study.selection.live, key=lambda channel: -of[channel]["absolute"].estimate) for of in (by_post, by_five)
    )
    rows: Table = []
    for rank, channel in enumerate(channels, 1):
        label = study.labels[channel]
        rows.append(
            {
                "rank": rank,
                "channel": channel,
                "pairs": 1,
                **intervals(absolute=by_post[channel]["absolute"], effect=by_post[channel]["effect"]),
                "rank_five_pairs": five.index(channel) + 1,
                "n_five_pairs": len(pairs),
                **cells("absolute_five_pairs", by_five[channel]["absolute"]),
                "label": label.label,
                "candidate": label.candidate,
                "n": label.n,
                **cells("auc", label.auc),
                "adjusted_p": None if np.isnan(label.adjusted_p) else label.adjusted_p,
                "n_choice": label.n_choice,
                **cells("auc_choice", label.auc_choice),
            }
        )
    return {"ranking": rows, "agreement": _agreement(rows, study.seed_for("ranking bootstrap"))}


def _differences(study: Study, pairs: list[Mazes], background: Tensor) -> dict[int, dict[str, Interval]]:
    """Per channel the mean absolute difference of sums over all rotations, also in standard deviations.

    The rotations of a pair are one observation, so one pair has no interval.
    """
    bases = [draw_levels(1, size=int(pair.size[0]), seed=0)[0] for pair in pairs]  # textures, as in `pair_sums`
    turned = [(number, mazes) for number, pair in enumerate(pairs) for mazes in rotations(pair)]
    clean, corrupted = (
        frames([write_mazes(mazes, bases[number])[side] for number, mazes in turned]) for side in range(2)
    )
    clusters = [number for number, _ in turned]
    result = contrast(study.points, clean, corrupted, SITE, background=background, absolute=True, clusters=clusters)
    ends = np.stack([result.effect(), result.low, result.high])
    both = {"absolute": [result.absolute, *(ends * result.std)[1:]], "effect": ends}
    return {
        channel_of(site): {name: Interval(*(float(each[row]) for each in of), 0.95) for name, of in both.items()}
        for row, site in enumerate(result.sites)
    }


def _agreement(rows: Table, seed: int) -> Table:
    """Rank correlations over the channels, with bootstrap intervals over channels."""
    scored = [row for row in rows if row["auc_choice"] is not None]
    table: Table = []
    for one, other in (
        ("absolute", "auc_choice"),
        ("absolute_five_pairs", "auc_choice"),
        ("absolute", "absolute_five_pairs"),
    ):
        values = np.stack([column(scored, one), column(scored, other)], axis=1).astype(np.float64)
        interval = bootstrap_interval(values, lambda sample: rank_correlation(*sample.T), seed=seed, resamples=1999)
        table.append({"of": one, "with": other, "channels": len(scored), **cells("spearman", interval)})
    return table


def _is_read(row: Row) -> bool:
    """Whether a channel stands for a direction, or two that are not opposite, beyond the walls."""
    return is_reading(row["label"]) and above(row, "auc_choice", KNOWS) is True


def finding(tables: Tables) -> Finding:
    top, rest = tables["ranking"][:READ], tables["ranking"][READ:]
    labels = ", ".join(
        f"{row['channel']} {row['label'] or 'no label'}"
        + ("" if row["label"] is None or row["auc_choice"] is None else f" {row['auc_choice']:.2f}")
        for row in top
    )
    read = sum(map(_is_read, top))
    labelled = sum(row["label"] is not None for row in top)
    pair, five = tables["agreement"][:2]
    counts = [row["n_choice"] for row in top if row["n_choice"]]
    of = f"n={min(counts)} to {max(counts)} mazes each" if counts else "no mazes"
    return Finding(
        f"{read} of the first {len(top)} stand for a direction, or two that are not opposite, with an interval above "
        f"{KNOWS:g}. By the post's pair, with the AUC on squares with a choice ({of}): {labels}.",
        "yes" if read == len(top) else "in part" if read >= len(top) / 2 else "no",
        f"{labelled} of them have a label beyond chance (n={top[0]['n']} held-out squares, p < 0.05 after Holm's "
        f"correction for {len(tables['ranking'])} live channels); {labelled - read} of these are an opposite pair, "
        "three directions, or little beyond the walls. The rank correlation between differences and these AUCs is "
        f"{shown(pair, 'spearman', '.2f')} for one pair, over {pair['channels']} channels, and "
        f"{shown(five, 'spearman', '.2f')} for five.",
        f"It does not follow that the pair finds such channels: of the {len(rest)} live channels that it ranks lower, "
        f"{sum(map(_is_read, rest))} stand for a direction by the same rule. Four rotations of one pair are one "
        "independent observation, so the differences have no p-value.",
    )


_NAMED, _TOP = ("channel", "label"), {"rank": lambda rank: rank <= TOP}

PART = Part(
    name="ranking",
    question="Which channels differ most over the post's pair, and what does each of them stand for?",
    method="Mean absolute difference of the sums at relu3 over the four rotations of the post's pair; per channel the "
    f"direction or union of directions chosen on one half of squares with {WAYS} legal moves or more and tested on the "
    "other. The AUC on squares with a choice is over random squares of the selection mazes, from which a move inside "
    "the union and one outside it are legal.",
    post="121 UP, 21 DOWN or LEFT, 80 LEFT, 35 UP or LEFT, 112 LEFT, 73 RIGHT, 71 UP, 7 UP or RIGHT, 123 DOWN, "
    "17 DOWN, read from the pictures of the pair.",
    measure=measure,
    figure=chart(
        Panel("ranking", _NAMED, "absolute", "mean absolute difference of sums, the post's pair", where=_TOP),
        Panel("ranking", _NAMED, "auc_choice", "AUC on squares with a choice", where=_TOP, line=0.5),
        Panel("ranking", "absolute", "auc_choice", "AUC on squares with a choice", along=True, line=0.5),
        size=(5, 6),
    ),
    finding=finding,
)
