"""Train a maze policy: the IMPALA network of the published checkpoints, with the cheese always in the top right 5x5.

There are two algorithms. Both train on any number of procgen's hard mazes, with all side lengths from 3 to 25:

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python examples/maze/train.py                                 imitation with the defaults
  python examples/maze/train.py --observations 20000 --out results/trial    a short trial
  python examples/maze/train.py --bfloat16                      faster on processors with that format
  python examples/maze/train.py --auxiliary cell                the control: no field of directions
  python examples/maze/train.py --algorithm ppo --start results/train/imitation-width1-seed0/policy.safetensors
  python examples/maze/train.py --keep-every 5                  also keep the policy every five minutes
  python examples/maze/train.py --width 4 --batch 512           the published size; for a GPU

then:
  python examples/maze/evaluate.py --weights results/train/imitation-width1-seed0/policy.safetensors
"""

DEFAULTS: dict[str, dict[str, Any]] = {  # options of one algorithm
    "imitation": {"batch": 128, "rate": 1e-3, "auxiliary": "field,cell", "dagger": 0.25},
    "ppo": {"batch": 1024, "rate": 1e-4, "environments": 64},
}


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Return a function that argparse calls to parse a number, and that rejects numbers outside the given range."""

    def parsed(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # written so that NaN is rejected too
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}; got {text}")
        return value

    parsed.__name__ = kind.__name__  # argparse prints this name if the text is not a number
    return parsed


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--algorithm", choices=list(DEFAULTS), default="imitation", help="(default: %(default)s)")
    width = "1 gives 32 channels at relu3, 4 gives 128 (default: that of --start, or 1)"
    add("--width", type=number(int, 1, 16), help=width)
    add("--start", type=Path, metavar="WEIGHTS", help="initial weights, .safetensors or .pth (default: random)")
    seed = "random seed for weights, levels and draws (default: %(default)s)"
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help=seed)
    large = "draw each side length with probability proportional to side ** POWER (default: %(default)g; 0: uniform)"
    add("--large", type=number(float, 0, 8), default=1.0, metavar="POWER", help=large)
    budget = "length of the run (default: %(default)s)"
    add("--observations", type=number(int, 1, 10**12), default=2_500_000, metavar="N", help=budget)
    batch = "observations in a batch (default: 128; for ppo 1024 in a minibatch)"
    add("--batch", type=number(int, 2, 65536), metavar="N", help=batch)
    add("--rate", type=number(float, 1e-7, 1), help="initial learning rate (default: 0.001; for ppo 0.0001)")
    losses = 'imitation: auxiliary losses, "field,cell", "field", "cell" or "none" (default: field,cell)'
    add("--auxiliary", choices=["field,cell", "field", "cell", "none"], metavar="LOSSES", help=losses)
    walks = "imitation: fraction of the observations from the policy's own walks (default: 0.25)"
    add("--dagger", type=number(float, 0, 0.9), metavar="FRACTION", help=walks)
    mazes = "ppo: number of simultaneous mazes (default: 64)"
    add("--environments", type=number(int, 1, 4096), metavar="N", help=mazes)
    add("--out", type=Path, metavar="FOLDER", help="(default: results/train/ and the main settings)")
    keep = "save a copy of the policy in FOLDER/kept at this interval"
    add("--keep-every", type=number(float, 0.01, 1e4), metavar="MINUTES", help=keep)
    half = "compute convolutions and products in bfloat16 (default: with cuda)"
    add("--bfloat16", action=argparse.BooleanOptionalAction, help=half)
    processes = "processes that generate data (default: 1, with cuda 2-12)"
    add("--workers", type=number(int, 0, 64), metavar="N", help=processes)
    return parser


def main(given: list[str] | None = None) -> int:
    from maze.command import exit_status

    options = arguments().parse_args(given)
    return exit_status(lambda: train(options))


def train(options: argparse.Namespace) -> int:
    """Train a policy with the given options, and return the exit status."""
    import torch  # here and below, so that --help answers at once

    from maze.policy.network import load_policy, new_policy
    from maze.results import locked
    from maze.training.imitation import Imitation
    from maze.training.ppo import PPO
    from maze.training.trainer import LOG, WEIGHTS

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
        if not trainer.train(folder, options.keep_every):
            print(f"Stopped. The checkpoint is in {folder}; the same command continues from it.", file=sys.stderr)
            return 130
    print(f"Done: {folder / WEIGHTS}\nLosses: {folder / LOG}")
    return 0


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _settings(options: argparse.Namespace, facts: dict[str, Any], device: str) -> argparse.Namespace:
    """Return the options that determine the result, with the algorithm's defaults filled in.

    `facts` describes the initial weights. It is empty if the initial weights are random.
    """
    from maze.command import UserError

    given = {name: value for name, value in vars(options).items() if name not in ("out", "workers", "keep_every")}
    for algorithm, own in DEFAULTS.items():
        for name in own.keys() - DEFAULTS[options.algorithm].keys():
            if given[name] is not None:
                raise UserError(f"--{name} only applies to --algorithm {algorithm}.")
    width = facts.get("width", 1)
    if facts and options.width not in (None, width):
        raise UserError(f"--width is {options.width}, but the weights in --start have width {width}.")
    defaults = {"width": width, "bfloat16": device == "cuda", **DEFAULTS[options.algorithm]}
    chosen = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    return argparse.Namespace(**chosen | {"start": facts.get("sha256")})


if __name__ == "__main__":
    if not __package__:  # run as a file: make the parent folder importable
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
