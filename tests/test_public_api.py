"""What stands at the top level, and nothing else."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import chanpatch

TOP_LEVEL = [
    *("hook_points", "HookPoints", "Site", "tap", "view"),
    *("Patch", "patched", "recording", "run_with_cache"),
    *("zero_ablate", "mean_ablate", "resample_ablate", "patch_in", "steer", "edit"),
    "contrast",
    *("channel_sums", "ThresholdProbe", "label_channels"),
    *("PatchedPolicy", "rollout", "paired_rollouts"),
    "sweep",
    *("save", "load"),
]
MODULES = [
    *("contrasts", "controls", "errors", "huggingface", "metrics", "patching", "plots", "policies"),
    *("probes", "registry", "saving", "statistics", "sweeps"),
]


def test_the_public_names_are_these() -> None:
    assert sorted(chanpatch.__all__) == sorted(TOP_LEVEL)


def test_dir_shows_the_public_names_and_modules_only() -> None:
    assert dir(chanpatch) == sorted([*TOP_LEVEL, *MODULES])


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_is_an_attribute_of_the_package(name: str) -> None:
    assert getattr(chanpatch, name) is importlib.import_module(f"chanpatch.{name}")


def test_an_unknown_attribute_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'chanpatch' has no attribute 'sweeper'"):
        chanpatch.sweeper  # noqa: B018


def test_a_public_name_has_one_module() -> None:
    exported = [name for module in MODULES for name in getattr(chanpatch, module).__all__]
    assert sorted(exported) == sorted({*exported})
    assert {*TOP_LEVEL} <= {*exported}


def test_a_module_of_the_package_exports_what_it_lists_and_no_other_name() -> None:
    for name in MODULES:
        module = getattr(chanpatch, name)
        public = {
            each for each, item in vars(module).items() if not each.startswith("_") and not isinstance(item, ModuleType)
        }
        assert all(hasattr(module, each) for each in module.__all__)
        if hasattr(module, "__path__"):  # a folder lists its names; a file has imports of its own
            assert public <= {*module.__all__}


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in chanpatch.__all__:
        assert getattr(chanpatch, name).__doc__


def test_importing_chanpatch_imports_neither_scipy_nor_plotting_nor_an_environment() -> None:
    heavy = ("scipy", "matplotlib", "gymnasium", "pandas", "xarray", "sklearn", "tqdm", "safetensors", "torch._dynamo")
    program = (
        "import torch, sys; before = set(sys.modules); import chanpatch; "
        f"print(sorted((set(sys.modules) - before) & set({heavy})))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
