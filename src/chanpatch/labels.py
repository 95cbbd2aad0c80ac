"""Labels of patches, for sweeps: a mapping gives them, otherwise they are made of the sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from .errors import ChanpatchError, EditError, UnreachedError
from .patching.contexts import checked_patches
from .patching.patch import Patch
from .registry.sites import Site

Patches: TypeAlias = "Mapping[Any, Patch | Iterable[Patch]] | Iterable[Patch | Iterable[Patch]]"


def labelled_patches(
    patches: Patches | Patch, what: str, fault: type[ChanpatchError]
) -> list[tuple[Any, tuple[Patch, ...]]]:
    """Return each label with its patches; without a mapping, the labels are made of the sites.

    Args:
        patches: Patches from the user.
        what: Noun for them in an error message.
        fault: Error to raise if there are no patches, or if two have the same label.

    Raises:
        TypeError: If an item is not a patch.
    """
    if not isinstance(patches, Iterable):
        patches = [patches]
    if isinstance(patches, Mapping):
        named = [(label, checked_patches(None, each)) for label, each in patches.items()]
    else:
        named = [
            (" + ".join(_label(patch.site) for patch in each), each)
            for each in (checked_patches(None, one) for one in patches)
        ]
    if not named:
        raise fault(f"There are no {what}: the mapping or the sequence is empty.")
    labels = [label for label, _ in named]
    twice = next((label for label in labels if labels.count(label) > 1), None) if len({*labels}) < len(labels) else None
    if twice is not None:
        raise fault(
            f"Two of the {what} are at {twice}, which makes one label for both. Give a mapping of labels to patches."
        )
    return named


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
