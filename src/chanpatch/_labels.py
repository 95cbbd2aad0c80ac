"""The labels of patches: made of their sites, and named in what they raise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from ._patches import Patch
from .errors import ChanpatchError, EditError, UnreachedError
from .sites import Site

Patches: TypeAlias = "Mapping[Any, Patch | Iterable[Patch]] | Iterable[Patch | Iterable[Patch]]"


def label_of(site: Site) -> str:
    """Return the label of a patch that was given none."""
    return repr(site).removeprefix("Site(").removesuffix(")").replace("'", "", 2)


def labelled_patches(
    patches: Patches | Patch, what: str, fault: type[ChanpatchError]
) -> list[tuple[Any, tuple[Patch, ...]]]:
    """Return each label with its patches; where there is no mapping, the labels are made of the sites.

    Args:
        patches: As the user gave them.
        what: How to call them in an error.
        fault: The error to raise.

    Raises:
        TypeError: If something else than patches is among them.
    """
    if not isinstance(patches, Iterable):
        patches = [patches]
    if isinstance(patches, Mapping):
        named = [(label, _together(each)) for label, each in patches.items()]
    else:
        named = [(" + ".join(label_of(patch.site) for patch in each), each) for each in map(_together, patches)]
    if not named:
        raise fault(f"There are no {what}: the mapping or the sequence is empty.")
    labels = [label for label, _ in named]
    twice = next((label for label in labels if labels.count(label) > 1), None) if len({*labels}) < len(labels) else None
    if twice is not None:
        raise fault(
            f"Two of the {what} are at {twice}, which makes one label for both. Give a mapping of labels to patches."
        )
    return named


def _together(patches: Patch | Iterable[Patch]) -> tuple[Patch, ...]:
    each = tuple(patches) if isinstance(patches, Iterable) else (patches,)
    for patch in each:
        if not isinstance(patch, Patch):
            raise TypeError(f"Expected a Patch, not {type(patch).__name__}: zero_ablate(Site('conv1', channel=5)).")
    return each


@contextmanager
def labelled(label: object) -> Iterator[None]:
    """Say in an error of which patch it is."""
    try:
        yield
    except (EditError, UnreachedError) as fault:
        raise type(fault)(f"{label!r}: {fault}") from fault
    except Exception as fault:
        if hasattr(fault, "add_note"):  # from Python 3.11 on
            fault.add_note(f"This is of the patch {label!r} in a sweep.")
        raise
