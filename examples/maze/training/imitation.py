"""Training by imitation: the policy is to take the first step of the shortest path to the cheese.

Two auxiliary maps are read from block 2 at the beginning, since a policy that is shown nothing but first steps learns
slowly: the direction to take from every free square, and the mouse's cell. A policy that is to say something about
directions in a network must not be taught the first: train a control without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

from chanpatch import recording
from maze.environment.paths import Direction
from maze.environment.states import WORLD
from maze.policy.network import ACTIONS
from maze.training.training_data import NO_DIRECTION, Chunks, Examples, TrainingMazes, batches, joined, sampled
from maze.training.training_run import Settings, Update

READ_FROM = "embedder.block2"  # the hook point of the auxiliary maps: (batch, channel, row=16, col=16)
CHANNELS = 32  # that it has at width 1
AUXILIARY_END = 0.7  # share of the run at which the weights of the auxiliary losses have fallen to 0
VALUE_WEIGHT = 0.02
REWARD, DISCOUNT = 10.0, 0.99  # the value head learns REWARD * DISCOUNT ** distance
WEIGHT_DECAY = 1e-4
LARGEST_NORM = 1.0  # of the gradient

PATIENCE = 256  # steps after which the policy's walk on a level is given up
EXPERT_END = 0.3  # share of the run at which nobody walks for the policy any more

_DRAWS = 2  # names the walks' draws among those of a seed


class AuxiliaryMaps(nn.Module):
    """Maps of the world, read by one 1x1 convolution.

    Args:
        channels: of the activation that is read.
        maps: number of maps.
    """

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * maps, 1)

    def forward(self, activation: Tensor) -> Tensor:
        """From (batch, channel, row=16, col=16) to (batch, map, row=25, col=25); the top row first, as in the image."""
        # Twice as fine first: a cell is smaller than a pixel of the activation.
        maps = F.pixel_shuffle(self.conv(activation), 2)
        return F.interpolate(maps.float(), size=(WORLD, WORLD), mode="bilinear")


class Auxiliary(NamedTuple):
    """What is read from block 2.

    Attributes:
        maps: how many.
        weight: of the loss at the beginning.
        loss: from the maps (batch, map, row, col) and the target.
    """

    maps: int
    weight: float
    loss: Callable[[Tensor, Tensor], Tensor]


AUXILIARY = {
    "field": Auxiliary(len(Direction), 1.0, partial(F.cross_entropy, ignore_index=NO_DIRECTION)),
    "cell": Auxiliary(1, 0.3, lambda maps, cell: F.cross_entropy(maps.flatten(1), cell)),
}


class Imitation:
    """The policy, what it learns with and from.

    Args:
        policy: to train.
        settings: of the run.
        device: to train on.
        workers: processes that draw data.
    """

    def __init__(self, policy: nn.Module, settings: Settings, *, device: torch.device, workers: int) -> None:
        self.policy = policy.to(device, memory_format=torch.channels_last).train()
        self.settings, self.device, self.workers = settings, device, workers
        parts = [part for part in AUXILIARY if part in (settings.auxiliary or "").split(",")]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            channels = CHANNELS * settings.width
            self.maps = nn.ModuleDict({part: AuxiliaryMaps(channels, AUXILIARY[part].maps) for part in parts})
        self.maps.to(device)
        parameters = [*self.policy.parameters(), *self.maps.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=WEIGHT_DECAY)
        self.walked = round((settings.dagger or 0) * settings.batch)  # rows of a batch that the policy walked to
        self.mazes = (
            TrainingMazes(self.walked, seed=settings.seed, large=settings.large, patience=PATIENCE)
            if self.walked
            else None
        )
        self._stream: Iterator[Examples] | None = None

    def update(self, number: int, progress: float) -> Update:
        """One step of the optimiser on one batch; the rows that the policy walked to are the last."""
        started = time.perf_counter()
        examples = self._next_examples(number)
        waited = time.perf_counter() - started
        self._schedule(progress)
        direction, losses = self._losses(examples, max(0.0, 1 - progress / AUXILIARY_END))
        right = direction.argmax(dim=1) == torch.from_numpy(examples.step).to(self.device)
        walk = self._walk_actions(direction, examples.step, number, progress) if self.mazes else None
        self.optimizer.zero_grad()
        torch.stack([weight * loss for weight, loss in losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_([*self.policy.parameters(), *self.maps.parameters()], LARGEST_NORM)
        self.optimizer.step()
        measures = {name: loss for name, (_, loss) in losses.items()} | {"right": right[: len(right) - self.walked]}
        if self.mazes and walk is not None:
            started = time.perf_counter()
            self.mazes.step(walk)  # while a GPU is still at work on the gradient
            waited += time.perf_counter() - started
            measures["right_walked"] = right[-self.walked :]
        return Update(len(examples), waited, {name: each.detach().float().mean() for name, each in measures.items()})

    def state(self) -> dict[str, Any]:
        """Of the maps, the optimiser and the walks; data and draws follow from the number of the update."""
        return {
            "maps": self.maps.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mazes": self.mazes.state() if self.mazes else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self.maps.load_state_dict(state["maps"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.mazes:
            self.mazes.restore(state["mazes"])

    def _next_examples(self, number: int) -> Examples:
        size = self.settings.batch - self.walked
        if self._stream is None:
            chunks = Chunks(self.settings.seed, self.settings.large)
            self._stream = batches(chunks, size, first=number * size, workers=self.workers)
        drawn = next(self._stream)
        return joined([drawn, self.mazes.examples()]) if self.mazes else drawn

    def _schedule(self, progress: float) -> None:
        """A cosine from the rate down to 2% of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)

    def _losses(self, examples: Examples, auxiliary: float) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        """Log-probabilities of the directions (batch, direction), and every loss with its weight.

        Args:
            examples: to learn from.
            auxiliary: factor of the auxiliary weights; at 0 the maps are not read.
        """
        frames, step, distance, field, cell = (
            torch.from_numpy(part).to(self.device)
            for part in (examples.frames, examples.step, examples.distance, examples.field, examples.cell)
        )
        losses = {}
        with precision(self.device, self.settings):
            if auxiliary and self.maps:
                with recording(self.policy, READ_FROM, detach=False) as cache:
                    actions, value = self.policy(network_input(frames))
                targets = {"field": field.long(), "cell": cell}
                for part, maps in self.maps.items():
                    read = maps(cache[READ_FROM])
                    losses[part] = (auxiliary * AUXILIARY[part].weight, AUXILIARY[part].loss(read, targets[part]))
            else:
                actions, value = self.policy(network_input(frames))
        direction = direction_log_probabilities(log_probabilities(actions))
        losses["step"] = (1.0, F.nll_loss(direction, step))
        losses["value"] = (VALUE_WEIGHT, F.mse_loss(value.float(), REWARD * DISCOUNT**distance))
        return direction, losses

    def _walk_actions(self, direction: Tensor, steps: np.ndarray, number: int, progress: float) -> np.ndarray:
        """How the walks go on: (walk,), actions sampled from the policy.

        At first the right step is often taken instead (DAgger's beta): an untrained policy would never leave the start.
        """
        rng = np.random.default_rng((self.settings.seed, _DRAWS, number))
        draws, expert = rng.random(self.walked), rng.random(self.walked) < 1 - progress / EXPERT_END
        chosen = sampled(direction[-self.walked :].detach().exp().cpu().numpy(), draws)
        chosen = np.where(expert, steps[-self.walked :], chosen)
        return np.array([ACTIONS[move][0] for move in Direction])[chosen]


def log_probabilities(actions: Categorical) -> Tensor:
    """Of every action, float32 (batch, action); in bfloat16 they do not quite sum to 1."""
    return torch.log_softmax(actions.logits.float(), dim=1)


def direction_log_probabilities(logits: Tensor) -> Tensor:
    """Log of the summed probability of each direction's actions: (batch, direction).

    Args:
        logits: normalised, (batch, action).
    """
    return torch.stack([logits[:, list(ACTIONS[move])].logsumexp(dim=1) for move in Direction], dim=1)


def network_input(frames: Tensor) -> Tensor:
    """What `maze.levels.policy_input` gives, in the memory layout in which convolutions are fast.

    Args:
        frames: uint8 (batch, row=64, col=64, channel=3).

    Returns:
        float32 (batch, channel=3, row=64, col=64) in [0, 1].
    """
    return frames.permute(0, 3, 1, 2).float() / 255


def precision(device: torch.device, settings: Settings) -> Any:
    """A context in which convolutions and products are computed in bfloat16, if the settings say so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bfloat16)
