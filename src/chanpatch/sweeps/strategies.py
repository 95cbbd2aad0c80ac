"""Three ways to run the same patches: the plain loop, the loop without the prefix, and many patches at a time.

The generators keep no context open between outputs, because the plain loop may run then.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..engine.paths import Path, leaves, replace
from ..engine.sessions import Session
from ..errors import EditError, NaNError
from ..labels import labelled
from ..patching.contexts import Patching, nan_error, patched
from ..patching.patch import Patch
from ..registry.sites import Site
from .forward import Forward
from .plan import Entry, Group
from .prefix import StrategyError

_CPU_BYTES = 3 * 2**24  # a CPU is slower with more at a time, which its caches do not hold
_FEWEST = 8  # patches at a time from which a CPU gains


def loop(forward: Forward, entry: Entry, *, skip: int = 0) -> Any:
    """Return the output under an entry's patches: one step of the plain loop, unless module calls are skipped."""
    with (
        labelled(entry.label),
        forward.running(skip) as run,  # hooks that are added before this would cost a new snapshot each time
        patched(forward.points, entry.patches, check_nan=forward.check_nan),
    ):
        return run.kept(forward.output())


def resumed(forward: Forward, group: Group, entries: Sequence[Entry]) -> Iterator[Any]:
    """Yield the output under each entry, with the prefix answered from memory."""
    for entry in entries:
        with _refused(but=EditError):
            output = loop(forward, entry, skip=group.skippable)
        yield output


def vmapped(forward: Forward, group: Group, entries: Sequence[Entry], baseline: Any, max_bytes: int) -> Iterator[Any]:
    """Yield the output under each entry; the suffix runs for as many entries at a time as fit into `max_bytes`."""
    paths = [path for path, _ in leaves(baseline)]
    with _refused():
        clean = forward.until(Site(group.point.name), skip=group.skippable)[group.point.name]
    room = min(max_bytes, _CPU_BYTES) if group.on_cpu else max_bytes
    size = max(1, room // max(1, group.bytes_each))  # inputs without rows take no memory
    for start in range(0, len(entries), size):
        chosen = entries[start : start + size]
        stack = _edited(forward, group, clean, chosen)
        with _refused(but=NaNError):
            tensors = _suffixes(forward, group, chosen, stack, paths)
            outputs = [baseline] * len(stack)
            for path, tensor in zip(paths, tensors, strict=True):
                outputs = [replace(output, path, row) for output, row in zip(outputs, tensor, strict=True)]
        yield from outputs


def gains_by_vmap(group: Group) -> bool:
    """Return whether many patches at a time are faster, by size: a CPU saves overhead and loses fused attention."""
    return not group.on_cpu or _FEWEST * group.bytes_each <= _CPU_BYTES


@contextmanager
def _refused(*, but: type[Exception] = StrategyError) -> Iterator[None]:
    """Turn an error into a StrategyError."""
    try:
        yield
    except (but, StrategyError):
        raise
    except Exception as fault:
        raise StrategyError(str(fault).partition("\n")[0] or type(fault).__name__) from fault


def _edited(forward: Forward, group: Group, clean: Tensor, entries: Sequence[Entry]) -> Tensor:
    """Return the activations `(entry, *activation)` after each entry's patches at the group's hook point."""
    stack = clean.new_empty((len(entries), *clean.shape))
    flags: list[_Flag] = []
    with forward.undisturbed as run:
        for entry, row in zip(entries, stack, strict=True):
            patches = group.first(entry)
            with labelled(entry.label):
                activation, found = forward.fire(patches, clean)
            flags += [(flag, entry, patch) for patch, flag in found]
            if activation is clean:
                raise StrategyError(f"{entry.label!r} returns the same tensor, which may be written into later")
            row.copy_(activation)
            if not all(patch.runs_only_ours for patch in patches):
                if run.snapshot.changed():
                    raise StrategyError(f"{entry.label!r} leaves something on the model for the rest of its forward")
                run.put_back()
    _raise_nan(flags)
    return stack


_Flag: TypeAlias = tuple[Tensor, Entry, Patch]  # whether the patch introduced NaN for the entry


def _raise_nan(flags: Sequence[_Flag]) -> None:
    """Raise for the first patch that introduced NaN; a device is read once."""
    if flags and torch.stack([flag for flag, *_ in flags]).any():
        entry, patch = next((entry, patch) for flag, entry, patch in flags if flag)
        with labelled(entry.label):
            raise nan_error(patch)


def _suffixes(
    forward: Forward, group: Group, entries: Sequence[Entry], stack: Tensor, paths: Sequence[Path]
) -> list[Tensor]:
    """Return the tensors of the output at these paths, `(entry, ...)` each, under a stack of activations."""
    session = Patching(forward.points, group.later or (), check_nan=forward.check_nan)
    waiting: list[Tensor] = []

    def put(leaf: Tensor, session: Session) -> Tensor:
        if not waiting:
            raise StrategyError("the hook point ran twice")
        return waiting.pop()

    def one(activation: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        waiting.append(activation)
        output = [*leaves(forward.output())]
        if [path for path, _ in output] != paths:
            raise StrategyError("the output has tensors in other places than the unpatched one")
        flags = [firing.nan for firing in session.firings if firing.nan is not None]
        return [leaf for _, leaf in output], flags

    session.listen(group.point, "patch", put)
    try:
        with forward.running(group.skippable), session.attached(), _vmap_compatible(stack.device):
            tensors: list[Tensor]
            tensors, nan = torch.vmap(one)(stack)
        if waiting or session.unreached():
            raise StrategyError("a patch was not reached")
        flagged = [firing.patch for firing in session.firings if firing.nan is not None]
        for patch, flags in zip(flagged, nan, strict=True):
            _raise_nan([(flag, entry, patch) for flag, entry in zip(flags, entries, strict=True)])
        return tensors
    finally:
        session.let_go()


@contextmanager
def _vmap_compatible(device: torch.device) -> Iterator[None]:
    """Disable validation of distributions and fused attention, for which vmap has no rule; refuse its slow loops."""
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    on_cpu = device.type == "cpu"  # the kernels of other devices have rules
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            warnings.filterwarnings("error", message="There is a performance drop")
            yield
    finally:
        Distribution.set_default_validate_args(validates)
