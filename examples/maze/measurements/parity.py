"""Are there separate circuits for (odd, even), (even, odd) and (even, even) squares?

Method: Size {SIZE}, cheese in distribution, mouse on a random square of a class, both moves along one axis legal and
one on the path: the best channel per direction and class, chosen on other mazes, tested on both. Every AUC compares the
two directions of that axis over squares of one class, so walls carry no information.

The post: Asked, not measured: maybe the model has separate circuits for (odd, even) and (even, odd) squares?

Limits: The result does not show that there is a single circuit, as different earlier layers could feed the same
channel. Kinds of squares also differ in the axis. Opposite directions use the same mazes, so their rank correlations
are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chanpatch.statistics import aucs, bootstrap_interval, rank_correlation
from maze.analysis.cells import Row, Table, Tables, Values, above, shown
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, one_by_one
from maze.analysis.part import SPLITS, TOO_FEW, Finding, Study
from maze.analysis.readings import Readings
from maze.levels import random_squares
from maze.paths import Direction, direction_field, legal_moves
from maze.states import read_mazes, write_mazes

SIZE = 25
CHOICE_LEVELS = 500  # per class, for choosing its channels
CROSSING, BETWEEN = "even, even", "between crossings"
PASSAGES = {"odd, even": (Direction.DOWN, Direction.UP), "even, odd": (Direction.LEFT, Direction.RIGHT)}
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
                row = {"direction": direction.name, "square": name}
                seed = study.seed_for("parity bootstrap")
                cells_of = _transfer(test[name], direction, live, best[name], best[other], seed)
                transfer.append({**row, "other": other, **cells_of})
    vertical, horizontal = PASSAGES
    seed = study.seed_for("parity between")
    between = [
        {"squares": squares, **_between(tests[vertical, one], tests[horizontal, other], live, seed)}
        for squares, one, other in ((BETWEEN, vertical, horizontal), (CROSSING, CROSSING, CROSSING))
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


def _between(vertical: Readings, horizontal: Readings, live: tuple[int, ...], seed: int) -> Row:
    """The rank correlation, between the two axes, of the channels' distances from an AUC of a half.

    The distance is the same for both directions of an axis.
    """
    sides = vertical, horizontal
    labels = [side.first[:, axis[0]] for side, axis in zip(sides, PASSAGES.values(), strict=True)]
    row = {"n_vertical": len(vertical), "n_horizontal": len(horizontal), "live": len(live)}
    if any(min(each.sum(), (~each).sum()) < 2 for each in labels):
        return row | intervals(rank_correlation=None)
    sample = np.concatenate(
        [
            np.column_stack([np.full(len(side), number), label, side.sums[:, live]])
            for number, (side, label) in enumerate(zip(sides, labels, strict=True))
        ]
    )

    def statistic(rows: Values) -> float:
        parts = (rows[rows[:, 0] == number] for number in range(2))
        # Rounded, so that AUCs at the same distance from a half are ties.
        return _correlation(*(np.abs(aucs(here[:, 2:], here[:, 1] > 0) - 0.5).round(9) for here in parts))

    found = bootstrap_interval(sample, statistic, seed=seed, resamples=RESAMPLES)
    return row | intervals(rank_correlation=found)


def finding(tables: Tables) -> Finding:
    rows = [row for row in tables["transfer"] if row["auc_own"] is not None]
    if not rows:
        return TOO_FEW
    own = [row for row in rows if row["channel_own"] != row["channel_other"]]
    worse = sum(above(row, "loss") is True for row in own)
    least = min(rows, key=lambda row: row["rank_other"])
    axes = {name.name: passage for passage, axis in PASSAGES.items() for name in axis}
    orders = {(row["square"], axes[row["direction"]]): above(row, "rank_loss") is True for row in rows}
    return Finding(
        f"In {len(rows) - len(own)} of {len(rows)} cases (direction and class of square, n={least['n']} mazes) both "
        f"classes choose the same channel; the other class's channel is worse, interval above 0, in {worse}. The "
        f"classes rank all live channels least alike for {least['direction']} at ({least['square']}) squares: "
        f"correlation {shown(least, 'rank_other', '.2f')}, against {shown(least, 'rank_own', '.2f')} within the class.",
        "not comparable",
        f"The order of channels depends on the class in {sum(orders.values())} of {len(orders)} cases of an axis and a "
        f"class (not corrected). {_kinds(*tables['between'])}",
    )


def _kinds(passages: Row, crossings: Row) -> str:
    """The comparison between (odd, even) and (even, odd) squares, and between two axes at crossings."""
    if passages["rank_correlation"] is None or crossings["rank_correlation"] is None:
        return "The two kinds of passage are not compared: too few mazes."
    return (
        "Between (odd, even) and (even, odd) squares, the live channels' separation of the two directions has rank "
        f"correlation {shown(passages, 'rank_correlation', '.2f')} (n={passages['n_vertical']}, "
        f"{passages['n_horizontal']}), and between the two axes at ({CROSSING}) squares, "
        f"{shown(crossings, 'rank_correlation', '.2f')}."
    )


_CASE = ("direction", "square")


figure = chart(
    Panel("transfer", _CASE, {"own class": "auc_own", "other class": "auc_other"}, "AUC on the class", line=0.5),
    Panel("transfer", _CASE, {"own class": "rank_own", "other class": "rank_other"}, "rank correlation of AUCs"),
    size=(6, 5.8),
)
