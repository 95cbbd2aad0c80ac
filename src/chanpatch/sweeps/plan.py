"""Plan a sweep: label the patches, run the model once without patches, and group the patches that share a prefix."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

from ..engine.inputs import batches, copied_inputs, input_count
from ..engine.moments import Moment, forward_context, published
from ..engine.paths import storage
from ..engine.sessions import Attached, Session
from ..engine.state import undisturbed
from ..errors import SweepError, UnreachedError
from ..labels import Patches, labelled_patches, refuse_shared_state
from ..patching.cache import ActivationCache
from ..patching.contexts import ContextSession, checked_patches
from ..patching.firing import Firing
from ..patching.patch import Patch
from ..patching.recording import run_with_cache
from ..registry.points import HookPoints
from ..registry.sites import HookPoint, Site
from .prefix import Prefix, Use, fresh

_LIVE = 6  # number of activations assumed in memory at once: a module's input and output, a residual, and copies
_OPERATIONS = 10**6  # number of multiplications that take about ten times as long as calling a module


class Entry(NamedTuple):
    """One row of a sweep's result: the row's index, a label, and patches that are applied together."""

    number: int
    label: Any
    patches: tuple[Patch, ...]


class Group(NamedTuple):
    """Entries whose first patch in execution order is at the same hook point, `point`."""

    point: HookPoint
    entries: tuple[Entry, ...]
    skippable: int  # number of module calls that finish before the hook point is reached
    bytes_each: int  # approximate memory per entry in a batched forward pass
    on_cpu: bool

    @property
    def is_single(self) -> bool:
        """Whether all patches of the group's entries are at the group's hook point."""
        return all(patch.site.name == self.point.name for entry in self.entries for patch in entry.patches)


class Forward:
    """Run the traced method on copies of the same inputs, without side effects."""

    def __init__(
        self,
        points: HookPoints,
        inputs: tuple[Any, ...],
        keywords: Mapping[str, Any],
        *,
        check_nan: bool = True,
        row: int | None = None,
        restoring: undisturbed | None = None,
    ) -> None:
        self.points, self.inputs, self.check_nan = points, (inputs, dict(keywords)), check_nan
        self.row = row  # if `inputs` contains only one row of the whole batch, the index of that row; otherwise None
        self.undisturbed = restoring or undisturbed(points.model)
        self.prefix = Prefix(points, self.undisturbed.snapshot)
        self.rebound: list[tuple[dict[str, Any], str]] = []  # the attributes that the last call set
        self.draws = False  # whether the last call drew random numbers

    def __call__(self, around: AbstractContextManager[Any] | None = None) -> Any:
        """Run the model without side effects, inside the context `around`, and return the model's output."""
        with self.running() as run:
            with around or nullcontext():
                output = self.output()
            self.draws, self.rebound = run.has_drawn(), run.snapshot.rebound()
            return run.kept(output)

    @contextmanager
    def running(self, skip: int = 0, spread: Callable[[Any, Any], Any] | None = None) -> Iterator[undisturbed]:
        """Return a context for a forward pass that skips the first `skip` module calls. Restore the model on exit.

        If `spread` is given, it receives each skipped Call and the reused output, and returns the output to use.
        """
        with (
            self.undisturbed as run,
            nullcontext() if self.row is None else forward_context(rows=[self.row], step=published.now.step),
            _usual_attention(),
            self.prefix.skipped(skip, spread) if skip else nullcontext(),
        ):
            yield run

    def output(self, inputs: Any = None) -> Any:
        """Run the model on `inputs`, a pair (args, kwargs), and return the output. Call this method inside `running`.

        By default, the model runs on the inputs of this Forward.
        """
        return fresh(self.points.run(*(inputs or self.inputs)))  # a model may return the same dict in every call

    def until(self, sites: Site | Sequence[Site], *, skip: int = 0) -> ActivationCache:
        """Run the model up to the last of the sites, and return a cache with the activations at all sites."""
        args, kwargs = copied_inputs(*self.inputs)
        with self.running(skip):
            cache: ActivationCache = run_with_cache(self.points, *args, sites=sites, stop=True, **kwargs)
            return cache

    def fire(
        self, patches: Sequence[Patch], activation: Tensor, masks: dict[tuple[object, ...], Any] | None = None
    ) -> tuple[Tensor, list[tuple[Patch, Tensor]]]:
        """Apply patches to `activation`, the tensor at the patches' hook point. Return the new tensor, and NaN flags.

        The flags are a list of pairs (patch, flag). A flag is a bool tensor that is True if the patch introduced NaN.
        `masks` is the cache of masks from `where` functions, as in Moment.
        """
        args, kwargs = self.inputs
        inputs, flags, masks = (*args, *kwargs.values()), [], {} if masks is None else masks
        for patch in patches:
            point = patch.site.point or self.points[patch.site.name]
            firing = Firing(patch, point, check_nan=self.check_nan)
            method = self.points.method
            moment = Moment(inputs, point.call or 0, 0, published.now, method, masks, self.points, method)
            activation = firing(activation, moment)
            flags += [] if firing.nan is None else [(patch, firing.nan)]
        return activation, flags

    def is_heavy(self, patches: int) -> bool:
        """Estimate whether the arithmetic for all patches takes much longer than the overhead of calling modules.

        If so, skipping module calls saves time. `patches` is the number of patches.
        """
        operations, outputs = 0, [each for each in self.points.values() if each.side == "out" and each.shape]
        inner = {
            ".".join(parts[:end]) for each in outputs for parts in [each.module.split(".")] for end in range(len(parts))
        }
        for point in outputs:
            if point.module not in inner:
                channels = point.length("channel") if "channel" in point.axes else point.shape[-1]
                operations += point.parameters * math.prod(n or 1 for n in point.shape) // (channels or 1)
        return operations * input_count(self.inputs) * patches > _OPERATIONS * len(outputs)

    def ends(self) -> list[Forward]:
        """Return two Forwards: one that runs only on the first row, and one that runs only on the last row.

        If a forward pass on a single row is not possible, or there is only one row, return an empty list.
        """
        count = input_count(self.inputs)
        if count < 2 or published.now.rows is not None:
            return []
        try:
            first, last = next(batches(self.inputs, 1)), [*batches(self.inputs, count - 1)][-1]
        except RuntimeError:  # a sparse tensor cannot be split
            return []
        cut = {0: first, count - 1: last}
        shared = {"check_nan": self.check_nan, "restoring": self.undisturbed}
        return [Forward(self.points, *each, row=row, **shared) for row, (each, _) in cut.items()]  # type: ignore[arg-type]


@contextmanager
def _usual_attention() -> Iterator[None]:
    """Disable torch's fused attention, which vmap does not support and which torch uses only if there are no hooks."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def entries_of(points: HookPoints, patches: Patches | Patch, what: str, start: int = 0) -> list[Entry]:
    """Return one entry per label, numbered from `start`. `what` is the name of the argument, for error messages."""
    named = labelled_patches(patches, what, SweepError)
    for label, each in named:
        if not each:
            raise SweepError(f"In `{what}`, the label {label!r} has no patches. Omit that label.")
    refuse_shared_state(named)
    checked = iter(checked_patches(points, [patch for _, each in named for patch in each]))
    return [
        Entry(number, label, tuple(next(checked) for _ in each)) for number, (label, each) in enumerate(named, start)
    ]


class Seen:
    """Properties of the activation at a hook point in the clean run and, if `keep` is True, a copy of it."""

    def __init__(self, leaf: Tensor, prefix: Prefix, *, keep: bool) -> None:
        self.nbytes, self.on_cpu = leaf.nbytes, leaf.is_cpu
        # Numbers of module calls that have finished, and of torch functions that have run, before this activation.
        self.skippable, self.step = prefix.finished, len(prefix.steps)
        self.clean = leaf.detach().clone() if keep and leaf.layout == torch.strided else None
        self._largest: Tensor | None = None
        self._leaf, self._version = leaf, -1 if leaf.is_inference() else leaf._version

    def settle(self, exposed: set[int]) -> None:
        """After the run, record whether a later function may have written to the tensor in place. Release the tensor.

        `exposed` contains the storages through which writes cannot be detected.
        """
        self.overwritten = self._version < 0 or self._leaf._version != self._version or storage(self._leaf) in exposed
        del self._leaf

    def others(self, axis: int) -> tuple[Tensor, Tensor]:
        """Return two tensors to put next to the activation: NaN and large values. For integers, both are reordered.

        `axis` is the batch axis of the activation. The activation must have been kept.
        """
        assert self.clean is not None
        if not (self.clean.is_floating_point() or self.clean.is_complex()):
            return (self.clean.flip(axis),) * 2
        return self.clean * math.nan, 1000 * (self.clean if self._largest is None else self._largest)

    def on_row(self, axis: int | None, row: int | None) -> Seen:
        """Return the same object with one row of the activation, or with none if the row has no other values.

        The large values are then those with the largest magnitudes in the whole activation.
        """
        seen, whole = copy.copy(self), self.clean
        seen.clean = None
        if axis is not None and row is not None and whole is not None and whole.is_floating_point():
            seen.clean, low, high = whole.narrow(axis, row, 1), *torch.aminmax(whole, dim=axis, keepdim=True)
            seen._largest = high.where(high > -low, low)
        return seen


def clean_run(
    forward: Forward, entries: Sequence[Entry], max_bytes: int, *, store: bool = True
) -> tuple[Any, list[Group], dict[str, Seen]]:
    """Run the model without patches. Return the output, groups of entries, and data about the patched activations.

    The groups are in execution order. The data are a dict that maps names of hook points to Seen objects. If `store` is
    True, the outputs of module calls, up to `max_bytes` in total, are stored in the prefix during the run.
    """
    points, prefix = forward.points, forward.prefix
    session = ContextSession(points)
    seen: dict[str, Seen] = {}

    free = [max_bytes]

    def note(name: str, leaf: Tensor, session: Session) -> Tensor:
        # `prefix` would otherwise watch the functions that run here; another thread may have no such mode.
        with _pop_mode_temporarily() if torch._C._len_torch_function_stack() else nullcontext():
            free[0] -= leaf.nbytes
            seen[name] = Seen(leaf, prefix, keep=free[0] >= 0)
            prefix.uses.append(Use(-1, prefix.finished, {storage(leaf)}, set()))
        return leaf

    first_at: dict[str, Entry] = {}
    for entry in entries:
        for patch in entry.patches:
            first_at.setdefault(patch.site.name, entry)
    for name in first_at:
        session.listen(points[name], "patch", partial(note, name))
    taps = {points[name].module for name in first_at if points[name].side == "tap"}

    @contextmanager
    def noting(*, draws: bool) -> Iterator[None]:
        with Attached(session), prefix.remembered(taps, max_bytes, draws=draws, store=store):
            yield

    output = forward(noting(draws=False))
    if store and forward.draws:
        output = forward(noting(draws=True))
    session.let_go()
    for each in seen.values():
        each.settle(prefix.exposed)
    for name, entry in first_at.items():
        if name not in seen:
            raise UnreachedError(
                f"{entry.label!r}: the patch at '{name}' never ran in the sweep. Either '{name}' was not called, or it "
                "was called through .forward() directly, which bypasses hooks."
            )
    groups = [*_groups(forward, entries, seen)]
    del prefix.calls[max(group.skippable for group in groups) :]
    return output, groups, seen


def _groups(forward: Forward, entries: Sequence[Entry], seen: Mapping[str, Seen]) -> Iterator[Group]:
    """Group entries by the hook point of the patch that runs first."""
    order = {name: number for number, name in enumerate(seen)}
    begun: dict[str, list[Entry]] = {name: [] for name in seen}
    for entry in entries:
        begun[min((patch.site.name for patch in entry.patches), key=order.__getitem__)].append(entry)
    for name, each in begun.items():
        if each:
            at = seen[name]
            bytes_each = _LIVE * max(at.nbytes, forward.prefix.largest_after(at.skippable))
            yield Group(forward.points[name], tuple(each), at.skippable, bytes_each, at.on_cpu)
