"""Which channels the post's pair picks out, what each of them stands for, and whether one pair picks well."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from chanpatch import contrast, label_channels
from chanpatch.statistics import bootstrap_interval
from maze.channels import channel_of
from maze.levels import draw_levels, observe, policy_input
from maze.pairs import contrastive_pairs, rotations
from maze.part import Finding, Part, Study, Table, Tables, column, interval_cells, shown
from maze.paths import Direction
from maze.readings import optional_cells, rank_correlation
from maze.states import Mazes, write_mazes
from maze.tables import SITE

TOP = 16
BACKGROUND_LEVELS = 200


def measure(study: Study) -> dict[str, Table]:
    """Every live channel with its difference, its label and its AUC; and how far the rankings agree."""
    pairs = contrastive_pairs()
    side = int(pairs[0].size[0])
    background = _frames(study.levels("ranking background", BACKGROUND_LEVELS, size=side, mouse="anywhere"))
    by_post, by_five = (_differences(study, chosen, background) for chosen in (pairs[:1], pairs))
    selection = study.selection
    names = [direction.name for direction in Direction]
    labels = label_channels(selection.sums, selection.first, names=names, seed=study.seed_for("labels"))
    channels = sorted(selection.live, key=lambda channel: -by_post[channel]["absolute"])
    five = sorted(selection.live, key=lambda channel: -by_five[channel]["absolute"])
    rows: Table = []
    for rank, channel in enumerate(channels, 1):
        told = labels[channel]
        rows.append(
            {
                "rank": rank,
                "channel": channel,
                "absolute": by_post[channel]["absolute"],
                "effect": by_post[channel]["effect"],
                "rank_five_pairs": five.index(channel) + 1,
                "absolute_five_pairs": by_five[channel]["absolute"],
                "label": told.label,
                "candidate": told.candidate,
                "n": labels.scored_on,
                **optional_cells("auc", told.auc),
                "adjusted_p": None if np.isnan(told.adjusted_p) else told.adjusted_p,
            }
        )
    return {"ranking": rows, "agreement": _agreement(rows, study.seed_for("ranking bootstrap"))}


def _differences(study: Study, pairs: list[Mazes], background: torch.Tensor) -> dict[int, dict[str, float | None]]:
    """Per channel the mean absolute difference of sums over all rotations, and the same in standard deviations."""
    # A level of the same size lends its textures, as in `pair_sums`.
    bases = [draw_levels(1, size=int(pair.size[0]), seed=0)[0] for pair in pairs]
    turned = [(number, mazes) for number, pair in enumerate(pairs) for mazes in rotations(pair)]
    clean, corrupted = (
        _frames([write_mazes(mazes, bases[number])[side] for number, mazes in turned]) for side in range(2)
    )
    result = contrast(
        study.points,
        clean,
        corrupted,
        SITE,
        background=background,
        absolute=True,
        clusters=[number for number, _ in turned],
    )
    effects = np.where(np.isfinite(result.effect), result.effect, None)
    return {
        channel_of(site): {"absolute": float(result.absolute[row]), "effect": effects[row]}
        for row, site in enumerate(result.sites)
    }


def _frames(levels: list[bytes]) -> torch.Tensor:
    return torch.from_numpy(policy_input(observe(levels)))


def _agreement(rows: Table, seed: int) -> Table:
    """Rank correlations over the channels, with bootstrap intervals over channels."""
    scored = [row for row in rows if row["auc"] is not None]
    compared = [("absolute", "auc"), ("absolute_five_pairs", "auc"), ("absolute", "absolute_five_pairs")]
    table: Table = []
    for one, other in compared:
        values = np.stack([column(scored, one), column(scored, other)], axis=1).astype(np.float64)
        interval = bootstrap_interval(values, lambda sample: rank_correlation(*sample.T), seed=seed, resamples=1999)
        table.append({"of": one, "with": other, "channels": len(scored), **interval_cells("spearman", interval)})
    return table


def figure(tables: Tables) -> Figure:
    """The top channels by the post's pair with their labels, and the difference of every channel against its AUC."""
    drawn = Figure(figsize=(12, 5.2), layout="constrained")
    bars, scatter = drawn.subplots(1, 2, width_ratios=(1.5, 1))
    top = tables["ranking"][:TOP]
    highest = max(row["absolute"] for row in top)
    for row in top:
        labelled = row["label"] is not None
        bars.barh(row["rank"], row["absolute"], color="0.75" if labelled else "white", edgecolor="black")
        said = row["label"] if labelled else "no label"
        area = "" if row["auc"] is None else f", AUC {row['auc']:.2f}"
        bars.text(row["absolute"] + 0.01 * highest, row["rank"], said + area, va="center", fontsize=9)
    bars.set_yticks([row["rank"] for row in top], [f"channel {row['channel']}" for row in top])
    bars.invert_yaxis()
    bars.set(xlim=(0, 1.45 * highest), xlabel="mean absolute difference of sums, the post's pair in 4 rotations")
    bars.set_title(f"the {len(top)} channels that differ most; labels from n={top[0]['n']} other mazes")
    for marker, name, labelled in (("o", "with a label", True), ("x", "without", False)):
        rows = [row for row in tables["ranking"] if row["auc"] is not None and (row["label"] is not None) == labelled]
        scatter.plot(column(rows, "absolute"), column(rows, "auc"), marker, color="black", alpha=0.7, label=name)
    agreement = tables["agreement"][0]
    scatter.set(xlabel="mean absolute difference of sums", ylabel="AUC of the label, held-out mazes")
    scatter.set_title(f"rank correlation {shown(agreement, 'spearman', '.2f')},\n{agreement['channels']} live channels")
    scatter.legend(frameon=False, loc="lower right")
    for axes in (bars, scatter):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def finding(tables: Tables) -> Finding:
    top, rest = tables["ranking"][:TOP], tables["ranking"][TOP:]
    said = [f"{row['channel']} {row['label'] or 'no label'}" for row in top[:10]]
    labelled = sum(row["label"] is not None for row in top[:10])
    share = labelled / len(said)
    pair, five = tables["agreement"][:2]
    return Finding(
        f"By the post's pair: {', '.join(said)} (labels from n={top[0]['n']} held-out mazes, p < 0.05 after Holm's "
        f"correction for {pair['channels']} live channels).",
        "yes" if share == 1 else "in part" if share >= 0.5 else "no",
        f"{labelled} of the first {len(said)} channels stand for a direction or a union of directions. One pair ranks "
        f"channels as their AUC does with a rank correlation of {shown(pair, 'spearman', '.2f')} over "
        f"{pair['channels']} channels; five pairs with {shown(five, 'spearman', '.2f')}.",
        f"That the pair is what finds such channels: of the {len(rest)} live channels that it ranks lower, "
        f"{sum(row['label'] is not None for row in rest)} have a label too. Four rotations of one pair are one "
        "independent observation, so the differences have no p-value.",
    )


PART = Part(
    name="ranking",
    question="Which channels differ most over the post's pair, and what does each of them stand for?",
    method="Mean absolute difference of the sums at relu3 over the four rotations of the post's pair; per channel the "
    "label or union of labels chosen on one half of the selection mazes and scored on the other.",
    post="121 UP, 21 DOWN or LEFT, 80 LEFT, 35 UP or LEFT, 112 LEFT, 73 RIGHT, 71 UP, 7 UP or RIGHT, 123 DOWN, "
    "17 DOWN, read from the pictures of the pair.",
    measure=measure,
    figure=figure,
    finding=finding,
)
