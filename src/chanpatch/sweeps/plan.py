"""The plan of a sweep: labeled patches, the clean run, and groups of patches that share a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from ..engine.sessions import Session
from ..errors import SweepError, UnreachedError
from ..labels import Patches, labelled_patches
from ..patching.contexts import checked_patches
from ..patching.edits import Set
from ..patching.patch import Patch
from ..registry.points import HookPoints, refuse_unhookable, root_of
from ..registry.sites import HookPoint
from .forward import Forward

_LIVE = 6  # activations alive at a time in a forward: a module's input and output, a residual, temporary copies
_FEWEST_ALIKE = 3  # entries with equal later patches that make a group of their own


class Entry(NamedTuple):
    """One row of the result: patches that are applied together."""

    number: int
    label: Any
    patches: tuple[Patch, ...]


class Group(NamedTuple):
    """Entries whose earliest patch is at one hook point."""

    point: HookPoint
    entries: tuple[Entry, ...]
    later: tuple[Patch, ...] | None  # the patches at other hook points; None if they differ between entries
    skippable: int  # number of module calls that finish before the hook point
    bytes_each: int  # approximate memory that one more entry takes in a forward of many
    on_cpu: bool

    def first(self, entry: Entry) -> list[Patch]:
        """Return the patches of an entry at the hook point of the group."""
        return [patch for patch in entry.patches if patch.site.name == self.point.name]


def entries_of(points: HookPoints, patches: Patches | Patch, what: str, start: int = 0) -> list[Entry]:
    """Return an entry for each label, numbered from `start`; errors call the patches `what`."""
    named = labelled_patches(patches, what, SweepError)
    for label, each in named:
        if not each:
            raise SweepError(f"The {what} hold {label!r} without a patch. The unpatched output is the baseline.")
    checked = iter(checked_patches(points, [patch for _, each in named for patch in each]))
    return [
        Entry(number, label, tuple(next(checked) for _ in each)) for number, (label, each) in enumerate(named, start)
    ]


_Seen: TypeAlias = tuple[int, bool, int]  # of a clean activation: bytes, whether on a CPU, number of calls before


def clean_run(forward: Forward, entries: Sequence[Entry], max_bytes: int) -> tuple[Any, list[Group]]:
    """Run the model once, unpatched; return its output and the groups, in execution order.

    The prefix may keep outputs of up to max_bytes.
    """
    points, prefix = forward.points, forward.prefix
    session = Session(*root_of(points))
    refuse_unhookable(session.modules)
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
    session.confined = True
    taps = {points[name].module for name in first_at if points[name].side == "tap"}
    with session.attached(), prefix.remembered(taps, max_bytes):
        output = forward()
    session.let_go()
    for name, entry in first_at.items():
        if name not in seen:
            raise UnreachedError(
                f"{entry.label!r}: the patch at '{name}' never ran in the sweep. '{name}' is not on the path that was "
                "called, or was called by its forward(), which runs no hooks."
            )
    groups = [*_groups(forward, entries, seen)]
    del prefix.calls[max(group.skippable for group in groups) :]
    return output, groups


def _groups(forward: Forward, entries: Sequence[Entry], seen: Mapping[str, _Seen]) -> Iterator[Group]:
    """Divide entries by the hook point at which they begin, then by their later patches."""
    order = {name: number for number, name in enumerate(seen)}
    begun: dict[str, dict[Any, tuple[tuple[Patch, ...], list[Entry]]]] = {}
    for entry in entries:
        first = min((patch.site.name for patch in entry.patches), key=order.__getitem__)
        later = tuple(patch for patch in entry.patches if patch.site.name != first)
        key = tuple((patch.site, _key(patch.edit), _key(patch.where)) for patch in later)
        begun.setdefault(first, {}).setdefault(key, (later, []))[1].append(entry)
    for first in sorted(begun, key=order.__getitem__):
        nbytes, on_cpu, skippable = seen[first]
        bytes_each = _LIVE * max(nbytes, forward.prefix.largest_after(skippable))
        others: list[Entry] = []
        for later, members in begun[first].values():
            if not later or len(members) >= _FEWEST_ALIKE or len(begun[first]) == 1:
                yield Group(forward.points[first], tuple(members), later, skippable, bytes_each, on_cpu)
            else:
                others += members
        if others:
            yield Group(forward.points[first], tuple(others), None, skippable, bytes_each, on_cpu)


def _key(operand: Any) -> Any:
    """Return a key; two edits or masks with equal keys surely do the same."""
    if isinstance(operand, Tensor):
        return operand.data_ptr(), operand.shape, operand.stride(), operand.dtype
    if type(operand).__module__ == Set.__module__:
        return type(operand), *map(_key, vars(operand).values())
    return id(operand) if callable(operand) else operand
