"""A patch: a site, an edit, and the elements that the edit replaces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ..engine.hooks import read_only
from ..errors import EditError, UnsupportedModelError
from ..registry.sites import Site
from .edits import Edit, Resample, Set, check_mask, check_operands, region_lengths

Mask: TypeAlias = "Tensor | Callable[..., Tensor | bool]"


def edit_name(edit: Any) -> str:
    """Return the name of an edit, for a table."""
    return type(edit).__name__ if is_dataclass(edit) else getattr(edit, "__name__", type(edit).__name__)


@dataclass(frozen=True, eq=False)
class Patch:
    """A site, an edit, and the elements that the edit replaces.

    Args:
        site: The site.
        edit: Callable that gets the region and returns a new tensor of the same shape, dtype and device. It may take a
            `chanpatch.patching.Context` in a keyword-only parameter `context`.
        where: Elements to replace: a bool tensor with one length per axis of the region, each equal or 1, or a function
            of the context that returns one, or True (all) or False (none); None for all.

    Raises:
        TypeError: If `site` is not a Site.
        EditError: If the edit cannot be called, or an operand or `where` does not fit.
        UnsupportedModelError: If the site is inside a distribution, which can only be recorded.
    """

    site: Site
    edit: Edit
    where: Mask | None = None
    takes_context: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.site, Site):
            raise TypeError(f"A patch needs a Site, not {type(self.site).__name__}: Site('conv1', channel=5).")
        if not callable(self.edit):
            raise EditError(
                f"The edit at {self.site!r} is {type(self.edit).__name__}, which cannot be called. "
                "Use Set(value) to put a value there, or a function activation -> activation."
            )
        point = self.site.point
        axes, lengths = ((), None) if point is None else (point.axes, region_lengths(self.site, point))
        if point is not None and lengths is not None:
            if point.read_only:
                raise UnsupportedModelError(read_only(point.name))
            check_operands(self.edit, self.site, axes, lengths, point.dtype, point.device)
        if self.where is not None and not callable(self.where):
            check_mask(self.where, self.site, axes, lengths)
        object.__setattr__(self, "takes_context", _takes_context(self.edit))

    @property
    def runs_only_ours(self) -> bool:
        """Whether it runs only code of chanpatch."""
        return type(self.edit).__module__ == Set.__module__ and not callable(self.where)

    def __repr__(self) -> str:
        return f"Patch({self.site!r}, {edit_name(self.edit)}{', where=...' if self.where is not None else ''})"


def _takes_context(edit: Edit) -> bool:
    """Return whether an edit has a keyword-only parameter `context`; raise if it takes more than an edit is given."""
    if type(edit).__module__ == Set.__module__:
        return isinstance(edit, Resample)
    try:
        parameters = [*inspect.signature(edit).parameters.values()]
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    contexts = [each for each in parameters if each.name == "context" and each.kind is each.KEYWORD_ONLY]
    for each in parameters[1:]:
        required = each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        if (required or each.name == "ctx") and each not in contexts:
            raise EditError(
                f"{edit_name(edit)} takes `{each.name}`. An edit takes the activation and, by keyword only and under "
                "this name, the context: def function(activation, *, context)."
            )
    return bool(contexts)
