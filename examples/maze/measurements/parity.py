"""Whether the policy reads the squares between crossings and the crossings themselves with the same channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.statistics import Interval, bootstrap_interval, difference_interval, mean_interval
from maze.analysis.part import Cell, Finding, Part, Study, Table, Tables, above, interval_cells, shown
from maze.analysis.readings import Readings, area, areas, optional_cells, rank_correlation
from maze.environment.levels import random_squares
from maze.environment.paths import Direction, direction_field, legal_moves
from maze.environment.states import read_mazes, write_mazes

SIZE = 25
CHOICE_LEVELS = 500  # per class, that its channels are chosen on
CROSSING = "even, even"
PASSAGES = {"odd, even": (Direction.DOWN, Direction.UP), "even, odd": (Direction.LEFT, Direction.RIGHT)}
RESAMPLES = 999

WAY, BACK, WALL = "the way", "the opposite of the way", "a wall"
STYLES = (("own", "o", 0.13, "the same class"), ("other", "s", -0.13, "the other class"))
LEGEND: dict[str, Any] = {  # above the axes, where no interval can reach it
    "frameon": False,
    "fontsize": 8,
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 3,
}

Values = NDArray[np.float64]


def measure(study: Study) -> dict[str, Table]:
    """What the other class's channel loses, where the channels are active, and every channel's AUC by class.

    All classes are measured on the same levels, each with the mouse on a square of its own. At a square between
    crossings the way goes on or back. So that the same is asked at crossings, they are such that both moves along the
    axis are legal and one of them is the way.
    """
    channels: Table = []
    transfer: Table = []
    tests: dict[tuple[str, str], Readings] = {}
    live = study.selection.live
    levels = {
        purpose: study.levels(f"parity {purpose}", count, size=SIZE, cheese="in distribution")
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
            chosen = {name: areas(here.sums[:, live], here.first[:, direction]) for name, here in choice.items()}
            for name, other in (classes, classes[::-1]):
                known = {"direction": direction.name, "square": name}
                channels += [known | _told(choice[name], test[name], channel, direction) for channel in live]
                seed = study.seed_for("parity bootstrap")
                row = _transfer(test[name], direction, live, chosen[name], chosen[other], seed)
                transfer.append({**known, "other": other, **row})
    between = [_between(tests, live, study.seed_for("parity between"))]
    return {
        "transfer": transfer,
        "between": between,
        "passages": [_on_passages(tests, channel) for channel in live],
        "activity": _activity(study, tests),
        "channels": channels,
    }


def _readings(study: Study, levels: Sequence[bytes], purpose: str, axis: Sequence[Direction], square: str) -> Readings:
    """Levels with the mouse on a random square of a class, from which the way goes along an axis and may go back."""
    mazes = read_mazes(levels)
    field, legal = direction_field(mazes, mazes.cheese)[:, axis], legal_moves(mazes)[:, axis]
    odd_row, odd_col = np.indices((SIZE, SIZE)) % 2 == 1
    of_class = {"odd, even": odd_row & ~odd_col, "even, odd": ~odd_row & odd_col, CROSSING: ~odd_row & ~odd_col}[square]
    squares = field.any(axis=1) & legal.all(axis=1) & of_class
    has = np.flatnonzero(squares.any(axis=(1, 2)))
    cells = random_squares(squares[has], np.random.default_rng(study.seed_for(f"{purpose} {square} {axis[0].name}")))
    return Readings.of(study.points, write_mazes(mazes[has].moved(mouse=cells), [levels[index] for index in has]))


def _transfer(
    test: Readings, direction: Direction, live: tuple[int, ...], own: Values, other: Values, seed: int
) -> dict[str, Cell]:
    """How what was chosen on squares of this class, and of the other one, does on this class."""
    labels, sums = test.first[:, direction], test.sums[:, live]
    cells: dict[str, Cell] = {"n": len(labels), "positives": int(labels.sum())}
    names = ("auc_own", "auc_other", "loss", "rank_own", "rank_other", "rank_loss")
    if min(labels.sum(), (~labels).sum()) < 2 or np.isnan([*own, *other]).any():
        empty: dict[str, Cell] = {f"{name}{end}": None for name in names for end in ("", "_low", "_high")}
        return {"channel_own": None, "channel_other": None, **cells, **empty}
    best, best_other = int(own.argmax()), int(other.argmax())

    def statistic(sample: Values) -> Values:
        area = areas(sample[:, 1:], sample[:, 0] > 0)
        auc = area[[best, best_other]]
        rank = [rank_correlation(area, own), rank_correlation(area, other)]
        return np.array([*auc, auc[0] - auc[1], *rank, rank[0] - rank[1]])

    interval = bootstrap_interval(np.column_stack([labels, sums]), statistic, seed=seed, resamples=RESAMPLES)
    for index, name in enumerate(names):
        ends = (interval.estimate[index], interval.low[index], interval.high[index])
        cells |= interval_cells(name, Interval(*map(float, ends), interval.confidence))
    return {"channel_own": live[best], "channel_other": live[best_other], **cells}


def _between(tests: Mapping[tuple[str, str], Readings], live: tuple[int, ...], seed: int) -> dict[str, Cell]:
    """Whether the channels that tell the way on one kind of passage are those that tell it on the other.

    No direction can be asked on both, as a passage has two ways and they lie along its own axis. So of every channel
    the distance of its AUC from a half is compared, which is the same for both ways of a passage.
    """
    sides = [tests[passage, passage] for passage in PASSAGES]
    labels = [side.first[:, axis[0]] for side, axis in zip(sides, PASSAGES.values(), strict=True)]
    cells: dict[str, Cell] = {
        f"n_{name}": len(side) for name, side in zip(("vertical", "horizontal"), sides, strict=True)
    }
    if any(min(each.sum(), (~each).sum()) < 2 for each in labels):
        return {**cells, "live": len(live), **optional_cells("rank_correlation", None)}
    sample = np.concatenate(
        [
            np.column_stack([np.full(len(side), number), label, side.sums[:, live]])
            for number, (side, label) in enumerate(zip(sides, labels, strict=True))
        ]
    )

    def statistic(rows: Values) -> float:
        told = [
            np.abs(areas(here[:, 2:], here[:, 1] > 0) - 0.5) for here in (rows[rows[:, 0] == 0], rows[rows[:, 0] == 1])
        ]
        return rank_correlation(*told)

    interval = bootstrap_interval(sample, statistic, seed=seed, resamples=RESAMPLES)
    return {**cells, "live": len(live), **optional_cells("rank_correlation", interval)}


def _on_passages(tests: Mapping[tuple[str, str], Readings], channel: int) -> dict[str, Cell]:
    """How well one channel tells one way of a passage from the other, by low sums or by high ones, on both kinds.

    The two are other squares of the same mazes, and are taken as independent.
    """
    cells: dict[str, Cell] = {"channel": channel}
    told = []
    for passage, axis in PASSAGES.items():
        here, name = tests[passage, passage], axis[-1].name
        told.append(area(here.sums[:, channel], here.first[:, axis[-1]]))
        cells |= {f"n_{name}": len(here), **optional_cells(f"auc_{name}", told[-1])}
    vertical, horizontal = told
    known = vertical is not None and horizontal is not None
    apart = difference_interval(_either_way(vertical), _either_way(horizontal)) if known else None
    return cells | optional_cells("vertical_minus_horizontal", apart)


def _either_way(told: Interval) -> Interval:
    """An AUC read the way round in which it is above a half."""
    turned = Interval(1 - told.estimate, 1 - told.high, 1 - told.low, told.confidence)
    return max(told, turned, key=lambda each: each.estimate)


def _activity(study: Study, tests: Mapping[tuple[str, str], Readings]) -> Table:
    """The mean sum of every direction's channel by the class of the square, with bootstrap intervals."""
    rows: Table = []
    for passage, axis in PASSAGES.items():
        (across,) = set(PASSAGES) - {passage}
        for direction in axis:
            along, crossing, beside = tests[passage, passage], tests[passage, CROSSING], tests[across, across]
            kinds = [
                (name, kind, here.sums[here.first[:, first], study.channel(direction)])
                for name, here in ((passage, along), (CROSSING, crossing))
                for kind, first in ((WAY, direction), (BACK, 3 - direction))
            ]
            kinds.append((across, WALL, beside.sums[:, study.channel(direction)]))
            for name, kind, sums in kinds:
                known = {"direction": direction.name, "channel": study.channel(direction), "square": name, "kind": kind}
                mean = mean_interval(sums) if len(sums) else None
                rows.append({**known, "n": len(sums), **optional_cells("sum", mean)})
    return rows


def _told(choice: Readings, test: Readings, channel: int, direction: Direction) -> dict[str, Cell]:
    """One channel's AUC on the mazes to choose on and on those to test on."""
    cells: dict[str, Cell] = {"channel": channel}
    for name, here in (("auc_choice", choice), ("auc", test)):
        n = name.replace("auc", "n")
        cells |= {n: len(here), **optional_cells(name, area(here.sums[:, channel], here.first[:, direction]))}
    return cells


def figure(tables: Tables) -> Figure:
    """Own and other class's channel, rank correlations, and where the channels are active."""
    drawn = Figure(figsize=(15, 5.8), layout="constrained")
    area, rank, activity = drawn.subplots(1, 3, width_ratios=(1, 1, 1.3))
    rows = [row for row in tables["transfer"] if row["auc_own"] is not None]
    _draw_pairs(area, rows, "auc", "AUC on the square's class, 95% interval")
    _draw_pairs(rank, rows, "rank", "rank correlation with the AUC of all live channels\non the square's class")
    if rows:
        area.legend(**LEGEND, title="chosen on squares of")
    rank.set_yticklabels([])
    _draw_activity(activity, tables["activity"])
    return drawn


def _draw_pairs(axes: Axes, rows: Table, name: str, label: str) -> None:
    for height, row in enumerate(reversed(rows)):
        for which, marker, shift, said in STYLES:
            axes.plot([row[f"{name}_{which}_low"], row[f"{name}_{which}_high"]], [height + shift] * 2, color="0.5")
            style = {"markerfacecolor": "black" if which == "own" else "white", "label": None if height else said}
            axes.plot(row[f"{name}_{which}"], height + shift, marker, color="black", linestyle="none", **style)
    names = [f"{row['direction']} at ({row['square']})\nn={row['n']}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set(xlabel=label, ylim=(-0.6, len(rows) - 0.4))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_activity(axes: Axes, rows: Table) -> None:
    rows = [row for row in rows if row["sum"] is not None]
    styles = {WAY: ("o", "black"), BACK: ("s", "white"), WALL: ("x", "0.4")}
    places = list(dict.fromkeys((row["direction"], row["square"]) for row in rows))[::-1]
    for number, (kind, (marker, fill)) in enumerate(styles.items()):
        chosen = [row for row in rows if row["kind"] == kind]
        at = np.array([places.index((row["direction"], row["square"])) for row in chosen]) + 0.18 * (1 - number)
        axes.hlines(at, [row["sum_low"] for row in chosen], [row["sum_high"] for row in chosen], color="0.5")
        color = "0.4" if marker == "x" else "black"
        axes.plot([row["sum"] for row in chosen], at, marker, color=color, markerfacecolor=fill, label=kind)
    axes.set_yticks(range(len(places)), [f"{name} at ({square})" for name, square in places], fontsize=8)
    axes.set(xlabel="mean sum of the channel, 95% interval")
    axes.legend(**LEGEND, title="in the channel's direction there is")
    axes.spines[["top", "right"]].set_visible(False)


def finding(tables: Tables) -> Finding:
    rows = [row for row in tables["transfer"] if row["auc_own"] is not None]
    if not rows:
        return Finding("Too few mazes of each class.", "not comparable", "Nothing.", "Raise --n.")
    # Where both classes choose one channel there is nothing to lose, whatever the mazes.
    own = [row for row in rows if row["channel_own"] != row["channel_other"]]
    least = min(rows, key=lambda row: row["rank_other"])
    return Finding(
        f"In {len(rows) - len(own)} of {len(rows)} cases (direction and class of square, n={least['n']} mazes) both "
        f"classes choose the same channel. The rankings of all live channels by the two classes agree least for "
        f"{_case(least)}: rank correlation {shown(least, 'rank_other', '.2f')}, against "
        f"{shown(least, 'rank_own', '.2f')} within the class.",
        "not comparable",
        f"{_own_channels(own)} {_own_order(rows)} {_between_told(tables['between'][0], tables['channels'])} "
        f"{_passages_told(tables['passages'])}",
        "That there is one circuit: different layers before could feed the same channel. Opposite directions are two "
        "readings of the same mazes, so their rank correlations are one number and not two. The intervals are over the "
        "tested mazes, with the choice fixed; noise in the AUCs lowers a rank correlation, which its bias-corrected "
        "interval makes up for, so it lies high.",
    )


def _own_channels(rows: Table) -> str:
    """What the other class's channel loses in the cases in which it is another one."""
    if not rows:
        return "No class has a channel of its own."
    worse = sum(row["loss_low"] > 0 for row in rows)
    largest = max(rows, key=lambda row: row["loss"])
    return (
        f"Where a class has a channel of its own, the other class's one is worse, interval above 0, in {worse} of "
        f"{len(rows)} cases; it loses most for {_case(largest)}: AUC {shown(largest, 'loss')}. "
        f"{'That is a' if worse else 'No'} sign of circuits of their own for a class."
    )


def _own_order(rows: Table) -> str:
    """In how many pairs of opposite directions, which share their rank correlations, the order is a class's own."""
    pairs = {(row["square"], _axis(row)): row["rank_loss_low"] > 0 for row in rows}
    unlike = sum(pairs.values())
    return (
        f"The order of all live channels, which the weaker ones make, is another one in the other class, interval "
        f"above 0, in {unlike} of {len(pairs)} cases of an axis and a class (not corrected for their number)."
    )


def axes_at_crossings(channels: Table) -> float | None:
    """The rank correlation that `between` has, at crossings alone: two axes, one kind of square. None without data."""
    auc = {(row["square"], row["direction"], row["channel"]): row["auc"] for row in channels}
    pairs = [
        (first, auc[CROSSING, Direction.LEFT.name, channel])
        for (square, direction, channel), first in auc.items()
        if (square, direction) == (CROSSING, Direction.DOWN.name)
    ]
    if not pairs or any(each is None for pair in pairs for each in pair):
        return None
    correlation = rank_correlation(*np.abs(np.array(pairs, dtype=np.float64).T - 0.5))
    return None if np.isnan(correlation) else correlation


def _between_told(row: Mapping[str, Cell], channels: Table) -> str:
    """How (odd, even) and (even, odd) squares compare directly, and two axes on squares of one kind."""
    if row["rank_correlation"] is None:
        return "The two kinds of passage are not compared directly: too few mazes."
    return (
        "(odd, even) and (even, odd) squares have no direction in common, so they are compared by how well each of the "
        f"{row['live']} live channels tells one way from the other: rank correlation "
        f"{shown(row, 'rank_correlation', '.2f')}, n={row['n_vertical']} and {row['n_horizontal']}. "
        f"{_axes_told(axes_at_crossings(channels))}"
    )


def _axes_told(baseline: float | None) -> str:
    """Says what the comparison of the two kinds of passage can show, given the same for one kind of square."""
    if baseline is None:
        return "The kinds also differ in the axis, and at crossings the two axes cannot be compared: too few mazes."
    return (
        f"The kinds also differ in the axis. At ({CROSSING}) squares, where the kind is the same, the two axes have "
        f"{baseline:.2f}, so the correlation between kinds does not show that each kind has its own channels."
    )


def _passages_told(rows: Table) -> str:
    """How many channels tell the way on one kind of passage, on both, or better on one."""
    known = [row for row in rows if row["vertical_minus_horizontal"] is not None]
    if not known:
        return "No channel is compared between them: too few mazes."
    tells = {
        (row["channel"], name): above(row, f"auc_{name}", 0.5) is not None for row in known for name in ("UP", "RIGHT")
    }
    both, vertical, horizontal = (
        sum((tells[row["channel"], "UP"], tells[row["channel"], "RIGHT"]) == wanted for row in known)
        for wanted in ((True, True), (True, False), (False, True))
    )
    apart = sum(above(row, "vertical_minus_horizontal") is not None for row in known)
    return (
        f"Channel by channel, {both} of {len(known)} tell the way on both kinds, interval of the AUC apart from a "
        f"half, {vertical} on (odd, even) squares only and {horizontal} on (even, odd) only; {apart} tell it better "
        "on one kind than on the other, interval of the difference apart from 0 (not corrected for their number). "
        "These counts do not separate the kind from the axis."
    )


def _axis(row: Mapping[str, Cell]) -> str:
    return next(passage for passage, axis in PASSAGES.items() if Direction[str(row["direction"])] in axis)


def _case(row: Mapping[str, Cell]) -> str:
    return f"{row['direction']} at ({row['square']}) squares"


PART = Part(
    name="parity",
    question="Are there separate circuits for (odd, even), (even, odd) and (even, even) squares?",
    method=f"Size {SIZE}, cheese in distribution, mouse on a random square of a class from which the way goes along "
    "one axis, both moves legal: the best channel per direction and class, chosen on other mazes, tested on both. "
    "Every AUC is of one way of that axis against the other, over squares of one class, so that walls tell nothing.",
    post="Asked, not measured: maybe the model has separate circuits for (odd, even) and (even, odd) squares?",
    measure=measure,
    figure=figure,
    finding=finding,
)
