"""Functions and models that the workers of an executor import."""

from __future__ import annotations

import functools
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import gymnasium
import torch
from torch import Tensor, nn

from chanpatch import HookPoints, edit, hook_points, zero_ablate
from chanpatch.engine.paths import leaves

ENVS = functools.partial(gymnasium.make_vec, "CartPole-v1", num_envs=4, vectorization_mode="sync")


def mlp() -> tuple[HookPoints, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    observations = torch.randn(6, 4)
    return hook_points(model, observations), observations


def ablations(points: HookPoints):
    return {site: zero_ablate(site) for name in "13" for site in points.site(name).split("feature")}


def noted(log: Path, name: str, activation: Tensor) -> Tensor:
    with log.open("a") as file:
        file.write(f"{name}\n")
    return activation * 0


def killed_once(log: Path, activation: Tensor) -> Tensor:
    marker = log.with_suffix(".killed")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return noted(log, "last", activation)


def edits(points: HookPoints, log: Path, last):
    """One patch for each feature at two hook points, which notes in `log` that it runs; the last one is `last`."""
    sites = [site for name in "13" for site in points.site(name).split("feature")]
    patches = {f"{row}": edit(site, functools.partial(noted, log, f"{row}")) for row, site in enumerate(sites[:-1])}
    return patches | {"last": edit(sites[-1], functools.partial(last, log))}


def interrupting(log: Path, activation: Tensor) -> Tensor:
    if threading.current_thread() is not threading.main_thread():
        with suppress(FileExistsError):  # another thread has already interrupted
            log.with_suffix(".interrupted").touch(exist_ok=False)
            signal.raise_signal(signal.SIGINT)
    return activation * 0


def failing(log: Path, activation: Tensor) -> Tensor:
    raise LookupError("no such activation")


def summed(output) -> Tensor:
    return sum(tensor.double().sum() for _, tensor in leaves(output))


def first_logit(output: Tensor) -> Tensor:
    return output[:, 0]
