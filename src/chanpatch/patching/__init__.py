"""Edits, patches, recordings, and the contexts that apply patches."""

from .cache import ActivationCache
from .contexts import patched
from .edit_context import Context
from .edits import Add, Clamp, Edit, Project, Resample, Scale, Set
from .firing import Ledger
from .patch import Patch
from .recording import recording, run_with_cache
from .verbs import edit, mean_ablate, patch_in, resample_ablate, steer, zero_ablate

__all__ = [
    "ActivationCache", "Add", "Clamp", "Context", "Edit", "Ledger", "Patch", "Project", "Resample", "Scale", "Set",
    "edit", "mean_ablate", "patch_in", "patched", "recording", "resample_ablate", "run_with_cache", "steer",
    "zero_ablate",
]  # fmt: skip
