"""Training by reward: proximal policy optimization, 10 at the cheese and nothing elsewhere.

From random weights the mouse hardly ever finds the cheese of a large maze: start from a policy that imitates.

References:
    Schulman et al. 2017, Proximal policy optimization algorithms, section 5; Schulman et al. 2016, High-dimensional
    continuous control using generalized advantage estimation, equation 16.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maze.training.trainer import Settings, Trainer, Update, direction_log_probabilities
from maze.training.training_data import REWARDED, TrainingMazes, sampled

STEPS = 256  # of every maze between two updates
EPOCHS = 3
LOOK_UP = 16  # steps between two comparisons of the policy with the right steps; training does not use them
DISCOUNT, TRACE = 0.999, 0.95  # gamma and lambda
CLIP = 0.2
ENTROPY_WEIGHT = 0.01
VALUE_WEIGHT = 0.005  # a half, and a hundredth since the reward is 10 and the error is squared

_DRAWS = 3  # the draws of actions and minibatches among those of a seed


class Experience(NamedTuple):
    """The transitions of `STEPS` steps; all but the last two are (step, maze, ...)."""

    frames: Tensor  # uint8 images before the step
    actions: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]
    values: NDArray[np.float32]  # before the step
    rewards: NDArray[np.float32]
    ended: NDArray[np.bool_]
    value_after: NDArray[np.float32]  # after the last step, (maze,)
    right: NDArray[np.bool_]  # whether the likeliest direction was right, each `LOOK_UP` steps


class PPO(Trainer):
    """Proximal policy optimization; the arguments are `Trainer`'s."""

    largest_norm = 0.5
    mazes: TrainingMazes

    def __init__(self, policy: nn.Module, settings: Settings, *, device: torch.device) -> None:
        super().__init__(policy, settings, device=device)
        # Other levels than those of an initial policy with the same seed.
        self.mazes = TrainingMazes(settings.environments or 1, seed=settings.seed, large=settings.large, draws=REWARDED)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.rate, eps=1e-5)

    def update(self, number: int, progress: float) -> Update:
        """Act for `STEPS` steps and learn from them for `EPOCHS` epochs."""
        rng = np.random.default_rng((self.settings.seed, _DRAWS, number))
        self.set_rate(1 - progress)
        started = time.perf_counter()
        experience = self._experience(rng)
        acting = time.perf_counter() - started
        measures = self._learn(experience, rng) | {
            "found": torch.tensor((experience.rewards > 0).sum() / max(experience.ended.sum(), 1)),  # of ended levels
            "levels_per_step": torch.tensor(experience.ended.mean()),
            "right": torch.tensor(experience.right.mean()),
        }
        return Update(experience.actions.size, acting, measures)

    @torch.no_grad()
    def _experience(self, rng: np.random.Generator) -> Experience:
        steps, right = [], []
        frames = []
        for step in range(STEPS):
            frames.append(torch.tensor(self.mazes.frames(), device=self.device))
            logits, value = (each.cpu() for each in self.forward(frames[-1]))
            if step % LOOK_UP == 0:
                direction = direction_log_probabilities(logits).argmax(dim=1)
                right.append(direction.numpy() == self.mazes.examples().step)
            chosen = sampled(np.exp(logits.numpy()), rng.random(len(value)))
            taken = logits.numpy()[np.arange(len(chosen)), chosen]
            steps.append((chosen, taken, value.numpy(), *self.mazes.step(chosen)))
        _, value_after = self.forward(torch.from_numpy(self.mazes.frames()).to(self.device))
        columns = map(np.stack, zip(*steps, strict=True))
        return Experience(torch.stack(frames), *columns, value_after.cpu().numpy(), np.concatenate(right))

    def _learn(self, experience: Experience, rng: np.random.Generator) -> dict[str, Tensor]:
        """Run the epochs over minibatches; returns the means of their measures."""
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
                self.descend(losses["policy"] + VALUE_WEIGHT * losses["value"] - ENTROPY_WEIGHT * losses["entropy"])
                measured.append({name: each.detach() for name, each in losses.items()})
        return {name: torch.stack([each[name] for each in measured]).mean() for name in measured[0]}


def advantages(experience: Experience, discount: float = DISCOUNT, trace: float = TRACE) -> NDArray[np.float32]:
    """Generalized advantage estimates: (step, maze).

    A level that ran out of time counts as ended, as is usual with procgen, which does not show its last state. The
    time limit is part of the task.
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
    """The clipped loss of the policy, the squared error of the value, and the entropy.

    `kl` is Schulman's k3, an estimate of the distance from the old policy, and `clipped` the share of clipped rows.
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
