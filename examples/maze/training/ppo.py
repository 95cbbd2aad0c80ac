"""Training by reward: proximal policy optimisation, 10 at the cheese and nothing elsewhere.

From a random start the mouse hardly ever finds the cheese of a large maze: start from a policy that imitates.

References:
    Schulman et al. 2017, Proximal policy optimization algorithms, section 5; Schulman et al. 2016, High-dimensional
    continuous control using generalized advantage estimation, equation 16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maze.training.imitation import direction_log_probabilities, log_probabilities, network_input, precision
from maze.training.training_data import REWARDED, TrainingMazes, sampled
from maze.training.training_run import Settings, Update

STEPS = 256  # of every maze between two updates
EPOCHS = 3
LOOK_UP = 16  # steps between two looks at how often the policy is right; it learns nothing from them
DISCOUNT, TRACE = 0.999, 0.95  # gamma and lambda
CLIP = 0.2
ENTROPY_WEIGHT = 0.01
VALUE_WEIGHT = 0.005  # a half, and a hundredth since the reward is 10 and the error is squared
LARGEST_NORM = 0.5  # of the gradient

_DRAWS = 3  # names the draws of actions and minibatches among those of a seed


class Experience(NamedTuple):
    """What happened in `STEPS` steps; all but the last two are (step, maze, ...).

    Attributes:
        frames: uint8 (step, maze, row=64, col=64, channel=3), what was seen.
        actions: that were taken.
        log_probabilities: of these.
        values: that the policy gave before each step.
        rewards: of the step.
        ended: whether the step ended the level.
        value_after: of what is seen at the end: (maze,).
        right: whether the likeliest direction was right, where that was looked up: (look-up,).
    """

    frames: Tensor
    actions: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]
    values: NDArray[np.float32]
    rewards: NDArray[np.float32]
    ended: NDArray[np.bool_]
    value_after: NDArray[np.float32]
    right: NDArray[np.bool_]


class PPO:
    """The policy, the mazes it acts in, and the optimiser.

    Args:
        policy: to train.
        settings: of the run.
        device: to train on.
    """

    def __init__(self, policy: nn.Module, settings: Settings, *, device: torch.device) -> None:
        self.policy = policy.to(device, memory_format=torch.channels_last).train()
        self.settings, self.device = settings, device
        # Levels that the policy it starts from has not walked through, should that be of the same seed.
        self.mazes = TrainingMazes(settings.environments or 1, seed=settings.seed, large=settings.large, draws=REWARDED)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.rate, eps=1e-5)

    def update(self, number: int, progress: float) -> Update:
        """Acts for `STEPS` steps and learns from them for `EPOCHS` epochs."""
        rng = np.random.default_rng((self.settings.seed, _DRAWS, number))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * (1 - progress)
        started = time.perf_counter()
        experience = self._experience(rng)
        acting = time.perf_counter() - started
        gained = advantages(
            experience.rewards, experience.values, experience.ended, experience.value_after, DISCOUNT, TRACE
        )
        measures = self._learn(experience, gained, rng)
        levels = max(int(experience.ended.sum()), 1)
        measures |= {
            "found": torch.tensor((experience.rewards > 0).sum() / levels),  # share of the levels that ended
            "levels_per_step": torch.tensor(experience.ended.mean()),
            "right": torch.tensor(experience.right.mean()),
        }
        return Update(experience.actions.size, acting, measures)

    def state(self) -> dict[str, Any]:
        """Of the optimiser and the mazes; draws follow from the number of the update."""
        return {"optimizer": self.optimizer.state_dict(), "mazes": self.mazes.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.mazes.restore(state["mazes"])

    def _experience(self, rng: np.random.Generator) -> Experience:
        steps, right = [], []
        frames = torch.empty((STEPS, self.settings.environments or 1, 64, 64, 3), dtype=torch.uint8, device=self.device)
        for step in range(STEPS):
            frames[step] = torch.from_numpy(self.mazes.frames())
            logits, value = self._forward(frames[step])
            if step % LOOK_UP == 0:
                direction = direction_log_probabilities(torch.from_numpy(logits)).argmax(dim=1)
                right.append(direction.numpy() == self.mazes.examples().step)
            chosen = sampled(np.exp(logits), rng.random(len(value)))
            reward, ended = self.mazes.step(chosen)
            steps.append((chosen, logits[np.arange(len(chosen)), chosen], value, reward, ended))
        _, value_after = self._forward(torch.from_numpy(self.mazes.frames()).to(self.device))
        return Experience(frames, *map(np.stack, zip(*steps, strict=True)), value_after, np.concatenate(right))

    @torch.no_grad()
    def _forward(self, frames: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Log-probabilities (maze, action) and values (maze,)."""
        with precision(self.device, self.settings):
            actions, value = self.policy(network_input(frames))
        return log_probabilities(actions).cpu().numpy(), value.float().cpu().numpy()

    def _learn(
        self, experience: Experience, gained: NDArray[np.float32], rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """The epochs over minibatches; returns means of what was measured in them."""
        frames = experience.frames.flatten(0, 1)
        actions, old, advantage, returns = (
            torch.from_numpy(each.reshape(-1)).to(self.device)
            for each in (experience.actions, experience.log_probabilities, gained, gained + experience.values)
        )
        count = math.ceil(len(frames) / self.settings.batch)
        measured = []
        for _ in range(EPOCHS):
            for rows in np.array_split(rng.permutation(len(frames)), count):
                chosen = torch.from_numpy(rows).to(self.device)
                with precision(self.device, self.settings):
                    distribution, value = self.policy(network_input(frames[chosen]))
                logits = log_probabilities(distribution)
                losses = ppo_losses(
                    logits, value.float(), actions[chosen], old[chosen], advantage[chosen], returns[chosen]
                )
                loss = losses["policy"] + VALUE_WEIGHT * losses["value"] - ENTROPY_WEIGHT * losses["entropy"]
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), LARGEST_NORM)
                self.optimizer.step()
                measured.append({name: each.detach() for name, each in losses.items()})
        return {name: torch.stack([each[name] for each in measured]).mean() for name in measured[0]}


def advantages(
    rewards: NDArray[np.float32],
    values: NDArray[np.float32],
    ended: NDArray[np.bool_],
    value_after: NDArray[np.float32],
    discount: float,
    trace: float,
) -> NDArray[np.float32]:
    """Generalised advantage estimates: (step, maze).

    A level that ran out of time counts as one that ended, as is usual with procgen, which does not show its last state:
    the limit is part of the task, and a mouse that is stuck is to feel it.

    Args:
        rewards: (step, maze).
        values: of what was seen before each step, (step, maze).
        ended: whether the step ended the level, (step, maze).
        value_after: of what is seen after the last step, (maze,).
        discount: gamma.
        trace: lambda.
    """
    gained = np.zeros_like(rewards)
    following, later = value_after, np.zeros_like(value_after)
    for step in reversed(range(len(rewards))):
        going_on = ~ended[step]
        surprise = rewards[step] + discount * following * going_on - values[step]
        gained[step] = later = surprise + discount * trace * later * going_on
        following = values[step]
    return gained


def ppo_losses(
    logits: Tensor, value: Tensor, actions: Tensor, old: Tensor, advantage: Tensor, returns: Tensor
) -> dict[str, Tensor]:
    """The clipped policy loss, the squared error of the value, the entropy, and how far the policy has moved.

    Args:
        logits: normalised, (batch, action).
        value: (batch,).
        actions: that were taken, (batch,).
        old: their log-probabilities then, (batch,).
        advantage: (batch,); normalised here.
        returns: what the value is to be, (batch,).

    Returns:
        `policy`, `value`, `entropy`, `kl` (an estimate, Schulman's k3) and `clipped`, the share of clipped rows.
    """
    log_ratio = logits.gather(1, actions[:, None]).squeeze(1) - old
    ratio = log_ratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return {
        "policy": -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean(),
        "value": (value - returns).square().mean(),
        "entropy": -(logits.exp() * logits).sum(dim=1).mean(),
        "kl": (ratio - 1 - log_ratio).mean(),
        "clipped": ((ratio - 1).abs() > CLIP).float().mean(),
    }
