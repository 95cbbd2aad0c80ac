"""Whether the policy uses the same channels on the squares between crossings and on the crossings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chanpatch.statistics import Interval, aucs, bootstrap_interval, mean_interval, rank_correlation
from maze.analysis.cells import Row, Table, Tables, above, cells, chosen, keyed, minus, shown
from maze.analysis.drawing import Panel, chart
from maze.analysis.effects import Values
from maze.analysis.part import SPLITS, TOO_FEW, Finding, Part, Study
from maze.analysis.readings import Readings, area
from maze.levels import random_squares
from maze.paths import Direction, direction_field, legal_moves
from maze.states import read_mazes, write_mazes

SIZE = 25
CHOICE_LEVELS = 500  # per class, to choose its channels on
CROSSING = "even, even"
PASSAGES = {"odd, even": (Direction.DOWN, Direction.UP), "even, odd": (Direction.LEFT, Direction.RIGHT)}
RESAMPLES = 999
WAY, BACK, WALL = "the way", "the opposite of the way", "a wall"
TRANSFERRED = ("auc_own", "auc_other", "loss", "rank_own", "rank_other", "rank_loss")


def measure(study: Study) -> dict[str, Table]:
    """The loss with the other class's channel, the channels' activity, and every channel's AUC by class.

    All classes use the same levels, each with the mouse on a square of its own. From a square between crossings the
    path goes on or back. Crossings are therefore such that both moves along the axis are legal and one is on the path.
    """
    channels: Table = []
    transfer: Table = []
    tests: dict[tuple[str, str], Readings] = {}
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
                row: Row = {"direction": direction.name, "square": name}
                channels += [row | _areas(choice[name], test[name], channel, direction) for channel in live]
                seed = study.seed_for("parity bootstrap")
                cells_of = _transfer(test[name], direction, live, best[name], best[other], seed)
                transfer.append({**row, "other": other, **cells_of})
    return {
        "transfer": transfer,
        "between": [_between(tests, live, study.seed_for("parity between"))],
        "passages": [_on_passages(tests, channel) for channel in live],
        "activity": _activity(study, tests),
        "channels": channels,
    }


def _readings(study: Study, levels: Sequence[bytes], purpose: str, axis: Sequence[Direction], square: str) -> Readings:
    """Levels with the mouse on a random square of a class, both moves along an axis legal and one on the path."""
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
    """The AUC on this class of the channel chosen on it and of the one chosen on the other class."""
    labels, sums = test.first[:, direction], test.sums[:, live]
    counts = {"n": len(labels), "positives": int(labels.sum())}
    if min(labels.sum(), (~labels).sum()) < 2 or np.isnan([*own, *other]).any():
        row: Row = {"channel_own": None, "channel_other": None, **counts}
        for name in TRANSFERRED:
            row |= cells(name, None)
        return row
    best, best_other = int(own.argmax()), int(other.argmax())

    def statistic(sample: Values) -> Values:
        areas = aucs(sample[:, 1:], sample[:, 0] > 0)
        auc = areas[[best, best_other]]
        rank = [_correlation(areas, own), _correlation(areas, other)]
        return np.array([*auc, auc[0] - auc[1], *rank, rank[0] - rank[1]])

    found = bootstrap_interval(np.column_stack([labels, sums]), statistic, seed=seed, resamples=RESAMPLES)
    row = {"channel_own": live[best], "channel_other": live[best_other], **counts}
    for index, name in enumerate(TRANSFERRED):
        row |= cells(name, Interval(found.estimate[index], found.low[index], found.high[index], 0.95))
    return row


def _correlation(one: Values, other: Values) -> float:
    """The rank correlation; NaN if a resample has only one label."""
    return rank_correlation(one, other) if np.isfinite([one, other]).all() else np.nan


def _between(tests: Mapping[tuple[str, str], Readings], live: tuple[int, ...], seed: int) -> Row:
    """The rank correlation between the two kinds of passage of the channels' distances from an AUC of a half.

    No direction lies along both axes. The distance is the same for both directions of a passage.
    """
    sides = [tests[passage, passage] for passage in PASSAGES]
    labels = [side.first[:, axis[0]] for side, axis in zip(sides, PASSAGES.values(), strict=True)]
    row: Row = {"n_vertical": len(sides[0]), "n_horizontal": len(sides[1]), "live": len(live)}
    if any(min(each.sum(), (~each).sum()) < 2 for each in labels):
        return row | cells("rank_correlation", None)
    sample = np.concatenate(
        [
            np.column_stack([np.full(len(side), number), label, side.sums[:, live]])
            for number, (side, label) in enumerate(zip(sides, labels, strict=True))
        ]
    )

    def statistic(rows: Values) -> float:
        parts = (rows[rows[:, 0] == number] for number in range(2))
        return _correlation(*(np.abs(aucs(here[:, 2:], here[:, 1] > 0) - 0.5) for here in parts))

    return row | cells("rank_correlation", bootstrap_interval(sample, statistic, seed=seed, resamples=RESAMPLES))


def _on_passages(tests: Mapping[tuple[str, str], Readings], channel: int) -> Row:
    """One channel's AUC on both kinds of passage, and the difference of their distances from a half.

    The squares are different ones of the same mazes; they count as independent.
    """
    row: Row = {"channel": channel}
    found = []
    for passage, axis in PASSAGES.items():
        here, name = tests[passage, passage], axis[-1].name
        found.append(area(here.sums[:, channel], here.first[:, axis[-1]]))
        row |= {f"n_{name}": len(here), **cells(f"auc_{name}", found[-1])}
    return row | cells("vertical_minus_horizontal", minus(*map(_folded, found)))


def _folded(auc: Interval | None) -> Interval | None:
    """An AUC, or 1 minus it if it is below a half."""
    if auc is None or auc.estimate >= 0.5:
        return auc
    return Interval(1 - auc.estimate, 1 - auc.high, 1 - auc.low, auc.confidence)


def _activity(study: Study, tests: Mapping[tuple[str, str], Readings]) -> Table:
    """The mean sum of every direction's channel by the class of the square."""
    rows: Table = []
    for passage, axis in PASSAGES.items():
        (across,) = set(PASSAGES) - {passage}
        for direction in axis:
            channel = study.channel(direction)
            kinds = [
                (name, kind, here.sums[here.first[:, first], channel])
                for name, here in ((passage, tests[passage, passage]), (CROSSING, tests[passage, CROSSING]))
                for kind, first in ((WAY, direction), (BACK, 3 - direction))
            ]
            kinds.append((across, WALL, tests[across, across].sums[:, channel]))
            for name, kind, sums in kinds:
                row = {"direction": direction.name, "channel": channel, "square": name, "kind": kind, "n": len(sums)}
                mean = mean_interval(sums) if len(sums) else None
                rows.append(row | cells("sum", mean))
    return rows


def _areas(choice: Readings, test: Readings, channel: int, direction: Direction) -> Row:
    """One channel's AUC on the mazes to choose on and on those to test on."""
    row: Row = {"channel": channel}
    for name, here in (("auc_choice", choice), ("auc", test)):
        found = area(here.sums[:, channel], here.first[:, direction])
        row |= {name.replace("auc", "n"): len(here), **cells(name, found)}
    return row


def _known(tables: Tables) -> Table:
    return [row for row in tables["transfer"] if row["auc_own"] is not None]


def finding(tables: Tables) -> Finding:
    rows = _known(tables)
    if not rows:
        return TOO_FEW
    own = [row for row in rows if row["channel_own"] != row["channel_other"]]
    least = min(rows, key=lambda row: row["rank_other"])
    return Finding(
        f"In {len(rows) - len(own)} of {len(rows)} cases (direction and class of square, n={least['n']} mazes) both "
        "classes choose the same channel. The rankings of all live channels by the two classes agree least for "
        f"{_case(least)} squares: rank correlation {shown(least, 'rank_other', '.2f')}, against "
        f"{shown(least, 'rank_own', '.2f')} within the class.",
        "not comparable",
        f"{_own_channels(own)} {_own_order(rows)} {_kinds(tables['between'][0], tables['channels'])} "
        f"{_passages(tables['passages'])}",
        "It does not follow that there is one circuit: different earlier layers could feed the same channel. Opposite "
        "directions read the same mazes, so their rank correlations are one number. The intervals hold the choice "
        "fixed; the bias correction puts those of rank correlations high.",
    )


def _own_channels(rows: Table) -> str:
    """The loss with the other class's channel, if that is another one."""
    if not rows:
        return "No class has a channel of its own."
    worse = sum(above(row, "loss") is True for row in rows)
    largest = max(rows, key=lambda row: row["loss"])
    return (
        f"If a class has a channel of its own, that of the other class is worse, interval above 0, in {worse} of "
        f"{len(rows)} cases; it loses most for {_case(largest)} squares: AUC {shown(largest, 'loss')}. "
        f"{'That is a' if worse else 'No'} sign of circuits of their own for a class."
    )


def _own_order(rows: Table) -> str:
    """The number of cases in which a class has its own order of channels; opposite directions are one case."""
    axes = {name.name: passage for passage, axis in PASSAGES.items() for name in axis}
    pairs = {(row["square"], axes[row["direction"]]): above(row, "rank_loss") is True for row in rows}
    return (
        f"The order of all live channels differs in the other class, interval above 0, in {sum(pairs.values())} of "
        f"{len(pairs)} cases of an axis and a class (not corrected for their number)."
    )


def axes_at_crossings(channels: Table) -> float | None:
    """The rank correlation of `between` at crossings: two axes, one kind of square. None without data."""
    pairs = [
        keyed(chosen(channels, square=CROSSING, direction=direction.name), "channel")
        for direction in (Direction.DOWN, Direction.LEFT)
    ]
    areas = [[row["auc"] for row in (pairs[0][channel], pairs[1][channel])] for channel in pairs[0]]
    if not areas or any(each is None for pair in areas for each in pair):
        return None
    correlation = rank_correlation(*np.abs(np.array(areas, dtype=np.float64).T - 0.5))
    return None if np.isnan(correlation) else correlation


def _kinds(row: Row, channels: Table) -> str:
    """The comparison of (odd, even) and (even, odd) squares, and of two axes on squares of one kind."""
    if row["rank_correlation"] is None:
        return "The two kinds of passage are not compared directly: too few mazes."
    text = (
        "(odd, even) and (even, odd) squares have no direction in common, so they are compared by how well each of the "
        f"{row['live']} live channels separates the two directions: rank correlation "
        f"{shown(row, 'rank_correlation', '.2f')}, n={row['n_vertical']} and {row['n_horizontal']}. The kinds also "
        "differ in the axis"
    )
    baseline = axes_at_crossings(channels)
    if baseline is None:
        return f"{text}, and at crossings the two axes cannot be compared: too few mazes."
    return (
        f"{text}. At ({CROSSING}) squares, which are of one kind, the two axes have {baseline:.2f}, so the "
        "correlation between kinds does not show that each kind has its own channels."
    )


def _passages(rows: Table) -> str:
    """The number of channels that predict the path on one kind of passage, on both, or better on one."""
    known = [row for row in rows if row["vertical_minus_horizontal"] is not None]
    if not known:
        return "No channel is compared between them: too few mazes."
    predicts = [tuple(above(row, f"auc_{name}", 0.5) is not None for name in ("UP", "RIGHT")) for row in known]
    apart = sum(above(row, "vertical_minus_horizontal") is not None for row in known)
    return (
        f"{predicts.count((True, True))} of {len(known)} channels predict the path on both kinds, interval of the AUC "
        f"apart from a half, {predicts.count((True, False))} on (odd, even) squares only and "
        f"{predicts.count((False, True))} on (even, odd) only; {apart} predict it better on one kind than on the other "
        "(not corrected for their number). These counts do not separate the kind from the axis."
    )


def _case(row: Row) -> str:
    return f"{row['direction']} at ({row['square']})"


_CASE = ("direction", "square")

PART = Part(
    name="parity",
    question="Are there separate circuits for (odd, even), (even, odd) and (even, even) squares?",
    method=f"Size {SIZE}, cheese in distribution, mouse on a random square of a class, both moves along one axis legal "
    "and one on the path: the best channel per direction and class, chosen on other mazes, tested on both. Every AUC "
    "compares the two directions of that axis over squares of one class, so walls carry no information.",
    post="Asked, not measured: maybe the model has separate circuits for (odd, even) and (even, odd) squares?",
    measure=measure,
    figure=chart(
        Panel("transfer", _CASE, {"own class": "auc_own", "other class": "auc_other"}, "AUC on the class", line=0.5),
        Panel("transfer", _CASE, {"own class": "rank_own", "other class": "rank_other"}, "rank correlation of AUCs"),
        Panel("activity", _CASE, "sum", "mean sum of the channel", "kind"),
        size=(6, 5.8),
    ),
    finding=finding,
)
