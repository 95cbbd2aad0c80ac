"""Train a maze policy: the IMPALA network from procgen-tools, with the cheese always in the top right 5x5.

There are two algorithms. Both train on any number of procgen's hard mazes, with all sides from 3 to 25:

  imitation   Learn the first step of the shortest path to the cheese. Two auxiliary losses speed up the beginning:
              maps of the direction to take from every square (field) and of the mouse's cell (cell), read from block 2.
              Their weights fall to 0 at 70% of the run.
  ppo         Learn from reward: 10 at the cheese and nothing elsewhere. Start from a policy trained by imitation.

Each run has a folder. Stop a run with Ctrl-C, or kill it: the same command continues from the last checkpoint.
At the end the folder contains policy.safetensors, facts.json and log.jsonl, the losses over time.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python examples/maze/train.py                                 imitation with the defaults
  python examples/maze/train.py --observations 20000 --out results/trial    a trial of two minutes
  python examples/maze/train.py --bfloat16                      faster on processors with that format
  python examples/maze/train.py --auxiliary cell                the control: no field of directions
  python examples/maze/train.py --algorithm ppo --start results/train/imitation-width1-seed0/policy.safetensors
  python examples/maze/train.py --width 4 --batch 512           the published size; for a GPU

then:
  python examples/maze/evaluate.py --weights results/train/imitation-width1-seed0/policy.safetensors
"""

DEFAULTS: dict[str, dict[str, Any]] = {  # options of one algorithm
    "imitation": {"batch": 128, "rate": 1e-3, "auxiliary": "field,cell", "dagger": 0.25},
    "ppo": {"batch": 1024, "rate": 1e-4, "environments": 64},
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--algorithm", choices=list(DEFAULTS), default="imitation", help="(default: %(default)s)")
    add("--width", type=int, help="1 gives 32 channels at relu3, 4 gives 128 (default: that of --start, or 1)")
    add("--start", type=Path, help="initial weights, .safetensors or .pth (default: random)")
    add("--seed", type=int, default=0, help="random seed for weights, levels and draws (default: %(default)s)")
    sides = "draw sides with probability proportional to side ** POWER, 0 for all equally (default: %(default)g)"
    add("--large", type=float, default=1.0, metavar="POWER", help=sides)
    add("--observations", type=int, default=2_500_000, help="length of the run (default: %(default)s)")
    add("--batch", type=int, help="observations in a batch (default: 128; for ppo 1024 in a minibatch)")
    add("--rate", type=float, help="initial learning rate (default: 0.001; for ppo 0.0001)")
    losses = 'imitation: auxiliary losses, "field,cell", "field", "cell" or "none" (default: field,cell)'
    add("--auxiliary", choices=["field,cell", "field", "cell", "none"], metavar="LOSSES", help=losses)
    walks = "imitation: fraction of the observations from the policy's own walks (default: 0.25)"
    add("--dagger", type=float, metavar="FRACTION", help=walks)
    add("--environments", type=int, help="ppo: number of simultaneous mazes (default: 64)")
    add("--out", type=Path, help="folder for the run (default: results/train/ and the main settings)")
    half = "compute convolutions and products in bfloat16 (default: with cuda)"
    add("--bfloat16", action=argparse.BooleanOptionalAction, help=half)
    add("--workers", type=int, help="processes that generate data; 0 for none (default: 1, with cuda 2-12)")
    return parser


def main(given: list[str] | None = None) -> int:
    from maze.command import exit_status

    options = arguments().parse_args(given)
    return exit_status(lambda: train(options))


def train(options: argparse.Namespace) -> int:
    """Train with these options; return the exit status."""
    import torch  # here and below, so that --help answers at once

    from maze.policy.network import load_policy, new_policy
    from maze.results import locked
    from maze.training.imitation import Imitation
    from maze.training.ppo import PPO
    from maze.training.training_run import LOG, WEIGHTS, TrainingRun

    device = _device()
    policy, facts = (None, {}) if options.start is None else load_policy(options.start)
    settings = _settings(options, facts, device.type)
    auxiliary = "" if options.auxiliary is None else f"-{options.auxiliary.replace(',', '-')}"
    name = f"{settings.algorithm}{auxiliary}-width{settings.width}-seed{settings.seed}"
    folder = options.out or Path("results", "train", name)
    if policy is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            policy = new_policy(settings.width)
    workers = options.workers
    if workers is None:  # one process generates more than a CPU can learn from; a GPU needs several
        workers = 1 if device.type == "cpu" else min(12, max(2, (os.cpu_count() or 2) - 2))
    with locked(folder):
        if settings.algorithm == "ppo":
            trainer: Any = PPO(policy, settings, device=device)
        else:
            trainer = Imitation(policy, settings, device=device, workers=workers)
        if not TrainingRun(trainer, folder).train():
            print(f"Stopped. The checkpoint is in {folder}; the same command continues from it.", file=sys.stderr)
            return 130
    print(f"Done: {folder / WEIGHTS}\nLosses: {folder / LOG}")
    return 0


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        raise TrainingError(f"--width is {options.width}, but the weights in --start have width {width}.")
    chosen = {"width": width, "bfloat16": device == "cuda", **own, **given, "start": facts.get("sha256")}
    return Settings(**{field.name: chosen.get(field.name) for field in fields(Settings)})


if __name__ == "__main__":
    if not __package__:  # run as a file: make the parent folder importable
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
