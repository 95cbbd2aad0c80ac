"""Store rollouts on disk, so that an interrupted run can continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from chanpatch.policies import Rollout
from maze.results import read_arrays, replaced

_PER_STEP = ("actions", "seen")  # fields with one array per episode, stored end to end


def kept(file: Path, play: Callable[[], Rollout]) -> Rollout:
    """Return the rollout stored in a file. If the file is missing or damaged, call `play` and store the result."""
    arrays = read_arrays(file) if file.exists() else None
    if arrays is None:
        rollout = play()
        held = dict(vars(rollout)) | {"settings": json.dumps(rollout.settings)}
        del held["rewards"], held["kept"]  # the study does not use them
        for name in _PER_STEP:
            held |= {name: np.concatenate(held[name]), f"{name} ends": np.cumsum([len(each) for each in held[name]])}
        with replaced(file) as partial:
            np.savez_compressed(partial, **held)
        return rollout
    for name in _PER_STEP:
        arrays[name] = tuple(np.split(arrays[name], arrays.pop(f"{name} ends")[:-1]))  # type: ignore[assignment]
    settings = json.loads(str(arrays["settings"]))
    return Rollout(**arrays | {"seeds": tuple(arrays["seeds"].tolist()), "settings": settings})
