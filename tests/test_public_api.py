"""What stands at the top level, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import chanpatch


def test_the_public_names_are_these() -> None:
    assert sorted(chanpatch.__all__) == sorted(
        """hook_points HookPoint HookPoints tap Site Patch ActivationCache recording patched run_with_cache
        zero_ablate mean_ablate resample_ablate patch_in steer edit PatchedPolicy rollout paired_rollouts""".split()
    )


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in chanpatch.__all__:
        assert getattr(chanpatch, name).__doc__


def test_importing_chanpatch_imports_neither_scipy_nor_plotting_nor_an_environment() -> None:
    heavy = ("scipy", "matplotlib", "gymnasium", "pandas", "tqdm", "torch._dynamo")
    program = f"import torch, sys; before = set(sys.modules); import chanpatch; print([m for m in {heavy} if m in set(sys.modules) - before])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
