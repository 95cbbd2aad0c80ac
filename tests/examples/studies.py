"""A study of the shipped policy with few levels, whose channels are given and not chosen."""

import csv
from functools import cache
from pathlib import Path

import numpy as np
import torch

from chanpatch import HookPoints, hook_points
from maze.analysis.cells import Tables, read_table
from maze.analysis.forwards import SITE
from maze.analysis.labels import LabelledChannel
from maze.analysis.part import Study
from maze.analysis.selection import Selection
from maze.levels import draw_levels, observe, policy_input
from maze.paths import Direction
from maze.policy.network import load_policy

BEST = {Direction.LEFT: 8, Direction.DOWN: 24, Direction.UP: 7, Direction.RIGHT: 30}


@cache
def shipped_points() -> HookPoints:
    policy = load_policy()[0].to(memory_format=torch.channels_last)
    return hook_points(policy, torch.from_numpy(policy_input(observe(draw_levels(2, size=9, seed=0)))))


def small_study(n: int, ranked: tuple[int, ...], best: dict[Direction, int] | None = None) -> Study:
    """A study in which the channels of `ranked` are live, the most telling first."""
    study = Study(shipped_points(), {"name": "policy.safetensors"}, n, seed=0)
    nothing = np.empty(0)
    chosen = BEST if best is None else best
    selection = Selection(SITE, nothing, nothing, nothing, nothing, chosen, tuple(sorted(ranked)), ranked)
    study.__dict__["selection"] = selection
    study.__dict__["labels"] = [LabelledChannel() for _ in range(32)]
    return study


def from_files(tables: Tables, folder: Path) -> Tables:
    """The tables as they come back from disk."""
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return {name: read_table(folder / f"{name}.csv") for name in tables}
