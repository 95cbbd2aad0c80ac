"""Two evaluated policies against each other, level by level: what `evaluate.py --against` adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from chanpatch.statistics import mean_interval
from maze.analysis.part import Table, column, interval_cells, read_table, shown
from maze.results import replace_table
from maze.training.evaluation import ACTIONS, LEVELS, Settings, run

DIFFERENCES = "differences.csv"


def run_against(settings: Settings, against: Path) -> Path:
    """Evaluate both policies on the same levels, print how they differ, and return the folder of the first."""
    other = run(replace(settings, weights=against))
    folder = run(settings)
    rows = differences(read_table(folder / LEVELS), read_table(other / LEVELS))
    replace_table(folder / DIFFERENCES, rows)
    print(f"\nFinds the cheese more often than {against}, mean over levels with its 95% interval:")
    for row in rows:
        print(f"  size {row['size']}, cheese {row['cheese']}, {row['actions']}: {shown(row, 'difference', '+.1%')}")
    print(f"In {folder / DIFFERENCES}")
    return folder


def differences(levels: Table, others: Table) -> Table:
    """How much more often the first policy finds the cheese than the second, on the very same levels.

    Args:
        levels: one row per level, as `levels.csv` of an evaluation has them.
        others: those of the second policy, in the same order.

    Returns:
        One row per size, place of the cheese and kind of actions.
    """
    kinds = dict.fromkeys((row["size"], row["cheese"]) for row in levels)
    rows: Table = []
    for size, cheese in kinds:
        here = [index for index, row in enumerate(levels) if (row["size"], row["cheese"]) == (size, cheese)]
        for actions in ACTIONS:
            name = f"found {actions}"
            change = (column(levels, name) - column(others, name))[here].astype(np.float64)
            known = {"size": size, "cheese": cheese, "actions": actions, "n": len(here)}
            rows.append({**known, **interval_cells("difference", mean_interval(change))})
    return rows
