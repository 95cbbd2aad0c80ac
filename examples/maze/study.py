"""Why does a mouse trained with the cheese in the top right corner go to the corner when the cheese is elsewhere?

The study repeats every measurement in the post that asked this question, in procgen itself and with a trained policy.
It has these parts:

  pair            which channels respond to the one wall that decides the first step to the cheese
  search          which hook points encode the path
  ranking         the channels that differ most in a pair like the post's, and their labels
  sums            a channel's sum as a predictor of the path, in distribution and out of it
  decision        on squares at which the paths to cheese and corner separate: the channel and the mouse's choice
  ablation        exact effects of ablating channels on reaching the cheese, with all other channels as controls
  distance        how the choice depends on the distance between the cheese and the corner
  top16           the vector field after an eighth of the channels is set to zero
  spatial         whether the channel is active only around the mouse
  sizes           whether the channels predict the same in mazes of all sizes
  parity          whether there are different channels for odd and even squares
  generator       the rules by which procgen generates mazes
  cheese-vector   subtract the cheese's part of the activation
  corner-vector   add the corner's part of the activation
  retarget        make the mouse go to a square without cheese
  statistics      predict the choice from distances
  random-mazes    whether the channels keep their labels in mazes that procgen never generates
  hypothesis      whether the sum of all pushes predicts the choice
  default         whether the corner is the default goal when the cheese is removed from the picture
  share           how much of the cheese's effect the best channels carry
  direction       whether one direction carries the preference for the corner
  dose            how the effect of the UP channel depends on the dose
  counterfactual  the choice when the best channels are as active as without the cheese

Channels are chosen by fixed rules, on mazes that are not used for anything else. A folder under --out contains the
report (report.html and report.md), the tables as CSV and the figures as PNG. After an interruption, the same command
continues where it stopped. The report ends with the run time of each part, in seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

EXAMPLES = """examples:
  python examples/maze/study.py                                             the shipped policy of width 1
  python examples/maze/study.py --shipped                                   all shipped policies
  python examples/maze/study.py --only pair,sums                            two parts
  python examples/maze/study.py --n 1000 --weights model_rand_region_5.pth  the published network
"""


def arguments() -> argparse.ArgumentParser:
    from maze.report.limits import limits

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", metavar="PART,...", default="", help="parts to run (default: all)")
    add("--n", type=int, default=200, help=f"number of levels (default: %(default)s); {limits()}")
    add("--seed", type=int, default=0, help="random seed for levels, draws and controls (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    files = (
        ".pth or .safetensors files: the main policy, and others to compare (default: the shipped policy of width 1)"
    )
    which.add_argument("--weights", type=Path, nargs="+", metavar="FILE", default=[], help=files)
    every = "all shipped policies, the one of width 4 first (each of the others on the parts that compare policies)"
    which.add_argument("--shipped", action="store_true", help=every)
    add("--policy", default="chanpatch", choices=("chanpatch", "procgen-tools"), help="package with the policy class")
    cores = min(2, os.cpu_count() or 1)
    add("--workers", type=int, default=cores, help="number of processes (default: %(default)s; each needs up to 5 GB)")
    add("--out", type=Path, default=Path("results"), help="folder for the results (default: %(default)s)")
    return parser


def main() -> int:
    """Run the study; return the exit status."""
    from maze.command import exit_status

    given = arguments().parse_args()
    return exit_status(lambda: study(given))


def study(given: argparse.Namespace) -> None:
    from maze.report.run import SHIPPED, RunSettings, run  # here, so that --help answers at once

    only = tuple(name.strip() for name in given.only.split(",") if name.strip())
    weights = SHIPPED if given.shipped else tuple(given.weights)
    run(RunSettings(only, given.n, given.seed, weights, given.out, given.policy, given.workers))


if __name__ == "__main__":
    if not __package__:  # run as a file: the package `maze` lies one folder up
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
