"""Evaluate how often a maze policy finds the cheese, and its choice at squares that separate cheese and corner.

Every number is exact for the given levels. A policy without memory is a Markov chain on a level, so the probability of
reaching the cheese within 256 steps is computed, not estimated. The 95% intervals are for the random choice of levels.

| measure | meaning |
|---|---|
| found | the mouse reaches the cheese within 256 steps |
| corner | the mouse passes the top right corner first |
| neither | the mouse reaches neither the cheese nor the corner within 256 steps |
| decision | the goal that the mouse reaches first from the square at which the paths to cheese and corner separate |

Each measure is computed for sampled actions and for greedy actions (always the most probable action). The mazes are the
same for all places of the cheese:

| place | square of the cheese |
|---|---|
| in distribution | a random square in the top right 5x5, as in training |
| out of distribution | a random square anywhere else |
| as drawn | procgen's own choice: any free square |
| top left, top right, bottom right | the corner with that name; the mouse starts in the fourth corner |

The results folder, named after the settings, contains summary.json, table.csv, table.md and levels.csv.
After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python examples/maze/evaluate.py                               the shipped weights, about 12 minutes on one core
  python examples/maze/evaluate.py --weights mine.safetensors
  python examples/maze/evaluate.py --weights mine.safetensors --against examples/maze/weights/policy.safetensors
  python examples/maze/evaluate.py --n 40 --sizes 15 --cheese "in distribution" "bottom right"    a first look
"""
PLACES = ("in distribution", "out of distribution", "as drawn", "top left", "top right", "bottom right")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=Path, help="a .pth or .safetensors file, of any width (default: the shipped weights)")
    add("--against", type=Path, metavar="WEIGHTS", help="a second policy, compared with the first level by level")
    add("--n", type=int, default=100, help="number of levels per size and place of the cheese (default: %(default)s)")
    sides, places = "maze side lengths (default: 9 15 25)", "places of the cheese, each in quotes (default: all six)"
    add("--sizes", type=int, nargs="+", choices=range(3, 26, 2), default=[9, 15, 25], metavar="SIDE", help=sides)
    add("--cheese", nargs="+", choices=PLACES, default=PLACES, metavar="PLACE", help=places)
    add("--seed", type=int, default=0, help="random seed for the levels (default: %(default)s)")
    add("--out", type=Path, default=Path("results"), help="folder for the results (default: %(default)s)")
    return parser


def main() -> int:
    from maze.command import exit_status

    return exit_status(partial(evaluate, **vars(arguments().parse_args())))


def evaluate(against: Path | None, weights: Path | None, **given: Any) -> None:
    from maze.results import check_folder
    from maze.training.evaluation import run, run_against  # here, so that --help answers at once

    check_folder(given["out"])
    if against is None:
        run(weights, **given)
    else:
        run_against(against, weights, **given)


if __name__ == "__main__":
    if not __package__:  # run as a file: make the folder above importable
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
