"""Training by imitation: the policy learns the first step of the shortest path to the cheese.

A policy that sees only first steps learns slowly. Two auxiliary maps, read from block 2, help at the beginning: the
direction to take from every free square, and the mouse's cell. The first map teaches directions, so claims about
directions in a network need a control trained without this map.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from chanpatch import recording
from maze.command import UserError
from maze.paths import Direction
from maze.policy.network import ACTIONS
from maze.states import WORLD
from maze.training.trainer import Trainer, Update
from maze.training.training_data import NO_DIRECTION, WALK_DRAWS, Chunks, Examples, TrainingMazes, batches, sampled

READ_FROM = "embedder.block2"  # the hook point for the auxiliary maps: (batch, channel, row=16, col=16)
CHANNELS = 32  # at this hook point, at width 1
AUXILIARY = {"field": (len(Direction), 1.0), "cell": (1, 0.3)}  # number of maps, and initial weight of the loss
AUXILIARY_END = 0.7  # fraction of the run after which the auxiliary losses have weight 0
VALUE_WEIGHT = 0.02
REWARD, DISCOUNT = 10.0, 0.99  # the value head learns REWARD * DISCOUNT ** distance
WEIGHT_DECAY = 1e-4

PATIENCE = 256  # steps after which the policy's walk on a level is given up
EXPERT_END = 0.3  # fraction of the run after which the policy chooses all steps of its walks


class Imitation(Trainer):
    """Imitation of shortest paths, with worker processes that generate the data."""

    largest_norm = 1.0

    def __init__(self, policy: nn.Module, settings: Namespace, *, device: torch.device, workers: int) -> None:
        super().__init__(policy, settings, device=device)
        self.workers = workers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.maps = nn.ModuleDict()  # to maps of the world, (batch, map, row=25, col=25)
            for part in [part for part in AUXILIARY if part in settings.auxiliary]:
                # The shuffle doubles the resolution first, since a cell is smaller than a pixel of the activation.
                layers = nn.Conv2d(CHANNELS * settings.width, 4 * AUXILIARY[part][0], 1), nn.PixelShuffle(2)
                self.maps[part] = nn.Sequential(*layers, nn.Upsample((WORLD, WORLD), mode="bilinear"))
        self.maps.to(device)
        parameters = [*self.policy.parameters(), *self.maps.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=WEIGHT_DECAY)
        self.walked = round(settings.dagger * settings.batch)  # the last rows of a batch: the policy's own walks
        if settings.dagger and not self.walked:
            raise UserError(f"--dagger {settings.dagger} of --batch {settings.batch} is less than one observation.")
        self.mazes = None
        if self.walked:
            self.mazes = TrainingMazes(self.walked, seed=settings.seed, large=settings.large, patience=PATIENCE)
        self._stream: Iterator[Examples] | None = None

    def update(self, number: int, progress: float) -> Update:
        started = time.perf_counter()
        drawn = self.settings.batch - self.walked
        if self._stream is None:
            chunks = Chunks(self.settings.seed, self.settings.large)
            self._stream = batches(chunks, drawn, first=number * drawn, workers=self.workers)
        examples = next(self._stream)
        if self.mazes:
            examples += self.mazes.examples()
        waited = time.perf_counter() - started
        direction, losses = self._losses(examples, max(0.0, 1 - progress / AUXILIARY_END))
        right = direction.argmax(dim=1) == torch.from_numpy(examples.step).to(self.device)
        measures = {name: loss for name, (_, loss) in losses.items()} | {"right": right[:drawn]}
        walk = self._walk_actions(direction[drawn:], examples.step[drawn:], number, progress)
        loss = torch.stack([weight * loss for weight, loss in losses.values()]).sum()
        self.descend(loss, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        if self.mazes:
            started = time.perf_counter()
            self.mazes.step(walk)  # while a GPU still computes the gradient
            waited += time.perf_counter() - started
            measures["right_walked"] = right[drawn:]
        return Update(len(examples), waited, {name: each.detach().float().mean() for name, each in measures.items()})

    def state(self) -> dict[str, Any]:
        return {**super().state(), "maps": self.maps.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.maps.load_state_dict(state["maps"])

    def _losses(self, examples: Examples, auxiliary: float) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        """Log-probabilities of the directions (batch, direction), and every loss with its weight."""
        on_device = {name: torch.from_numpy(part).to(self.device) for name, part in vars(examples).items()}
        parts = self.maps if auxiliary else {}
        with recording(self.policy, READ_FROM, detach=False) if parts else nullcontext({}) as cache:
            logits, value = self.forward(on_device["frames"])
        losses = {}
        for part, maps in parts.items():
            world, target = maps(cache[READ_FROM].float()), on_device[part].long()
            given = world if part == "field" else world.flatten(1)
            loss = F.cross_entropy(given, target, ignore_index=NO_DIRECTION)
            losses[part] = (auxiliary * AUXILIARY[part][1], loss)
        direction = direction_log_probabilities(logits)
        losses["step"] = (1.0, F.nll_loss(direction, on_device["step"]))
        losses["value"] = (VALUE_WEIGHT, F.mse_loss(value, REWARD * DISCOUNT ** on_device["distance"]))
        return direction, losses

    def _walk_actions(
        self, direction: Tensor, steps: NDArray[np.int64], number: int, progress: float
    ) -> NDArray[np.int64]:
        """The next actions of the walks, sampled from the policy: (walk,)."""
        # At first most are the right step instead (DAgger's beta), since an untrained policy never leaves the start.
        rng = np.random.default_rng((self.settings.seed, WALK_DRAWS, number))
        draws, expert = rng.random(len(steps)), rng.random(len(steps)) < 1 - progress / EXPERT_END
        chosen = np.where(expert, steps, sampled(direction.detach().exp().cpu().numpy(), draws))
        return np.array([ACTIONS[move][0] for move in Direction])[chosen]


def direction_log_probabilities(logits: Tensor) -> Tensor:
    """Log of the summed probability of each direction's actions, (batch, direction), from normalized logits."""
    return torch.stack([logits[:, list(ACTIONS[move])].logsumexp(dim=1) for move in Direction], dim=1)
