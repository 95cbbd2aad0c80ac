"""The plan of a sweep: labeled patches, the clean run, and the groups of patches that share a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..engine.sessions import Session
from ..errors import SweepError, UnreachedError
from ..labels import Patches, labelled_patches
from ..patching.edits import Set
from ..patching.patch import Patch, checked_patches
from ..registry.points import root_of
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
    """Entries whose earliest patch is at one hook point.

    Attributes:
        point: The hook point.
        entries: Entries whose patches begin there.
        later: The patches at other hook points, if all entries have equal ones; otherwise None.
        skippable: Number of module calls that had finished before.
        bytes_each: Approximate memory that one more entry takes in a forward of many.
        on_cpu: Whether the activation is on a CPU.
    """

    point: HookPoint
    entries: tuple[Entry, ...]
    later: tuple[Patch, ...] | None
    skippable: int
    bytes_each: int
    on_cpu: bool

    def first(self, entry: Entry) -> list[Patch]:
        """Return the patches of an entry at the hook point of the group."""
        return [patch for patch in entry.patches if patch.site.name == self.point.name]


def entries_of(forward: Forward, patches: Patches | Patch, what: str, start: int = 0) -> list[Entry]:
    """Return a numbered entry for each label.

    Args:
        forward: The forward of the model. The sites are checked against it, all faults at once.
        patches: The patches as the user gave them.
        what: Their name in an error.
        start: The number of the first entry.

    Raises:
        SweepError: If there are none, or two would have one label.
        HookPointError, SiteError: If a site does not exist.
    """
    named = labelled_patches(patches, what, SweepError)
    for label, each in named:
        if not each:
            raise SweepError(f"The {what} hold {label!r} without a patch. The unpatched output is the baseline.")
    flat = [patch for _, each in named for patch in each]
    checked = iter(checked_patches(forward.points, flat))
    return [
        Entry(number, label, tuple(next(checked) for _ in each)) for number, (label, each) in enumerate(named, start)
    ]


class _Seen(NamedTuple):
    """The clean activation at a swept hook point."""

    nbytes: int
    on_cpu: bool
    skippable: int


def clean_run(forward: Forward, entries: Sequence[Entry], max_bytes: int) -> tuple[Any, list[Group]]:
    """Run the model once, unpatched; return its output and the groups, in execution order.

    The prefix of the forward takes up to max_bytes.

    Raises:
        UnreachedError: If a patch's hook point did not run.
    """
    points, prefix = forward.points, forward.prefix
    session = Session(*root_of(points))
    seen: dict[str, _Seen] = {}

    def noting(name: str) -> Callable[[Tensor, Session], Tensor]:
        def note(leaf: Tensor, session: Session) -> Tensor:
            seen[name] = _Seen(leaf.nbytes, leaf.is_cpu, prefix.so_far)
            return leaf

        return note

    names = dict.fromkeys(patch.site.name for entry in entries for patch in entry.patches)
    for name in names:
        session.listen(points[name], "patch", noting(name))
    session.confined = True
    with session, prefix.remembered({points[name].module for name in names if points[name].side == "tap"}, max_bytes):
        output = forward()
    session.let_go()
    for entry in entries:
        for patch in entry.patches:
            if patch.site.name not in seen:
                raise UnreachedError(
                    f"{entry.label!r}: the patch at '{patch.site.name}' never ran in the sweep. "
                    f"'{patch.site.name}' is not on the path that was called, or was called by its forward(), which "
                    "runs no hooks."
                )
    groups = [*_groups(forward, entries, seen)]
    prefix.forget_after(max(group.skippable for group in groups))
    return output, groups


def _groups(forward: Forward, entries: Sequence[Entry], seen: Mapping[str, _Seen]) -> Iterator[Group]:
    """Divide entries by the hook point at which they begin, then by their later patches."""
    order = {name: number for number, name in enumerate(seen)}
    begun: dict[str, dict[Any, tuple[tuple[Patch, ...], list[Entry]]]] = {}
    for entry in entries:
        first = min((patch.site.name for patch in entry.patches), key=order.__getitem__)
        later = tuple(patch for patch in entry.patches if patch.site.name != first)
        kinds = begun.setdefault(first, {})
        key = tuple((patch.site, _key(patch.edit), _key(patch.where)) for patch in later)
        kinds.setdefault(key, (later, []))[1].append(entry)
    for first in sorted(begun, key=order.__getitem__):
        divided: list[tuple[tuple[Patch, ...] | None, list[Entry]]] = []
        others: list[Entry] = []
        for later, members in begun[first].values():
            if not later or len(members) >= _FEWEST_ALIKE or len(begun[first]) == 1:
                divided.append((later, members))
            else:
                others += members
        if others:
            divided.append((None, others))
        nbytes, on_cpu, skippable = seen[first]
        bytes_each = _LIVE * max(nbytes, forward.prefix.largest_after(skippable))
        for common, members in divided:
            yield Group(forward.points[first], tuple(members), common, skippable, bytes_each, on_cpu)


def _key(operand: Any) -> Any:
    """Return a key that two edits, or two masks, share only if they are sure to do the same."""
    if isinstance(operand, Tensor):
        return operand.data_ptr(), operand.shape, operand.stride(), operand.dtype
    if type(operand).__module__ == Set.__module__:
        return type(operand), *map(_key, vars(operand).values())
    return id(operand) if callable(operand) else operand
