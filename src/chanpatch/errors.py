"""Exceptions raised by chanpatch. Every class inherits from ChanpatchError and from a built-in, such as ValueError.

Every message states the wrong value, the expected value, and a fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class ChanpatchError(Exception):
    """Base class for all chanpatch errors."""


class HookPointError(ChanpatchError, KeyError):
    """Raised when a name does not exist in the model, or when the traced forward pass did not call the named module."""

    __str__ = Exception.__str__  # KeyError would print the message as a quoted literal


class SiteError(ChanpatchError, ValueError):
    """Raised when an axis or an index does not exist at the hook point."""


class EditError(ChanpatchError, ValueError):
    """Raised when an edit's operands or result do not match the region."""


class NaNError(EditError):
    """Raised when an edit introduces NaN into a region that contained no NaN."""


class BatchAxisError(ChanpatchError, ValueError):
    """Raised when an operation needs the rows of a batch, but the batch axis of the hook point is unknown."""


class TraceMismatchError(ChanpatchError, RuntimeError):
    """Raised when types, shapes (other than batch sizes), dtypes or numbers of calls differ from those in the trace."""


class UnreachedError(ChanpatchError, RuntimeError):
    """Raised when no forward pass reached a patched or recorded site."""


class ConcurrencyError(ChanpatchError, RuntimeError):
    """Raised when a model patched or recorded in one thread runs in another, or a copy of a patched module runs."""


class UnsupportedModelError(ChanpatchError, TypeError):
    """Raised when a model would ignore hooks, cannot be copied, or belongs to an unknown family."""


class DistributionError(ChanpatchError, TypeError):
    """Raised when an output has no action distribution, or a distribution does not support inverse-CDF sampling."""


class MetricError(ChanpatchError, ValueError):
    """Raised when a metric, or an action passed to a metric, does not match the model's output."""


class SweepError(ChanpatchError, ValueError):
    """Raised when patches cannot be swept at all, or cannot be swept with the requested strategy."""


class RolloutError(ChanpatchError, ValueError):
    """Raised when a rollout cannot run with the given seeds, environments or policies."""


class ExecutorError(ChanpatchError, RuntimeError):
    """Raised when a call cannot be sent to an executor's workers, or when the executor loses workers.

    Attributes:
        lost: Labels of the results that were not computed.
        partial: Result for all other labels, or None if there is no partial result.
    """

    lost: tuple[Any, ...] = ()
    partial: Any = None


class StatisticsError(ChanpatchError, ValueError):
    """Raised when a statistic is undefined for the given counts or scores."""


class ContrastError(ChanpatchError, ValueError):
    """Raised when inputs do not form pairs, or when clusters or background inputs do not match the pairs."""


class ProbeError(ChanpatchError, ValueError):
    """Raised when a probe cannot be fitted to the given sums or labels."""


class InterventionError(ChanpatchError, ValueError):
    """Raised when a patch to be saved contains a function, or when a file is damaged or does not match the model."""


class MissingPackageError(ChanpatchError, ImportError):
    """Raised when an optional package is not installed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def counted(count: int, noun: str) -> str:
    """Return a count and its noun, such as `"1 input"`, `"3 inputs"` or `"2 patches"`."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{count} {noun}{plural * (count != 1)}"


def in_one(faults: Sequence[object]) -> str:
    """Combine error messages into one message. If there is only one error message, return that message unchanged."""
    listed = [f"{len(faults)} errors:", *(f"- {each}" for each in faults)]
    return "\n".join(listed) if len(faults) > 1 else str(*faults)


__all__ = [name for name, kind in vars().copy().items() if isinstance(kind, type) and issubclass(kind, Exception)]
