"""Rollouts kept on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from chanpatch.policies import Rollout
from maze.results import read_arrays, replaced

_PER_STEP = ("actions",)  # fields with one array per episode, stored end to end


def kept(file: Path, play: Callable[[], Rollout]) -> Rollout:
    """Return the rollout in a file; play it and write the file if there is none, or if it is damaged."""
    arrays = read_arrays(file) if file.exists() else None
    if arrays is None:
        rollout = play()
        held = {name: np.concatenate(each) if name in _PER_STEP else each for name, each in asdict(rollout).items()}
        with replaced(file) as partial:
            np.savez_compressed(partial, **held)
        return rollout
    ends = np.cumsum(arrays["lengths"])[:-1]
    fields = {name: tuple(np.split(each, ends)) if name in _PER_STEP else each for name, each in arrays.items()}
    return Rollout(**fields | {"seeds": tuple(arrays["seeds"].tolist())})  # type: ignore[arg-type]
