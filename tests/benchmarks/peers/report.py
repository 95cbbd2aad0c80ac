"""The results of all tasks as Markdown."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers import HANDWRITTEN, LIBRARIES, PEERS, module_of
from peers.tasks import TASKS, Row

NAMES = {
    "floor": "floor, by hand",
    "loop": "loop of hooks, by hand",
    "chanpatch": "**chanpatch**",
    "nnsight_skip": "nnsight, expert's",
    "transformer_lens": "TransformerLens",
}
COMPARED = ("recording", "ablation", "recording, open context", "ablation, open context")

Results = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Target:
    """What chanpatch is to reach: met when the interval reaches the limit.

    Attributes:
        name: What it is.
        task: Where it is measured.
        pick: Of the task's rows, one with these entries.
        key: Where the number and the ends of its interval stand in the row.
        limit: At most this.
        at_least: At least this instead.
        unit: Of the number.
    """

    name: str
    task: str
    pick: Mapping[str, str]
    key: str
    limit: float
    unit: str = "x"
    at_least: bool = False


def _overhead(what: str, limit: float) -> Target:
    return Target(f"MLP policy, {what}", "overhead", {"peer": "chanpatch", "what": what}, "microseconds", limit, " us")


TARGETS = (
    Target("width 4, time of the floor", "impala-4", {"peer": "chanpatch"}, "to_floor", 1.15),
    Target("width 4, times as fast as the loop", "impala-4", {"peer": "chanpatch"}, "to_loop", 60, at_least=True),
    Target("width 1, time of the floor", "impala-1", {"peer": "chanpatch"}, "to_floor", 1.25),
    Target("convolutional points, time of the floor", "convolutional", {"peer": "chanpatch"}, "to_floor", 1.3),
    Target("every point, time of the floor", "everywhere", {"peer": "chanpatch"}, "to_floor", 1.3),
    _overhead("recording, open context", 35),
    _overhead("ablation, open context", 70),
    _overhead("a twin's call", 40),
    _overhead("a twin's call, check_nan=False", 15),
    _overhead("entering and leaving a context", 60),
    Target("channel sums of 10,000 observations", "memory-sums", {"peer": "chanpatch"}, "bytes", 40, " MB"),
    Target("import chanpatch", "import", {"peer": "chanpatch"}, "over", 0.3, " s"),
)


def page(results: Results, machine: Mapping[str, str], *, judged: bool) -> str:
    """Return all tables.

    Args:
        results: Rows by task; a task that is missing is named as not measured.
        machine: What the numbers were measured with.
        judged: Whether to hold them against the targets.
    """
    parts = [_facts(machine)]
    if judged:
        parts += ["## Targets", _targets(results)]
    for name, task in TASKS.items():
        parts.append(f"## {task.title}")
        parts.append(_section(name, results[name]) if name in results else "Not measured.")
    parts += ["## How the peers were run", _remarks(machine)]
    return "\n\n".join(parts) + "\n"


def _section(name: str, rows: Sequence[Row]) -> str:
    if name == "overhead":
        return _overhead_table(rows)
    if name == "silence":
        return _silence_table(rows)
    if name == "import":
        return _table([{"CPU seconds": _interval(row["over"], "{:.3f}"), "repeats": row["repeats"]} for row in rows])
    if name.startswith("memory"):
        return _table(
            [
                {"": _name(row["peer"]), "MB above model and one forward": _bytes(row), "size": row.get("size", "")}
                for row in rows
            ],
        )
    return _sweep_table(rows)


def _sweep_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: PEERS.index(row["peer"])):
        if "reason" in row:
            lines.append({"": _name(row["peer"]), "time / floor": f"cannot: {row['reason']}"})
            continue
        lines.append(
            {
                "": _name(row["peer"]),
                "time / floor": _interval(row["to_floor"], "{:.2f}"),
                "time / loop": _interval(row["to_loop"], "{:.3f}"),
                "CPU seconds": f"{_median(row['seconds']):.3g}",
                "size": row["size"],
                "repeats": row["repeats"],
                "off by": f"{row['error']:.0e}" if row["error"] else "0",
            }
        )
    return _table(lines)


def _overhead_table(rows: Sequence[Row]) -> str:
    lines = []
    for peer in ("loop", "chanpatch", *LIBRARIES):
        own = [row for row in rows if row["peer"] == peer]
        cells = {
            row["what"]: f"cannot: {row['reason']}" if "reason" in row else _interval(row["microseconds"], "{:.0f}")
            for row in own
            if "what" in row
        }
        everything = [f"cannot: {row['reason']}" for row in own if "what" not in row]
        lines.append(
            {"": _name(peer), **{what: cells.get(what, everything[0] if everything else "") for what in COMPARED}}
        )
    plain = next(row for row in rows if row["peer"] == "")
    own = [row for row in rows if row["peer"] == "chanpatch" and row["what"] not in COMPARED]
    return "\n\n".join(
        [
            f"A plain forward takes {_interval(plain['microseconds'], '{:.0f}')} microseconds. A recording and an "
            "ablation are a whole use: opened, run once and closed, where a library has contexts to open.",
            _table(lines),
            _table([{"chanpatch": row["what"], "us": _interval(row["microseconds"], "{:.0f}")} for row in own]),
        ]
    )


def _silence_table(rows: Sequence[Row]) -> str:
    whats = ("unknown name", "patch never ran")
    found = {(row["peer"], row["what"]): row.get("outcome") or f"cannot: {row['reason']}" for row in rows}
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    return _table([{"": _name(peer), **{what: found[peer, what] for what in whats}} for peer in peers])


def _targets(results: Results) -> str:
    lines = []
    for target in TARGETS:
        rows = [row for row in results.get(target.task, ()) if all(row.get(k) == v for k, v in target.pick.items())]
        line = {"target": target.name, "limit": f"{'>=' if target.at_least else '<='} {target.limit:g}{target.unit}"}
        if rows:
            estimate, low, high = _numbers(target, rows[0])
            reaches = operator.ge(high, target.limit) if target.at_least else operator.le(low, target.limit)
            line |= {"measured": f"{estimate:.3g} ({low:.3g} to {high:.3g})", "met": "yes" if reaches else "**no**"}
        lines.append(line)
    return _table(lines)


def _numbers(target: Target, row: Row) -> tuple[float, float, float]:
    if target.key == "bytes":
        return (row["bytes"] / 1e6,) * 3
    estimate, low, high = row[target.key]
    return (1 / estimate, 1 / high, 1 / low) if target.at_least else (estimate, low, high)


def _facts(machine: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in machine.items() if name not in LIBRARIES)


def _remarks(machine: Mapping[str, str]) -> str:
    lines = []
    for peer in PEERS:
        if peer in (*HANDWRITTEN, "chanpatch"):
            continue
        try:
            remark = module_of(peer).Peer.remark
        except ImportError as error:
            remark = f"does not import: {error}"
        lines.append({"": _name(peer), "release": machine.get(peer, ""), "remark": remark})
    return _table(lines)


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for line in lines for column in line))
    rows: Iterable[Iterable[str]] = [columns, ["---"] * len(columns)]
    rows = [*rows, *[[str(line.get(column, "")) for column in columns] for line in lines]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _interval(numbers: Sequence[float], form: str) -> str:
    estimate, low, high = (form.format(number) for number in numbers)
    return estimate if low == high == estimate else f"{estimate} ({low} to {high})"


def _median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def _bytes(row: Row) -> str:
    return f"cannot: {row['reason']}" if "reason" in row else f"{row['bytes'] / 1e6:.0f}"


def _name(peer: str) -> str:
    return NAMES.get(peer, peer)
