"""The parts of the study, in the order of the report; each module ends in its `PART`."""

from maze.analysis.part import Part
from maze.measurements import (
    ablation,
    cheese_vector,
    corner_vector,
    decision,
    distance,
    generator,
    hypothesis,
    pair,
    parity,
    random_mazes,
    ranking,
    retarget,
    search,
    sizes,
    spatial,
    statistics,
    sums,
    sweep,
    top16,
)

_MODULES = (
    pair,
    search,
    ranking,
    sums,
    decision,
    ablation,
    distance,
    top16,
    spatial,
    sizes,
    parity,
    generator,
    cheese_vector,
    corner_vector,
    retarget,
    statistics,
    random_mazes,
    hypothesis,
)

PARTS: dict[str, Part] = {module.PART.name: module.PART for module in _MODULES}

# Measured only when `--only` names them.
EXTRA: dict[str, Part] = {sweep.PART.name: sweep.PART}

# Measured on every policy.
SIDE_BY_SIDE = ("search", "ranking", "sums", "decision", "ablation")
