"""Why does a mouse trained with the cheese in the top right corner go to the corner when the cheese is elsewhere?

Every measurement of the post that asked this, in parts, on real procgen and a real trained policy:

  pair            which channels notice the one wall that decides the first step to the cheese
  search          which hook points know the way
  ranking         the channels that differ most in the post's pair, and what each stands for
  sums            does a channel's sum tell the way, in distribution and out of it
  decision        where the ways to the cheese and to the corner part: what the channel says, where the mouse goes
  ablation        exact effects of ablating the channels on reaching the cheese, with all other channels as controls
  distance        the same against the distance of the cheese from the corner
  top16           sixteen channels zeroed: the vector field
  spatial         is the channel active around the mouse only
  sizes           do channels say the same in mazes of all sizes
  parity          are there other channels for odd and even squares
  generator       what procgen's mazes are like
  cheese-vector   take the cheese away inside the network
  corner-vector   put the corner's vector in
  retarget        make the mouse go where there is no cheese
  statistics      what distances say of where the mouse goes
  random-mazes    do the channels survive in mazes that procgen never makes
  hypothesis      does the sum of all pushes predict the choice

and two that run only when --only names them:

  rollouts        one channel zeroed, in real procgen: the post's causal experiment, with controls and a picture
  sweep           every channel of every convolution zeroed in turn: exact effects

Channels are chosen on mazes that nothing else is measured on, by rules that stand in the code. The parts go to a folder
under --out with a report (report.html, which opens from disk, and report.md), their tables as CSV and their figures as
PNG. Interrupt it at any time; the same command goes on where it stopped.

The report ends with the seconds that each part took, as do the manifests. Where the time of the longest part goes, by
function: python -m cProfile -s cumulative examples/maze_goal_misgen.py --only ablation --n 60 --out results/profile
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from maze.command import UserError, exit_status
from maze.report.limits import limits

EXAMPLES = """examples:
  python examples/maze_goal_misgen.py                                 the whole study, on 200 levels each
  python examples/maze_goal_misgen.py --n 1000                        on as many levels as the post
  python examples/maze_goal_misgen.py --only pair,sums                two parts of it
  python examples/maze_goal_misgen.py --weights model_rand_region_5.pth       on the published network
  python examples/maze_goal_misgen.py --only rollouts --controls 19   the experiment in procgen, with more controls
  python examples/maze_goal_misgen.py --only rollouts --channel 5 --site embedder.block3.res2.resadd
"""

ROLLOUTS = {"size": 15, "site": "embedder.relu3", "channel": None, "controls": 3}  # its own options


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PART,...", help="parts to run (default: all but rollouts and sweep)")
    parser.add_argument("--n", type=int, default=200, help=f"levels (default: %(default)s); {limits()}")
    parser.add_argument("--seed", type=int, default=0, help="of levels, draws and controls (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=Path,
        help="a .pth or .safetensors file, of any width (default: the shipped policies, side by side)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for the results (default: %(default)s)"
    )
    rollouts = parser.add_argument_group("for --only rollouts")
    rollouts.add_argument("--size", type=int, help="side of the mazes, odd, 7 to 25 (default: %(default)s)")
    rollouts.add_argument("--site", help="hook point whose channels are ablated (default: %(default)s)")
    rollouts.add_argument(
        "--channel", type=int, help="channel to zero (default: the one that says best that the way is UP)"
    )
    rollouts.add_argument(
        "--controls",
        type=int,
        help="other live channels of about the same mean activation, zeroed in turn; from 19 on the rank of the "
        "channel among them has a p-value (default: %(default)s)",
    )
    parser.set_defaults(**ROLLOUTS)
    return parser


def main() -> int:
    """Run the study; return the exit status."""
    given = vars(arguments().parse_args())
    return exit_status(lambda: study(given))


def study(given: dict[str, Any]) -> None:
    """Run the parts that were asked for."""
    from maze.experiment import Settings, run_rollouts  # here, so that --help answers at once
    from maze.report.run import RunSettings, run

    only = tuple(name.strip() for name in (given.pop("only") or "").split(",") if name.strip())
    parts = tuple(part for part in only if part != "rollouts")
    if "rollouts" not in only and (stray := [name for name in ROLLOUTS if given[name] != ROLLOUTS[name]]):
        raise UserError(f"--{stray[0]} is for --only rollouts; the other parts choose by rules of their own.")
    if "rollouts" in only:
        run_rollouts(Settings(**given))
    if parts or not only:
        run(RunSettings(parts, *(given[name] for name in ("n", "seed", "weights", "out"))))


if __name__ == "__main__":
    sys.exit(main())
