"""What is swept: labelled patches, the one clean forward, and the groups that share what comes before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..engine.sessions import Session
from ..errors import SweepError, UnreachedError
from ..patching.patch import Patch, Patches, checked_patches, labelled_patches
from ..registry.names import BarePoint
from ..registry.points import resolve, root_of
from ..registry.sites import HookPoint, Site
from .forward import Forward
from .later import kind
from .prefix import Prefix

_LIVE = 6  # activations alive at a time in a forward: what a module takes and returns, a residual, copies to compute


_FEWEST_ALIKE = 3  # patches that make a group of their own


class Entry(NamedTuple):
    """One row of the result: patches that are applied together."""

    number: int
    label: Any
    patches: tuple[Patch, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Entries whose earliest patch is at one hook point.

    Attributes:
        point: The hook point.
        names: All names of it that the patches use.
        entries: Whose patches begin there.
        alike: Whether what they do later can go into one forward.
        blank: Zeros like the activation, by hook point.
        call: Index of the module's call there.
        skippable: How many module calls had finished before.
        bytes_each: About how much one more patch takes in a forward of many.
    """

    point: HookPoint | BarePoint
    names: frozenset[str]
    entries: tuple[Entry, ...]
    alike: bool
    blank: Mapping[str, Tensor]
    call: int
    skippable: int
    bytes_each: int

    @property
    def on_cpu(self) -> bool:
        """Whether the activation is on a CPU."""
        return self.blank[self.point.name].is_cpu

    def first(self, entry: Entry) -> list[Patch]:
        """Return the patches of an entry that stand at the hook point of the group."""
        return [patch for patch in entry.patches if patch.site.name in self.names]

    def later(self, entry: Entry) -> list[Patch]:
        """Return the patches of an entry that stand at other hook points."""
        return [patch for patch in entry.patches if patch.site.name not in self.names]


def entries_of(forward: Forward, patches: Patches | Patch, what: str) -> list[Entry]:
    """Return a numbered entry for each label.

    Args:
        forward: Of the model, whose sites are checked, all faults at once.
        patches: As the user gave them.
        what: How to call them in an error.

    Raises:
        SweepError: If there are none, or two would have one label.
        HookPointError, SiteError: If a site does not exist.
    """
    named = labelled_patches(patches, what, SweepError)
    for label, each in named:
        if not each:
            raise SweepError(f"The {what} hold {label!r} without a patch. The unpatched output is the baseline.")
    flat = [patch for _, each in named for patch in each]
    checked = iter(checked_patches(forward.points_or_model, flat))
    return [Entry(number, label, tuple(next(checked) for _ in each)) for number, (label, each) in enumerate(named)]


class _Firing(NamedTuple):
    """What the clean forward had at a swept hook point."""

    order: int  # one number for all names of a place
    point: HookPoint | BarePoint
    blank: Tensor
    call: int
    skippable: int


def clean_run(forward: Forward, entries: Sequence[Entry], prefix: Prefix) -> tuple[Any, list[Group]]:
    """Run the model once, unpatched; return its output and the groups, in execution order.

    Raises:
        UnreachedError: If a patch's hook point did not run.
    """
    session = Session(*root_of(forward.points_or_model))
    fired: dict[str, _Firing] = {}
    places: dict[Any, int] = {}

    def noting(point: HookPoint | BarePoint) -> Callable[[Tensor, Session], Tensor]:
        def note(leaf: Tensor, session: Session) -> Tensor:
            place = session.modules.get(point.module, point.module), point.side, point.path, session.call
            order = places.setdefault(place, len(places))
            blank = leaf.new_zeros(()).expand(leaf.shape)
            fired[point.name] = _Firing(order, point, blank, session.call, prefix.so_far)
            return leaf

        return note

    for site in dict.fromkeys(Site(patch.site.name).at(patch.site.point) for e in entries for patch in e.patches):
        point = resolve(session.modules, site)
        session.listen(point, "patch", noting(point))
    session.confined = True
    with session, prefix.remembered():
        output = forward()
    session.let_go()
    for entry in entries:
        for patch in entry.patches:
            if patch.site.name not in fired:
                raise UnreachedError(
                    f"{entry.label!r}: the patch at '{patch.site.name}' never ran in the sweep. "
                    f"'{patch.site.name}' is not on the path that was called, or was called by its forward(), which "
                    "runs no hooks."
                )
    groups = _groups(entries, fired, prefix)
    prefix.forget_after(max(group.skippable for group in groups))
    return output, groups


def _groups(entries: Sequence[Entry], fired: Mapping[str, _Firing], prefix: Prefix) -> list[Group]:
    """Divide entries by where they begin, and then by what they do later."""
    order = {name: firing.order for name, firing in fired.items()}
    begun: dict[int, dict[Any, list[Entry]]] = {}
    for entry in entries:
        first = min(order[patch.site.name] for patch in entry.patches)
        later = tuple(kind(patch) for patch in entry.patches if order[patch.site.name] != first)
        begun.setdefault(first, {}).setdefault(later, []).append(entry)
    blanks = {name: firing.blank for name, firing in fired.items()}
    groups = []
    for first in sorted(begun):
        names = [name for name in fired if order[name] == first]
        _, point, blank, call, skippable = fired[names[0]]
        bytes_each = _LIVE * max(blank.nbytes, prefix.largest_after(skippable))
        group = partial(
            Group, point, frozenset(names), blank=blanks, call=call, skippable=skippable, bytes_each=bytes_each
        )
        apart: list[Entry] = []
        for later, each in begun[first].items():
            if not later or len(each) >= _FEWEST_ALIKE:
                groups.append(group(tuple(each), alike=True))
            else:
                apart += each
        if apart:
            groups.append(group(tuple(apart), alike=len(begun[first]) == 1))
    return groups
