"""Hook points in a traced model, and sites that are checked against the trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..engine.calls import Interrupted, left_twice
from ..engine.inputs import Inputs, batches, copied_inputs
from ..engine.paths import Place
from ..engine.tree import Tree
from ..errors import BatchAxisError, HookPointError, SiteError, did_you_mean, in_one
from ..results import Records
from ..views import View
from .indices import Index
from .names import alternative, is_pattern, parsed_name, selected, spellings, unknown_name, written_name
from .sites import Axes, HookPoint, Site, normalized
from .trace import traced_run


class HookPoints(Records, Mapping[str, HookPoint]):
    """A model's hook points by name, in execution order, as returned by `chanpatch.hook_points`.

    Attributes:
        model: The traced model.
        method: Name of the traced method; `"__call__"` is a call to the model itself.
        calls: Dict that maps names of modules and taps to their numbers of calls in the traced forward pass.
        not_called: Names of the modules that the traced forward pass did not call.
        steady: Whether the traced forward pass left all parameters unchanged. If False, no forward pass of the model is
            stopped early.
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
        self._points = {point.name: point for point in points}
        self._aliases = {alias: point.name for point in self._points.values() for alias in point.aliases}
        self._tree: Tree | None = None

    def __getitem__(self, name: str) -> HookPoint:
        _check_name(name)
        point = self._points.get(self._aliases.get(name, name)) or self._points.get(self._rewritten(name))
        if point is None:
            raise HookPointError(self._unknown(name))
        return point

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def values(self) -> ValuesView[HookPoint]:
        """Return the hook points in execution order. This is faster than looking up each name."""
        return self._points.values()

    def select(self, pattern: str) -> HookPoints:
        """Return the hook points whose names or aliases match a pattern.

        Args:
            pattern: Pattern, such as `"embedder.block*.res?"`. `*` matches any text without a dot, `**` any number of
                dot-separated parts, and `?` one character. A pattern that ends in a module name matches that module's
                outputs in every call: `"h.*"` matches `h.0` or, if `h.0` has several outputs, `h.0.out[0]`, ...
                `"h.*.in[0]"` matches first inputs, `"h.*.out[1]"` second outputs, and `"**.in"` all inputs.

        Raises:
            HookPointError: If no name matches, or if `?` misses indices with several digits, as `h.?` misses `h.10`.
        """
        _check_name(pattern)
        points = {p.name: spellings(p.name, p.module, p.aliases) for p in self._points.values()}
        chosen = [self._points[name] for name in selected(pattern, points)]
        if not chosen:
            dots = " `*` stops at a dot; `**` does not." if "*" in pattern else ""
            hint = alternative(pattern, points) or did_you_mean(pattern, self._names()) + dots
            raise HookPointError(f"No hook point matches '{pattern}'.{hint} {self._advice()}")
        facts = {name: getattr(self, name) for name in ("method", "calls", "not_called", "steady")}
        return HookPoints(self.model, chosen, **facts)

    def site(self, name: str, /, *_unnamed: Any, **indices: Index) -> Site:
        """Create a site, and check the site against the trace.

        Args:
            name: Name of the hook point.
            indices: Index along each restricted axis, such as `channel=[55, 121]` or `row=slice(2, 5)`.

        Raises:
            HookPointError: If the hook point does not exist.
            SiteError: If an axis or an index does not exist; all errors are reported together.
        """
        return self.bind(Site(name, *_unnamed, **indices))

    def bind(self, site: Site) -> Site:
        """Check a site against the trace, as `site` does, and return the site bound to the traced hook point."""
        point = self[site.name]
        return site if site.point is point or site.point == point else normalized(site, point)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tree": None}  # a tree refers to the attributes of this model's modules

    def tree(self) -> Tree:
        """Return the Tree of the model's modules. Raise UnsupportedModelError if a module would ignore hooks."""
        tree = self._tree
        if tree is None or tree.modules[""] is not self.model or tree.has_changed():
            self._tree = tree = Tree(self.model)
            tree.refuse_unhookable()
        else:
            tree.refuse_compiled()
        return tree

    def run(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """Run the traced method on copies of the inputs and keyword arguments, and return the method's output."""
        args, kwargs = copied_inputs(inputs, keywords)
        return getattr(self.model, self.method)(*args, **kwargs)

    def _rewritten(self, name: str) -> str:
        """Return the canonical form of a hook point's name, such as `fc` for `fc.out`."""
        with suppress(HookPointError):
            point = parsed_name(dict(self.model.named_modules(remove_duplicate=False)), name)
            name = written_name(point.module, point.side, point.path, point.call)
        return self._aliases.get(name, name)

    def _unknown(self, name: str) -> str:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if name in self.not_called:
            return (
                f"'{name}' is not a hook point, because the traced forward pass did not call that module. "
                f"{self._advice()} To trace another path through the model, call hook_points() with other inputs or "
                "another method."
            )
        module = modules.get(name, name)
        fired = [point.name for point in self._points.values() if modules.get(point.module, point.module) == module]
        if fired:
            return f"'{name}' does not identify a hook point. Use one of these names: {', '.join(fired)}."
        if is_pattern(name):
            return f"'{name}' is a pattern, but a hook point is expected. Use a name from points.select('{name}')."
        return f"{unknown_name(name, modules, self._names())} {self._advice()}"

    def _names(self) -> list[str]:
        return [*self._points, *self._aliases]

    _ipython_key_completions_ = _names

    def _advice(self) -> str:
        if len(self) <= 8:
            return f"(The hook points are {', '.join(self)}.)"
        return f"({len(self)} hook points; print the HookPoints to list them.)"

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per hook point, in execution order."""
        return [
            {
                "hook point": " = ".join((point.name, *point.aliases)),
                "axes": ", ".join(point.axes),
                "shape without batch": " x ".join("any" if length is None else str(length) for length in point.shape),
                "dtype": str(point.dtype).removeprefix("torch."),
                "module": point.module_type,
                "parameters": point.parameters,
            }
            for point in self._points.values()
        ]

    def _title(self) -> str:
        return f"{len(self)} hook points of {type(self.model).__name__}, in execution order"

    def _notes(self) -> list[str]:
        unproved = [point.name for point in self._points.values() if point.batch_axis is None]
        shown = unproved if len(unproved) <= 6 else [*unproved[:6], "..."]
        named = {f"Hook points with unknown batch axis ({len(unproved)})": shown, "Not called": self.not_called}
        return [f"{note}: {', '.join(names)}" for note, names in named.items() if names]

    def _lines(self) -> list[dict[str, Any]]:
        return [{**record, "parameters": f"{record['parameters']:,}"} for record in self.to_records()]


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"A hook point's name or pattern must be a string, such as 'conv1'; got {type(name).__name__}.")


def hook_points(
    model: nn.Module,
    *example_inputs: Any,
    method: str = "__call__",
    axes: Mapping[str, str | tuple[str, ...] | View] | None = None,
    free: Mapping[str, int] | None = None,
    **example_keywords: Any,
) -> HookPoints:
    """List all places in a model where activations can be read or written, in execution order.

    The model runs twice under `torch.no_grad`; the second run has one more row, to identify the batch axis. Random
    number generators, buffers, attributes and training flags are restored.

    Args:
        model: Any module.
        example_inputs: Inputs with at least one row; the model receives copies. In the second run, each input gets one
            more row along the axis named "batch" (by `axes`, or by a module such as a sequence-first LSTM). An input
            with unnamed axes gets one more row along the first axis if that axis is as long as the batch.
        method: Name of the method to trace, if not `__call__`. The method's inputs are named `.in[0]`, ...
        axes: Dict that maps patterns (see `HookPoints.select`) to the axis names of the matching hook points, for axes
            whose names cannot be inferred: `{"encoder.*": "batch position feature"}`. Elementwise modules and functions
            propagate axis names. A `chanpatch.view` also splits axes, such as a feature axis into heads.
        free: Axes whose lengths may differ in later forward passes, as a dict that maps each axis name to the index of
            that axis in the first input. For example, `{"position": 1}` gives axis 1 of the first input the name
            "position" and a free length. In a third run, axis 1 has one more entry, a copy of the last entry, in every
            input in which axis 1 is as long as in the first input. All axes that grow in this run are also free. If
            several inputs have the free axis, trace with inputs of equal length.
        example_keywords: Keyword arguments for the model.

    Raises:
        UnsupportedModelError: If the model is compiled or scripted, has lazy parameters, or uses nested tensors.
        BatchAxisError: If the example inputs have no rows.
        TypeError: If the model is not a module, or if `axes` or `free` is not a dict.
        HookPointError: If the model does not have the method, if no hook point matches a pattern in `axes`, or if two
            hook points have the same name.
        SiteError: If `axes` does not fit a hook point, or `free` does not fit the inputs.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> points = hook_points(model, torch.zeros(2, 3, 9, 9))
        >>> points["1"].axes, points["1"].shape
        (('batch', 'channel', 'row', 'col'), (8, 7, 7))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hook_points expects a torch.nn.Module, not {no_module(model)}")
    for name, given, example in (("axes", axes, "{'h.*': 'batch position'}"), ("free", free, "{'position': 1}")):
        if not isinstance(given, (Mapping, type(None))):
            raise TypeError(f"{name}= must be a dict, such as {example}; got {type(given).__name__}.")
    tree = Tree(model)
    tree.refuse_unhookable()
    facts = traced_run(tree.modules, method, example_inputs, example_keywords, axes or {}, free or {})
    return HookPoints(model, method=method, **facts)


def traced(
    points_or_model: HookPoints | nn.Module, inputs: Inputs | Iterable[Inputs] | None, keywords: Mapping[str, Any] = {}
) -> HookPoints:
    """Return the hook points of a model: trace the model with the inputs, or return HookPoints unchanged.

    If `inputs` is an iterable of batches, the model is traced with the first batch.
    """
    if isinstance(points_or_model, HookPoints):
        return points_or_model
    model = model_of(points_or_model)
    if inputs is None:
        raise TypeError(
            f"There are no inputs to trace the {type(model).__name__} with. Pass hook_points(model, ...) instead of "
            "the model."
        )
    each = [inputs] if isinstance(inputs, (Tensor, tuple, Mapping)) else inputs
    for arguments, named in batches(each, 1):
        return hook_points(model, *arguments, **named, **keywords)
    raise BatchAxisError("The inputs are empty, so the model cannot be traced. Pass at least one batch.")


def names_by_trace(
    model: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, tuple[Axes, int | None]]:
    """Trace a model, and map each hook point's name to its axis names and batch axis. If the trace fails, return {}.

    The trace may run in the middle of another forward pass, so all listeners are disabled during the trace.
    """
    if model not in _names:
        found = {}
        with suppress(Exception), left_twice(Interrupted(model)):
            points = hook_points(model, *args, method=method, **kwargs).values()
            found = {name: (each.axes, each.batch_axis) for each in points for name in (each.name, *each.aliases)}
        _names[model] = found
    return _names[model]


_names: WeakKeyDictionary[nn.Module, Mapping[str, tuple[Axes, int | None]]] = WeakKeyDictionary()


def resolve(modules: Mapping[str, nn.Module], site: Site) -> Place:
    """Return the place of a site in a model. `modules` maps names to the model's modules.

    If the site is bound to a traced hook point of this model, return the hook point. Otherwise, parse the site's name;
    raise HookPointError if the name is not valid.
    """
    point = site.point
    if point is not None and (point.side == "tap" or point.module in modules):
        return point
    if site.basis is not None:
        raise SiteError(
            f"{site!r} has a basis, which requires a traced model. Pass hook_points(model, *inputs) instead of "
            "the model."
        )
    return parsed_name(modules, site.name)


def sites_of(
    points_or_model: HookPoints | nn.Module, sites: str | Site | HookPoint | Iterable[str | Site | HookPoint]
) -> tuple[Site, ...]:
    """Convert names, patterns, hook points or sites to checked sites, in order, without duplicates."""
    named: list[Site] = []
    if not isinstance(sites, (str, Site, HookPoint, Iterable)):
        raise TypeError(
            f"sites= must be a name, a pattern, a site, a hook point or a list of these; got {type(sites).__name__}."
        )
    for item in [sites] if isinstance(sites, (str, Site, HookPoint)) else sites:
        if isinstance(points_or_model, HookPoints) and isinstance(item, str) and is_pattern(item):
            named += map(Site, points_or_model.select(item))
        else:
            named.append(Site(item.name).at(item) if isinstance(item, HookPoint) else
                         item if isinstance(item, Site) else Site(item))  # fmt: skip
    if not named:
        raise SiteError(
            "There are no sites to record: the argument sites= is empty. Pass at least one site, as in sites=['conv1']."
        )
    return tuple(dict.fromkeys(bound(points_or_model, named)))


def site_of(points: HookPoints, site: str | Site | HookPoint | Iterable[Site]) -> Site:
    """Convert a name, pattern, hook point or site to a checked site. Raise SiteError if the result is several sites."""
    found = sites_of(points, site)
    if len(found) > 1:
        raise SiteError(
            f"Expected one site, but got {len(found)}: {', '.join(map(repr, found))}. Pass one of these sites."
        )
    return found[0]


def bound(points_or_model: HookPoints | nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Check sites against the traced hook points, and return the sites bound to these hook points.

    If a model is passed instead of HookPoints, check only the sites' names, and return the sites unchanged. All errors
    are reported together.
    """
    found, faults = [], []
    traced = isinstance(points_or_model, HookPoints)
    modules = {} if traced else dict(model_of(points_or_model).named_modules(remove_duplicate=False))
    for site in sites:
        try:
            if isinstance(points_or_model, HookPoints):
                site = points_or_model.bind(site)
            else:
                resolve(modules, site)
            found.append(site)
        except (HookPointError, SiteError) as fault:
            faults.append(fault)
    if faults:
        raise type(faults[0])(in_one(faults))
    return found


def model_of(points_or_model: HookPoints | nn.Module) -> nn.Module:
    """Return the model, given the model or its HookPoints. Raise TypeError for any other argument."""
    model = points_or_model.model if isinstance(points_or_model, HookPoints) else points_or_model
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected HookPoints or a torch.nn.Module, not {no_module(points_or_model)}")
    return model


def no_module(given: object) -> str:
    """Return text for an error message about an object that is not a module: the name of the object's type and a hint.

    The hint names an attribute of the object that is a module. If there is no such attribute, the hint is left out.
    """
    held = [name for name, item in getattr(given, "__dict__", {}).items() if isinstance(item, nn.Module)]
    return f"{type(given).__name__}.{f' Pass its module .{held[0]} instead.' if held else ''}"


def root_of(points_or_model: HookPoints | nn.Module) -> tuple[Tree, str, dict[str, int] | None]:
    """Return the arguments for a Session: the Tree of modules, the method's name, and the numbers of calls.

    For HookPoints, the numbers of calls are a dict; for a model, they are None.

    Raises:
        UnsupportedModelError: If a module would ignore hooks.
    """
    if isinstance(points_or_model, HookPoints):
        return points_or_model.tree(), points_or_model.method, points_or_model.calls
    tree = Tree(model_of(points_or_model))
    tree.refuse_unhookable()
    return tree, "__call__", None
