"""Labels of patches, for sweeps: a mapping gives them, otherwise they are made of the sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from .errors import ChanpatchError, EditError, UnreachedError
from .patching.contexts import checked_patches
from .patching.edit_context import may_hold_state
from .patching.patch import Patch, edit_name
from .registry.sites import Site

Patches: TypeAlias = "Mapping[Any, Patch | Iterable[Patch]] | Iterable[Patch | Iterable[Patch]]"


def labelled_patches(
    patches: Patches | Patch, what: str, fault: type[ChanpatchError]
) -> list[tuple[Any, tuple[Patch, ...]]]:
    """Return each label with its patches; without a mapping, the labels are made of the sites.

    If there are no patches, or two have the same label, this raises the error, which calls them `what`.
    """
    if isinstance(patches, Mapping):
        named = [(label, checked_patches(None, each)) for label, each in patches.items()]
    else:
        listed = [checked_patches(None, each) for each in (patches if isinstance(patches, Iterable) else [patches])]
        named = [(" + ".join(_label(patch.site) for patch in each), each) for each in listed]
    if not named:
        raise fault(f"There are no {what}: the mapping or the sequence is empty.")
    for label, times in Counter(label for label, _ in named).items():
        if times > 1:
            raise fault(
                f"Two of the {what} are at {label}, which makes one label for both. Give a mapping of labels to "
                "patches."
            )
    return named


def refuse_shared_state(named: Iterable[tuple[Any, Iterable[Patch]]]) -> None:
    """Raise if a callable object is an edit or a `where` under two labels: they would share its state."""
    known: dict[int, Any] = {}
    for label, patches in named:
        for function in [function for patch in patches for function in (patch.edit, patch.where)]:
            if callable(function) and may_hold_state(function) and known.setdefault(id(function), label) != label:
                raise EditError(
                    f"{edit_name(function)} is under two labels, {known[id(function)]!r} and {label!r}, so each would "
                    "continue with the other's state. Give each an object of its own, or use a plain function."
                )


@contextmanager
def labelled(label: object) -> Iterator[None]:
    """Add the label to an error that is raised in the context."""
    try:
        yield
    except (EditError, UnreachedError) as fault:
        raise type(fault)(f"{label!r}: {fault}") from fault
    except Exception as fault:
        if hasattr(fault, "add_note"):  # Python 3.11 and later
            fault.add_note(f"This is of the patch {label!r} in a sweep.")
        raise


def _label(site: Site) -> str:
    return repr(site).removeprefix("Site(").removesuffix(")").replace("'", "", 2)
