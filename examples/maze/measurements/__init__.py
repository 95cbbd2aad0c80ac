"""The parts of the study, in the order of the report; `Part.of` describes the contents of a module."""

from importlib import import_module

from maze.analysis.part import Part

_MODULES = (
    *("pair", "search", "ranking", "sums", "decision", "ablation", "distance", "top16", "spatial", "sizes", "parity"),
    *("generator", "cheese_vector", "corner_vector", "retarget", "statistics", "random_mazes", "hypothesis"),
)

PARTS = {part.name: part for part in (Part.of(import_module(f"{__name__}.{module}")) for module in _MODULES)}

# Measured on every policy.
SIDE_BY_SIDE = ("search", "ranking", "sums", "decision", "ablation")
