"""Results on disk: a file is written beside its place first, so that it is never half there.

with replaced(folder / "figure.png") as partial:
    figure.savefig(partial)
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import chanpatch
from maze.command import UserError


def check_folder(folder: Path) -> None:
    """Raise where nothing can be written into `folder`, which need not exist yet, before hours of work are lost.

    Raises:
        UserError: a file is in the way, or the permission is missing.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out is '{folder}', but '{nearest}' is a file. Name a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out is '{folder}', but '{nearest}' cannot be written to. Name another folder.")


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yields a path to write to; what is there when the block ends without an error becomes `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.partial{file.suffix}")  # the suffix stays: savefig and savez go by it
    yield partial
    os.replace(partial, file)


def replace_text(file: Path, text: str) -> None:
    with replaced(file) as partial:
        partial.write_text(text)


def replace_table(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as CSV; the first row's keys are the header."""
    rows = list(rows)
    with replaced(file) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short name for settings: equal for equal settings only."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def versions() -> dict[str, str]:
    """What the numbers were computed with; `source` changes with any line of chanpatch or of the study."""
    digest = hashlib.sha256()
    for package in (Path(chanpatch.__file__).parent, Path(__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": version("scipy"),
        "procgen": version("procgen2" if sys.version_info >= (3, 11) else "procgen"),
        "chanpatch": chanpatch.__version__,
        "source": digest.hexdigest()[:12],
    }
