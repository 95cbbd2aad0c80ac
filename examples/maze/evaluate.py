"""How often a maze policy finds the cheese, and which way it takes where the ways to the cheese and the corner part.

Every number is exact for its levels: a policy without memory is a Markov chain on a level, so the probability of
reaching the cheese within 256 steps is computed and not sampled. The intervals (95%) are about the choice of levels.

  found      the mouse gets to the cheese within 256 steps
  corner     it passes the top right corner before
  neither    it comes to neither of them within 256 steps
  decision   it stands where the way to the cheese and the way to the corner part: which does it take first?

Each is told for sampled actions and for greedy ones (the likeliest action, always). The cheese is put

  in distribution       on a random square of the top right 5x5, where it was in training
  out of distribution   on a random square anywhere else
  as drawn              where procgen put it, on any free square
  top left, top right, bottom right     in that corner (the mouse starts in the fourth)

and the same mazes are used for all of these. Results go to a folder that is named for the settings: summary.json,
table.csv, table.md, levels.csv, evaluation.png. Interrupt it at any time; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python examples/maze/evaluate.py                               the shipped weights, about 12 minutes on one core
  python examples/maze/evaluate.py --weights mine.safetensors
  python examples/maze/evaluate.py --weights mine.safetensors --against examples/maze/weights/policy.safetensors
  python examples/maze/evaluate.py --n 200 --sizes 3,5,...,25    every size: about an hour
  python examples/maze/evaluate.py --n 40 --sizes 15 --cheese "in distribution" "bottom right"    a first look
"""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", type=Path, help="a .pth or .safetensors file, of any width (default: the shipped weights)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="WEIGHTS", help="a second policy; how much the first differs from it per level"
    )
    parser.add_argument(
        "--n", type=int, default=100, help="levels of each size and place of the cheese (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes", default="9,15,25", help="sides of the mazes, odd, 3 to 25; 3,5,...,25 is all (default: %(default)s)"
    )
    parser.add_argument(
        "--cheese", nargs="+", metavar="PLACE", help="places of the cheese, each in quotes (default: all six)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the levels (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for the results (default: %(default)s)"
    )
    return parser


def main() -> int:
    """Evaluate; return the exit status."""
    from maze.command import exit_status

    given = vars(arguments().parse_args())
    return exit_status(lambda: evaluate(given))


def evaluate(given: dict[str, Any]) -> None:
    """Evaluate with these settings."""
    from maze.results import check_folder
    from maze.training.evaluation import PLACES, Settings, run, sizes_in  # here, so that --help answers at once
    from maze.training.paired_evaluation import run_against

    against = given.pop("against")
    given["sizes"] = sizes_in(given["sizes"])
    given["cheese"] = tuple(given["cheese"] or PLACES)
    check_folder(given["out"])
    settings = Settings(**given)
    if against is None:
        run(settings)
    else:
        run_against(settings, against)


if __name__ == "__main__":
    if not __package__:  # run as a file: what is imported as `maze` lies one folder up
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
