"""Training by reward with proximal policy optimization: 10 at the cheese and nothing elsewhere.

An untrained mouse hardly ever finds the cheese in a large maze, so start from a policy trained by imitation.

References:
    Schulman et al. 2017, Proximal policy optimization algorithms, section 5; Schulman et al. 2016, High-dimensional
    continuous control using generalized advantage estimation, equation 16.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maze.training.trainer import Trainer, Update
from maze.training.training_data import REWARD_DRAWS, REWARDED, TrainingMazes, sampled

STEPS = 256  # in every maze between two updates
EPOCHS = 3
DISCOUNT, TRACE = 0.999, 0.95  # gamma and lambda
CLIP = 0.2
ENTROPY_WEIGHT = 0.01
VALUE_WEIGHT = 0.005  # a half, and a hundredth since the reward is 10 and the error is squared


class Experience(NamedTuple):
    """Transitions: (step, maze, ...)."""

    frames: Tensor  # uint8 images before the step
    actions: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]
    values: NDArray[np.float32]  # before the step
    rewards: NDArray[np.float32]
    ended: NDArray[np.bool_]
    value_after: NDArray[np.float32]  # after the last step, (maze,)


class PPO(Trainer):
    """Proximal policy optimization."""

    largest_norm = 0.5
    mazes: TrainingMazes

    def __init__(self, policy: nn.Module, settings: Namespace, *, device: torch.device) -> None:
        super().__init__(policy, settings, device=device)
        # Other levels than imitation with the same seed.
        self.mazes = TrainingMazes(settings.environments, seed=settings.seed, large=settings.large, draws=REWARDED)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.rate, eps=1e-5)

    def update(self, number: int, progress: float) -> Update:
        rng = np.random.default_rng((self.settings.seed, REWARD_DRAWS, number))
        started = time.perf_counter()
        experience = self._experience(rng)
        acting = time.perf_counter() - started
        measures = self._learn(experience, rng, 1 - progress) | {
            "found": torch.tensor((experience.rewards > 0).sum() / max(experience.ended.sum(), 1)),  # of ended levels
            "levels_per_step": torch.tensor(experience.ended.mean()),
        }
        return Update(experience.actions.size, acting, measures)

    @torch.no_grad()
    def _experience(self, rng: np.random.Generator) -> Experience:
        frames, steps = [], []
        for _ in range(STEPS):
            frames.append(torch.tensor(self.mazes.frames(), device=self.device))
            logits, value = (each.cpu().numpy() for each in self.forward(frames[-1]))
            chosen = sampled(np.exp(logits), rng.random(len(value)))
            steps.append((chosen, logits[np.arange(len(chosen)), chosen], value, *self.mazes.step(chosen)))
        _, value_after = self.forward(torch.from_numpy(self.mazes.frames()).to(self.device))
        return Experience(torch.stack(frames), *map(np.stack, zip(*steps, strict=True)), value_after.cpu().numpy())

    def _learn(self, experience: Experience, rng: np.random.Generator, rate: float) -> dict[str, Tensor]:
        """Learn for `EPOCHS` epochs in minibatches; return the means of their measures."""
        frames = experience.frames.flatten(0, 1)
        gained = advantages(experience)
        targets = [
            torch.from_numpy(each.reshape(-1)).to(self.device)
            for each in (experience.actions, experience.log_probabilities, gained, gained + experience.values)
        ]
        count = math.ceil(len(frames) / self.settings.batch)
        measured = []
        for _ in range(EPOCHS):
            for rows in np.array_split(rng.permutation(len(frames)), count):
                chosen = torch.from_numpy(rows).to(self.device)
                losses = ppo_losses(*self.forward(frames[chosen]), *(each[chosen] for each in targets))
                loss = losses["policy"] + VALUE_WEIGHT * losses["value"] - ENTROPY_WEIGHT * losses["entropy"]
                self.descend(loss, rate)
                measured.append({name: each.detach() for name, each in losses.items()})
        return {name: torch.stack([each[name] for each in measured]).mean() for name in measured[0]}


def advantages(experience: Experience, discount: float = DISCOUNT, trace: float = TRACE) -> NDArray[np.float32]:
    """Generalized advantage estimates: (step, maze).

    A level that ran out of time counts as ended, as is usual with procgen, which does not show the last state.
    """
    gained = np.zeros_like(experience.rewards)
    following, later = experience.value_after, np.zeros_like(experience.value_after)
    for step in reversed(range(len(gained))):
        going_on = ~experience.ended[step]
        surprise = experience.rewards[step] + discount * following * going_on - experience.values[step]
        gained[step] = later = surprise + discount * trace * later * going_on
        following = experience.values[step]
    return gained


def ppo_losses(
    logits: Tensor, value: Tensor, actions: Tensor, old: Tensor, advantage: Tensor, returns: Tensor
) -> dict[str, Tensor]:
    """The clipped policy loss, the squared error of the value, and the entropy.

    `kl` is Schulman's k3 estimate of the divergence from the old policy, and `clipped` the fraction of clipped rows.
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
