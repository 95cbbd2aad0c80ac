"""The labels of patches: made of their sites, and named in what they raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import EditError, UnreachedError
from .sites import Site


def label_of(site: Site) -> str:
    """Return the label of a patch that was given none."""
    return repr(site).removeprefix("Site(").removesuffix(")").replace("'", "", 2)


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
