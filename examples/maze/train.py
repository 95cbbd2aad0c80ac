"""Train a maze policy: the IMPALA network of procgen-tools, with the cheese always in the top right 5x5.

Two algorithms, on procgen's hard mazes of all sides from 3 to 25, any number of levels:

  imitation   The first step of the shortest path to the cheese. Two auxiliary losses speed up the beginning: maps of
              the direction to take from every square (field) and of the mouse's cell (cell), read from block 2. Their
              weights fall to 0 at 70% of the run.
  ppo         Reward, 10 at the cheese and nothing elsewhere. Start it from a policy that imitates.

A run lives in a folder. Stop it with Ctrl-C, or kill it: the same command goes on from the last checkpoint.
At the end the folder holds policy.safetensors and facts.json; log.jsonl says how it went.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = """examples:
  python examples/maze/train.py                                 imitation with the defaults
  python examples/maze/train.py --minutes 2 --out results/trial    a trial
  python examples/maze/train.py --bfloat16                      faster where the processor knows that format
  python examples/maze/train.py --auxiliary cell                the control: no directions are taught but the first step
  python examples/maze/train.py --algorithm ppo --start results/train/imitation-width1-seed0/policy.safetensors
  python examples/maze/train.py --width 4 --batch 512 --minutes 30    the published size; for a GPU

then:
  python examples/maze/evaluate.py --weights results/train/imitation-width1-seed0/policy.safetensors
  python examples/maze_goal_misgen.py --weights results/train/imitation-width1-seed0/policy.safetensors
"""

# Options that belong to one algorithm, with its defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "imitation": {"batch": 128, "rate": 1e-3, "auxiliary": "field,cell", "dagger": 0.25},
    "ppo": {"batch": 1024, "rate": 1e-4, "environments": 64},
}
OBSERVATIONS = 2_500_000


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"error: {message}\n")


def arguments() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--algorithm", choices=list(DEFAULTS), default="imitation", help="(default: %(default)s)")
    add("--width", type=int, help="1 gives 32 channels at relu3, 4 gives 128 (default: that of --start, or 1)")
    add("--start", "--weights", type=Path, help="weights to start from, .safetensors or .pth (default: random ones)")
    add("--seed", type=int, default=0, help="of weights, levels and draws (default: %(default)s)")
    add(
        "--large",
        type=float,
        nargs="?",
        const=1.0,
        default=1.0,
        metavar="POWER",
        help="draw sides with probability proportional to side ** POWER, 0 for all equally (default: %(default)g)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--observations", type=int, help=f"the budget (default: {OBSERVATIONS:,})")
    budget.add_argument("--minutes", type=float, help="the budget as time; two runs are then not exactly alike")
    add("--batch", type=int, help="observations in a batch (default: 128; for ppo 1024 in a minibatch)")
    add("--rate", type=float, help="learning rate at the beginning (default: 0.001; for ppo 0.0001)")
    imitation = parser.add_argument_group("for imitation")
    imitation.add_argument(
        "--auxiliary",
        choices=["field,cell", "field", "cell", "none"],
        metavar="LOSSES",
        help='auxiliary losses: "field,cell", "field", "cell" or "none" (default: field,cell)',
    )
    imitation.add_argument(
        "--dagger",
        type=float,
        metavar="SHARE",
        help="share of the observations that come from where the policy itself goes (default: 0.25)",
    )
    ppo = parser.add_argument_group("for ppo")
    ppo.add_argument("--environments", type=int, help="mazes that are acted in at once (default: 64)")
    running = parser.add_argument_group("running")
    running.add_argument("--out", type=Path, help="the run's folder (default: results/train/ and the main settings)")
    running.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the folder's checkpoint, if there is one; --no-resume starts over (default: %(default)s)",
    )
    running.add_argument(
        "--save-minutes", type=float, default=2.0, help="time between two checkpoints (default: %(default)s)"
    )
    running.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        help="compute convolutions and products in half the bits, which is faster where the processor knows how "
        "(default: with cuda)",
    )
    running.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda where there is one)")
    running.add_argument(
        "--workers",
        type=int,
        help="processes that draw data; 0 draws them between updates (default: 1, with cuda 2-12)",
    )
    return parser


def main(given: list[str] | None = None) -> int:
    """Train a policy; return the exit status."""
    from maze.command import exit_status

    options = arguments().parse_args(given)
    return exit_status(lambda: train(options))


def train(options: argparse.Namespace) -> int:
    """Train as the options say; return the exit status."""
    from maze.results import locked  # here and below, so that --help answers at once

    device = _device(options.device)
    policy, width, start = _policy(options)
    settings = _settings(options, width, start, device.type)
    folder = options.out or _folder(options, width)
    with locked(folder):
        return _trained(options, policy, settings, folder, device)


def _trained(options: argparse.Namespace, policy: Any, settings: Any, folder: Path, device: Any) -> int:
    """Train in a folder that no other run works in; return the exit status."""
    from maze.training.training_run import LOG, WEIGHTS, read_checkpoint, run

    checkpoint = read_checkpoint(folder, settings) if options.resume else None
    if settings.algorithm == "ppo":
        from maze.training.ppo import PPO

        trainer: Any = PPO(policy, settings, device=device)
    else:
        from maze.training.imitation import Imitation

        trainer = Imitation(policy, settings, device=device, workers=_workers(options, device.type))
    if not run(trainer, settings, folder, checkpoint, save_seconds=60 * options.save_minutes):
        print(f"Stopped. The checkpoint is in {folder}; the same command goes on from there.", file=sys.stderr)
        return 130
    print(f"Done: {folder / WEIGHTS}\nHow it went: {folder / LOG}")
    return 0


def _device(name: str | None) -> Any:
    """The device of that name; without one a GPU where there is one."""
    import torch

    from maze.training.training_run import TrainingError

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise TrainingError("--device is cuda, but torch finds none.")
    return torch.device(name or ("cuda" if found else "cpu"))


def _settings(options: argparse.Namespace, width: int, start: str | None, device: str) -> Any:
    """The options, with the algorithm's defaults, without those that do not change the numbers."""
    from maze.training.training_run import Settings, TrainingError

    chosen = DEFAULTS[options.algorithm]
    for name in {name for defaults in DEFAULTS.values() for name in defaults} - chosen.keys():
        if getattr(options, name) is not None:
            raise TrainingError(f"--{name} has no meaning for --algorithm {options.algorithm}.")
    particular = {
        name: default if getattr(options, name) is None else getattr(options, name) for name, default in chosen.items()
    }
    return Settings(
        algorithm=options.algorithm,
        width=width,
        start=start,
        seed=options.seed,
        large=options.large,
        observations=OBSERVATIONS if options.observations is None and options.minutes is None else options.observations,
        minutes=options.minutes,
        bfloat16=device == "cuda" if options.bfloat16 is None else options.bfloat16,
        **particular,
    )


def _policy(options: argparse.Namespace) -> tuple[Any, int, str | None]:
    """The policy to train, its width, and the sha256 of the weights that it starts from."""
    import torch

    from maze.policy.network import load_policy, new_policy
    from maze.training.training_run import TrainingError

    if options.start is not None:
        policy, facts = load_policy(options.start)
        if options.width not in (None, facts["width"]):
            raise TrainingError(f"--width is {options.width}, but --start has width {facts['width']}.")
        return policy, facts["width"], facts["sha256"]
    width = 1 if options.width is None else options.width
    if not 1 <= width <= 16:
        raise TrainingError(f"--width is {width}, but it is 1 to 16.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return new_policy(width), width, None


def _folder(options: argparse.Namespace, width: int) -> Path:
    """Named for what most often differs between runs; the checkpoint's settings tell the rest apart."""
    auxiliary = "" if options.auxiliary is None else f"-{options.auxiliary.replace(',', '-')}"
    return Path("results", "train", f"{options.algorithm}{auxiliary}-width{width}-seed{options.seed}")


def _workers(options: argparse.Namespace, device: str) -> int:
    """One draws more than a CPU can learn from; a GPU needs several."""
    if options.workers is not None:
        return int(options.workers)
    return 1 if device == "cpu" else min(12, max(2, (os.cpu_count() or 2) - 2))


if __name__ == "__main__":
    if not __package__:  # run as a file: what is imported as `maze` lies one folder up
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
