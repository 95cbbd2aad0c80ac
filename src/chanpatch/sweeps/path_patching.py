"""Path patching: the effect of one component on the output along the direct path to chosen receivers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ..channels import pair_count
from ..engine.inputs import Inputs, batches
from ..engine.training import training_modules
from ..errors import SiteError
from ..labels import site_label
from ..metrics.measured import Metric, measured
from ..patching.cache import ActivationCache
from ..patching.contexts import patched
from ..patching.patch import Patch
from ..patching.recording import recording
from ..patching.verbs import patch_in
from ..registry.points import HookPoints, site_of, sites_of, traced
from ..registry.sites import HookPoint, Site
from ..results import Grid
from .plan import Entry, Forward, clean_run
from .prefix import StrategyError
from .sweep import sweep

Place: TypeAlias = "str | Site | HookPoint"
Places: TypeAlias = "Place | Iterable[Place] | Mapping[Any, Place | Iterable[Place]]"


def path_patch(
    points_or_model: HookPoints | nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    sender: Places,
    receivers: Places,
    *,
    metric: Metric,
    frozen: Place | Iterable[Place] | None = None,
) -> Any:
    """Measure the effect of one or many senders on a metric along the direct paths to the receivers.

    First, the model runs on the clean inputs with the sender's activation patched in from the corrupted run, while
    frozen modules between the sender and the receivers keep their clean activations. The resulting activations at the
    receivers are then patched into a second run on the clean inputs. In that run, nothing is frozen, so the receivers
    affect the output along every path.

    Args:
        points_or_model: HookPoints, or a model, which is then traced with the clean inputs.
        clean: Clean inputs: a tensor with shape `(batch, ...)`, a tuple of positional arguments, or a dict of keyword
            arguments.
        corrupted: Corrupted inputs in the same form as `clean`, with one corrupted input for each clean input.
        sender: Hook point at which the path begins. For many senders, pass an iterable of hook points, or a dict that
            maps labels to hook points.
        receivers: Hook points at which the path ends, such as module inputs. With one sender, all receivers are patched
            together, and the path may pass through several receivers. With many senders, each receiver has its own
            column in the result. To patch several receivers together, pass a dict that maps labels to lists of
            hook points.
        metric: A function of the model's output, as in `sweep`.
        frozen: Hook points to freeze if they lie between the sender and the last receiver. By default, these are the
            outputs of modules that have weights and contain no other module with weights (such as Linear, Conv2d,
            Embedding, LSTM and MultiheadAttention), except norms. With `()`, nothing is frozen, so every path from the
            sender to the receivers counts. The sender, modules that contain the sender, and modules whose inputs or
            outputs are receivers are never frozen.

    Returns:
        The metric in the run with the path patched minus the metric in the clean run. With one sender, the result is a
        tensor with shape `(batch,)`. With many senders, the result is a `Grid` with one row per sender and one column
        per receiver. In the Grid, a cell is NaN if the receiver does not come after the sender. With many senders, one
        activation for each pair of sender and receiver is kept in memory.

    Raises:
        HookPointError, SiteError: If a site does not exist, if no receiver comes after a sender, or if the sites frozen
            by default block every path from the senders to the receivers.
        ContrastError: If `clean` and `corrupted` have different numbers of inputs.
        MetricError: If the metric does not return a tensor with shape `(batch,)`.

    Example:
        >>> import torch
        >>> from chanpatch import hook_points
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> clean, corrupted = torch.randn(2, 8, 3)
        >>> points = hook_points(model, clean)
        >>> path_patch(points, clean, corrupted, "0", "2.in[0]", metric=lambda output: output[:, 0]).shape
        torch.Size([8])

    References:
        Wang et al. 2023, "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small";
        Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching".
    """
    points = traced(points_or_model, clean)
    ends = named(points, "receivers", receivers)
    one = isinstance(sender, (str, Site, HookPoint)) and site_of(points, sender)
    if one:
        ends = {" + ".join(map(str, ends)): tuple(site for sites in ends.values() for site in sites)}
    paths = Paths(points, clean, corrupted, one or sender, ends, frozen)
    before = measured(metric, paths.baseline, paths.baseline)
    grid = paths.grid(metric)
    kind = before.device if before.dtype == torch.bool else before  # a difference of booleans may be -1
    return torch.from_numpy(grid.differences[0, 0]).to(kind) if one else grid


class Paths:
    """The direct paths from all senders to all receivers. Receivers with the same label are patched together."""

    def __init__(
        self, points: HookPoints, clean: Inputs, corrupted: Inputs, senders: Places, receivers: Places, frozen: Any
    ) -> None:
        pair_count(clean, corrupted)
        self.points, self._is_default = points, frozen is None
        frozen = _with_weights(points) if frozen is None else frozen
        listed = [frozen] if isinstance(frozen, (str, Site, HookPoint)) else [*frozen]
        self._frozen = sites_of(points, listed) if listed else ()
        self.senders = {label: site_of(points, each) for label, each in named(points, "senders", senders).items()}
        self.receivers = named(points, "receivers", receivers)
        self._order = {name: number for number, name in enumerate(points)}
        self._last = {label: max(self._order[end.name] for end in ends) for label, ends in self.receivers.items()}
        # A path may also change the receiver's activation outside the receiver's region.
        self._ends = {label: [points.site(end.name) for end in ends] for label, ends in self.receivers.items()}
        every = [*itertools.product(self.senders, self.receivers)]
        pairs = [pair for pair in every if not self._too_early(*pair)] or every[:1]
        self._held = {pair: self._between(*pair) for pair in pairs}
        self.forward, self.corrupted = (Forward(points, *batch) for batch in batches([clean, corrupted], 1))
        self._source = self.corrupted.until([*self.senders.values()])
        self._skips: dict[str, int] = {}  # number of module calls before each sender, by the sender's hook point
        recorded = itertools.chain(self.senders.values(), *self._held.values(), *self._ends.values())
        with recording(points, recorded) as self._cache:
            if len(self.senders) == 1 or training_modules(points.model):
                self.baseline = self.forward()
            else:
                entries = [Entry(0, label, (patch_in(site, self._source),)) for label, site in self.senders.items()]
                self.baseline, groups, _ = clean_run(self.forward, entries, max_bytes=2**28)
                self._skips = {group.point.name: group.skippable for group in groups}
        last, label = max(pairs, key=lambda pair: self._order[self.senders[pair[0]].name])
        if skips := self._skips:
            fast, self._skips = self._arrival(last, [label], ()), {}
            self._skips = skips if _alike(fast, self._arrival(last, [label], ()), fast) else {}

    def received(self) -> dict[tuple[Any, Any], ActivationCache]:
        """Map each pair (sender label, receiver label) to a cache with the activations that arrive at the receivers."""
        found, order = dict[tuple[Any, Any], ActivationCache](), self._order
        for sender in self.senders:
            # Receivers share a run if the same sites are frozen before each receiver. Later sites have no effect on the
            # receiver.
            held = {label: {*each} for (start, label), each in self._held.items() if start == sender}
            every = set().union(*held.values())
            alike = [
                label
                for label in held
                if {each for each in every if order[each.name] <= self._last[label]} == held[label]
            ]
            for labels in (alike, *([label] for label in held if label not in alike)):
                if labels:
                    cache = self._arrival(sender, labels, set().union(*(held[label] for label in labels)))
                    found |= {(sender, label): cache for label in labels}
        if self._is_default and all(_alike(each, self._cache, self._ends[pair[1]]) for pair, each in found.items()):
            for (sender, label), frozen in self._held.items():
                site, ends = self.senders[sender], self._ends[label]
                is_same = torch.equal(self._source[site], self._cache[site])
                if not is_same and not _alike(self._arrival(sender, [label], ()), self._cache, ends):
                    names = ", ".join(f"'{each.name}'" for each in frozen[:6]) + ", ..." * (len(frozen) > 6)
                    raise SiteError(
                        f"All paths from {site!r} to the receivers pass through frozen sites: {names}. Choose the "
                        "sites to freeze with frozen=[...], or freeze nothing with frozen=()."
                    )
        return found

    def patches(self, label: Any, cache: ActivationCache) -> list[Patch]:
        """Return patches that write the cached activations into the receivers with the given label."""
        return [patch_in(site, cache) for site in self.receivers[label]]

    def grid(self, metric: Metric) -> Grid:
        """Patch the receivers of each path, and return the changes in the metric, with one row per sender label.

        Each receiver label has a column. A cell is NaN if no path leads from the sender to the receivers.
        """
        received = self.received()
        # Patching in clean activations is not a no-op if a module modifies them in place.
        runs = {(label,): self._cache for _, label in received} | received
        patches = {key: self.patches(key[-1], cache) for key, cache in runs.items()}
        args, keywords = self.forward.inputs
        strategy: Any = "loop" if len(received) == 1 else "auto"
        result = sweep(self.points, *args, patches=patches, metric=metric, strategy=strategy, **keywords)
        (values,) = result.values.values()
        by_label = dict(zip(result.labels, values, strict=True))
        differences = np.full((len(self.senders), len(self.receivers), values.shape[1]), np.nan)
        rows, cols = tuple(self.senders), tuple(self.receivers)
        for sender, label in received:
            differences[rows.index(sender), cols.index(label)] = by_label[sender, label] - by_label[(label,)]
        return Grid(rows, cols, differences, result.effect_label)

    def _arrival(self, sender: Any, labels: Sequence[Any], held: Iterable[Site]) -> ActivationCache:
        """Run the model on the clean inputs, and record the receivers with the given labels.

        In this run, the sender is patched with its corrupted activation, and the sites in `held` are frozen. The run
        stops after the last of the receivers.
        """
        site = self.senders[sender]
        patches = [patch_in(site, self._source), *(patch_in(each, self._cache) for each in held)]
        ends = [end for label in labels for end in self._ends[label]]
        with suppress(StrategyError), patched(self.points, patches):
            return self.forward.until(ends, skip=self._skips.get(site.name, 0))
        with patched(self.points, patches):
            return self.forward.until(ends)

    def _too_early(self, sender: Any, label: Any) -> list[Site]:
        """Return the receivers with the given label that do not come after the sender."""
        first = self._order[self.senders[sender].name]
        return [site for site in self.receivers[label] if self._order[site.name] <= first]

    def _between(self, sender: Any, label: Any) -> list[Site]:
        """Check the receivers labeled `label`; return the sites to freeze between the sender and the last of these."""
        points, order, receivers = self.points, self._order, self.receivers[label]
        if before := self._too_early(sender, label):
            raise SiteError(
                f"The receiver {before[0]!r} does not come after the sender {self.senders[sender]!r} in the forward "
                "pass, so no path connects the two. Print the HookPoints to see their execution order."
            )
        whole = [site for site in receivers if not points[site.name].module]
        if whole and self._is_default:
            raise SiteError(
                f"The receiver {whole[0]!r} is the model's final output. By default, the module that computes this "
                "output may be frozen, which blocks all paths through it. Use that module or its input (such as "
                "'head.in[0]') as the receiver, or choose the hook points to freeze with frozen=[...]."
            )
        start, ends = points[self.senders[sender].name], [points[site.name] for site in receivers]
        first, last = order[start.name], self._last[label]
        # Module calls that contain the sender began before the sender ran. If the sender is a module's input, the call
        # to that module is one of these calls.
        begun = [each for each in points.values() if each.side == "in" and order[each.name] <= first]
        exempt = {(each.module, each.call) for each in begun}
        exempt -= {(start.module, start.call)} if start.side == "out" else set()
        exempt |= {(end.module, end.call) for end in ends}
        inside = tuple(f"{end.module}." for end in ends if end.side == "out")

        def may_freeze(point: HookPoint) -> bool:
            is_exempt = (point.module, point.call) in exempt or point.module.startswith(inside)
            return first < order[point.name] < last and not is_exempt

        return [site for site in self._frozen if may_freeze(points[site.name])]


def _alike(one: ActivationCache, other: ActivationCache, sites: Iterable[Site]) -> bool:
    return all(torch.equal(one[site], other[site]) for site in sites)


def named(points: HookPoints, name: str, sites: Any) -> dict[Any, tuple[Site, ...]]:
    """Return a dict that maps labels to tuples of sites. If `sites` is not a dict, the labels are the sites' names.

    `name` is "senders" or "receivers", for error messages.
    """
    if isinstance(sites, (str, Site, HookPoint)):
        sites = [sites]
    if not (sites := sites if isinstance(sites, Mapping) else [*sites]):
        raise SiteError(f"There are no {name}. Pass at least one {name[:-1]}, such as 'head.in[0]'.")
    pairs = (
        sites.items() if isinstance(sites, Mapping) else ((site_label(each), each) for each in sites_of(points, sites))
    )
    return {label: sites_of(points, each) for label, each in pairs}


def _with_weights(points: HookPoints) -> list[HookPoint]:
    """Return the outputs of modules that have weights, except norms and parents of modules with weights."""
    # A parametrization computes weights, not activations.
    weighted = [p for p in points.values() if p.parameters and "parametrizations" not in p.module.split(".")]
    modules = {point.module for point in weighted}
    outputs = [p for p in weighted if p.side == "out" and "norm" not in p.module_type.lower()]
    return [
        point
        for point in outputs
        if not any(other.startswith(f"{point.module}." if point.module else "") for other in modules - {point.module})
    ]
