"""Exact success rates and decisions of a policy, by the size of the maze and the place of the cheese."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from chanpatch import HookPoints
from chanpatch.statistics import Interval, mean_interval, wilson_interval
from maze import results
from maze.analysis.cells import Row, Table, cells, chosen, column, read_table, shown
from maze.analysis.exact import ORIGINAL, STEPS, Chains, cheese_and_corner, decisions, greedy, neither
from maze.analysis.forwards import load_points
from maze.analysis.tables import action_tables
from maze.command import UserError
from maze.levels import REGION, draw_levels

ACTIONS = ("sampled", "greedy")
SUMMARY, LEVELS, DIFFERENCES = "summary.json", "levels.csv", "differences.csv"
MEASURES = {
    "found": "finds the cheese",
    "corner": "passes the corner before",
    "neither": "comes to neither",
    "to_cheese": "decision: to the cheese",
    "to_corner": "decision: to the corner",
    "to_neither": "decision: neither",
}

PerLevel: TypeAlias = Mapping[str, NDArray[np.float64]]  # (level,) by "measure actions"; NaN if it is not defined


def run(file: Path | None, *, n: int, sizes: Sequence[int], cheese: Sequence[str], seed: int, out: Path) -> Path:
    """Evaluate weights on n levels of each size and place of the cheese, and return the folder with the results.

    Raises:
        UserError: There are no levels or no squares for the cheese, or the seed or the weights are wrong.
    """
    if n < 1:
        raise UserError(f"--n must be at least 1; got {n}.")
    every = dict.fromkeys((size, place) for size in sizes for place in cheese)
    parts = [(size, place) for size, place in every if size > REGION or place != "out of distribution"]
    if not parts:
        raise UserError(f"No maze in --sizes has a square outside the top right {REGION}x{REGION}. Add a larger size.")
    points, weights = load_points(file)
    draw_levels(0, seed=seed)  # raises an error for a wrong seed before a folder is made
    known = {"n": n, "sizes": sizes, "cheese": cheese, "seed": seed, "steps": STEPS, "versions": results.versions()}
    folder = out / f"evaluation-n{n}-seed{seed}-{results.settings_key(known | {'weights': weights['sha256']})}"
    print(f"weights {weights['name']} (width {weights['width']}, sha256 {weights['sha256'][:12]})", flush=True)
    if (folder / SUMMARY).exists():
        try:
            results.read_manifest(folder, SUMMARY)
        except results.Damaged as fault:
            print(f"Evaluating again, because {fault}: {folder}")
        else:
            print(f"Kept from before, with the same settings, weights and code: {folder}")
            return folder
    measured: dict[tuple[int, str], PerLevel] = {}
    with results.locked(folder):
        for number, (size, place) in enumerate(parts, 1):
            print(f"[{number}/{len(parts)}] size {size}, cheese {place}", flush=True)
            measured[size, place] = _kept(folder / "parts", points, size, place, n, seed)
            found = scores(size, place, measured[size, place])
            for actions in ACTIONS:
                line = (f"{MEASURES[row['measure']]} {_text(row)}" for row in chosen(found, actions=actions))
                print(f"    {actions}: {', '.join(line)}", flush=True)
        _write(folder, {**known, "weights": weights}, measured)
    print(f"\nResults in {folder}")
    return folder


def run_against(against: Path, file: Path | None, **given: Any) -> Path:
    """Evaluate both policies as `run` does, print their differences, and return the folder for `file`."""
    other = run(against, **given)
    folder = run(file, **given)
    rows = differences(read_table(folder / LEVELS), read_table(other / LEVELS))
    results.replace_table(folder / DIFFERENCES, rows)
    print(f"\nFinds the cheese more often than {against}, mean over levels with its 95% interval:")
    for row in rows:
        print(f"  size {row['size']}, cheese {row['cheese']}, {row['actions']}: {shown(row, 'difference', '+.1%')}")
    print(f"In {folder / DIFFERENCES}")
    return folder


def measure(points: HookPoints, levels: Sequence[bytes]) -> PerLevel:
    """Compute every measure in every level: (level,) by measure and actions, such as `"found sampled"`."""
    chains = Chains.of(levels)
    sampled = action_tables(points, chains)[ORIGINAL]
    values: dict[str, NDArray[np.float64]] = {}
    for actions, table in zip(ACTIONS, (sampled, greedy(sampled)), strict=True):
        each = (*cheese_and_corner(chains, table), neither(chains, table), *decisions(chains, table).T)
        values |= {f"{name} {actions}": value for name, value in zip(MEASURES, each, strict=True)}
    return values


def scores(size: int, place: str, values: PerLevel) -> Table:
    """The mean of each measure over the levels with this measure, for all measures that some level has.

    Some levels have no decision square, or the cheese is in the corner.
    """
    found: Table = []
    for actions in ACTIONS:
        for name in MEASURES:
            value = values[f"{name} {actions}"]
            value = value[~np.isnan(value)]
            if len(value):
                interval = rate_interval(value, actions)
                row = {"size": size, "cheese": place, "actions": actions, "measure": name, "n": len(value)}
                found.append(row | {"mean": interval.estimate, "low": interval.low, "high": interval.high})
    return found


def differences(levels: Table, others: Table) -> Table:
    """How much more often the first policy finds the cheese than the second, by size, place and kind of actions.

    Both arguments are the contents of `levels.csv`, with the same levels in the same order.
    """
    rows: Table = []
    for size, cheese in dict.fromkeys((row["size"], row["cheese"]) for row in levels):
        here, there = (chosen(table, size=size, cheese=cheese) for table in (levels, others))
        for actions in ACTIONS:
            name = f"found {actions}"
            change = (column(here, name) - column(there, name)).astype(np.float64)
            known = {"size": size, "cheese": cheese, "actions": actions, "n": len(here)}
            rows.append({**known, **cells("difference", mean_interval(change))})
    return rows


def rate_interval(values: NDArray[np.float64], actions: str) -> Interval:
    """The mean over levels and its 95% interval, within 0 and 1.

    Greedy actions succeed or fail on a level, so their interval is Wilson's. Sampled actions succeed with some
    probability. Their interval is Student's, over the levels and two added ones, at 0 and at 1, because otherwise a few
    levels with equal values would give an interval of width 0.

    References:
        Agresti and Caffo, "Simple and effective confidence intervals for proportions and differences of
        proportions result from adding two successes and two failures" (2000), for the added observations.
    """
    n, mean = len(values), float(values.mean())
    if actions == "greedy":
        return wilson_interval(round(mean * n), n)
    added = np.append(values, [0.0, 1.0])
    low, high = scipy.stats.t.interval(0.95, n + 1, loc=added.mean(), scale=added.std(ddof=1) / (n + 2) ** 0.5)
    return Interval(mean, max(float(low), 0.0), min(float(high), 1.0), 0.95)


def markdown(means: Table) -> str:
    """A table with one row per size, place and kind of actions."""
    rows: dict[tuple[int, str, str], dict[str, Row]] = {}
    for each in means:
        rows.setdefault((each["size"], each["cheese"], each["actions"]), {})[each["measure"]] = each
    labels = [label.removeprefix("decision: ") for label in MEASURES.values()]
    table = [["size", "cheese", "actions", "levels", *labels[:3], "decision squares", *labels[3:]]]
    table.append(["---"] * len(table[0]))
    for kind, row in rows.items():
        texts = [_text(row[name]) if name in row else "-" for name in MEASURES]
        squares = row["to_cheese"]["n"] if "to_cheese" in row else 0
        table.append([*map(str, kind), str(row["found"]["n"]), *texts[:3], str(squares), *texts[3:]])
    return "".join(f"| {' | '.join(row)} |\n" for row in table).replace(" --- ", "---")


def _text(row: Row) -> str:
    return f"{row['mean']:.1%} ({row['low']:.1%} to {row['high']:.1%})"


def _kept(parts: Path, points: HookPoints, size: int, place: str, n: int, seed: int) -> PerLevel:
    """Read the measures for one size and place from disk, or compute and write them."""
    file = parts / f"size{size}-{place.replace(' ', '-')}.npz"
    if file.exists() and (kept := results.read_arrays(file)) is not None:
        print("    kept from before", flush=True)
        return kept
    values = measure(points, draw_levels(n, size=size, seed=seed, cheese=place))
    with results.replaced(file) as partial:
        np.savez_compressed(partial, **values)
    return values


def _write(folder: Path, known: Mapping[str, Any], measured: Mapping[tuple[int, str], PerLevel]) -> None:
    """Write every result, and delete the parts."""
    means = [row for (size, place), values in measured.items() for row in scores(size, place, values)]
    results.replace_table(folder / "table.csv", means)
    weights = known["weights"]
    heading = (
        f"{weights['name']} (sha256 {weights['sha256'][:12]}), seed {known['seed']}: exact for each level, within "
        f"{STEPS} steps; mean over levels with its 95% interval.\n\n"
    )
    results.replace_text(folder / "table.md", heading + markdown(means))
    rows = [
        {"size": size, "cheese": place, "level": level}
        | {name: "" if np.isnan(value[level]) else float(value[level]) for name, value in values.items()}
        for (size, place), values in measured.items()
        for level in range(known["n"])
    ]
    results.replace_table(folder / LEVELS, rows)
    results.write_manifest(folder, {**known, "scores": means}, SUMMARY)  # last: it marks the folder as complete
    shutil.rmtree(folder / "parts")
