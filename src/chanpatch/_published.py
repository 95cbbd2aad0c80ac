"""What rollouts and sweeps tell the patches about the forward under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Published(threading.local):
    step: int | None = None
    rows: Tensor | None = None


published = _Published()


@contextmanager
def forward_context(*, step: int | None = None, rows: Any = None) -> Iterator[None]:
    """Publish the step of a rollout, and the numbers of the rows in this forward, to the patches that ask."""
    before = published.step, published.rows
    published.step, published.rows = step, None if rows is None else torch.as_tensor(rows)
    try:
        yield
    finally:
        published.step, published.rows = before
