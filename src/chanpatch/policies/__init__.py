"""Run a policy with patches, and compare its behavior with and without the patches.

twin = PatchedPolicy(policy, zero_ablate(points.site("embedder.relu3", channel=55)))
paired_rollouts({"original": policy, "patched": twin}, envs, seeds=range(100), max_steps=256)
"""

from .decisions import action_distribution
from .environments import from_gym3, from_pettingzoo
from .results import PairedRollouts, Rollout, SweptRollouts
from .rollout_sweep import rollout_sweep
from .rollouts import paired_rollouts, rollout
from .twin import PatchedPolicy

__all__ = [
    "PairedRollouts",
    "PatchedPolicy",
    "Rollout",
    "SweptRollouts",
    "action_distribution",
    "from_gym3",
    "from_pettingzoo",
    "paired_rollouts",
    "rollout",
    "rollout_sweep",
]
