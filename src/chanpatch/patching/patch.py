"""A patch as data, and what happens when it fires.

Row by row of a forward: read the region, call the edit, check what came back, write it into a copy. The checks are
made once per shape; the ledger counts from shapes alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..engine.sessions import read_only
from ..errors import ChanpatchError, EditError, UnreachedError, UnsupportedModelError
from ..registry.points import HookPoints, bound
from ..registry.sites import Site
from .checks import check_mask, check_mask_type, check_operands, region_lengths
from .edits import Edit, Set

Mask: TypeAlias = "Tensor | Callable[..., Tensor]"


def edit_name(edit: Any) -> str:
    """Return what to call an edit in a table."""
    return type(edit).__name__ if is_dataclass(edit) else getattr(edit, "__name__", type(edit).__name__)


@dataclass(frozen=True, eq=False)
class Patch:
    """A site, what is done to it, and to which of its elements.

    Args:
        site: Where.
        edit: A callable `activation -> activation`; it gets the region and returns a new tensor of the same shape,
            dtype and device. One with a keyword-only parameter `context` gets a `chanpatch.patching.Context` too.
        where: Which elements of the region are replaced: a bool tensor with one length per axis of the region, each
            equal to the region's or 1, or a function of the context that returns one. None means all of them.

    Raises:
        TypeError: If the edit cannot be called or the site is none.
        EditError: If `where` is no bool tensor, or an operand of the edit does not fit a traced site.
    """

    site: Site
    edit: Edit | Callable[..., Tensor]
    where: Mask | None = None

    def __post_init__(self) -> None:
        """Check what can be known before the model runs."""
        if not isinstance(self.site, Site):
            raise TypeError(f"A patch needs a Site, not {type(self.site).__name__}: Site('conv1', channel=5).")
        if not callable(self.edit):
            raise EditError(
                f"The edit at {self.site!r} is {type(self.edit).__name__}, which cannot be called. "
                "Use Set(value) to put a value there, or a function activation -> activation."
            )
        if isinstance(self.where, Tensor):
            check_mask_type(self.where, self.site)
        elif self.where is not None and not callable(self.where):
            raise EditError(
                f"where at {self.site!r} is {type(self.where).__name__}; it takes a bool tensor or a function."
            )
        point = self.site.point
        if point is not None:
            if point.read_only:
                raise UnsupportedModelError(read_only(point.name))
            lengths = region_lengths(self.site, point)
            check_operands(self.edit, self.site, point.axes, lengths, point.dtype, point.device)
            if isinstance(self.where, Tensor):
                check_mask(self.where, self.site, point.axes, lengths)

    @cached_property
    def takes_context(self) -> bool:
        """Whether the edit has a keyword-only parameter `context`."""
        kind: Any = type(self.edit)
        return _class_takes_context(kind) if kind.__module__ == Set.__module__ else _takes_context(self.edit)

    @property
    def runs_only_ours(self) -> bool:
        """Whether no function of the user's runs in it, so that it leaves nothing behind but what it returns."""
        return type(self.edit).__module__ == Set.__module__ and not callable(self.where)

    def __repr__(self) -> str:
        return f"Patch({self.site!r}, {edit_name(self.edit)}{', where=...' if self.where is not None else ''})"


def _takes_context(edit: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(edit).parameters.get("context")
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    if parameter is None:
        return False
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty:
        raise EditError(
            f"{edit_name(edit)} takes `context` by position. An edit takes it by keyword alone: "
            "def function(activation, *, context)."
        )
    return parameter.kind is parameter.KEYWORD_ONLY


@cache
def _class_takes_context(kind: Any) -> bool:
    return _takes_context(kind.__call__)


def checked_patches(
    points_or_model: HookPoints | nn.Module | None, patches: Patch | Iterable[Patch]
) -> tuple[Patch, ...]:
    """Return patches whose sites are bound to the trace, or checked by name, all faults at once.

    Without hook points or a model, only the type of the patches is checked.

    Raises:
        TypeError: If something else than patches is among them.
        HookPointError, SiteError: If a site does not exist.
        EditError: If an operand does not fit a traced site.
    """
    each = _together(patches)
    if points_or_model is None:
        return each
    sites = bound(points_or_model, [patch.site for patch in each])
    return tuple(
        patch if site is patch.site else Patch(site, patch.edit, patch.where)
        for patch, site in zip(each, sites, strict=True)
    )


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
