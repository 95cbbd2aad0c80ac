"""Are there separate circuits for (odd, even), (even, odd) and (even, even) squares?

Method: Size {SIZE}, cheese in distribution, mouse on a random square of a class, both moves along one axis legal and
one on the path. Every AUC compares the two directions of that axis over squares of one class, so walls carry no
information. Squares of two classes with the same axis are compared by the rank correlation over the live channels of
the AUCs' distances from 0.5. Between (odd, even) and (even, odd) squares the axis differs too; the baseline is the
correlation between the two axes at ({CROSSING}) squares. The post gives no result, so there is no verdict.

The post: Asked, not measured: maybe the model has separate circuits for (odd, even) and (even, odd) squares?

Limits: The result does not show that there is a single circuit, as different earlier layers could feed the same
channel. Opposite directions use the same mazes, so their rank correlations are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chanpatch.statistics import aucs, bootstrap_interval, rank_correlation
from maze.analysis.cells import Row, Table, Tables, Values, above, keyed, shown
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, one_by_one
from maze.analysis.part import SPLITS, TOO_FEW, Finding, Study
from maze.analysis.readings import Readings
from maze.levels import random_squares
from maze.paths import Direction, direction_field, legal_moves
from maze.states import read_mazes, write_mazes

SIZE = 25
CHOICE_LEVELS = 500  # per class, for choosing its channels
CROSSING = "even, even"
PASSAGES = {"odd, even": (Direction.DOWN, Direction.UP), "even, odd": (Direction.LEFT, Direction.RIGHT)}
BETWEEN = (
    "vertical, passages and crossings",
    "horizontal, passages and crossings",
    "axes, passages",
    "axes, crossings",
)
RESAMPLES = 999
TRANSFERRED = ("auc_own", "auc_other", "loss", "rank_own", "rank_other", "rank_loss")


def measure(study: Study) -> dict[str, Table]:
    """The loss with the other class's channel, and how alike the axes rank the channels.

    All classes use the same levels, each with the mouse on a square in the class. From a square between crossings the
    path goes on or back. So at each crossing, both moves along the axis are legal and one of them is on the path.
    """
    transfer = []
    tests = {}
    live = study.selection.live
    levels = {
        purpose: study.levels(f"parity {purpose}", count, size=SIZE, cheese=SPLITS[0])
        for purpose, count in (("choice", CHOICE_LEVELS), ("test", study.n))
    }
    for passage, axis in PASSAGES.items():
        classes = (passage, CROSSING)
        choice, test = (
            {name: _readings(study, levels[purpose], f"parity {purpose}", axis, name) for name in classes}
            for purpose in levels
        )
        tests |= {(passage, name): readings for name, readings in test.items()}
        for direction in axis:
            best = {name: aucs(here.sums[:, live], here.first[:, direction]) for name, here in choice.items()}
            for name, other in (classes, classes[::-1]):
                row = {"direction": direction.name, "square": name, "other": other}
                seed = study.seed_for("parity bootstrap")
                transfer.append(row | _transfer(test[name], direction, live, best[name], best[other], seed))
    vertical, horizontal = PASSAGES
    compared = [((axis, axis), (axis, CROSSING)) for axis in PASSAGES]
    compared += [((vertical, vertical), (horizontal, horizontal)), ((vertical, CROSSING), (horizontal, CROSSING))]
    seed = study.seed_for("parity between")
    between = [
        {"compared": name, **_between(*([tests[case], PASSAGES[case[0]][0]] for case in cases), live, seed)}
        for name, cases in zip(BETWEEN, compared, strict=True)
    ]
    return {"transfer": transfer, "between": between}


def _readings(study: Study, levels: Sequence[bytes], purpose: str, axis: Sequence[Direction], square: str) -> Readings:
    """Levels with the mouse on a random square in a class, both moves along an axis legal and one on the path."""
    mazes = read_mazes(levels)
    field, legal = direction_field(mazes, mazes.cheese)[:, axis], legal_moves(mazes)[:, axis]
    odd_row, odd_col = np.indices((SIZE, SIZE)) % 2 == 1
    of_class = {"odd, even": odd_row & ~odd_col, "even, odd": ~odd_row & odd_col, CROSSING: ~odd_row & ~odd_col}[square]
    squares = field.any(axis=1) & legal.all(axis=1) & of_class
    has = np.flatnonzero(squares.any(axis=(1, 2)))
    mice = random_squares(squares[has], np.random.default_rng(study.seed_for(f"{purpose} {square} {axis[0].name}")))
    return Readings.of(study.points, write_mazes(mazes[has].moved(mouse=mice), [levels[index] for index in has]))


def _transfer(
    test: Readings, direction: Direction, live: tuple[int, ...], own: Values, other: Values, seed: int
) -> Row:
    """The AUC on this class of the channel chosen on this class and of the channel chosen on the other class."""
    labels, sums = test.first[:, direction], test.sums[:, live]
    counts = {"n": len(labels), "positives": int(labels.sum())}
    if min(labels.sum(), (~labels).sum()) < 2 or np.isnan([*own, *other]).any():
        return {"channel_own": None, "channel_other": None, **counts, **intervals(**dict.fromkeys(TRANSFERRED))}
    best, best_other = int(own.argmax()), int(other.argmax())

    def statistic(sample: Values) -> Values:
        areas = aucs(sample[:, 1:], sample[:, 0] > 0)
        auc = areas[[best, best_other]]
        rank = [_correlation(areas, own), _correlation(areas, other)]
        return np.array([*auc, auc[0] - auc[1], *rank, rank[0] - rank[1]])

    found = bootstrap_interval(np.column_stack([labels, sums]), statistic, seed=seed, resamples=RESAMPLES)
    named = dict(zip(TRANSFERRED, one_by_one(found), strict=True))
    return {"channel_own": live[best], "channel_other": live[best_other], **counts, **intervals(**named)}


def _correlation(one: Values, other: Values) -> float:
    """The rank correlation; NaN if a resample has only one label."""
    return rank_correlation(one, other) if np.isfinite([one, other]).all() else np.nan


def _between(
    one: tuple[Readings, Direction], other: tuple[Readings, Direction], live: tuple[int, ...], seed: int
) -> Row:
    """The rank correlation, between two classes of squares, of the channels' distances from an AUC of a half.

    The distance is the same for both directions of an axis.
    """
    labels = [side.first[:, direction] for side, direction in (one, other)]
    row = {"n_one": len(labels[0]), "n_other": len(labels[1]), "live": len(live)}
    if any(min(each.sum(), (~each).sum()) < 2 for each in labels):
        return row | intervals(rank_correlation=None)
    sums = np.concatenate([side.sums[:, live] for side, _ in (one, other)])
    is_one = np.arange(len(sums)) < len(labels[0])
    sample = np.column_stack([is_one, np.concatenate(labels), sums])

    def statistic(rows: Values) -> float:
        parts = (rows[rows[:, 0] == which] for which in (1, 0))
        # Rounded, so that AUCs at the same distance from a half are ties.
        return _correlation(*(np.abs(aucs(here[:, 2:], here[:, 1] > 0) - 0.5).round(9) for here in parts))

    found = bootstrap_interval(sample, statistic, seed=seed, resamples=RESAMPLES)
    return row | intervals(rank_correlation=found)


def finding(tables: Tables) -> Finding:
    between = keyed(tables["between"], "compared")
    rows = [row for row in tables["transfer"] if row["auc_own"] is not None]
    if not rows or any(row["rank_correlation"] is None for row in between.values()):
        return TOO_FEW
    vertical, horizontal, passages, crossings = (shown(between[name], "rank_correlation", ".2f") for name in BETWEEN)
    n = min(min(row["n_one"], row["n_other"]) for row in between.values())
    own = [row for row in rows if row["channel_own"] != row["channel_other"]]
    worse = sum(above(row, "loss") is True for row in own)
    return Finding(
        "With the same axis, the rank correlation of the live channels' separation is "
        f"{vertical} between (odd, even) and (even, even) squares and {horizontal} between (even, odd) and (even, "
        f"even) squares (n={n} mazes). Between (odd, even) and (even, odd) squares the correlation is {passages}; "
        f"between the two axes at (even, even) squares, {crossings}.",
        "not comparable",
        f"In {len(rows) - len(own)} of {len(rows)} cases (direction and class of square), both classes choose the same "
        f"channel; the other class's channel is worse, interval above 0, in {worse}.",
    )


_CASE = ("direction", "square")
figure = chart(
    Panel("between", "compared", "rank_correlation", "rank correlation of separations"),
    Panel("transfer", _CASE, {"own class": "auc_own", "other class": "auc_other"}, "AUC on the class", line=0.5),
    Panel("transfer", _CASE, {"own class": "rank_own", "other class": "rank_other"}, "rank correlation of AUCs"),
    size=(6, 5.8),
)
