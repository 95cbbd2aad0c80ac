"""Packages that not everybody has."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import MissingPackageError


def imported(name: str, *, package: str | None = None) -> Any:
    """Return a module.

    Args:
        name: Such as `"sklearn.linear_model"`.
        package: What pip calls it; the first part of the name if None.

    Raises:
        MissingPackageError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = package or name.partition(".")[0]
        raise MissingPackageError(f"{package} is not installed: pip install {package}") from error
