"""Reading sites: recorded activations, reduced inside the hook where only sums are wanted.

output, cache = run_with_cache(points, observations, sites="embedder.relu3", reduce="sum")
cache["embedder.relu3"]        # (batch, channel)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.hooks import refuse_unhookable
from ..engine.paths import inside_vmap
from ..engine.regions import read, written
from ..engine.sessions import Session, StopForward
from ..errors import UnreachedError, UnsupportedModelError
from ..registry.names import BarePoint
from ..registry.points import HookPoints, model_of, resolve, root_of, sites_of
from ..registry.sites import Axes, HookPoint, Site
from .cache import ActivationCache
from .checks import Located, allowed_names, region_lengths
from .contexts import Opened
from .reductions import Reduce, reduced, reduced_axes


def recording(
    points_or_model: HookPoints | nn.Module,
    sites: str | Site | HookPoint | Iterable[str | Site | HookPoint],
    reduce: Reduce | None = None,
    before: bool = False,
    *,
    detach: bool = True,
    device: torch.device | str | None = None,
    allow_unreached: Iterable[str] = (),
) -> Opened[ActivationCache]:
    """Record sites while the context is open; several forwards are joined along the batch.

    It is a decorator too: then each call of the function records into a cache of its own.

    Args:
        points_or_model: The model, or its HookPoints: then every site is checked against the trace at once.
        sites: Names, sites or hook points; HookPoints for all of theirs.
        reduce: `"sum"`, `"mean"`, `"max"` or `"norm"` over all axes but batch, channel and feature, or an einops
            pair `("b c h w -> b c", "sum")`. Reduced inside the hook: only the result is kept.
        before: Record what the patches found instead of what they left.
        detach: Cut the record from the graph. False keeps it there, and what follows is computed from it, so that
            `torch.autograd.grad(output, cache[site])` is the gradient at the site; a reduced record is a branch.
        device: Where records are kept; their own device if None.
        allow_unreached: Names of hook points that need not run.

    Yields:
        The cache, which fills as the model runs.

    Raises:
        HookPointError, SiteError: At once, if a site does not exist or cannot be reduced so, or there is none.
        ValueError: At once, if `allow_unreached` has a name that is not recorded.
        UnreachedError: At exit, if a site never ran; it masks no exception in flight.
        UnsupportedModelError: At once, if the model ignores hooks.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> with recording(model, "0", reduce="sum") as cache:
        ...     _ = model(torch.zeros(2, 3, 9, 9))
        >>> cache["0"].shape
        torch.Size([2, 8])
    """
    # Of iterators nothing would be left for a second entry.
    chosen = sites if isinstance(sites, (str, Site, HookPoint)) else tuple(sites)
    allowed = allow_unreached if isinstance(allow_unreached, str) else tuple(allow_unreached)
    return Opened(
        lambda: _Recorder(
            points_or_model, chosen, reduce, before=before, detach=detach, device=device, allow_unreached=allowed
        )
    )


def run_with_cache(
    points_or_model: HookPoints | nn.Module,
    *inputs: Any,
    sites: str | Site | HookPoint | Iterable[str | Site | HookPoint],
    reduce: Reduce | None = None,
    device: torch.device | str | None = None,
    stop: bool = False,
    detach: bool = True,
    **keywords: Any,
) -> Any:
    """Run the model once and return its output and the recorded sites.

    Args:
        points_or_model: The model, or its HookPoints: then their method is run.
        inputs: What the model takes.
        sites: As in recording.
        reduce: As in recording.
        device: As in recording.
        stop: Return the cache alone, and end the forward as soon as every site was recorded. A forward of a model
            without a trace runs on where a site names no call (`relu` rather than `relu#0`), since only the rest of
            it can tell whether the module is called again, which is an error; so does one that changes its own
            parameters for a while, as the trace shows, since it has to change them back.
        detach: As in recording.
        keywords: Keyword inputs of the model.

    Returns:
        `(output, cache)`, or the cache if `stop`.

    Raises:
        HookPointError, SiteError: If a site does not exist or cannot be reduced so, or there is none.
        UnreachedError: If a site never ran.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
        >>> output, cache = run_with_cache(model, torch.zeros(2, 3), sites="0")
        >>> torch.equal(cache["0"].relu(), output)
        True
    """
    recorder = _Recorder(points_or_model, sites, reduce, detach=detach, device=device, stop=stop)
    output, gradients = None, torch.is_grad_enabled()
    with recorder:
        try:
            output = getattr(recorder.root, recorder.method)(*inputs, **keywords)
        except StopForward as ended:
            if ended.args != (recorder,):
                raise
            torch.set_grad_enabled(gradients)  # the forward may have meant to do so at its end
    recorder.raise_unreached("inside run_with_cache()")
    recorder.let_go()
    return recorder.result if stop else (output, recorder.result)


class _Recorder(Session):
    """A session that records sites into a cache."""

    confined = True

    def __init__(
        self,
        points_or_model: HookPoints | nn.Module,
        sites: str | Site | HookPoint | Iterable[str | Site | HookPoint],
        reduce: Reduce | None,
        *,
        detach: bool,
        device: torch.device | str | None,
        before: bool = False,
        stop: bool = False,
        allow_unreached: Iterable[str] = (),
    ) -> None:
        refuse_unhookable(model_of(points_or_model))
        super().__init__(*root_of(points_or_model))
        self.result = ActivationCache({}, {}, {})
        self.reduce, self.device, self.keeps_graph = reduce, device, not detach
        self._sites = sites_of(points_or_model, sites)
        self._allowed = allowed_names(allow_unreached, (site.name for site in self._sites), "nothing is recorded")
        self._missing: set[Site] = set()
        self._stops = stop and (not isinstance(points_or_model, HookPoints) or points_or_model.steady)
        for site in self._sites:
            point = resolve(self.modules, site)
            # Without a trace, a module that is called again would be an error, which only the rest can tell.
            self._stops &= isinstance(point, HookPoint) or point.call is not None
            record = _Record(self, site, point, self.modules.get(point.module))
            self.listen(point, "before" if before else "after", record)

    def recorded(self, site: Site, activation: Tensor, axes: Axes, batch_axis: int | None) -> None:
        """Keep what was recorded at a site."""
        self.result._append(site, activation, axes, batch_axis)
        self._missing.discard(site)
        if self._stops and not self._missing:
            self.stop(self)

    def on_begin(self) -> None:
        """Start to wait for all sites again."""
        self._missing = set(self._sites)

    def failed(self, error: Exception) -> None:
        """Leave an exception as it is."""

    def finish(self) -> None:
        self.raise_unreached("inside recording()")

    def raise_unreached(self, where: str) -> None:
        names = [site.name for site in self._sites if site not in self.result and site.name not in self._allowed]
        if names:
            listed = ", ".join(f"'{name}'" for name in dict.fromkeys(names))
            raise UnreachedError(
                f"Nothing was recorded at {listed} {where}. The model was compiled, or it is not on the path that "
                "was called, or was called by its forward(), which runs no hooks."
            )


class _Record(Located):
    """What records one site."""

    def __init__(self, recorder: _Recorder, site: Site, point: HookPoint | BarePoint, module: nn.Module | None) -> None:
        super().__init__(site, point, module)
        self._recorder = recorder
        self.wants_names = isinstance(recorder.reduce, str)
        self._kept: tuple[Axes, int | None] = ((), None)  # what the reduction leaves
        if isinstance(point, HookPoint):
            lengths = [1 if length is None else length for length in region_lengths(site, point)]
            if recorder.reduce is not None:
                reduced(torch.empty(lengths, dtype=point.dtype, device="meta"), site, point.axes, recorder.reduce)

    def __call__(self, leaf: Tensor, session: Session) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            return leaf  # a backward pass computes anew what was recorded, as torch.utils.checkpoint has it do
        if inside_vmap(leaf):
            raise UnsupportedModelError(
                f"{self.site!r} cannot be recorded inside torch.vmap, which its record would have to leave. Call the "
                "model outside of vmap, on a batch of inputs."
            )
        recorder = self._recorder
        self.locate(leaf, session)
        region = read(leaf, self.positions)
        if not recorder.keeps_graph:
            region = region.detach()
        value = reduced(region, self.site, self.axes, recorder.reduce)
        on_the_way = value is region and recorder.keeps_graph  # what follows is computed from the record
        # What an index list selects is a copy already.
        copied = any(isinstance(chosen, Tensor) for chosen in self.positions.values())
        # On the way, too, it is a node of its own: what a module computed from its result before it returned it is no
        # part of what follows, and what is written into it in place later is no part of the record.
        if on_the_way or (not copied and (value is region or value._is_view())):
            value = value.clone()
        if recorder.device is not None:
            value = value.to(recorder.device)
        recorder.recorded(self.site, value, *self._kept)
        return written(leaf, self.positions, value.clone()) if on_the_way else leaf

    def _check(self, leaf: Tensor) -> None:
        axes = reduced_axes(self.site, self.axes, self._recorder.reduce)
        batch = None if self.batch_axis is None else self.axes[self.batch_axis]
        self._kept = axes, axes.index(batch) if batch in axes else None
