"""Everything chanpatch raises, in one tree.

    ChanpatchError
    ├── HookPointError (KeyError)            no such hook point, or one that never fired
    ├── SiteError (ValueError)               an axis or an index that the hook point does not have
    ├── EditError (ValueError)               an edit that cannot apply to its region
    │   └── NaNError                         an edit that brought NaN into the network
    ├── BatchAxisError (ValueError)          something row-wise where no batch axis is proved
    ├── TraceMismatchError (RuntimeError)    a forward that differs from the traced one
    ├── UnreachedError (RuntimeError)        a patch or a record that never ran
    ├── ConcurrencyError (RuntimeError)      one context, two threads
    ├── UnsupportedModelError (TypeError)    a model whose hooks would be ignored, or that cannot be copied
    ├── DistributionError (TypeError)        an output that is no action distribution, or one that cannot be sampled
    ├── MetricError (ValueError)             a metric that does not fit the output
    ├── SweepError (ValueError)              patches or a strategy that cannot be swept
    ├── RolloutError (ValueError)            seeds, environments or policies that cannot be rolled out
    ├── StatisticsError (ValueError)         counts or scores that no statistic can be taken of
    ├── ContrastError (ValueError)           pairs that are none
    ├── ProbeError (ValueError)              sums or labels that no probe can be fitted to
    ├── InterventionError (ValueError)       patches that cannot be saved, or a file that cannot be loaded or repeated
    └── MissingPackageError (ImportError)    an optional package that is not installed

A message says what is wrong with the user's own value, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BatchAxisError",
    "ChanpatchError",
    "ConcurrencyError",
    "ContrastError",
    "DistributionError",
    "EditError",
    "HookPointError",
    "InterventionError",
    "MetricError",
    "MissingPackageError",
    "NaNError",
    "ProbeError",
    "RolloutError",
    "SiteError",
    "StatisticsError",
    "SweepError",
    "TraceMismatchError",
    "UnreachedError",
    "UnsupportedModelError",
]


class ChanpatchError(Exception):
    """The base of every error that chanpatch raises."""


class HookPointError(ChanpatchError, KeyError):
    """A name that is no hook point of the model, or a module that the traced forward never called."""

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
    """An output that is no action distribution, or a distribution that cannot be sampled by inverse CDF."""


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
    """Patches that are no data, or a file of them that is damaged, does not fit the model, or does not repeat."""


class MissingPackageError(ChanpatchError, ImportError):
    """An optional package that is not installed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
