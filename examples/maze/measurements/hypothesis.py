"""Does the mouse go the way that the channels together push more: to the cheese or to the corner?

Method: Size 25, mouse on the decision square. Push for a direction: standardized sums of the channels labeled so on
other mazes, weighted by AUC - 0.5 on random squares with other legal moves. The larger push is a prediction, and a
regression on both pushes, fitted on other levels, is another. A push that is mean-ablated, over reference sets as in
the part on ablation, is ranked among random sets of as many live channels. The verdict: out of distribution, the larger
push predicts more choices than the base rate.

The post: A hypothesis, not measured: if the aggregated push for the action to the cheese is higher than that for the
corner, the mouse goes to the cheese, otherwise to the corner.

Limits: The result does not show that the policy adds up sums in this way: a readout that predicts the choice need not
be the one that the policy computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from chanpatch import sweep
from chanpatch.controls import random_sets
from chanpatch.metrics import logit_difference
from chanpatch.probes import LogisticProbe
from chanpatch.statistics import Interval, mean_interval, paired_counts, paired_difference_interval
from maze.analysis import effects
from maze.analysis.cells import Flags, Row, Table, Tables, Values, above, keyed, shown, verdict
from maze.analysis.decision_squares import Decisions, at_decision_squares
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import SETS
from maze.analysis.estimates import intervals, rank_cells, share
from maze.analysis.forwards import frames
from maze.analysis.labels import LabelledChannel, directions_of, is_reading
from maze.analysis.part import SPLITS, Finding, Study
from maze.analysis.readings import area
from maze.analysis.selection import Selection
from maze.paths import Direction
from maze.policy.network import ACTIONS

SIZE = 25
BASE, PUSH, FITTED = "always the more frequent goal", "the larger push", "pushes, fitted"
ABLATED = ("the cheese's", "the corner's")
CONTROLS = 99  # random assignments of the weights to live channels


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
    references = effects.references(study, "hypothesis reference", size=SIZE, cheese=SPLITS[0], mouse="anywhere")
    tables = {"channels": _channels(pushes), "predictions": [], "controls": [], "ablations": []}
    for split in SPLITS:
        fitted, scored = (
            study.levels(f"hypothesis {split} {use}", size=SIZE, cheese=split, mouse="decision square")
            for use in ("fit", "score")
        )
        fit, score = (at_decision_squares(study.points, each) for each in (fitted, scored))
        probe, push = LogisticProbe.fit(pushes(fit), prefers_cheese(fit)), pushes(score)
        says = {
            BASE: np.full(len(push), probe.majority),
            PUSH: push[:, 0] > push[:, 1],
            FITTED: probe.predict(push) > 0.5,
        }
        tables["predictions"] += _scored(split, score, says)
        tables["controls"].append(_against_controls(split, score, pushes, study))
        for goal, name in enumerate(ABLATED):
            after = ablate_push(study, scored, score, pushes, goal, references)
            tables["ablations"].append({"split": split, "ablated": name, **_ablated(prefers_cheese(score), after)})
    return tables


def prefers_cheese(seen: Decisions) -> Flags:
    """Whether the step to the cheese is likelier than the step to the corner: (level,)."""
    every = np.arange(len(seen.moves))
    return seen.moves[every, seen.cheese] > seen.moves[every, seen.corner]


def _channels(pushes: Pushes) -> Table:
    pushing = [(direction.name, np.flatnonzero(pushes.weights[direction])) for direction in Direction]
    return [{"direction": name, "count": len(each), "channels": " ".join(map(str, each))} for name, each in pushing]


def _scored(split: str, seen: Decisions, says: Mapping[str, Flags]) -> Table:
    """One row per predictor: accuracy for the likeliest move, and the gain over the base."""
    two = _goes(seen)
    right = {name: (each == seen.took_cheese)[two] for name, each in says.items()}
    n = int(two.sum())
    rows = []
    for name in says:
        gain = paired_difference_interval(*paired_counts(right[name], right[BASE])) if n and name != BASE else None
        row = {"split": split, "predictor": name, "n": n, "went_elsewhere": len(two) - n}
        rows.append(row | intervals(accuracy=share(right[name].sum(), n), gain=gain))
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

    own, others = separation(pushes.weights), []
    for _ in range(CONTROLS if own else 0):
        dealt = np.zeros_like(pushes.weights)
        dealt[:, live] = pushes.weights[:, generator.permutation(live)]
        others.append(separation(dealt).estimate - 0.5)
    ranks = rank_cells(own.estimate - 0.5 if own else 0.0, others, increase=True)
    return {"split": split, "n": len(seen.chosen), **intervals(auc=own), **ranks}


def ablate_push(
    study: Study, levels: Sequence[bytes], seen: Decisions, pushes: Pushes, goal: int, references: Tensor
) -> Flags:
    """Whether the step to the cheese is likelier than the step to the corner with a push mean-ablated.

    The channels of the push for the cheese (`goal` 0) or the corner (1) depend on the directions of both. Returns bool
    (1 + control, level): first the push, then random sets of as many live channels.
    """
    after, count = np.tile(prefers_cheese(seen), (1 + SETS, 1)), 1 + SETS
    for pair in np.unique(np.stack([seen.cheese, seen.corner], axis=1), axis=0).tolist():
        rows = np.flatnonzero((seen.cheese == pair[0]) & (seen.corner == pair[1]))
        channels = pushes.only(pair[goal], pair[1 - goal])
        if channels:
            seed = study.seed_for("hypothesis others")
            others = random_sets(study.selection.live, len(channels), count=SETS, seed=seed, other_than=[channels])
            sets = (channels, *others)
            ablations = (effects.ablation(study.points, "mean", each, references, seed=0) for each in sets)
            patches = {str(number): ablation(rows)[0] for number, ablation in enumerate(ablations)}
            odds = {"odds": logit_difference(*(ACTIONS[Direction(each)] for each in pair))}
            inputs = frames([levels[row] for row in rows])
            result = sweep(study.points, inputs, patches=patches, metric=odds, progress=False)
            after[: len(patches), rows] = result.values["odds"] > 0
            count = min(count, len(patches))
    return after[:count]


def _ablated(before: Flags, after: Flags) -> Row:
    """The fraction of levels on which the step to the cheese is likelier, and the rank of the change by ablation."""
    n = len(before)
    change, *controls = ((each.sum() - before.sum()) / n for each in after)
    return {
        "n": n,
        **intervals(before=share(before.sum(), n), after=share(after[0].sum(), n)),
        **intervals(change=mean_interval(after[0] * 1.0 - before, clusters=effects.reference_of("mean", n))),
        **rank_cells(change, controls),
    }


def finding(tables: Tables) -> Finding:
    rows, areas = keyed(tables["predictions"], "split", "predictor"), keyed(tables["controls"], "split")
    texts = []
    for split in SPLITS[::-1]:  # out of distribution first, since there the two goals compete
        push, area = rows[split, PUSH], areas[split]
        among = "" if area["rank"] is None else f", rank {area['rank']} of {area['controls'] + 1} readouts"
        texts.append(
            f"{split.capitalize()}: the larger push predicts {shown(push, 'accuracy', '.0%')} of {push['n']} choices, "
            f"gain over the base rate {shown(push, 'gain', '+.2f')}, AUC {shown(area, 'auc', '.2f')}{among}."
        )
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
        verdict(above(rows[SPLITS[1], PUSH], "gain") if len(without) < len(Direction) else None),
        f"A regression on both pushes predicts {fitted}. With one push mean-ablated, the fraction of levels on which "
        f"the step to the cheese is likelier changes by {changes}.",
    )


def _beside(row: Row) -> str:
    """The rank of the push among random sets of channels."""
    if row["rank"] is None:
        return "no other sets to compare with"
    return f"rank {row['rank']} of {row['controls'] + 1}" + (
        "" if row["rank_p"] is None else f", p = {row['rank_p']:.2g}"
    )


figure = chart(
    Panel("predictions", "predictor", "accuracy", "choices predicted right, %", "split", scale=100, line=None),
    Panel("ablations", "ablated", "change", "step to the cheese likelier: change, points", "split", scale=100),
    size=(6.5, 4.8),
)
