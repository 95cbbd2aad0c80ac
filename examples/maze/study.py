"""Why does a mouse trained with the cheese in the top right corner go to the corner when the cheese is elsewhere?

The study repeats every measurement in the post that asked this, on real procgen and a trained policy, in parts:

  pair            which channels respond to the one wall that decides the first step to the cheese
  search          which hook points encode the path
  ranking         the channels that differ most in the post's pair, and their labels
  sums            a channel's sum as a predictor of the path, in distribution and out of it
  decision        on squares at which the paths to cheese and corner separate: the channel and the mouse's choice
  ablation        exact effects of ablating channels on reaching the cheese, with all other channels as controls
  distance        the choice against the distance of the cheese from the corner
  top16           sixteen channels zeroed: the vector field
  spatial         is the channel active around the mouse only
  sizes           do the channels predict the same in mazes of all sizes
  parity          are there other channels for odd and even squares
  generator       the rules of procgen's mazes
  cheese-vector   subtract the cheese's part of the activation
  corner-vector   add the corner's part of the activation
  retarget        make the mouse go to a square without cheese
  statistics      predict the choice from distances
  random-mazes    do the channels keep their labels in mazes that procgen never makes
  hypothesis      does the sum of all pushes predict the choice

Channels are chosen by fixed rules on mazes with no other use. A folder under --out contains the report (report.html
and report.md), the tables as CSV and the figures as PNG. After an interruption, the same command continues. The report
ends with the seconds of each part.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python examples/maze/study.py                                        the whole study, on 200 levels each
  python examples/maze/study.py --n 1000                               on as many levels as the post
  python examples/maze/study.py --only pair,sums                       two parts
  python examples/maze/study.py --weights model_rand_region_5.pth      on the published network
"""


def arguments() -> argparse.ArgumentParser:
    from maze.report.limits import limits

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", metavar="PART,...", default="", help="parts to run (default: all)")
    add("--n", type=int, default=200, help=f"levels (default: %(default)s); {limits()}")
    add("--seed", type=int, default=0, help="seed of levels, draws and controls (default: %(default)s)")
    add("--weights", type=Path, help="a .pth or .safetensors file (default: the shipped policies, side by side)")
    add("--out", type=Path, default=Path("results"), help="folder for the results (default: %(default)s)")
    return parser


def main() -> int:
    """Run the study; return the exit status."""
    from maze.command import exit_status

    given = arguments().parse_args()
    return exit_status(lambda: study(given))


def study(given: argparse.Namespace) -> None:
    from maze.report.run import RunSettings, run  # here, so that --help answers at once

    only = tuple(name.strip() for name in given.only.split(",") if name.strip())
    run(RunSettings(only, given.n, given.seed, given.weights, given.out))


if __name__ == "__main__":
    if not __package__:  # run as a file: the package `maze` lies one folder up
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
