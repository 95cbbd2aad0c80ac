"""What stands at the top level, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import chanpatch


def test_the_public_names_are_these() -> None:
    registry = ["hook_points", "HookPoint", "HookPoints", "Site", "tap"]
    reading = ["ActivationCache", "recording", "run_with_cache"]
    sweeps = ["sweep"]
    files = ["save", "load"]
    writing = ["Patch", "patched", "zero_ablate", "mean_ablate", "resample_ablate", "patch_in", "steer", "edit"]
    policies = ["PatchedPolicy", "rollout", "paired_rollouts"]
    probes = ["contrast", "channel_sums", "ThresholdProbe", "label_channels"]
    assert sorted(chanpatch.__all__) == sorted(registry + reading + writing + sweeps + files + policies + probes)


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in chanpatch.__all__:
        assert getattr(chanpatch, name).__doc__


def test_importing_chanpatch_imports_neither_scipy_nor_plotting_nor_an_environment() -> None:
    heavy = ("scipy", "matplotlib", "gymnasium", "pandas", "sklearn", "tqdm", "safetensors", "torch._dynamo")
    program = (
        "import torch, sys; before = set(sys.modules); import chanpatch; "
        f"print(sorted((set(sys.modules) - before) & set({heavy})))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
