"""Labels for swept patches: the keys of a mapping, or names derived from the sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor

from .errors import ChanpatchError, EditError, UnreachedError
from .patching.contexts import checked_patches
from .patching.donors import Donor
from .patching.edit_context import state_of
from .patching.edits import Resample, Set
from .patching.patch import Patch, edit_name
from .registry.sites import Site

Patches: TypeAlias = "Mapping[Any, Patch | Iterable[Patch]] | Iterable[Patch | Iterable[Patch]]"


def labelled_patches(
    patches: Patches | Patch, what: str, fault: type[ChanpatchError]
) -> list[tuple[Any, tuple[Patch, ...]]]:
    """Return pairs (label, patches). If `patches` is not a mapping, the labels are derived from the sites.

    Raise an exception of class `fault` if there are no patches, or if two items in `patches` have the same label.
    `what` is the word for the patches in error messages.
    """
    if isinstance(patches, Mapping):
        named = [(label, checked_patches(None, each)) for label, each in patches.items()]
    else:
        listed = [checked_patches(None, each) for each in (patches if isinstance(patches, Iterable) else [patches])]
        named = [(" + ".join(site_label(patch.site) for patch in each), each) for each in listed]
    if not named:
        raise fault(f"There are no {what}: the mapping or sequence is empty. Pass at least one patch.")
    for label, times in Counter(label for label, _ in named).items():
        if times > 1:
            raise fault(
                f"Two of the {what} have the same site, {label}, and therefore the same label. Pass a dict that maps "
                "labels to patches."
            )
    return named


def site_label(site: Site) -> str:
    """Return the label of a site, such as `1, feature=2` or `1, component=2 along feature`."""
    region, _, _ = repr(site).partition(").along(")
    along = f" along {site.basis.axis}" if site.basis else ""
    return region.removeprefix("Site(").removesuffix(")").replace("'", "", 2) + along


def no_p_among(controls: Iterable[Iterable[Patch]]) -> str:
    """Return the reason why ranks among `controls` have no p-values, or an empty string if the ranks have p-values."""
    return next((patch.site.no_p for each in controls for patch in each if patch.site.no_p), "")


def reference_notes(patches: Iterable[Patch]) -> list[str]:
    """Return the note to add to a table of intervals if a patch relies on a single, fixed set of reference inputs."""
    note = "Intervals ignore the sampling error in the reference of a mean or resample ablation."
    return [note] if any(map(_has_one_reference, patches)) else []


def _has_one_reference(patch: Patch) -> bool:
    """Return whether a patch writes activations that are averaged over, or drawn from, a fixed set of inputs."""
    edit, point = patch.edit, patch.site.point
    if isinstance(edit, Resample):
        return True
    batch = None if point is None else point.batch_axis
    return (
        isinstance(edit, Set) and isinstance(edit.value, Tensor) and batch is not None and edit.value.shape[batch] == 1
    )


def refuse_shared_state(named: Iterable[tuple[Any, Iterable[Patch]]]) -> None:
    """Raise EditError if patches under different labels share a stateful edit or a stateful `where` function."""
    known: dict[int, Any] = {}
    for label, patches in named:
        edits = [patch.edit.function if isinstance(patch.edit, Donor) else patch.edit for patch in patches]
        for function in [*edits, *(patch.where for patch in patches)]:
            owner = state_of(function) if callable(function) else None
            if owner is not None and known.setdefault(id(owner), label) != label:
                raise EditError(
                    f"{edit_name(function)} is used under two labels, {known[id(owner)]!r} and {label!r}, so the "
                    "patches with these labels would share its state. Use a separate object for each label, or a "
                    "plain function."
                )


@contextmanager
def labelled(label: object) -> Iterator[None]:
    """Context in which the label is added to every error that is raised."""
    try:
        yield
    except (EditError, UnreachedError) as fault:
        raise type(fault)(f"{label!r}: {fault}") from fault
    except Exception as fault:
        if hasattr(fault, "add_note"):  # Python 3.11 and later
            fault.add_note(f"Raised by the patch {label!r} in a sweep.")
        raise
