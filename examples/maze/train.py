"""Train a maze policy: the IMPALA network of procgen-tools, with the cheese always in the top right 5x5.

Two algorithms, on procgen's hard mazes of all sides from 3 to 25, any number of levels:

  imitation   The first step of the shortest path to the cheese. Two auxiliary losses speed up the beginning: maps of
              the direction to take from every square (field) and of the mouse's cell (cell), read from block 2. Their
              weights fall to 0 at 70% of the run.
  ppo         Reward, 10 at the cheese and nothing elsewhere. Start it from a policy that imitates.

A run has a folder. Stop it with Ctrl-C, or kill it: the same command continues from the last checkpoint.
At the end the folder holds policy.safetensors, facts.json and log.jsonl, the course of the losses.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python examples/maze/train.py                                 imitation with the defaults
  python examples/maze/train.py --minutes 2 --out results/trial    a trial
  python examples/maze/train.py --bfloat16                      faster on processors with that format
  python examples/maze/train.py --auxiliary cell                the control: no field of directions
  python examples/maze/train.py --algorithm ppo --start results/train/imitation-width1-seed0/policy.safetensors
  python examples/maze/train.py --width 4 --batch 512 --minutes 30    the published size; for a GPU

then:
  python examples/maze/evaluate.py --weights results/train/imitation-width1-seed0/policy.safetensors
"""

DEFAULTS: dict[str, dict[str, Any]] = {  # options of one algorithm
    "imitation": {"batch": 128, "rate": 1e-3, "auxiliary": "field,cell", "dagger": 0.25},
    "ppo": {"batch": 1024, "rate": 1e-4, "environments": 64},
}
OBSERVATIONS = 2_500_000


def arguments() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--algorithm", choices=list(DEFAULTS), default="imitation", help="(default: %(default)s)")
    add("--width", type=int, help="1 gives 32 channels at relu3, 4 gives 128 (default: that of --start, or 1)")
    add("--start", type=Path, help="initial weights, .safetensors or .pth (default: random)")
    add("--seed", type=int, default=0, help="random seed of weights, levels and draws (default: %(default)s)")
    sides = "draw sides with probability proportional to side ** POWER, 0 for all equally (default: %(default)g)"
    add("--large", type=float, default=1.0, metavar="POWER", help=sides)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--observations", type=int, help=f"the budget (default: {OBSERVATIONS:,})")
    budget.add_argument("--minutes", type=float, help="the budget as time; the result is then not reproducible")
    add("--batch", type=int, help="observations in a batch (default: 128; for ppo 1024 in a minibatch)")
    add("--rate", type=float, help="learning rate at the beginning (default: 0.001; for ppo 0.0001)")
    losses = 'imitation: auxiliary losses, "field,cell", "field", "cell" or "none" (default: field,cell)'
    add("--auxiliary", choices=["field,cell", "field", "cell", "none"], metavar="LOSSES", help=losses)
    walks = "imitation: share of the observations from the policy's own walks (default: 0.25)"
    add("--dagger", type=float, metavar="SHARE", help=walks)
    add("--environments", type=int, help="ppo: number of mazes at once (default: 64)")
    add("--out", type=Path, help="the run's folder (default: results/train/ and the main settings)")
    add("--no-resume", action="store_true", help="start over, even if the folder has a checkpoint")
    add("--save-minutes", type=float, default=2.0, help="time between two checkpoints (default: %(default)s)")
    half = "compute convolutions and products in bfloat16 (default: with cuda)"
    add("--bfloat16", action=argparse.BooleanOptionalAction, help=half)
    add("--device", choices=["cpu", "cuda"], help="(default: cuda if available)")
    add("--workers", type=int, help="processes that draw data; 0 for none (default: 1, with cuda 2-12)")
    return parser


def main(given: list[str] | None = None) -> int:
    """Train a policy; return the exit status."""
    from maze.command import exit_status

    options = arguments().parse_args(given)
    return exit_status(lambda: train(options))


def train(options: argparse.Namespace) -> int:
    """Train with these options; return the exit status."""
    from maze.policy.network import load_policy  # here and below, so that --help answers at once
    from maze.results import locked
    from maze.training.training_run import LOG, WEIGHTS, read_checkpoint, run

    device = _device(options.device)
    started, facts = (None, {}) if options.start is None else load_policy(options.start)
    settings = _settings(options, facts, device.type)
    auxiliary = "" if options.auxiliary is None else f"-{options.auxiliary.replace(',', '-')}"
    name = f"{settings.algorithm}{auxiliary}-width{settings.width}-seed{settings.seed}"
    folder = options.out or Path("results", "train", name)
    with locked(folder):
        checkpoint = None if options.no_resume else read_checkpoint(folder, settings)
        trainer = _trainer(started, settings, device, options.workers)
        if not run(trainer, settings, folder, checkpoint, save_seconds=60 * options.save_minutes):
            print(f"Stopped. The checkpoint is in {folder}; the same command continues from it.", file=sys.stderr)
            return 130
    print(f"Done: {folder / WEIGHTS}\nLosses: {folder / LOG}")
    return 0


def _device(name: str | None) -> Any:
    import torch

    from maze.training.trainer import TrainingError

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise TrainingError("--device is cuda, but torch finds none.")
    return torch.device(name or ("cuda" if found else "cpu"))


def _settings(options: argparse.Namespace, facts: dict[str, Any], device: str) -> Any:
    """The options that determine the result, with the algorithm's defaults; random weights have no facts."""
    from dataclasses import fields

    from maze.training.trainer import Settings, TrainingError

    given = {name: value for name, value in vars(options).items() if value is not None}
    own = DEFAULTS[options.algorithm]
    for name in given.keys() & {name for each in DEFAULTS.values() for name in each} - own.keys():
        raise TrainingError(f"--{name} has no effect with --algorithm {options.algorithm}.")
    width = facts.get("width", 1)
    if facts and options.width not in (None, width):
        raise TrainingError(f"--width is {options.width}, but --start has width {width}.")
    budget = {} if options.minutes is not None else {"observations": OBSERVATIONS}
    chosen = {"width": width, "bfloat16": device == "cuda", **budget, **own, **given, "start": facts.get("sha256")}
    return Settings(**{field.name: chosen.get(field.name) for field in fields(Settings)})


def _trainer(policy: Any, settings: Any, device: Any, workers: int | None) -> Any:
    """The algorithm with its policy; None draws the policy's weights."""
    import torch

    from maze.policy.network import new_policy
    from maze.training.imitation import Imitation
    from maze.training.ppo import PPO

    if policy is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            policy = new_policy(settings.width)
    if settings.algorithm == "ppo":
        return PPO(policy, settings, device=device)
    if workers is None:  # one draws more than a CPU can learn from; a GPU needs several
        workers = 1 if device.type == "cpu" else min(12, max(2, (os.cpu_count() or 2) - 2))
    return Imitation(policy, settings, device=device, workers=workers)


if __name__ == "__main__":
    if not __package__:  # run as a file: make the folder above importable
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
