"""The common part of both training algorithms: the forward pass of the policy, and the optimizer step."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maze.training.training_data import TrainingMazes


class Update(NamedTuple):
    """The result of one update."""

    observations: int
    waited: float  # seconds spent waiting for data
    measures: dict[str, Tensor]  # scalars, such as losses


class Trainer:
    """An algorithm with its policy, mazes and optimizer.

    The settings are the options of `train.py` that determine the result; options of the other algorithm are None.
    """

    optimizer: torch.optim.Optimizer
    mazes: TrainingMazes | None
    largest_norm: float  # of the gradient

    def __init__(self, policy: nn.Module, settings: Namespace, *, device: torch.device) -> None:
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
