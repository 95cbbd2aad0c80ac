"""The only imports of procgen and of procgen-tools (the oracle of the tests), on first use."""

from __future__ import annotations

import importlib
import sys
import warnings
from contextlib import suppress
from importlib.util import find_spec
from typing import Any


class MissingRequirement(ImportError):
    """procgen or procgen-tools cannot be imported; the message contains the command that installs the package."""


def check_python() -> None:
    """Raise MissingRequirement if there is no procgen for this version of Python."""
    if sys.version_info >= (3, 12) and find_spec("procgen") is None:
        raise MissingRequirement(
            "The maze study needs procgen, which has builds for Python 3.10 and 3.11 only, and this is Python "
            f"{sys.version_info[0]}.{sys.version_info[1]}: run `make study PYTHON=python3.11`."
        )


def procgen_mazes(count: int, *, seed: int = 0) -> Any:
    """Return a `procgen.ProcgenGym3Env` with `count` hard mazes; seed and count determine the sequence of levels."""
    environment = _imported("procgen").ProcgenGym3Env(
        num=count, env_name="maze", distribution_mode="hard", num_levels=0, start_level=0, rand_seed=seed
    )
    # cffi looks up a C function under a lock on first use. The process would deadlock if the garbage collector used
    # `libenv_close` for the first time during another look-up.
    _ = environment._c_lib.libenv_close
    return environment


def policy_models() -> Any:
    """Return the module `procgen_tools.models`, which contains the policy's classes and their width, `scale`."""
    return _imported("procgen_tools.models")


def _imported(name: str) -> Any:
    """Import a module without the messages of procgen and gym."""
    with suppress(ImportError):
        from gym_notices import notices

        notices.notices.clear()  # gym prints these to stderr
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # procgen leaves its version file open
            return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        advice = 'Type `pip install "chanpatch[maze]"`.'
        if package == "procgen-tools":
            advice = "Type `pip install --no-deps procgen-tools==0.1 ipywidgets` (its own pins no longer install)."
        raise MissingRequirement(
            f"The maze study needs {package}, which cannot be imported ({error}). {advice}"
        ) from error
