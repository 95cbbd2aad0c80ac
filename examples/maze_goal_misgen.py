"""Why does a mouse trained with the cheese in the top right corner go to the corner when the cheese is elsewhere?

The experiment: real procgen mazes with the cheese in the bottom right corner, a real trained policy, and the same
policy with one channel set to zero: the channel whose sum says best "the way to the cheese starts UP". If that
channel makes the mouse go up where it should not, the mouse without it finds the cheese more often.

  1. The contrastive pair: two mazes that differ by one moved wall, in four rotations, and the channel's sums.
  2. The channel is chosen on mazes with the cheese where it was in training; none of them is used afterwards.
  3. Both policies run through the same levels, with the same draw behind each sampled action, and so does the
     policy with other live channels zeroed, drawn at random: the controls.

Results go to a folder that is named for the settings: summary.json, table.csv, episodes.csv, ablation.png.
Interrupt it at any time; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from maze.command import exit_status

EXAMPLES = """examples:
  python examples/maze_goal_misgen.py                                 the study with its defaults
  python examples/maze_goal_misgen.py --n 1000 --controls 10          the post's number of levels, more controls
  python examples/maze_goal_misgen.py --channel 5                     another channel
  python examples/maze_goal_misgen.py --site embedder.block3.res2.resadd
  python examples/maze_goal_misgen.py --weights model_rand_region_5.pth   the published network
"""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=200, help="levels of the experiment (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of levels, draws and controls (default: %(default)s)")
    parser.add_argument("--size", type=int, default=15, help="side of the mazes, odd, 7 to 25 (default: %(default)s)")
    parser.add_argument(
        "--site", default="embedder.relu3", help="hook point whose channels are ablated (default: %(default)s)"
    )
    parser.add_argument(
        "--channel", type=int, help="channel to zero (default: the one that says best that the way is UP)"
    )
    parser.add_argument(
        "--controls", type=int, default=3, help="other live channels that are zeroed in turn (default: %(default)s)"
    )
    parser.add_argument(
        "--weights", type=Path, help="a .pth or .safetensors file, of any width (default: the shipped weights)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for the results (default: %(default)s)"
    )
    return parser


def main() -> int:
    """Run the study; return the exit status."""
    given = vars(arguments().parse_args())
    return exit_status(lambda: study(given))


def study(given: dict[str, Any]) -> None:
    """Run the study with these settings."""
    from maze.study import Settings, run  # here, so that --help answers at once

    run(Settings(**given))


if __name__ == "__main__":
    sys.exit(main())
