"""Three ways to run the same patches: the plain loop, the loop without what comes before, and many at a time.

The plain loop is what the other two must agree with. The generators hold no context open while they wait, so that
the plain loop may be run in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..engine.paths import Path, leaves, replace
from ..engine.sessions import Moment, Session, published
from ..errors import EditError
from ..patching.contexts import Patching, nan_error, patched
from ..patching.firing import Firing
from ..patching.patch import labelled
from ..patching.recording import run_with_cache
from ..registry.points import root_of
from ..registry.sites import Site
from .forward import Forward, usual_attention
from .later import Later, Operands
from .plan import Entry, Group
from .prefix import Prefix

_CPU_BYTES = 3 * 2**24  # more at a time, which its caches do not hold, makes a CPU slower


_FEWEST = 8  # patches at a time, from which on a CPU gains by that


class StrategyError(Exception):
    """A fast strategy that this model or these patches do not allow."""


def loop(forward: Forward, entry: Entry) -> Any:
    """Return the output under an entry's patches: one step of the plain loop."""
    with labelled(entry.label), patched(forward.points_or_model, entry.patches, check_nan=forward.check_nan):
        return forward()


def resumed(forward: Forward, prefix: Prefix, group: Group, entries: Sequence[Entry]) -> Iterator[Any]:
    """Yield the output under each entry; what comes before the patches is answered from memory."""
    for entry in entries:
        try:
            with prefix.skipped(group.skippable):
                output = loop(forward, entry)
        except EditError:
            raise
        except Exception as fault:
            raise StrategyError(_first_line(fault)) from fault
        yield output


def vmapped(
    forward: Forward, prefix: Prefix, group: Group, entries: Sequence[Entry], baseline: Any, max_bytes: int
) -> Iterator[Any]:
    """Yield the output under each entry; what comes after the patches runs for many of them at a time.

    Args:
        forward: What is run.
        prefix: What is not run again.
        group: Where the entries begin.
        entries: In this order.
        baseline: An output, for the shape of the others.
        max_bytes: For what one forward of many patches takes.
    """
    run = _Vmapped(forward, prefix, group, [path for path, _ in leaves(baseline)])
    try:
        clean = _clean(forward, prefix, group)
    except Exception as fault:
        raise StrategyError(_first_line(fault)) from fault
    room = min(max_bytes, _CPU_BYTES) if group.on_cpu else max_bytes
    size = max(1, room // max(1, group.bytes_each + run.later.bytes_each))  # inputs without rows take none
    try:
        for start in range(0, len(entries), size):
            chosen = entries[start : start + size]
            stack = _stacked(forward, group, clean, chosen)
            try:
                outputs = run(stack, chosen)
                for row in range(len(stack)):
                    yield _rebuilt(baseline, {path: leaf[row] for path, leaf in outputs.items()})
            except Exception as fault:
                raise StrategyError(_first_line(fault)) from fault
    finally:
        run.let_go()


def gains_by_vmap(group: Group) -> bool:
    """Tell whether many patches at a time are faster than one after the other, from their size alone.

    A CPU gains what a forward costs beside its arithmetic, and loses the fused attention.
    """
    return not group.on_cpu or _FEWEST * group.bytes_each <= _CPU_BYTES


class _Vmapped:
    """The forward, for many activations at one hook point at once.

    Args:
        forward: What is run.
        prefix: What is not run again.
        group: Where the activations go.
        paths: Where the tensors stand in an output.
    """

    def __init__(self, forward: Forward, prefix: Prefix, group: Group, paths: Sequence[Path]) -> None:
        self._forward, self._prefix, self._group, self._paths = forward, prefix, group, paths
        self._session = Session(*root_of(forward.points_or_model))
        self._session.listen(group.point, "patch", self._put)
        self._session.confined = True
        self.later = Later([group.later(entry) for entry in group.entries], group.blank)
        self._applied = Patching(forward.points_or_model, self.later.patches, check_nan=forward.check_nan)
        self._applied.confined = True
        self._activation: Tensor | None = None

    def __call__(self, stack: Tensor, entries: Sequence[Entry]) -> dict[Path, Tensor]:
        """Return every tensor of the output, each with an axis of entries before its own."""
        operands = self.later.operands([self._group.later(entry) for entry in entries])
        with (
            self._attributes_put_back(),
            self._forward.undisturbed,
            self._session,
            self._applied,
            self._prefix.skipped(self._group.skippable),
            _ways_that_vmap_knows(stack.device),
        ):
            tensors, brought_nan = torch.vmap(self._one)(stack, operands)
        if any(bool(flags.any()) for flags in brought_nan):
            raise StrategyError("a later patch brought NaN in")  # the loop says which
        if self._activation is not None or self._applied.unreached():
            raise StrategyError("a patch was not reached")
        return dict(zip(self._paths, tensors, strict=True))

    def let_go(self) -> None:
        """Forget the listeners, as no forward comes any more."""
        self._session.let_go()
        self._applied.let_go()

    def _one(self, activation: Tensor, operands: Sequence[Operands]) -> tuple[list[Tensor], list[Tensor]]:
        self._activation = activation
        self.later.use(operands)
        self._applied.forget()
        output = [*leaves(self._forward.disturbing())]
        if [path for path, _ in output] != self._paths:
            raise StrategyError("the output has tensors in other places than the unpatched one")
        return [leaf for _, leaf in output], [each.nan for each in self._applied.firings if each.nan is not None]

    @contextmanager
    def _attributes_put_back(self) -> Iterator[None]:
        try:
            yield
        finally:  # a tensor of a vmap that has ended is of no use to anybody
            self._prefix.attributes.put_back()

    def _put(self, leaf: Tensor, session: Session) -> Tensor:
        activation, self._activation = self._activation, None
        if activation is None:
            raise StrategyError("the hook point ran twice")
        return activation


def _clean(forward: Forward, prefix: Prefix, group: Group) -> Tensor:
    """Return the activation at a group's hook point without its patches."""
    site = Site(group.point.name)
    args, kwargs = forward.copies()
    with forward.undisturbed, usual_attention(), prefix.skipped(group.skippable):
        cache = run_with_cache(forward.points_or_model, *args, sites=site, stop=True, **kwargs)
    activation: Tensor = cache[site]
    return activation


def _stacked(forward: Forward, group: Group, clean: Tensor, entries: Sequence[Entry]) -> Tensor:
    stack = clean.new_empty((len(entries), *clean.shape))
    modules = dict(forward.model.named_modules(remove_duplicate=False))
    args, kwargs = forward.inputs
    # The edits find everything as it is when the hook point is reached.
    moment = Moment((*args, *kwargs.values()), group.call, published.step, published.rows, forward.method)
    flags = []
    with forward.undisturbed:
        for entry, row in zip(entries, stack, strict=True):
            activation = clean
            patches = group.first(entry)
            with labelled(entry.label):
                for patch in patches:
                    firing = Firing(patch, group.point, modules.get(group.point.module), check_nan=forward.check_nan)
                    activation = firing(activation, moment)
                    flags += [] if firing.nan is None else [(firing.nan, entry, patch)]
            if activation is clean:
                raise StrategyError(f"{entry.label!r} leaves the very tensor, which may be written into later")
            row.copy_(activation)
            if not all(patch.runs_only_ours for patch in patches):
                if forward.undisturbed.snapshot.changed():
                    raise StrategyError(f"{entry.label!r} leaves something on the model for the rest of its forward")
                forward.undisturbed.put_back()
    if flags and torch.stack([flag for flag, *_ in flags]).any():
        entry, patch = next((entry, patch) for flag, entry, patch in flags if flag)
        with labelled(entry.label):
            raise nan_error(patch)
    return stack


def _rebuilt(baseline: Any, tensors: Mapping[Path, Tensor]) -> Any:
    """Return an output like the baseline with other tensors in it."""
    output = baseline
    for path, tensor in tensors.items():
        output = replace(output, path, tensor)
    return output


@contextmanager
def _ways_that_vmap_knows(device: torch.device) -> Iterator[None]:
    """Do without what vmap has no rule for: validation of distributions, and fused attention; refuse its slow loops."""
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    on_cpu = device.type == "cpu"  # the kernels of other devices have rules
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            warnings.filterwarnings("error", message="There is a performance drop")
            yield
    finally:
        Distribution.set_default_validate_args(validates)


def _first_line(fault: Exception) -> str:
    return str(fault).partition("\n")[0] or type(fault).__name__
