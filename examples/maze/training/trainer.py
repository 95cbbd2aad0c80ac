"""The common part of both algorithms: their settings, the forward of the policy, and the step of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maze.command import UserError
from maze.paths import Direction
from maze.policy.network import ACTIONS
from maze.training.training_data import TrainingMazes


class TrainingError(UserError):
    """Settings outside their range, or a run that cannot continue."""


_RANGES = {
    "width": (1, 16),
    "seed": (0, 2**31 - 1),
    "large": (0, 8),
    "observations": (1, 10**12),
    "minutes": (0.01, 10**6),
    "batch": (2, 65536),
    "rate": (1e-7, 1),
    "dagger": (0, 0.9),
    "environments": (1, 4096),
}


@dataclass(frozen=True)
class Settings:
    """All settings that determine the result of a run; `train.py --help` explains them.

    Options of the other algorithm are None, and so is `observations` or `minutes`. `start` is the sha256 of the initial
    weights.

    Raises:
        TrainingError: a number outside its range.
    """

    algorithm: str
    width: int
    start: str | None
    seed: int
    large: float
    observations: int | None
    minutes: float | None
    batch: int
    rate: float
    bfloat16: bool
    auxiliary: str | None = None
    dagger: float | None = None
    environments: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            given = getattr(self, name)
            if given is not None and not low <= given <= high:  # not: rejects NaN too
                raise TrainingError(f"--{name} is {given}, but it is {low} to {high}.")
        if self.dagger and not round(self.dagger * self.batch):
            raise TrainingError(f"--dagger {self.dagger} of --batch {self.batch} is less than one observation.")


@dataclass
class Update:
    """The result of one update."""

    observations: int
    waited: float  # seconds of waiting for data
    measures: dict[str, Tensor]  # losses and the like, each a scalar


class Trainer:
    """An algorithm with its policy, its mazes and its optimizer."""

    optimizer: torch.optim.Optimizer
    mazes: TrainingMazes | None
    largest_norm: float  # of the gradient

    def __init__(self, policy: nn.Module, settings: Settings, *, device: torch.device) -> None:
        self.policy = policy.to(device, memory_format=torch.channels_last).train()
        self.settings, self.device = settings, device

    def update(self, number: int, progress: float) -> Update:
        """Run the update with this number; `progress`, in [0, 1), is the share of the budget that is spent."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """A snapshot without the policy's weights; data and draws follow from the number of the update."""
        return {"optimizer": self.optimizer.state_dict(), "mazes": self.mazes.state() if self.mazes else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a snapshot."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.mazes:
            self.mazes.restore(state["mazes"])

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (batch, action) and values (batch,), both float32, from uint8 images."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bfloat16):
            actions, value = self.policy(network_input(frames))
        # Normalized again, as bfloat16 probabilities do not quite sum to 1.
        return torch.log_softmax(actions.logits.float(), dim=1), value.float()

    def descend(self, loss: Tensor) -> None:
        """Take a step of the optimizer on the clipped gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.largest_norm)
        self.optimizer.step()

    def set_rate(self, share: float) -> None:
        """Set the learning rate to a share of the initial one."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * share


def direction_log_probabilities(logits: Tensor) -> Tensor:
    """Log of the summed probability of each direction's actions, (batch, direction), from normalized logits."""
    return torch.stack([logits[:, list(ACTIONS[move])].logsumexp(dim=1) for move in Direction], dim=1)


def network_input(frames: Tensor) -> Tensor:
    """The result of `levels.policy_input`, in the memory layout in which convolutions are fast."""
    return frames.permute(0, 3, 1, 2).float() / 255
