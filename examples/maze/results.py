"""Results on disk: written as a whole, by one run at a time, and checked on reading.

with locked(folder), replaced(folder / "figure.png") as partial:
    figure.savefig(partial)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

import chanpatch
from maze.command import UserError

MANIFEST, LOCK = "manifest.json", "run.lock"


class Damaged(Exception):
    """A file differs from the file that was written; the message names the file."""


def check_folder(folder: Path) -> None:
    """Raise UserError if `folder`, which need not exist yet, cannot be written to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out is '{folder}', but '{nearest}' is a file. Name a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out is '{folder}', but '{nearest}' cannot be written to. Name another folder.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder` until the block ends; the lock of a dead process does not count.

    Raises:
        UserError: another run works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, blocking=False):
            yield
    except Timeout:
        raise UserError(
            f"'{folder}' is in use by another run. Wait until that run ends, or name another folder with --out."
        ) from None


def write_manifest(folder: Path, facts: Mapping[str, Any], name: str = MANIFEST) -> None:
    """Write facts about the results in a folder, with SHA-256 digests of its tables and of the manifest."""
    files = {file.name: _digest(file.read_bytes()) for file in sorted(folder.glob("*.csv"))}
    manifest = {**facts, "files": files}
    replace_text(folder / name, json.dumps({**manifest, "digest": _manifest_digest(manifest)}, indent=2) + "\n")


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """Return the facts of `write_manifest` after checking the digests.

    Raises:
        Damaged: the manifest or a table is missing or changed.
    """
    try:
        manifest = json.loads((folder / name).read_bytes())
        digest = manifest.pop("digest")
        if digest != _manifest_digest(manifest):
            raise ValueError
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{name} is damaged, or from before it held digests") from None
    for file, expected in manifest["files"].items():
        try:
            content = (folder / file).read_bytes()
        except OSError:
            raise Damaged(f"{file} is missing") from None
        if _digest(content) != expected:
            raise Damaged(f"{file} is not as it was measured")
    return dict(manifest)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return _digest(json.dumps(manifest, sort_keys=True).encode())


def read_arrays(file: Path) -> dict[str, NDArray[Any]] | None:
    """The arrays in an .npz file; None, with a printed line, if the file is damaged."""
    try:
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        print(f"    '{file.name}' is damaged, so it is computed again", flush=True)
        return None


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `file` if the block ends without an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.partial{file.suffix}")  # savefig and savez need the suffix
    partial.unlink(missing_ok=True)  # left by a killed run, or a link
    try:
        partial.open("x").close()
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(file: Path, text: str) -> None:
    with replaced(file) as partial:
        partial.write_text(text)


def replace_table(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV; the keys of the first row are the header."""
    rows = list(rows)
    with replaced(file) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short name that is equal for equal settings only."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def versions() -> dict[str, str]:
    """The versions behind the numbers; `source` changes with any line of code that a number may depend on.

    The report's own code only presents numbers, so a new layout keeps the measured parts.
    """
    digest = hashlib.sha256()
    for package in (Path(chanpatch.__file__).parent, Path(__file__).parent):
        for file in sorted(package.rglob("*.py")):
            name = file.relative_to(package).as_posix()
            if not name.startswith("report/"):
                digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": version("scipy"),
        "procgen": version("procgen2" if sys.version_info >= (3, 11) else "procgen"),
        "chanpatch": chanpatch.__version__,
        "source": digest.hexdigest()[:12],
    }
