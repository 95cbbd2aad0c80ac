"""Does a CartPole policy follow a lamp that was usually right in training, and which hidden units encode the lamp?

    python examples/lamp.py --out lamp_results     two to three minutes on one core

The observation has a fifth number, a lamp: 1 if the pole falls to the right, -1 if it falls to the left. In training,
the lamp is wrong in 20% of the steps. In the test, it is random. After training PPO with a fixed seed, the script

  1. plays episodes in which the lamp is always right, dark (0) or random, to see whether the policy follows the lamp
  2. finds the hidden units that respond most to the lamp, in pairs of observations that differ only in the lamp
  3. plays new episodes with a random lamp, and patches these units to their activations for a dark lamp
  4. compares the effect with the effect of patching random sets of other units, and draws a figure
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor

from chanpatch import HookPoints, Patch, contrast, edit, hook_points, rollout, run_with_cache
from chanpatch.controls import random_sets
from chanpatch.policies import SweptRollouts, rollout_sweep

UNITS, LAYER, STEPS, WRONG = 16, "mlp_extractor.policy_net.3", 300, 0.2
LAMPS = ("right", "dark", "random")


class Lamp(gym.ObservationWrapper[Any, Any, Any]):
    """Add a lamp to CartPole's observation."""

    def __init__(self, lamp: str, wrong: float = 0.0) -> None:
        super().__init__(gym.make("CartPole-v1", max_episode_steps=STEPS))
        self.lamp, self.wrong = lamp, wrong
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)

    def observation(self, observation: Any) -> Any:
        is_right = observation[2] + 0.5 * observation[3] > 0  # the angle plus half the angular velocity
        right = 1.0 if is_right != (self.np_random.random() < self.wrong) else -1.0
        shown = {"right": right, "dark": 0.0, "random": self.np_random.choice([-1.0, 1.0])}
        return np.append(observation, shown[self.lamp]).astype(np.float32)


def with_lamp(observations: Tensor, lamp: float) -> Tensor:
    changed = observations.clone()
    changed[:, 4] = lamp
    return changed


def with_dark_lamp(points: HookPoints, units: Sequence[int]) -> Patch:
    """Return a patch that sets units to their activations for the same observation with a dark lamp."""
    site = points.site(LAYER, feature=units)

    def darkened(activation: Tensor, *, context: Any) -> Tensor:
        return run_with_cache(points, with_lamp(context.inputs[0], 0), sites=site, stop=True)[site]

    return edit(site, darkened)


def draw(effects: Any, chosen: Sequence[int], returns: dict[str, float], swept: SweptRollouts, file: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))
    order = np.argsort(-np.abs(effects))
    left.bar(range(len(order)), np.abs(effects)[order], color=["k" if n in {*chosen} else "lightgray" for n in order])
    left.set(xlabel="hidden units, sorted", ylabel="|response to the lamp|", title=f"{UNITS} lamp units (black)")
    controls = [each.returns.mean() for each in (swept.controls or {}).values()]
    patched = {label: swept[label].returns.mean() for label in swept.labels} | {f"{UNITS} random other units": 0}
    names = [f"{lamp} lamp" for lamp in returns] + [f"random lamp,\n{label} patched" for label in patched]
    right.barh(names, [*returns.values(), *patched.values()], color=["lightgray"] * 3 + ["dimgray"] * len(patched))
    right.plot(controls, [names[-1]] * len(controls), "o", color="white", mec="black")
    right.axvline(swept["original"].returns.mean(), color="black", ls=":", lw=1)
    right.invert_yaxis()
    right.set(xlabel="mean return", title="patched: as with a dark lamp")
    figure.savefig(file, dpi=150)


def study(out: Path, *, training: int, episodes: int, controls: int) -> SweptRollouts:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the number of threads changes rounding, and so the trained policy
    training_envs = make_vec_env(lambda: Lamp("right", WRONG), n_envs=8, seed=0)
    model = PPO("MlpPolicy", training_envs, n_steps=256, batch_size=256, seed=0, device="cpu").learn(training)
    points = hook_points(model.policy, torch.zeros(2, 5), method="get_distribution")
    envs = {lamp: SyncVectorEnv([lambda lamp=lamp: Lamp(lamp)] * min(episodes, 128)) for lamp in LAMPS}
    played = {lamp: rollout(model, envs[lamp], range(episodes), max_steps=STEPS, keep="observations") for lamp in LAMPS}
    returns = {lamp: float(done.returns.mean()) for lamp, done in played.items()}
    print("mean return:", ", ".join(f"{value:.0f} with a {lamp} lamp" for lamp, value in returns.items()))

    seen = torch.from_numpy(np.concatenate([each[::20] for each in played["right"].kept["observations"]]))
    response = contrast(points, with_lamp(seen, 1), with_lamp(seen, -1), LAYER)
    effects = response.effect()
    chosen = sorted(np.argsort(-np.abs(effects))[:UNITS].tolist())
    lamp_units, every = f"{UNITS} lamp units", f"all {len(effects)} units"
    patches = {lamp_units: with_dark_lamp(points, chosen), every: with_dark_lamp(points, range(len(effects)))}
    sets = random_sets([unit for unit in range(len(effects)) if unit not in chosen], UNITS, count=controls)
    random = {f"units {', '.join(map(str, units))}": with_dark_lamp(points, units) for units in sets}
    new = range(10_000, 10_000 + episodes)  # these episodes were not used to select the units
    swept = rollout_sweep(points, envs["random"], new, patches, controls=random, max_steps=STEPS)
    print(swept)
    effect = dict(zip(swept.labels, swept.effect(), strict=True))
    print(f"{lamp_units} recover {effect[lamp_units]:.1f} of the {effect[every]:.1f} points that {every} recover.")
    draw(effects, chosen, returns, swept, out / "lamp.png")
    return swept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lamp_results"), help="folder for the figure")
    parser.add_argument("--training", type=int, default=60_000, help="environment steps of training")
    parser.add_argument("--episodes", type=int, default=100, help="episodes per policy")
    parser.add_argument("--controls", type=int, default=19, help="random sets of units")
    study(**vars(parser.parse_args()))
