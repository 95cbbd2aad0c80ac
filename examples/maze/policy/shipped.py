"""The shipped policies that a run studies side by side: what each is, and what remains without the teaching."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from maze.analysis.part import Tables, shown

# By policy, the one under study first, then by part: what was measured, read from the files of the run.
Measured: TypeAlias = Mapping[str, Mapping[str, Tables]]

MAIN, CONTROL, REWARD = "imitation", "control", "reward"

_SEED = (
    "the run of the imitation policy with another seed, directions taught too, on fewer observations: how much depends "
    "on the seed, as far as a shorter run tells"
)

_AREA = "AUC of the sum of the channel for "

# By name, the main one first; those after it are studied where their weights are there.
POLICIES = {
    MAIN: "imitation of shortest paths; auxiliary losses taught its middle layers the field of directions and the "
    "mouse's cell",
    CONTROL: "imitation without the field of directions but with the mouse's cell, on as many observations, though in "
    "two stages: what remains without that teaching",
    REWARD: "trained by reward (PPO) from the imitation policy, so its start was taught directions: what reward "
    "changes, not what remains without that teaching",
    "seed1": _SEED,
    "seed2": _SEED,
}


def introduction(measured: Measured) -> str:
    """What the policy under study was taught, and how far the control tells what remains without it."""
    main, *others = measured
    if not others:
        return (
            "One policy only. If it was taught directions by an auxiliary loss, as the shipped imitation policy was in "
            "its middle layers, a direction signal in it was in part taught; a control beside it would tell how much."
        )
    taught = (
        f"The policy under study ({main}) was trained by imitation with an auxiliary loss that teaches directions to "
        "its middle layers, so a direction signal in it was in part taught."
    )
    if CONTROL not in measured:
        return f"{taught} No policy without that teaching stands beside it here, so how much was taught stays open."
    if not _rows(measured[CONTROL]):
        return f"{taught} What remains without it stays open here: no sums, no ablation of the control policy."
    return (
        f"{taught} The {CONTROL} policy had no such loss: without that teaching {_remains(measured)}. But a "
        "difference between the two is not of that teaching alone: the control saw as many observations, but larger "
        "mazes and its own mistakes in the second half only, and the two differ in how often they find the cheese at "
        "all. Nor is what remains there without any help: the control keeps the loss that teaches the mouse's cell."
    )


def _remains(measured: Measured) -> str:
    """How well the best channel of each direction tells it in the control, beside the main policy."""
    main = next(iter(measured))
    told = {policy: _rows(measured[policy]) for policy in (main, CONTROL)}
    areas = [quantity for quantity in told[CONTROL] if quantity.startswith("AUC") and quantity in told[main]]
    if not areas:
        return "the table tells what remains"
    both = (
        f"{told[CONTROL][each].partition(',')[0]} against {told[main][each].partition(',')[0]} for "
        f"{each.removeprefix(_AREA).partition(' ')[0]}"
        for each in areas
    )
    return f"the best channel tells a direction in distribution with an AUC of {', '.join(both)}"


def compared(measured: Measured) -> Sequence[Mapping[str, str]]:
    """What tells how much was taught, one row per quantity and one column per policy; no rows for one policy alone."""
    columns = {policy: _rows(parts) for policy, parts in measured.items()}
    columns = {policy: rows for policy, rows in columns.items() if rows}
    if len(columns) < 2:
        return []
    quantities = dict.fromkeys(quantity for rows in columns.values() for quantity in rows)
    return [
        {"quantity": quantity} | {policy: rows.get(quantity, "not measured") for policy, rows in columns.items()}
        for quantity in quantities
    ]


def _rows(parts: Mapping[str, Tables]) -> dict[str, str]:
    """The quantities of one policy as texts."""
    rows: dict[str, str] = {}
    sums = parts.get("sums", {"goals": [], "transfer": []})
    for row in sums["goals"]:
        if row["split"] == "in distribution" and row["cheese"] is not None:
            rows[f"{_AREA}{row['direction']} at relu3, cheese in distribution"] = (
                f"{shown(row, 'cheese')}, channel {row['channel']}, n={row['n']}"
            )
    for row in sums["transfer"]:
        if (row["direction"], row["quantity"]) == ("UP", "false-positive rate"):
            for split, where, n in (("fit", "in", "n_fit"), ("shifted", "out of", "n_shifted")):
                rows[f"false positives of the threshold on the channel for UP, {where} distribution"] = (
                    f"{shown(row, split, '.1%')}, n={row[n]}"
                )
    for row in parts["ablation"]["effects"] if "ablation" in parts else []:
        quantity = f"P(cheese within 256 steps) of the unchanged policy, cheese {row['cheese']}"
        rows.setdefault(quantity, f"{shown(row, 'original')}, n={row['n']}")  # the same in all rows of a place
    return rows


def described(measured: Measured) -> Iterator[tuple[str, str]]:
    """Yields each policy's name and what it is, when several stand side by side."""
    if len(measured) > 1:
        for name, parts in measured.items():
            yield name, POLICIES[name] + ("." if parts else "; not measured in this run.")
        if REWARD not in measured:
            yield REWARD, "no policy trained by reward stands beside them in this run."
