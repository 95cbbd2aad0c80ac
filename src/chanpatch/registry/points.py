"""Where a network can be read or written: one tensor that one call of one module takes or returns.

Plain data; `chanpatch.hook_points` finds the points of a model by running it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..engine.paths import path_text
from ..errors import HookPointError, did_you_mean
from ..results import Records
from .names import glob
from .sites import HookPoint, Index, Selection, Site


class HookPoints(Records, Mapping[str, HookPoint]):
    """The hook points of a model in execution order, by name; what `chanpatch.hook_points` returns.

    Attributes:
        model: The model that was traced.
        method: The method that was run, `"__call__"` for the forward.
        calls: How often each module and tap was called, by name.
        not_called: Names of the modules that the traced forward never called.
        steady: Whether the traced forward left the parameters alone while it ran; otherwise none is ended early.
    """

    _most = None

    def __init__(
        self,
        model: nn.Module,
        points: Iterable[HookPoint],
        *,
        method: str,
        calls: Mapping[str, int],
        not_called: Sequence[str],
        steady: bool = True,
    ) -> None:
        self.model, self.method, self.calls, self.not_called = model, method, dict(calls), tuple(not_called)
        self.steady = steady
        listed = [*points]
        counts = Counter(point.name for point in listed)
        self._points = {point.name: point for point in listed if counts[point.name] == 1}
        self._doubled = [point for point in listed if counts[point.name] > 1]
        self._aliases = {alias: point.name for point in self._points.values() for alias in point.aliases}

    def __getitem__(self, name: str) -> HookPoint:
        point = self._points.get(self._aliases.get(name, name))
        if point is None:
            raise HookPointError(self._unknown(name))
        return point

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def select(self, pattern: str) -> HookPoints:
        """Return the hook points whose name matches a glob: `*` for any text, `?` for any one character.

        Args:
            pattern: Such as `"embedder.block*.res?"`. Other characters, brackets included, mean themselves.

        Raises:
            HookPointError: If no name matches.
        """
        matches = glob(pattern)
        chosen = [p for p in self._points.values() if any(matches(name) for name in (p.name, *p.aliases))]
        if not chosen:
            raise HookPointError(f"No hook point matches '{pattern}'. {self._advice()}")
        return HookPoints(
            self.model,
            chosen,
            method=self.method,
            calls=self.calls,
            not_called=self.not_called,
            steady=self.steady,
        )

    def site(self, name: str, /, **indices: Index) -> Site:
        """Return a region of a hook point, checked against the trace.

        Args:
            name: The hook point.
            indices: One entry per restricted axis, as in `channel=[55, 121]` or `row=slice(2, 5)`.

        Raises:
            HookPointError: If there is no such hook point.
            SiteError: If an axis or an index does not exist; all faults at once.
        """
        return self.bind(Site(name, **indices))

    def bind(self, site: Site) -> Site:
        """Return the same site with its hook point's trace attached, after checking it against that."""
        point = self[site.name]
        if site.point == point:
            return site
        return normalised(site if site.name == point.name else Site(point.name, **dict(site.indices)), point)

    def _unknown(self, name: str) -> str:
        doubled = [each for each in self._doubled if each.name == name]
        if doubled:
            places = ", ".join(f"{each.side}{path_text(each.path)} of '{each.module}'" for each in doubled)
            return (
                f"'{name}' is the name of {len(doubled)} hook points: {places}. Give a submodule, or a part of what a "
                "module returns, another name."
            )
        fired = [point.name for point in self._points.values() if name in (point.module, *_modules(point))]
        if name in self.not_called:
            return (
                f"Hook point '{name}' never fired: the traced forward did not call that module. "
                f"{self._advice()} To trace another path, pass its inputs or its method to hook_points()."
            )
        if fired:
            return f"'{name}' is {len(fired)} hook points: {', '.join(fired)}. Name one of them."
        return f"No hook point named '{name}'.{did_you_mean(name, [*self._points, *self._aliases])} {self._advice()}"

    def _advice(self) -> str:
        count = len(self)
        if count <= 8:
            return f"(Hook points that fired: {', '.join(self)}.)"
        return f"({count} hook points; print the HookPoints to list them.)"

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per hook point: name and aliases, axes, shape without batch, dtype, module, parameters."""
        return [
            {
                "hook point": " = ".join((point.name, *point.aliases)),
                "axes": ", ".join(point.axes),
                "shape without batch": " x ".join(map(str, point.shape)),
                "dtype": str(point.dtype).removeprefix("torch."),
                "module": point.module_type,
                "parameters": point.parameters,
            }
            for point in self._points.values()
        ]

    def _title(self) -> str:
        return f"{len(self)} hook points of {type(self.model).__name__}, in execution order"

    def _notes(self) -> list[str]:
        notes = []
        unproved = [point.name for point in self._points.values() if point.batch_axis is None]
        if unproved:
            shown = ", ".join(unproved[:6]) + (", ..." if len(unproved) > 6 else "")
            notes.append(f"Batch axis not proved for {len(unproved)} of them: {shown}")
        if self.not_called:
            notes.append(f"Not called: {', '.join(self.not_called)}")
        if self._doubled:
            names = dict.fromkeys(point.name for point in self._doubled)
            notes.append(f"Left out, as several have that name: {', '.join(names)}")
        return notes

    def _lines(self) -> list[dict[str, Any]]:
        return [{**record, "parameters": f"{record['parameters']:,}"} for record in self.to_records()]

    def _ipython_key_completions_(self) -> list[str]:
        return [*self._points, *self._aliases]


def _modules(point: HookPoint) -> tuple[str, ...]:
    """Names of the module of a point, its aliases included."""
    return tuple(alias.split("#")[0] for alias in point.aliases)


def normalised(site: Site, point: HookPoint) -> Site:
    """Check a site against the trace, write its indices out, and attach the hook point."""
    lengths = {axis: point.length(axis) for axis in point.axes}
    rows = {axis: index for axis, index in site.indices if lengths.get(axis, 0) is None}  # of any forward's length
    others = {axis: index for axis, index in site.indices if axis not in rows}
    traced = Site(site.name, **others) if rows else site
    written: dict[str, Selection] = {}
    for number, positions in traced.positions(point.axes, [lengths[axis] or 0 for axis in point.axes]).items():
        axis, length = point.axes[number], lengths[point.axes[number]] or 0
        chosen = tuple(range(length)[positions]) if isinstance(positions, slice) else tuple(positions)
        if len(chosen) < length or chosen != tuple(range(length)):
            written[axis] = chosen
    return (site if written == others else Site(site.name, **rows, **written)).at(point)
