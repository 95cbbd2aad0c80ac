"""Activation patching for any torch.nn.Module: hook points, contrasts, channel-sum probes and patched policies."""

import importlib
from typing import Any

from .contrasts import contrast
from .patching import (
    Patch,
    edit,
    mean_ablate,
    patch_in,
    patched,
    recording,
    resample_ablate,
    run_with_cache,
    steer,
    zero_ablate,
)
from .policies import PatchedPolicy, paired_rollouts, rollout
from .probes import ThresholdProbe, channel_sums, label_channels
from .registry import HookPoints, Site, hook_points, tap, view
from .saving import load, save
from .sweeps import sweep

__version__ = "0.2.0"

__all__ = [
    "HookPoints", "Patch", "PatchedPolicy", "Site", "ThresholdProbe", "channel_sums", "contrast", "edit",
    "hook_points", "label_channels", "load", "mean_ablate", "paired_rollouts", "patch_in", "patched", "recording",
    "resample_ablate", "rollout", "run_with_cache", "save", "steer", "sweep", "tap", "view", "zero_ablate",
]  # fmt: skip

_PUBLIC_MODULES = (
    "contrasts", "controls", "errors", "huggingface", "metrics", "patching", "plots", "policies", "probes", "registry",
    "saving", "statistics", "sweeps",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public submodule on first access."""
    if name in _PUBLIC_MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'chanpatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PUBLIC_MODULES])
