"""All errors of chanpatch: each is a ChanpatchError, and the built-in error that fits, such as ValueError.

A message says the fault in the user's own value, the expected value, and a remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ChanpatchError(Exception):
    """The base of every error that chanpatch raises."""


class HookPointError(ChanpatchError, KeyError):
    """A name that the model does not have, or a module that the traced forward never called."""

    __str__ = Exception.__str__  # KeyError would print the message as a quoted literal


class SiteError(ChanpatchError, ValueError):
    """An axis or an index that the hook point does not have."""


class EditError(ChanpatchError, ValueError):
    """An edit whose operands or result do not fit the region."""


class NaNError(EditError):
    """An edit that brought NaN into a region that had none."""


class BatchAxisError(ChanpatchError, ValueError):
    """Something row-wise was asked of a hook point whose batch axis is not proved."""


class TraceMismatchError(ChanpatchError, RuntimeError):
    """A forward that differs from the traced one in more than the batch."""


class UnreachedError(ChanpatchError, RuntimeError):
    """A patch or a record whose site never ran."""


class ConcurrencyError(ChanpatchError, RuntimeError):
    """A context used from a thread other than its own, or a copy of a module that is being patched."""


class UnsupportedModelError(ChanpatchError, TypeError):
    """A model whose hooks would be ignored, or that cannot be copied."""


class DistributionError(ChanpatchError, TypeError):
    """An output without an action distribution, or a distribution that cannot be sampled by inverse CDF."""


class MetricError(ChanpatchError, ValueError):
    """A metric, or an action given to one, that does not fit the output."""


class SweepError(ChanpatchError, ValueError):
    """Patches that cannot be swept, or not by the strategy that was asked for."""


class RolloutError(ChanpatchError, ValueError):
    """Seeds, environments or policies that cannot be rolled out."""


class StatisticsError(ChanpatchError, ValueError):
    """Counts or scores of which the statistic does not exist."""


class ContrastError(ChanpatchError, ValueError):
    """Inputs that do not make pairs, or clusters and backgrounds that do not fit them."""


class ProbeError(ChanpatchError, ValueError):
    """Sums or labels that no probe can be fitted to."""


class InterventionError(ChanpatchError, ValueError):
    """Patches that hold functions, or a file of them that is damaged, does not fit the model, or does not repeat."""


class MissingPackageError(ChanpatchError, ImportError):
    """An optional package that is not installed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def in_one(faults: Sequence[object]) -> str:
    """Return one message with all faults."""
    return "\n".join(
        [f"{len(faults)} faults:", *(f"- {each}" for each in faults)] if len(faults) > 1 else map(str, faults)
    )


__all__ = [name for name, kind in vars().copy().items() if isinstance(kind, type) and issubclass(kind, Exception)]
