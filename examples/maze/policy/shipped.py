"""The shipped policies: their names and files; the report describes them in `argument.jinja`."""

from __future__ import annotations

import hashlib
from functools import cache

from maze.policy.network import SHIPPED_WEIGHTS

# The main policy of a run on all of them first.
NAMES = ("width4", "imitation", "control", "reward", "seed1", "seed2")
FILES = {name: SHIPPED_WEIGHTS.with_name(f"{name.replace('imitation', 'policy')}.safetensors") for name in NAMES}


@cache
def shipped_name(sha256: str) -> str | None:
    """The name of a shipped policy by the digest of its file; None for any other file."""
    digests = {hashlib.sha256(file.read_bytes()).hexdigest(): name for name, file in FILES.items() if file.exists()}
    return digests.get(sha256)
