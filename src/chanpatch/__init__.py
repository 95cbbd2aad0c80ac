"""Activation patching on any torch module: hook points, contrasts, channel-sum probes, ablation and patch policies."""

from ._patches import Patch
from ._taps import tap
from .contrast import contrast
from .interventions import load, save
from .patching import edit, mean_ablate, patch_in, patched, resample_ablate, steer, zero_ablate
from .points import HookPoint, HookPoints
from .policies import PatchedPolicy
from .probes import ThresholdProbe, channel_sums, label_channels
from .recording import ActivationCache, recording, run_with_cache
from .rollouts import paired_rollouts, rollout
from .sites import Site
from .sweeps import sweep
from .tracing import hook_points

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "HookPoint",
    "HookPoints",
    "Patch",
    "PatchedPolicy",
    "Site",
    "ThresholdProbe",
    "channel_sums",
    "contrast",
    "edit",
    "hook_points",
    "label_channels",
    "load",
    "mean_ablate",
    "paired_rollouts",
    "patch_in",
    "patched",
    "recording",
    "resample_ablate",
    "rollout",
    "run_with_cache",
    "save",
    "steer",
    "sweep",
    "tap",
    "zero_ablate",
]
