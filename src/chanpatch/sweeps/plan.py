"""Plan a sweep: label the patches, run the model once without patches, and group the patches that share a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..engine.inputs import batches, copied_inputs, input_count
from ..engine.moments import Moment, forward_context, published
from ..engine.sessions import Attached, Session
from ..engine.state import undisturbed
from ..errors import SweepError, UnreachedError
from ..labels import Patches, labelled_patches, refuse_shared_state
from ..patching.cache import ActivationCache
from ..patching.contexts import ContextSession, checked_patches
from ..patching.edits import Set
from ..patching.firing import Firing
from ..patching.patch import Patch
from ..patching.recording import run_with_cache
from ..registry.points import HookPoints
from ..registry.sites import HookPoint, Site
from .prefix import Prefix, fresh

_LIVE = 6  # number of activations assumed in memory at once: a module's input and output, a residual, and copies
_FEWEST_ALIKE = 3  # minimum number of entries that form a separate group because their later patches are equal
_FEWEST_TO_CUT = 8  # with fewer inputs, a forward pass on a single input saves no time
_OF_TORCH = frozenset(vars(nn.Module()))


class Entry(NamedTuple):
    """One row of the result: a label, and patches that are applied together."""

    number: int
    label: Any
    patches: tuple[Patch, ...]


class Group(NamedTuple):
    """Entries whose earliest patch is at the same hook point."""

    point: HookPoint
    entries: tuple[Entry, ...]
    later: tuple[Patch, ...] | None  # patches at later hook points; None if these differ between the entries
    skippable: int  # number of module calls that finish before the hook point
    bytes_each: int  # approximate memory per entry in a batched forward pass
    on_cpu: bool

    def first(self, entry: Entry) -> list[Patch]:
        """Return the entry's patches at the group's hook point."""
        return [patch for patch in entry.patches if patch.site.name == self.point.name]


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
    ) -> None:
        self.points, self.inputs, self.check_nan = points, (inputs, dict(keywords)), check_nan
        self.row = row  # index in the whole batch of the one row that `inputs` contains; None for the whole batch
        self.undisturbed = undisturbed(points.model)
        self.prefix = Prefix(points.model, self.undisturbed.snapshot)
        self.rebound: list[tuple[dict[str, Any], str]] = []  # the attributes that the last call set

    def __call__(self) -> Any:
        """Run the model without side effects and return its output."""
        with self.running() as run:
            before = [(vars(module), vars(module).copy()) for module in self.points.model.modules()]
            output = run.kept(self.output())
            self.rebound = [
                (own, name)
                for own, earlier in before
                for name, value in own.items()
                if name not in _OF_TORCH and not callable(value) and earlier.get(name, before) is not value
            ]
            return output

    @contextmanager
    def running(self, skip: int = 0) -> Iterator[undisturbed]:
        """Prepare one forward pass that skips the first `skip` module calls; restore the model on exit."""
        with (
            self.undisturbed as run,
            nullcontext() if self.row is None else forward_context(rows=[self.row], step=published.now.step),
            _usual_attention(),
            self.prefix.skipped(skip) if skip else nullcontext(),
        ):
            yield run

    def output(self) -> Any:
        """Return the model's output. Call this inside `running`."""
        return fresh(self.points.run(*self.inputs))  # a model may return the same dict in every call

    def until(self, sites: Site | Sequence[Site], *, skip: int = 0) -> ActivationCache:
        """Run the model up to the last of the sites, and return a cache that contains the activations at the sites."""
        args, kwargs = copied_inputs(*self.inputs)
        with self.running(skip):
            cache: ActivationCache = run_with_cache(self.points, *args, sites=sites, stop=True, **kwargs)
            return cache

    def fire(self, patches: Sequence[Patch], activation: Tensor) -> tuple[Tensor, list[tuple[Patch, Tensor]]]:
        """Apply patches to the tensor at their hook point; return the new tensor and the patches' NaN flags."""
        args, kwargs = self.inputs
        inputs, flags, masks = (*args, *kwargs.values()), [], dict[tuple[object, ...], Any]()
        for patch in patches:
            point = patch.site.point or self.points[patch.site.name]
            firing = Firing(patch, point, check_nan=self.check_nan)
            moment = Moment(inputs, point.call or 0, 0, published.now, self.points.method, masks)
            activation = firing(activation, moment)
            flags += [] if firing.nan is None else [(patch, firing.nan)]
        return activation, flags

    def ends(self) -> list[Forward]:
        """Return two Forwards: one on the first row only, and one on the last row only.

        If forward passes on a single row would not save time, return an empty list.
        """
        count = input_count(self.inputs)
        if count < _FEWEST_TO_CUT or published.now.rows is not None:
            return []
        first, last = next(batches(self.inputs, 1)), [*batches(self.inputs, count - 1)][-1]
        cut = {0: first, count - 1: last}
        return [Forward(self.points, *each, check_nan=self.check_nan, row=row) for row, (each, _) in cut.items()]


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
    """Return one entry per label, numbered from `start`. `what` is the argument's name, for error messages."""
    named = labelled_patches(patches, what, SweepError)
    for label, each in named:
        if not each:
            raise SweepError(f"The label {label!r} in {what} has no patches. Omit that label.")
    refuse_shared_state(named)
    checked = iter(checked_patches(points, [patch for _, each in named for patch in each]))
    return [
        Entry(number, label, tuple(next(checked) for _ in each)) for number, (label, each) in enumerate(named, start)
    ]


_Seen: TypeAlias = tuple[int, bool, int]  # size in bytes, whether on a CPU, number of calls finished before


def clean_run(forward: Forward, entries: Sequence[Entry], max_bytes: int) -> tuple[Any, list[Group]]:
    """Run the model once without patches; return the output, and the groups of entries in execution order.

    During the run, the prefix stores module outputs of up to `max_bytes` in total.
    """
    points, prefix = forward.points, forward.prefix
    session = ContextSession(points)
    seen: dict[str, _Seen] = {}

    def note(name: str, leaf: Tensor, session: Session) -> Tensor:
        seen[name] = leaf.nbytes, leaf.is_cpu, prefix.finished
        return leaf

    first_at: dict[str, Entry] = {}
    for entry in entries:
        for patch in entry.patches:
            first_at.setdefault(patch.site.name, entry)
    for name in first_at:
        session.listen(points[name], "patch", partial(note, name))
    taps = {points[name].module for name in first_at if points[name].side == "tap"}
    with Attached(session), prefix.remembered(taps, max_bytes):
        output = forward()
    session.let_go()
    for name, entry in first_at.items():
        if name not in seen:
            raise UnreachedError(
                f"{entry.label!r}: the patch at '{name}' never ran in the sweep. Either '{name}' was not called, or it "
                "was called through .forward() directly, which bypasses hooks."
            )
    groups = [*_groups(forward, entries, seen)]
    del prefix.calls[max(group.skippable for group in groups) :]
    return output, groups


def _groups(forward: Forward, entries: Sequence[Entry], seen: Mapping[str, _Seen]) -> Iterator[Group]:
    """Yield groups of entries with the first patch at the same hook point and with equal later patches.

    Small groups at the same hook point are merged.
    """
    order = {name: number for number, name in enumerate(seen)}
    begun: dict[str, dict[Any, tuple[tuple[Patch, ...], list[Entry]]]] = {name: {} for name in seen}
    for entry in entries:
        first = min((patch.site.name for patch in entry.patches), key=order.__getitem__)
        later = tuple(patch for patch in entry.patches if patch.site.name != first)
        key = tuple((patch.site, _key(patch.edit), _key(patch.where)) for patch in later)
        begun[first].setdefault(key, (later, []))[1].append(entry)
    for first, alike in begun.items():
        nbytes, on_cpu, skippable = seen[first]
        bytes_each = _LIVE * max(nbytes, forward.prefix.largest_after(skippable))
        others: list[Entry] = []
        for later, members in alike.values():
            if not later or len(members) >= _FEWEST_ALIKE or len(alike) == 1:
                yield Group(forward.points[first], tuple(members), later, skippable, bytes_each, on_cpu)
            else:
                others += members
        if others:
            yield Group(forward.points[first], tuple(others), None, skippable, bytes_each, on_cpu)


def _key(operand: Any) -> Any:
    """Return a key for an edit or mask. Two keys are equal only if the edits or masks are equivalent."""
    if isinstance(operand, Tensor):
        return operand.data_ptr(), operand.shape, operand.stride(), operand.dtype
    if type(operand).__module__ == Set.__module__:
        return type(operand), *map(_key, vars(operand).values())
    return id(operand) if callable(operand) else operand
