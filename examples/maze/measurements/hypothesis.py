"""Does the mouse go the way that the channels together push more: to the cheese or to the corner?

Method: Size 25, mouse on the decision square. Push for a direction: standardized sums of the channels labeled so on
other mazes, weighted by AUC - 0.5 on random squares with other legal moves. The larger push is a prediction, and a
regression on both pushes, fitted on other levels, is another. An ablated push is ranked among sets of as many other
live channels, matched on mean activation.

The post: A hypothesis, not measured: if the aggregated push for the action to the cheese is higher than that for the
corner, the mouse goes to the cheese, otherwise to the corner.

Limits: The result does not show that the policy adds up sums in this way: a readout that predicts the choice need not
be the one that the policy computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chanpatch.probes import LogisticProbe
from chanpatch.statistics import Interval, mean_interval, paired_counts, paired_difference_interval, rank_among
from maze.analysis.cells import Flags, Row, Table, Tables, Values, above, keyed, shown, verdict
from maze.analysis.decision_squares import Decisions, at_decision_squares
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, rank_cells, share
from maze.analysis.forwards import SITE, activations, frames
from maze.analysis.labels import LabelledChannel, directions_of, is_reading
from maze.analysis.part import SPLITS, Finding, Study
from maze.analysis.push_ablation import Ablation, MatchedSets, ablate_push
from maze.analysis.readings import area
from maze.analysis.selection import Selection
from maze.paths import Direction

SIZE = 25
BASE, PUSH, FITTED, CARRIED, OWN = (
    "always the more frequent goal",
    "the larger push",
    "pushes, fitted",
    "pushes, fitted on the other split",
    "the policy's own probabilities",
)
ABLATED = ("the cheese's", "the corner's")
CONTROLS = 99  # random assignments of the weights to live channels
REFERENCE = 200  # levels for the means that replace ablated channels


@dataclass(frozen=True, eq=False)
class Pushes:
    """The push of a hook point for each direction: a weighted sum of standardized channel sums.

    A weight is AUC - 0.5 for channels labeled with the direction, else 0. The AUC is over mazes in which the label and
    other moves are legal, so knowledge of the walls alone has no weight.
    """

    weights: Values  # (direction, channel)
    mean: Values  # (channel,): mean of the sums on the selection mazes
    deviation: Values  # (channel,): standard deviation of these sums; 1 for dead channels

    @classmethod
    def of(cls, selection: Selection, labels: Sequence[LabelledChannel]) -> Pushes:
        """The pushes of channels with a label; a channel for "UP or LEFT" counts for both directions."""
        weights = np.zeros((len(Direction), selection.sums.shape[1]))
        for channel, each in enumerate(labels):
            if is_reading(each.label) and each.auc_choice is not None:
                weights[list(directions_of(each.label)), channel] = max(each.auc_choice.estimate - 0.5, 0.0)
        deviation = selection.sums.std(axis=0)
        return cls(weights, selection.sums.mean(axis=0), np.where(deviation > 0, deviation, 1.0))

    def __call__(self, seen: Decisions, weights: Values | None = None) -> Values:
        """The pushes for the directions of cheese and corner, with other weights if given: (level, 2)."""
        by_direction = (seen.sums - self.mean) / self.deviation @ (self.weights if weights is None else weights).T
        every = np.arange(len(by_direction))
        return np.stack([by_direction[every, seen.cheese], by_direction[every, seen.corner]], axis=1)

    def only(self, towards: int, away_from: int) -> list[int]:
        """The channels that push for one direction and not for the other."""
        return np.flatnonzero((self.weights[towards] > 0) & (self.weights[away_from] == 0)).tolist()


def measure(study: Study) -> dict[str, Table]:
    """The channels of every push, predictions of the choice against controls, and the effect of ablation."""
    pushes = Pushes.of(study.selection, study.labels)
    levels = {
        (split, use): study.levels(f"hypothesis {split} {use}", size=SIZE, cheese=split, mouse="decision square")
        for split in SPLITS
        for use in ("fit", "score")
    }
    seen = {key: at_decision_squares(study.points, each) for key, each in levels.items()}
    fitted = {split: towards_cheese(seen[split, "fit"]) > 0.5 for split in SPLITS}
    probes = {split: LogisticProbe.fit(pushes(seen[split, "fit"]), fitted[split]) for split in SPLITS}
    reference = study.levels("hypothesis reference", REFERENCE, size=SIZE, cheese=SPLITS[0], mouse="anywhere")
    cache = activations(study.points, reference, SITE)
    others = MatchedSets(study.points, frames(reference), study.seed_for("hypothesis others"))
    tables = {"channels": _channels(pushes), "weights": _weights(pushes, study.labels)}
    tables |= {name: [] for name in ("predictions", "controls", "ablations", "ablation_controls")}
    for split, other in (SPLITS, SPLITS[::-1]):
        score = seen[split, "score"]
        towards, push = towards_cheese(score) > 0.5, pushes(score)
        says = {
            BASE: np.full(len(towards), probes[split].majority),
            PUSH: push[:, 0] > push[:, 1],
            FITTED: probes[split].predict(push) > 0.5,
            CARRIED: probes[other].predict(push) > 0.5,
            OWN: towards,
        }
        tables["predictions"] += _scored(split, score, says)
        tables["controls"].append(_against_controls(split, score, pushes, study))
        for name, swapped in zip(ABLATED, (False, True), strict=True):

            def channels_of(cheese: int, corner: int, swapped: bool = swapped) -> list[int]:
                return pushes.only(*((corner, cheese) if swapped else (cheese, corner)))

            done = ablate_push(study.points, levels[split, "score"], score, channels_of, others, cache)
            row = {"split": split, "ablated": name, "n": len(towards)}
            tables["ablations"].append(row | _ablated(towards, done))
            tables["ablation_controls"] += [
                row | {"control": number, **_change(towards, after)} for number, after in enumerate(done.controls, 1)
            ]
    return {name: table for name, table in tables.items() if table}


def towards_cheese(seen: Decisions) -> Values:
    """The probability of the step to the cheese among this step and the one to the corner: (level,)."""
    cheese, corner = seen.towards()
    total = cheese + corner
    return np.where(total > 0, cheese / np.where(total > 0, total, 1.0), 0.5)


def _channels(pushes: Pushes) -> Table:
    pushing = [(direction.name, np.flatnonzero(pushes.weights[direction])) for direction in Direction]
    return [{"direction": name, "count": len(each), "channels": " ".join(map(str, each))} for name, each in pushing]


def _weights(pushes: Pushes, labels: Sequence[LabelledChannel]) -> Table:
    return [
        {
            "direction": direction.name,
            "channel": int(channel),
            "weight": pushes.weights[direction, channel],
            "n": labels[channel].n_choice,
            **intervals(auc=labels[channel].auc_choice),
        }
        for direction in Direction
        for channel in np.flatnonzero(pushes.weights[direction])
    ]


def _scored(split: str, seen: Decisions, says: dict[str, Flags]) -> Table:
    """One row per predictor: accuracy for the likeliest move and for a sampled move, and the gain over the base."""
    towards = towards_cheese(seen)
    two = _goes(seen)
    right = {name: (each == seen.took_cheese)[two] for name, each in says.items()}
    n = int(two.sum())
    rows = []
    for name, each in says.items():
        gain = paired_difference_interval(*paired_counts(right[name], right[BASE])) if n and name != BASE else None
        row = {"split": split, "predictor": name, "n": n, "went_elsewhere": len(two) - n}
        row |= {"cheese": int(seen.took_cheese.sum()), **intervals(accuracy=share(right[name].sum(), n), gain=gain)}
        sampled = mean_interval(np.where(each, towards, 1 - towards))
        rows.append(row | {"n_sampled": len(two), **intervals(sampled=sampled)})
    return rows


def _goes(seen: Decisions) -> Flags:
    """Whether the mouse goes to the cheese or to the corner."""
    return (seen.chosen == seen.cheese) | (seen.chosen == seen.corner)


def _against_controls(split: str, seen: Decisions, pushes: Pushes, study: Study) -> Row:
    """The AUC of the difference of the pushes for the choice, among readouts with the weights on random channels."""
    seen = seen.rows(_goes(seen))
    live = list(study.selection.live)
    generator = np.random.default_rng(study.seed_for("hypothesis controls"))

    def separation(weights: Values) -> Interval | None:
        push = pushes(seen, weights)
        return area(push[:, 0] - push[:, 1], seen.took_cheese)

    row = {"split": split, "n": len(seen.chosen), "controls": CONTROLS}
    own, others = separation(pushes.weights), []
    if own is None:
        empty = dict.fromkeys(("controls_median", "controls_highest", "rank", "rank_p"))
        return row | intervals(auc=None) | empty
    for _ in range(CONTROLS):
        dealt = np.zeros_like(pushes.weights)
        dealt[:, live] = pushes.weights[:, generator.permutation(live)]
        others.append(separation(dealt).estimate)
    rank = rank_among(own.estimate - 0.5, np.array(others) - 0.5)
    summary = {"controls_median": float(np.median(others)), "controls_highest": float(np.max(others))}
    return row | intervals(auc=own) | summary | {"rank": rank.rank, "rank_p": rank.p}


def _ablated(before: Flags, done: Ablation) -> Row:
    """The fraction of levels on which the step to the cheese is likelier, and the rank of the change by ablation."""
    n = len(before)
    changes = [(each.sum() - before.sum()) / n for each in done.controls]
    change = (done.towards.sum() - before.sum()) / n
    ranks = rank_cells(change, changes)
    return {
        "n_with_channels": done.affected,
        **intervals(before=share(before.sum(), n), after=share(done.towards.sum(), n)),
        **_change(before, done.towards),
        "controls": len(changes),
        "controls_apart": None if np.isnan(done.apart) else done.apart,
        "controls_lowest": min(changes, default=None),
        "controls_median": float(np.median(changes)) if changes else None,
        "controls_highest": max(changes, default=None),
        "rank": ranks["rank"],
        "rank_p": None if done.no_p else ranks["rank_p"],
        "why_no_p": (done.no_p or rank_among(change, changes).no_p) if changes else "there are no other channels",
    }


def _change(before: Flags, after: Flags) -> Row:
    return intervals(change=paired_difference_interval(*paired_counts(after, before)))


def finding(tables: Tables) -> Finding:
    rows, areas = keyed(tables["predictions"], "split", "predictor"), keyed(tables["controls"], "split")
    texts, claims = [], []
    for split in SPLITS[::-1]:  # out of distribution first, since there the two goals compete
        push, area = rows[split, PUSH], areas[split]
        among = "" if area["rank"] is None else f", rank {area['rank']} of {area['controls'] + 1} readouts"
        texts.append(
            f"{split.capitalize()}: the larger push predicts {shown(push, 'accuracy', '.0%')} of {push['n']} choices, "
            f"gain over the base rate {shown(push, 'gain', '+.2f')}, AUC {shown(area, 'auc', '.2f')}{among}."
        )
        if area["auc"] is not None:
            # If the same weights on other channels predict as well, these channels need not be the ones that push.
            beyond = True if area["rank_p"] is not None and area["rank_p"] < 0.05 else None
            claims += [above(area, "auc", 0.5), above(push, "gain"), beyond]
    without = [row["direction"] for row in tables["channels"] if row["count"] == 0]
    if without:
        texts.append(f"No channel stands for {', '.join(without)}, whose push is 0 throughout.")
    fitted = ", ".join(f"{shown(rows[split, FITTED], 'accuracy', '.0%')} {split}" for split in SPLITS)
    changes = "; ".join(
        f"{shown(row, 'change', '+.2f')} {row['split']} for {row['ablated']} ({_beside(row)})"
        for row in tables["ablations"]
    )
    return Finding(
        " ".join(texts),
        verdict(*(claims if len(without) < len(Direction) else [])),
        f"A regression on both pushes predicts {fitted}. With one push mean-ablated, the fraction of levels on which "
        f"the step to the cheese is likelier changes by {changes}.",
    )


def _beside(row: Row) -> str:
    """The rank of the push among matched sets of other channels."""
    if not row["controls"]:
        return "no other channels to compare with"
    p = f"no p-value: {row['why_no_p']}" if row["rank_p"] is None else f"p = {row['rank_p']:.2g}"
    return f"rank {row['rank']} of {row['controls'] + 1}, {p}"


figure = chart(
    Panel("predictions", "predictor", "accuracy", "choices predicted right, %", "split", scale=100, line=None),
    Panel("ablations", "ablated", "change", "step to the cheese likelier: change, points", "split", scale=100),
    size=(6.5, 4.8),
)
