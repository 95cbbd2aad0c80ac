"""Rollouts over gymnasium's vector environments, paired so that two of them differ by their policies alone.

    pairs = paired_rollouts({"original": policy, "patched": PatchedPolicy(policy, patch)}, envs, seeds, max_steps=500)
    sweep = rollout_sweep(points, envs, seeds, {"channel 5": patch, "channel 7": other}, max_steps=500)

Each episode has its own stream of uniform draws, made from the sampling seed and the seed of the episode, and
an action is the inverse CDF of the policy's distribution at the next draw. So nothing depends on how many
environments run side by side, and two policies that agree act alike.
"""

from ._results import PairedRollouts, Rollout, SweptRollouts
from ._rollouts import paired_rollouts, rollout
from ._sweep import rollout_sweep

__all__ = ["PairedRollouts", "Rollout", "SweptRollouts", "paired_rollouts", "rollout", "rollout_sweep"]
