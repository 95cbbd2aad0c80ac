"""The common part of both training algorithms: settings, the forward pass of the policy, and the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maze.command import UserError
from maze.paths import Direction
from maze.policy.network import ACTIONS
from maze.training.training_data import TrainingMazes


class TrainingError(UserError):
    """A setting is out of range, or a run cannot continue."""


_RANGES = {
    "width": (1, 16),
    "seed": (0, 2**31 - 1),
    "large": (0, 8),
    "observations": (1, 10**12),
    "batch": (2, 65536),
    "rate": (1e-7, 1),
    "dagger": (0, 0.9),
    "environments": (1, 4096),
}


@dataclass(frozen=True)
class Settings:
    """All settings that determine the result of a run; `train.py --help` explains them.

    Options of the other algorithm are None. `start` is the sha256 of the initial weights.

    Raises:
        TrainingError: A number is out of range.
    """

    algorithm: str
    width: int
    start: str | None
    seed: int
    large: float
    observations: int
    batch: int
    rate: float
    bfloat16: bool
    auxiliary: str | None = None
    dagger: float | None = None
    environments: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            given = getattr(self, name)
            if given is not None and not low <= given <= high:  # written so that NaN is rejected too
                raise TrainingError(f"--{name} must be {low} to {high}; got {given}.")
        if self.dagger and not round(self.dagger * self.batch):
            raise TrainingError(f"--dagger {self.dagger} of --batch {self.batch} is less than one observation.")


class Update(NamedTuple):
    """The result of one update."""

    observations: int
    waited: float  # seconds spent waiting for data
    measures: dict[str, Tensor]  # scalars, such as losses


class Trainer:
    """An algorithm with its policy, mazes and optimizer."""

    optimizer: torch.optim.Optimizer
    mazes: TrainingMazes | None
    largest_norm: float  # of the gradient

    def __init__(self, policy: nn.Module, settings: Settings, *, device: torch.device) -> None:
        self.policy = policy.to(device, memory_format=torch.channels_last).train()
        self.settings, self.device = settings, device

    def update(self, number: int, progress: float) -> Update:
        """Run the update with this number; `progress` is the fraction of the budget already spent, in [0, 1)."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Everything but the weights of the policy; data and random draws follow from the number of the update."""
        return {"optimizer": self.optimizer.state_dict(), "mazes": self.mazes.state() if self.mazes else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.mazes:
            self.mazes.restore(state["mazes"])

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (batch, action) and values (batch,), both float32, from uint8 images."""
        # The values of `levels.policy_input`; the permuted memory layout makes convolutions fast.
        given = frames.permute(0, 3, 1, 2).float() / 255
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bfloat16):
            actions, value = self.policy(given)
        # Normalized again, because bfloat16 probabilities do not quite sum to 1.
        return torch.log_softmax(actions.logits.float(), dim=1), value.float()

    def descend(self, loss: Tensor, rate: float) -> None:
        """Take an optimizer step on the clipped gradient, at `rate` times the initial learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.largest_norm)
        self.optimizer.step()


def direction_log_probabilities(logits: Tensor) -> Tensor:
    """Log of the summed probability of each direction's actions, (batch, direction), from normalized logits."""
    return torch.stack([logits[:, list(ACTIONS[move])].logsumexp(dim=1) for move in Direction], dim=1)
