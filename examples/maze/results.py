"""Results on disk. Files are written completely or not at all, by one run at a time, and are checked when read.

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
    """Raised if a file is missing or differs from the file that was written. The message names the file."""


def check_folder(folder: Path) -> None:
    """Raise UserError if `folder` cannot be written to. The folder does not have to exist yet."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out is '{folder}', but '{nearest}' is a file. Name a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out is '{folder}', but '{nearest}' cannot be written to. Name another folder.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder` until the block ends. A lock that a dead process left behind is ignored.

    Raises:
        UserError: If another run is using the folder.
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
    """Write a manifest to a folder: the given facts, and SHA-256 digests of the folder's tables and of the manifest."""
    files = {file.name: _digest(file.read_bytes()) for file in sorted(folder.glob("*.csv"))}
    manifest = {**facts, "files": files}
    replace_text(folder / name, json.dumps({**manifest, "digest": _manifest_digest(manifest)}, indent=2) + "\n")


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """Check the digests in a folder's manifest, and return the facts that `write_manifest` wrote.

    Raises:
        Damaged: If the manifest or a table is missing or was changed.
    """
    try:
        manifest = json.loads((folder / name).read_bytes())
        digest = manifest.pop("digest")
        if digest != _manifest_digest(manifest):
            raise ValueError
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{name} is damaged, or is from an older version that did not store digests") from None
    for file, expected in manifest["files"].items():
        try:
            content = (folder / file).read_bytes()
        except OSError:
            raise Damaged(f"{file} is missing") from None
        if _digest(content) != expected:
            raise Damaged(f"{file} was changed after it was measured")
    return dict(manifest)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return _digest(json.dumps(manifest, sort_keys=True).encode())


def read_arrays(file: Path) -> dict[str, NDArray[Any]] | None:
    """Return the arrays in an .npz file. If the file is damaged, print a message and return None."""
    try:
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        print(f"    '{file.name}' is damaged, so it is computed again", flush=True)
        return None


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a temporary path. If the block ends without an error, the file at this path replaces `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.partial{file.suffix}")  # savefig and savez need the suffix
    partial.unlink(missing_ok=True)  # left behind by a killed run, or a link
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
    """Write rows to a CSV file. The keys of the first row are the header."""
    rows = list(rows)
    with replaced(file) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return a short name for settings. Two names are equal only if the settings are equal."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def versions() -> dict[str, str]:
    """Return the versions of the software that the numbers may depend on.

    `source` changes with any source file, except for the files in `report/`. These only present numbers, so parts that
    were measured before remain valid if the report gets a new layout.
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
