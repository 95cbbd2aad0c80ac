"""The parts of the study, in the order of the report; each module ends in its `PART`."""

from maze.part import Part
from maze.parts import pair, search, sums, sweep

PARTS: dict[str, Part] = {module.PART.name: module.PART for module in (pair, search, sums)}

# What is measured on every policy, so that what was taught can be told from what was not.
SIDE_BY_SIDE = ("search", "ranking", "sums", "decision", "ablation")

# Measured only when `--only` names them.
EXTRA: dict[str, Part] = {sweep.PART.name: sweep.PART}
