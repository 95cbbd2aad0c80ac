"""What the study needs beside chanpatch: procgen's maze and the policy class of procgen-tools.

Both are imported here and nowhere else, and only when they are first used.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any


class MissingRequirement(ImportError):
    """procgen or procgen-tools cannot be imported; the message holds the line to type."""


def procgen_mazes(count: int, *, seed: int = 0) -> Any:
    """A procgen vector environment of `count` hard mazes, each on a fresh level.

    Args:
        count: number of sub-environments.
        seed: procgen's random seed; the same seed and count give the same sequence of levels.

    Returns:
        A `procgen.ProcgenGym3Env`.

    Raises:
        MissingRequirement: procgen cannot be imported.
    """
    procgen = _imported("procgen")
    environment = procgen.ProcgenGym3Env(
        num=count, env_name="maze", distribution_mode="hard", num_levels=0, start_level=0, rand_seed=seed
    )
    # cffi looks a C function up under a lock when it is first used. Were `libenv_close` first used by the garbage
    # collector, and that ran inside another look-up, the process would wait for itself forever.
    _ = environment._c_lib.libenv_close
    return environment


def policy_models() -> Any:
    """The module `procgen_tools.models`, in which the policy's classes and their width, `scale`, are.

    Raises:
        MissingRequirement: procgen-tools, or something that it imports, cannot be imported.
    """
    return _imported("procgen_tools.models")


def _imported(name: str) -> ModuleType:
    """The module `name`, imported without procgen's and gym's noise."""
    if (known := sys.modules.get(name)) is not None:
        return known
    _silence_gym_notice()
    try:
        with warnings.catch_warnings():
            # procgen leaves its version file open.
            warnings.simplefilter("ignore", ResourceWarning)
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingRequirement(_what_to_type(name, error)) from error


def _silence_gym_notice() -> None:
    """Empties the table from which gym prints its farewell to stderr when it is imported."""
    try:
        from gym_notices import notices
    except ImportError:
        return
    notices.notices.clear()


def _what_to_type(name: str, error: ImportError) -> str:
    package = name.partition(".")[0].replace("_", "-")
    problem = f"The maze study needs {package}, which cannot be imported ({error}). "
    if sys.version_info >= (3, 12):
        running = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return problem + (
            f"procgen has wheels for Python 3.10 and 3.11 only, and this is Python {running}; "
            "run `make study PYTHON=python3.11`."
        )
    return problem + (
        'Type `pip install "chanpatch[maze]"`, then `pip install --no-deps procgen-tools==0.1` '
        "(its own pins no longer install)."
    )
