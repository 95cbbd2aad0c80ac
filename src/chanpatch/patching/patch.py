"""A patch: a site, an edit, and the elements that the edit replaces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..engine.paths import read_only
from ..errors import EditError, UnsupportedModelError
from ..registry.sites import Site
from .edits import Edit, Resample, Set, check_mask, check_operands, region_lengths

Mask: TypeAlias = "Tensor | Callable[..., Tensor | bool]"


def edit_name(edit: Any) -> str:
    """Return the name by which tables and messages refer to an edit: the name of its class or function."""
    return type(edit).__name__ if is_dataclass(edit) else getattr(edit, "__name__", type(edit).__name__)


@dataclass(frozen=True, eq=False)
class Patch:
    """A site, an edit, and the elements that the edit replaces.

    Args:
        site: Site to patch.
        edit: Callable that maps the region's activation to a new tensor with the same shape, dtype and device. A
            keyword-only parameter `context`, if the callable has one, receives a `chanpatch.patching.Context`.
        where: Elements to replace; None for all elements. Pass a bool tensor with as many axes as the region, in which
            each axis has the region's length or length 1. Or pass a function that maps a `chanpatch.patching.Context`
            to such a tensor, or to True or False for all elements.

    Raises:
        TypeError: If `site` is not a Site.
        EditError: If the edit is not callable, or if an operand of the edit or `where` does not match the region.
        UnsupportedModelError: If the site is inside a distribution, where tensors can only be recorded.
    """

    site: Site
    edit: Edit
    where: Mask | None = None
    takes_context: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.site, Site):
            raise TypeError(f"A Patch needs a Site, such as Site('conv1', channel=5); got {type(self.site).__name__}.")
        if not callable(self.edit):
            raise EditError(
                f"The edit at {self.site!r} must be callable; got {type(self.edit).__name__}. Use Set(value) to set "
                "the activation to a value, or a function that maps the activation to a new activation."
            )
        if (point := self.site.point) is not None:
            if point.read_only:
                raise UnsupportedModelError(read_only(point.name))
            lengths = region_lengths(self.site, point)
            check_operands(self.edit, self.site, point.axes, lengths, point.dtype, point.device)
        if self.where is not None and not callable(self.where):
            check_mask(self.where, self.site)
        object.__setattr__(self, "takes_context", _takes_context(self.edit))

    @property
    def runs_only_ours(self) -> bool:
        """Whether the patch runs only code from chanpatch."""
        return type(self.edit).__module__ == Set.__module__ and not callable(self.where)

    def __repr__(self) -> str:
        return f"Patch({self.site!r}, {edit_name(self.edit)}{', where=...' if self.where is not None else ''})"


def _takes_context(edit: Edit) -> bool:
    """Return whether an edit has a keyword-only parameter `context`.

    Raises:
        EditError: If the edit requires any parameter besides the activation and `context`.
    """
    if type(edit).__module__ == Set.__module__:
        return isinstance(edit, Resample)
    try:
        parameters = [*inspect.signature(edit.forward if isinstance(edit, nn.Module) else edit).parameters.values()]
    except (TypeError, ValueError):  # some builtins lack a signature
        return False
    contexts = [each for each in parameters if each.name == "context" and each.kind is each.KEYWORD_ONLY]
    for each in parameters[1:]:
        required = each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        if (required or each.name == "ctx") and each not in contexts:
            raise EditError(
                f"{edit_name(edit)} has a parameter `{each.name}`. An edit accepts the activation and, optionally, a "
                "keyword-only `context`: def function(activation, *, context)."
            )
    return bool(contexts)
