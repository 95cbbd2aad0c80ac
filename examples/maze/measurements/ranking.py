"""Which channels the post's pair picks out, what each of them stands for, and whether one pair picks well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from chanpatch import contrast
from chanpatch.statistics import Interval, bootstrap_interval
from maze.analysis.channels import channel_of
from maze.analysis.decision_squares import cells
from maze.analysis.labels import WAYS, is_reading
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, column, interval_cells, shown
from maze.analysis.readings import optional_cells, rank_correlation
from maze.analysis.tables import SITE
from maze.environment.levels import draw_levels, observe, policy_input
from maze.environment.pairs import contrastive_pairs, rotations
from maze.environment.states import Mazes, write_mazes

TOP = 16
READ = 10  # channels of which the post gives a reading
KNOWS = 0.7  # of the AUC where there is a choice: a reading is more than what the walls say if it lies above
BACKGROUND_LEVELS = 200


def measure(study: Study) -> dict[str, Table]:
    """Every live channel with its difference, its label and its AUC; and how far the rankings agree."""
    pairs = contrastive_pairs()
    side = int(pairs[0].size[0])
    background = _frames(study.levels("ranking background", BACKGROUND_LEVELS, size=side, mouse="anywhere"))
    by_post, by_five = (_differences(study, chosen, background) for chosen in (pairs[:1], pairs))
    live = study.selection.live
    channels, five = (sorted(live, key=lambda channel: -of[channel]["absolute"].estimate) for of in (by_post, by_five))
    rows: Table = []
    for rank, channel in enumerate(channels, 1):
        told = study.labels[channel]
        rows.append(
            {
                "rank": rank,
                "channel": channel,
                "pairs": 1,
                **cells("absolute", by_post[channel]["absolute"]),
                **cells("effect", by_post[channel]["effect"]),
                "rank_five_pairs": five.index(channel) + 1,
                "n_five_pairs": len(pairs),
                **cells("absolute_five_pairs", by_five[channel]["absolute"]),
                "label": told.label,
                "candidate": told.candidate,
                "n": told.n,
                **optional_cells("auc", told.auc),
                "adjusted_p": None if np.isnan(told.adjusted_p) else told.adjusted_p,
                "n_choice": told.n_choice,
                **optional_cells("auc_choice", told.auc_choice),
            }
        )
    return {"ranking": rows, "agreement": _agreement(rows, study.seed_for("ranking bootstrap"))}


def _differences(study: Study, pairs: list[Mazes], background: torch.Tensor) -> dict[int, dict[str, Interval]]:
    """Per channel the mean absolute difference of sums over all rotations, and the same in standard deviations.

    The rotations of a pair are one observation, so one pair alone has no interval.
    """
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
    unit, ends = result.std, np.stack([result.effect(), result.low, result.high])
    told = {"absolute": [result.absolute, *(ends * unit)[1:]], "effect": ends}
    return {
        channel_of(site): {name: Interval(*(float(each[row]) for each in of), 0.95) for name, of in told.items()}
        for row, site in enumerate(result.sites)
    }


def _frames(levels: list[bytes]) -> torch.Tensor:
    return torch.from_numpy(policy_input(observe(levels)))


def _agreement(rows: Table, seed: int) -> Table:
    """Rank correlations over the channels, with bootstrap intervals over channels."""
    scored = [row for row in rows if row["auc_choice"] is not None]
    told = "auc_choice"
    compared = [("absolute", told), ("absolute_five_pairs", told), ("absolute", "absolute_five_pairs")]
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
        bars.barh(row["rank"], row["absolute"], color="0.75" if _is_read(row) else "white", edgecolor="black")
        area = "" if row["auc_choice"] is None else f", AUC {shown(row, 'auc_choice', '.2f')}"
        said = (row["label"] or "no label") + area
        bars.text(row["absolute"] + 0.01 * highest, row["rank"], said, va="center", fontsize=9)
    bars.set_yticks([row["rank"] for row in top], [f"channel {row['channel']}" for row in top])
    bars.invert_yaxis()
    bars.set(
        xlim=(0, 1.7 * highest),
        xlabel="mean absolute difference of sums, the post's pair in 4 rotations: one observation",
    )
    bars.set_title(f"the {len(top)} channels that differ most; grey: a reading beyond the walls", fontsize=11)
    for marker, name, read in (("o", "with a reading beyond the walls", True), ("x", "without", False)):
        rows = [row for row in tables["ranking"] if row["auc_choice"] is not None and _is_read(row) == read]
        x, y = column(rows, "absolute"), column(rows, "auc_choice")
        scatter.vlines(x, column(rows, "auc_choice_low"), column(rows, "auc_choice_high"), color="0.7", linewidth=1)
        scatter.plot(x, y, marker, color="black", alpha=0.7, label=f"{name} ({len(rows)})")
    agreement = tables["agreement"][0]
    scatter.set(xlabel="mean absolute difference of sums", ylabel="AUC where there is a choice, 95% interval")
    scatter.set_title(
        f"rank correlation {shown(agreement, 'spearman', '.2f')},\n{agreement['channels']} live channels", fontsize=11
    )
    scatter.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    for axes in (bars, scatter):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _is_read(row: Mapping[str, Any]) -> bool:
    """Whether a channel stands for a direction, or two that are not opposite, by more than what the walls say."""
    return is_reading(row["label"]) and above(row, "auc_choice", KNOWS) is True


def finding(tables: Tables) -> Finding:
    top, rest = tables["ranking"][:READ], tables["ranking"][READ:]
    said = [
        f"{row['channel']} {row['label'] or 'no label'}"
        + ("" if row["label"] is None or row["auc_choice"] is None else f" {row['auc_choice']:.2f}")
        for row in top
    ]
    read = sum(map(_is_read, top))
    labelled = sum(row["label"] is not None for row in top)
    pair, five = tables["agreement"][:2]
    counts = [row["n_choice"] for row in top if row["n_choice"]]
    of = f"n={min(counts)} to {max(counts)} mazes each" if counts else "no mazes"
    return Finding(
        f"{read} of the first {len(top)} stand for a direction, or two that are not opposite, with an interval above "
        f"{KNOWS:g}. By the post's pair, with the AUC where there is a choice ({of}): {', '.join(said)}.",
        "yes" if read == len(top) else "in part" if read >= len(top) / 2 else "no",
        f"{labelled} of them have a label beyond chance (n={top[0]['n']} held-out squares, p < 0.05 after Holm's "
        f"correction for {len(tables['ranking'])} live channels); {labelled - read} of these labels are those of an "
        "opposite pair or of three directions, or tell little where there is a choice. One pair ranks channels as "
        f"that AUC does with a rank correlation of {shown(pair, 'spearman', '.2f')} over {pair['channels']} channels; "
        f"five pairs with {shown(five, 'spearman', '.2f')}.",
        f"That the pair is what finds such channels: of the {len(rest)} live channels that it ranks lower, "
        f"{sum(map(_is_read, rest))} stand for a direction by the same rule. Four rotations of one pair are one "
        "independent observation, so the differences have no p-value.",
    )


PART = Part(
    name="ranking",
    question="Which channels differ most over the post's pair, and what does each of them stand for?",
    method="Mean absolute difference of the sums at relu3 over the four rotations of the post's pair; per channel the "
    f"direction or union of directions chosen on one half of squares where {WAYS} ways or more part and tested on the "
    "other. Its AUC where there is a choice is that on random squares of the mazes that channels are chosen on, from "
    "which a move inside the union and one outside it are free, so that to notice walls is not enough.",
    post="121 UP, 21 DOWN or LEFT, 80 LEFT, 35 UP or LEFT, 112 LEFT, 73 RIGHT, 71 UP, 7 UP or RIGHT, 123 DOWN, "
    "17 DOWN, read from the pictures of the pair.",
    measure=measure,
    figure=figure,
    finding=finding,
)
