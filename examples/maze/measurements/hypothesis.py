"""The post's hypothesis: the larger push, that for the cheese or that for the corner, decides where the mouse goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.errors import StatisticsError
from chanpatch.statistics import (
    auc,
    mean_interval,
    paired_counts,
    paired_difference_interval,
    rank_among,
    wilson_interval,
)
from maze.analysis.decision_squares import Decisions, at_decision_squares, cells, said, share_cells
from maze.analysis.effects import activations
from maze.analysis.labels import LabelledChannel, directions_of, is_reading
from maze.analysis.logistic import fit_logistic, predicted
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, verdict
from maze.analysis.push_ablation import Ablation, MatchedSets, ablate_push
from maze.analysis.selection import Selection
from maze.analysis.tables import SITE
from maze.environment.levels import observe, policy_input
from maze.environment.paths import Direction

SIZE = 25
SPLITS = ("in distribution", "out of distribution")
BASE, PUSH, FITTED, CARRIED, OWN = (
    "always the more frequent goal",
    "the larger push",
    "pushes, fitted",
    "pushes, fitted on the other split",
    "the policy's own probabilities",
)
ABLATED = ("the cheese's", "the corner's")
CONTROLS = 99  # random assignments of the weights to other live channels
RESAMPLES = 1999
REFERENCE = 200  # levels whose mean activation takes the place of an ablated channel

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pushes:
    """How much the channels of a hook point push for each direction: a linear readout that was fixed before.

    Attributes:
        weights: (direction, channel): AUC - 0.5 of the channels that stand for the direction, 0 of the others. The
            AUC is that on mazes in which the way may or may not be as the label says: what a channel knows of the
            walls alone gives it no weight.
        mean: (channel,), of the sums on the selection mazes.
        deviation: (channel,), their standard deviation; 1 for dead channels, which have no weight.
    """

    weights: Floats
    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, selection: Selection, labels: Sequence[LabelledChannel]) -> Pushes:
        """The readout of the selection mazes; a channel that stands for "UP or LEFT" counts for UP and for LEFT."""
        weights = np.zeros((len(Direction), selection.sums.shape[1]))
        for channel, told in enumerate(labels):
            if is_reading(told.label) and told.auc_choice is not None:
                weights[list(directions_of(told.label)), channel] = max(told.auc_choice.estimate - 0.5, 0.0)
        deviation = selection.sums.std(axis=0)
        return cls(weights, selection.sums.mean(axis=0), np.where(deviation > 0, deviation, 1.0))

    def __call__(self, seen: Decisions) -> Floats:
        """The push for the cheese's direction and that for the corner's: (level, goal=2)."""
        return self.readout(seen, self.weights)

    def readout(self, seen: Decisions, weights: Floats) -> Floats:
        """The same with other weights."""
        by_direction = (seen.sums - self.mean) / self.deviation @ weights.T
        every = np.arange(len(by_direction))
        return np.stack([by_direction[every, seen.cheese], by_direction[every, seen.corner]], axis=1)

    def only(self, towards: int, away_from: int) -> list[int]:
        """The channels that push for one direction and not for the other."""
        channels: list[int] = np.flatnonzero((self.weights[towards] > 0) & (self.weights[away_from] == 0)).tolist()
        return channels


def measure(study: Study) -> dict[str, Table]:
    """The channels of every push, how well pushes predict the choice, against controls, and what ablation changes."""
    pushes = Pushes.of(study.selection, study.labels)
    levels = {
        (split, use): study.levels(f"hypothesis {split} {use}", size=SIZE, cheese=split, mouse="decision square")
        for split in SPLITS
        for use in ("fit", "score")
    }
    seen = {key: at_decision_squares(study.points, each) for key, each in levels.items()}
    fits = {split: _fit(pushes(seen[split, "fit"]), towards_cheese(seen[split, "fit"]) > 0.5) for split in SPLITS}
    reference = study.levels("hypothesis reference", REFERENCE, size=SIZE, cheese=SPLITS[0], mouse="anywhere")
    cache = activations(study.points, reference, SITE)
    background = torch.from_numpy(policy_input(observe(reference)))
    others = MatchedSets(study.points, background, study.seed_for("hypothesis others"))
    tables: dict[str, Table] = {"channels": _channels(pushes), "weights": _weights(pushes, study.labels)}
    for split, other in (SPLITS, SPLITS[::-1]):
        score = seen[split, "score"]
        towards = towards_cheese(score)
        usual = bool((towards_cheese(seen[split, "fit"]) > 0.5).mean() >= 0.5)
        push = pushes(score)
        told = {
            BASE: np.full(len(towards), usual),
            PUSH: push[:, 0] > push[:, 1],
            FITTED: _said_cheese(fits[split], push),
            CARRIED: _said_cheese(fits[other], push),
            OWN: towards > 0.5,
        }
        scored = _scored(split, score, told)
        tables.setdefault("predictions", []).extend(scored)
        tables.setdefault("controls", []).append(_against_controls(split, score, pushes, study))
        for name, channels_of in zip(
            ABLATED, (pushes.only, lambda cheese, corner: pushes.only(corner, cheese)), strict=True
        ):
            done = ablate_push(study.points, levels[split, "score"], score, channels_of, others, cache)
            known: dict[str, Any] = {"split": split, "ablated": name, "n": len(towards)}
            tables.setdefault("ablations", []).append(known | _ablated(towards > 0.5, done))
            tables.setdefault("ablation_controls", []).extend(known | row for row in _each(towards > 0.5, done))
    return {name: table for name, table in tables.items() if table}


def towards_cheese(seen: Decisions) -> Floats:
    """The probability of the step to the cheese, given that it is this or the step to the corner: (level,)."""
    every = np.arange(len(seen.cheese))
    cheese, corner = seen.moves[every, seen.cheese], seen.moves[every, seen.corner]
    total = cheese + corner
    return np.where(total > 0, cheese / np.where(total > 0, total, 1.0), 0.5)


def _fit(push: Floats, cheese: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """Mean and deviation of the pushes, and the coefficients on what is scaled by them."""
    mean, deviation = push.mean(axis=0), push.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return mean, deviation, fit_logistic((push - mean) / deviation, cheese)


def _said_cheese(fit: tuple[Floats, Floats, Floats], push: Floats) -> NDArray[np.bool_]:
    mean, deviation, coefficients = fit
    return predicted(coefficients, (push - mean) / deviation) > 0.5


def _channels(pushes: Pushes) -> Table:
    """One row per direction: the channels that push for it."""
    return [
        {
            "direction": direction.name,
            "count": int(np.count_nonzero(pushes.weights[direction])),
            "channels": " ".join(map(str, np.flatnonzero(pushes.weights[direction]))),
        }
        for direction in Direction
    ]


def _weights(pushes: Pushes, labels: Sequence[LabelledChannel]) -> Table:
    """One row per direction and channel: the weight, and the AUC that it is 0.5 below, with its n."""
    return [
        {
            "direction": direction.name,
            "channel": int(channel),
            "weight": pushes.weights[direction, channel],
            "n": labels[channel].n_choice,
            **cells("auc", labels[channel].auc_choice),
        }
        for direction in Direction
        for channel in np.flatnonzero(pushes.weights[direction])
    ]


def _scored(split: str, seen: Decisions, told: dict[str, NDArray[np.bool_]]) -> Table:
    """One row per predictor: its accuracy for the likeliest move and for a sampled one, and its gain over the base."""
    towards = towards_cheese(seen)
    two = (seen.chosen == seen.cheese) | (seen.chosen == seen.corner)
    right = {name: (says == seen.took_cheese)[two] for name, says in told.items()}
    sampled = {name: np.where(says, towards, 1 - towards) for name, says in told.items()}
    n = int(two.sum())
    rows: Table = []
    for name in told:
        gain = paired_difference_interval(*paired_counts(right[name], right[BASE])) if n else None
        rows.append(
            {
                "split": split,
                "predictor": name,
                "n": n,
                "went_elsewhere": len(two) - n,
                "cheese": int(seen.took_cheese.sum()),
                **cells("accuracy", wilson_interval(int(right[name].sum()), n) if n else None),
                **cells("gain", None if name == BASE else gain),
                "n_sampled": len(two),
                **cells("sampled", mean_interval(sampled[name])),
            }
        )
    return rows


def _against_controls(split: str, seen: Decisions, pushes: Pushes, study: Study) -> dict[str, Any]:
    """How well the difference of the pushes separates the choices (AUC), among readouts with the weights dealt anew."""
    two = (seen.chosen == seen.cheese) | (seen.chosen == seen.corner)
    seen = seen.rows(two)
    live = list(study.selection.live)
    generator = np.random.default_rng(study.seed_for("hypothesis controls"))
    row: dict[str, Any] = {"split": split, "n": len(seen.chosen), "controls": CONTROLS}
    try:
        area = _separation(pushes(seen), seen)
        others = []
        for _ in range(CONTROLS):
            dealt = np.zeros_like(pushes.weights)
            dealt[:, live] = pushes.weights[:, generator.permutation(live)]
            others.append(_separation(pushes.readout(seen, dealt), seen).estimate)
    except StatisticsError:  # fewer than two mice went one of the ways
        empty = dict.fromkeys(("controls_median", "controls_highest", "rank", "rank_p"))
        return row | cells("auc", None) | empty
    rank = rank_among(area.estimate - 0.5, np.array(others) - 0.5)
    summary = {"controls_median": float(np.median(others)), "controls_highest": float(np.max(others))}
    return row | cells("auc", area) | summary | {"rank": rank.rank, "rank_p": rank.p}


def _separation(push: Floats, seen: Decisions) -> Any:
    return auc(push[:, 0] - push[:, 1], seen.took_cheese)


def _ablated(before: NDArray[np.bool_], done: Ablation) -> dict[str, Any]:
    """On how many levels the step to the cheese is likelier, before and after, and the rank of the change."""
    changes = [(each.sum() - before.sum()) / len(before) for each in done.controls]
    rank = rank_among((done.towards.sum() - before.sum()) / len(before), changes) if changes else None
    return {
        "n_with_channels": done.affected,
        **share_cells("before", before.sum(), len(before)),
        **share_cells("after", done.towards.sum(), len(before)),
        **_change(before, done.towards),
        "controls": len(changes),
        "controls_apart": None if np.isnan(done.apart) else done.apart,
        "controls_lowest": min(changes, default=None),
        "controls_median": float(np.median(changes)) if changes else None,
        "controls_highest": max(changes, default=None),
        "rank": rank and rank.rank,
        "rank_p": rank.p if rank and not done.no_p else None,
        "why_no_p": done.no_p or rank.no_p if rank else "there are no other channels",
    }


def _each(before: NDArray[np.bool_], done: Ablation) -> Table:
    """The change by each of the controls."""
    return [{"control": number, **_change(before, after)} for number, after in enumerate(done.controls, 1)]


def _change(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> dict[str, Any]:
    return cells("change", paired_difference_interval(*paired_counts(after, before)))


def figure(tables: Tables) -> Figure:
    """The accuracy of every predictor in and out of distribution, and what ablation does to the choice."""
    drawn = Figure(figsize=(13, 4.8), layout="constrained")
    accuracy, ablation = drawn.subplots(1, 2, width_ratios=(1.2, 1))
    _draw_points(accuracy, tables["predictions"], "predictor", "accuracy")
    accuracy.set_xlabel("choices predicted right, %, 95% interval")
    _draw_points(ablation, tables["ablations"], "ablated", "change")
    _draw_controls(ablation, tables.get("ablation_controls", []))
    ablation.axvline(0, color="black", linewidth=0.8)
    ablation.set_xlabel("levels on which the step to the cheese is the likelier\none, change in percentage points")
    ablation.set_title("a push's channels, or matched others, set to their mean", fontsize=10)
    for axes in (accuracy, ablation):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
    return drawn


def _draw_points(axes: Axes, rows: Table, by: str, what: str) -> None:
    names = list(dict.fromkeys(row[by] for row in rows))
    for number, split in enumerate(SPLITS):
        of = [row for row in rows if row["split"] == split]
        for row in of:
            if row[what] is None:
                continue
            height = len(names) - names.index(row[by]) + 0.12 * (1 - 2 * number)
            axes.plot([100 * row[f"{what}_low"], 100 * row[f"{what}_high"]], [height] * 2, color="0.6")
            axes.plot(100 * row[what], height, "ox"[number], color="black")
        axes.plot([], [], "ox"[number], color="black", label=f"{split}, n={of[0]['n']}")
    axes.set_yticks(range(len(names), 0, -1), names)
    axes.set_ylim(0.5, len(names) + 0.5)


def _draw_controls(axes: Axes, rows: Table) -> None:
    """A dot for every matched set, below the push that it was drawn for."""
    for number, split in enumerate(SPLITS):
        of = [row for row in rows if row["split"] == split]
        heights = [len(ABLATED) - ABLATED.index(row["ablated"]) + 0.12 * (1 - 2 * number) - 0.05 for row in of]
        label = f"matched sets of other channels, {split.split()[0]}"
        axes.plot([100 * row["change"] for row in of], heights, "ox"[number], color="tab:orange", markersize=3,
                  alpha=0.7, label=label)  # fmt: skip


def finding(tables: Tables) -> Finding:
    rows = {(row["split"], row["predictor"]): row for row in tables["predictions"]}
    areas = {row["split"]: row for row in tables["controls"]}
    told, held = [], []
    for split in SPLITS:
        push, fitted, area = rows[split, PUSH], rows[split, FITTED], areas[split]
        among = "" if area["rank"] is None else f", rank {area['rank']} of {area['controls'] + 1} readouts"
        told.append(
            f"{split.capitalize()}: the larger push predicts {said(push, 'accuracy')} of {push['n']} choices (base "
            f"rate {said(rows[split, BASE], 'accuracy')}), fitted {said(fitted, 'accuracy')}; the difference of the "
            f"pushes separates them with AUC {said(area, 'auc', '.2f')}{among}."
        )
        if area["auc"] is not None:
            # Weights dealt to other channels that do as well leave open whether these channels are what pushes.
            beyond = True if area["rank_p"] is not None and area["rank_p"] < 0.05 else None
            held += [above(area, "auc", 0.5), above(push, "gain"), beyond]
    without = [row["direction"] for row in tables["channels"] if row["count"] == 0]
    told.reverse()  # out of distribution first, since there the two goals compete
    if without:
        told.append(f"No channel stands for {', '.join(without)}, whose push is 0 throughout.")
    gains = [
        f"{said(rows[split, each], 'gain', '+.2f')} {split} ({each})" for split in SPLITS for each in (PUSH, FITTED)
    ]
    changes = [
        f"{said(row, 'change', '+.2f')} {row['split']} for {row['ablated']} ({_beside(row)})"
        for row in tables["ablations"]
    ]
    return Finding(
        " ".join(told),
        verdict(*(held if len(without) < len(Direction) else [])),
        f"Gain in accuracy over the base rate: {'; '.join(gains)}. With the channels of one push set to their mean, "
        f"the share of levels on which the step to the cheese is likelier changes by {'; '.join(changes)}. Their sums "
        "are then the usual ones, 0 standard deviations from the mean of the reference levels, by construction.",
        "That the rest of the policy adds up sums in this way: a readout that predicts the choice need not be the one "
        "that the policy computes, and what is gained in accuracy over a high base rate is small by necessity.",
    )


def _beside(row: Mapping[str, Any]) -> str:
    """What as large sets of other channels do, and where the push ranks among them."""
    if not row["controls"]:
        return "no other channels to compare with"
    p = f", no p: {row['why_no_p']}" if row["rank_p"] is None else f", p = {row['rank_p']:.2g}"
    return (
        f"{row['controls']} matched sets of others: median {row['controls_median']:+.3f}, "
        f"{row['controls_lowest']:+.3f} to {row['controls_highest']:+.3f}; rank {row['rank']} of "
        f"{row['controls'] + 1}{p}"
    )


PART = Part(
    name="hypothesis",
    question="Does the mouse go where the channels together push more: to the cheese or to the corner?",
    method="Size 25, mouse on the decision square. Push of a direction: standardised sums of the channels labelled "
    "with it on other mazes, weighted by AUC - 0.5 on random squares where that way is one of several. The larger one "
    "is the prediction; so is a regression on both, fitted on other levels. An ablated push is ranked among sets of as "
    "many other live channels, matched on mean activation.",
    post="A hypothesis, not measured: if the aggregated push for the action to the cheese is higher than that for the "
    "corner, the mouse goes to the cheese, otherwise to the corner.",
    measure=measure,
    figure=figure,
    finding=finding,
)
