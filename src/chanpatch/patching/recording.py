"""Record activations at sites. Reductions run inside the hook, so only reduced activations are stored."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import einops
import numpy as np
import torch
from torch import Tensor, nn

from ..engine.moments import RootCall, published
from ..engine.paths import Place, inside_vmap
from ..engine.sessions import Attached, Session, StopForward
from ..errors import SiteError, UnsupportedModelError, did_you_mean
from ..registry.points import HookPoints, resolve, sites_of
from ..registry.sites import Axes, HookPoint, Site, read, unusual_layout, written
from .cache import ActivationCache
from .contexts import ContextSession, Opened, allowed_names, check_reached
from .edit_context import Context
from .edits import check_mask, region_lengths
from .firing import Located
from .patch import Mask

Reduce: TypeAlias = 'Literal["sum", "mean", "max", "norm"] | tuple[str, str | Callable[..., Tensor]]'
Sites: TypeAlias = "str | Site | HookPoint | Iterable[str | Site | HookPoint]"


def recording(
    points_or_model: HookPoints | nn.Module,
    sites: Sites,
    reduce: Reduce | None = None,
    before: bool = False,
    *,
    where: Mask | None = None,
    detach: bool = True,
    device: torch.device | str | None = None,
    allow_unreached: Iterable[str] = (),
) -> Opened[ActivationCache]:
    """Record activations while the context is open. Several forward passes are concatenated along the batch axis.

    If `recording` is used as a decorator, each call to the decorated function has a separate cache.

    Args:
        points_or_model: Model or HookPoints. With HookPoints, every site is checked against the trace.
        sites: Names, sites or hook points; pass HookPoints to record every hook point. With a trace, names may be
            patterns such as `"h.*"` (see `HookPoints.select`).
        reduce: `"sum"`, `"mean"`, `"max"` or `"norm"` over all axes except batch, channel and feature, or an einops
            pair such as `("b c h w -> b c", "sum")`. Only the result is stored.
        before: Whether to record activations before patches are applied.
        where: Elements to reduce; None for all elements. Accepts the same values as `where` in Patch, and needs
            `reduce`. For each reduced value, `cache.counts` contains the number of selected elements. If no elements
            are selected, the value is NaN. Integer activations are converted to float64.
        detach: Whether to detach the recorded activations from the autograd graph. If False and without `reduce`, the
            forward pass continues from the recorded activation, so after a single forward pass,
            `torch.autograd.grad(output, cache[site])` is the gradient at the site.
        device: Device on which to store the recorded activations; None to leave each on its own device.
        allow_unreached: Names of hook points that the model does not have to reach.

    Yields:
        Cache that fills as the model runs.

    Raises:
        HookPointError, SiteError: If there are no sites, or if a site does not exist or cannot be reduced.
        EditError: If `where` does not match a site's region.
        ValueError: If a name in `allow_unreached` is not recorded.
        UnsupportedModelError: If the model would ignore hooks.
        UnreachedError: On exit, if a site was never reached.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> with recording(model, "0", reduce="sum") as cache:
        ...     _ = model(torch.zeros(2, 3, 9, 9))
        >>> cache["0"].shape
        torch.Size([2, 8])
    """
    # An iterator would be empty later.
    chosen = sites if isinstance(sites, str) or not isinstance(sites, Iterable) else tuple(sites)
    allowed = allow_unreached if isinstance(allow_unreached, str) else tuple(allow_unreached)
    options: dict[str, Any] = {"before": before, "detach": detach, "device": device, "allow_unreached": allowed}
    return Opened(lambda: Recorder(points_or_model, chosen, reduce, where=where, **options))


def run_with_cache(  # noqa: D417
    points_or_model: HookPoints | nn.Module,
    *inputs: Any,
    sites: Sites,
    reduce: Reduce | None = None,
    where: Mask | None = None,
    device: torch.device | str | None = None,
    stop: bool = False,
    detach: bool = True,
    **keywords: Any,
) -> Any:
    """Run the model once, and return the output together with a cache of recorded activations.

    Args:
        points_or_model: Model or HookPoints. With HookPoints, the traced method runs.
        inputs: Positional arguments for the model.
        sites, reduce, where, device, detach: Same as in recording.
        stop: Whether to return only the cache, and to stop the forward pass once every site has been recorded. The
            forward pass still completes if the model replaces its parameters while it runs, or if a site has neither a
            trace nor a call index.
        keywords: Keyword arguments for the model.

    Returns:
        `(output, cache)`, or only the cache if `stop` is True.

    Raises:
        HookPointError, SiteError, EditError, UnreachedError: Same as in recording.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
        >>> output, cache = run_with_cache(model, torch.zeros(2, 3), sites="0")
        >>> torch.equal(cache["0"].relu(), output)
        True
    """
    recorder = Recorder(points_or_model, sites, reduce, where=where, detach=detach, device=device, stop=stop)
    output = recorder.run_once(inputs, keywords)
    return recorder.result if stop else (output, recorder.result)


class Recorder(ContextSession):
    """Session that records activations at sites. If `double` is True, reductions run in double precision."""

    rows = 0  # number of rows in the last forward pass

    def __init__(
        self,
        points_or_model: HookPoints | nn.Module,
        sites: Sites,
        reduce: Reduce | None,
        *,
        where: Mask | None = None,
        first_row: int | None = None,  # if the inputs are split into batches: index of the first row in this batch
        double: bool = False,
        before: bool = False,
        detach: bool = True,
        device: torch.device | str | None = None,
        stop: bool = False,
        allow_unreached: Iterable[str] = (),
    ) -> None:
        super().__init__(points_or_model)
        if where is not None and reduce is None:
            raise SiteError(
                "`where` needs a reduction of the selected elements, as in reduce='mean'. Without a reduction, omit "
                "`where`, and apply the mask to the recorded activation."
            )
        self.result = ActivationCache({}, {}, {})
        self.result.counts = None if where is None else ActivationCache({}, {}, {})
        self.where, self.first_row = where, first_row
        self.reduce, self.double, self.device, self.keeps_graph = reduce, double, device, not detach
        self._sites = sites_of(points_or_model, sites)
        self._allowed = allowed_names(allow_unreached, (site.name for site in self._sites), "recorded")
        self.missing: set[Site] = set()
        self.in_repeated = published.now.repeated  # True if the recorder was opened by an edit
        self.stops = stop and (not isinstance(points_or_model, HookPoints) or points_or_model.steady)
        for site in self._sites:
            point = resolve(self.modules, site)
            # Without a trace, the module may be called again later in the forward pass; that call must raise an error.
            self.stops &= isinstance(point, HookPoint) or point.call is not None
            self.listen(point, "before" if before else "after", _Record(self, site, point))

    def run_once(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """Run the model and return the output, or None if the forward pass was stopped early."""
        output, gradients = None, torch.is_grad_enabled()
        with Attached(self):
            try:
                output = getattr(self.root, self.method)(*inputs, **keywords)
            except StopForward as ended:
                if ended.args != (self,):
                    raise
                torch.set_grad_enabled(gradients)  # the forward pass may have disabled gradients temporarily
        self.finish(None)
        self.let_go()
        return output

    def on_begin(self, call: RootCall) -> None:
        """Mark all sites as not yet recorded."""
        self.missing = set(self._sites)

    def finish(self, error: Exception | None) -> None:
        """Raise UnreachedError if a site was never reached, unless the context exits with an exception."""
        missing = [
            site.name for site in self._sites if site not in self.result._parts and site.name not in self._allowed
        ]
        if error is None:
            check_reached("Nothing was recorded at {}", dict.fromkeys(missing), advice=self.no_call)


class _Record(Located):
    """Listener that records one site."""

    def __init__(self, recorder: Recorder, site: Site, point: Place) -> None:
        super().__init__(site, point, recorder.modules.get(point.module))
        self._recorder = recorder
        where = recorder.where
        self.wants_names = isinstance(recorder.reduce, str) or callable(where)
        if where is not None and not callable(where):
            check_mask(where, site)
        if isinstance(point, HookPoint) and recorder.reduce is not None:  # check that the reduction applies
            # Not on the meta device, where torch imports sympy to reduce a tensor.
            one = torch.zeros((), dtype=point.dtype, device=point.device)
            region = one.expand([n or 1 for n in region_lengths(site, point)])
            mask = None if where is None else torch.ones_like(region, dtype=torch.bool)
            reduced(region, site, point.axes, recorder.reduce, mask, double=recorder.double)

    def __call__(self, leaf: Tensor, session: Session) -> Tensor:
        if published.now.repeated and not self._recorder.in_repeated:
            return leaf
        if torch._C._current_graph_task_id() != -1:
            return leaf  # already recorded; torch.utils.checkpoint is rerunning the module in the backward pass
        if inside_vmap(leaf):
            raise UnsupportedModelError(
                f"{self.site!r} cannot be recorded inside torch.vmap, because a tensor from inside vmap cannot be used "
                "after vmap returns. Call the model outside vmap, on a batch of inputs."
            )
        recorder = self._recorder
        self.locate(leaf, session)
        seen = leaf if self._lens is None else self._lens.split(leaf)
        region = read(seen, self.positions)
        if not recorder.keeps_graph:
            region = region.detach()
        mask = None if recorder.where is None else self._selected(recorder.where, region, seen, session)
        value, counts = reduced(region, self.site, self.axes, recorder.reduce, mask, double=recorder.double)
        in_forward = value is region and recorder.keeps_graph  # the forward pass continues from the record
        # Indexing with a list already makes a copy.
        copied = any(isinstance(chosen, Tensor) for chosen in self.positions.values())
        if in_forward or (not copied and (value is region or value._is_view())):
            value = value.clone()
        device = value.device if recorder.device is None else recorder.device
        recorder.result._append(self.site, value.to(device), *self._kept, self._steps(seen, session))
        if counts is not None and recorder.result.counts is not None:
            recorder.result.counts._append(self.site, counts.to(device), *self._kept)
        recorder.missing.discard(self.site)
        if recorder.stops and not recorder.missing:
            recorder.stop(recorder)
        if not in_forward:
            return leaf
        rewritten = written(seen, self.positions, value.clone())
        return rewritten if self._lens is None else self._lens.merge(rewritten, leaf)

    def _selected(self, where: Mask, region: Tensor, leaf: Tensor, session: Session) -> Tensor:
        """Return a bool tensor with the shape of the region, which is True for the elements to reduce."""
        moment, first, axis = session.moment(), self._recorder.first_row, self.batch_axis
        if first is not None and axis is not None:
            self._recorder.rows = leaf.shape[axis]
            rows = np.arange(first, first + leaf.shape[axis])
            moment = replace(moment, published=replace(moment.published, rows=rows))
            if isinstance(where, Tensor) and where.shape[axis] > 1:
                where = where.narrow(axis, first, leaf.shape[axis])
                where = read(where, {axis: self.positions[axis]} if axis in self.positions else {})
        mask = self._mask(where, region, Context(moment, self.site, axis, leaf, self.positions))
        return mask.expand(region.shape)

    def _steps(self, leaf: Tensor, session: Session) -> Tensor | None:
        """Return the indices of the episode and the step of each row: int64 with shape `(row, 2)`.

        Return None if the rows do not come from a rollout, or if the recorded activation has no batch axis.
        """
        now, axis = published.now, self.batch_axis
        if now.step is None or now.rows is None or self._kept[1] is None or axis is None:
            return None
        if len(now.rows) != leaf.shape[axis]:  # an edit is running a model on other inputs
            return None
        rows = Context(session, self.site, axis, leaf, self.positions).rows
        return torch.stack([rows, torch.full_like(rows, now.step)], 1)

    def _check(self, leaf: Tensor) -> None:
        where = self._recorder.where
        if where is not None and (layout := unusual_layout(leaf)):
            raise UnsupportedModelError(
                f"`where` at {self.site!r} needs a dense tensor; got a {layout} tensor. Omit `where`, or make the "
                "tensor dense in the model."
            )
        if isinstance(where, Tensor) and self._recorder.first_row is None:
            check_mask(where, self.site, self.axes, read(leaf, self.positions).shape)
        axes = reduced_axes(self.site, self.axes, self._recorder.reduce)
        batch = None if self.batch_axis is None else self.axes[self.batch_axis]
        self._kept = axes, axes.index(batch) if batch in axes else None


_KEPT = ("batch", "channel", "feature", "component")
_UNSELECTED = {"sum": 0.0, "mean": 0.0, "norm": 0.0, "max": -math.inf, "min": math.inf, "prod": 1.0}  # neutral values
_BUILT_IN: dict[str, Any] = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "norm": torch.linalg.vector_norm}
_TOKEN = re.compile(r"\([^)]*\)|\S+")


def reduced_axes(site: Site, axes: Axes, reduce: Reduce | None) -> Axes:
    """Return the names of the axes that remain after a reduction of a region with the given axes.

    Raise SiteError if `reduce` is unknown, or if `reduce` needs axis names and an axis is unnamed.
    """
    if reduce is None:
        return axes
    if isinstance(reduce, tuple):
        left, _, right = reduce[0].partition("->")
        rest = len(axes) - len(_TOKEN.findall(left)) + 1
        tokens, remain = (_expanded(side, rest) for side in (left, right))
        named = dict(zip(tokens, axes, strict=True)) if len(tokens) == len(axes) else {}
        return tuple(named.get(token, token.strip("()")) for token in remain)
    if reduce not in _BUILT_IN:
        raise SiteError(
            f"reduce must be 'sum', 'mean', 'max', 'norm' or a pair such as ('b c h w -> b c', 'sum'); got {reduce!r}."
            + did_you_mean(str(reduce), _BUILT_IN)
        )
    if any(re.fullmatch(r"axis\d+", axis) for axis in axes):
        raise SiteError(
            f"reduce={reduce!r} keeps the axes named batch, channel and feature, but {site!r} has unnamed axes: "
            f"({', '.join(axes)}). Name these axes with hook_points(..., axes={{'{site.name}': (...)}}), or pass a "
            "pair such as ('b c h w -> b c', 'sum')."
        )
    return tuple(axis for axis in axes if axis in _KEPT)


def _expanded(side: str, rest: int) -> list[str]:
    """Split one side of an einops pattern into tokens. An ellipsis is replaced by `rest` tokens."""
    dots = [f"...{number}" for number in range(rest)]
    return [each for token in _TOKEN.findall(side) for each in (dots if token == "..." else [token])]


def reduced(
    region: Tensor, site: Site, axes: Axes, reduce: Reduce | None, mask: Tensor | None = None, *, double: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Reduce a region. Return the reduced tensor, and the number of elements that went into each of its values.

    `mask` has the region's shape. Only elements for which the mask is True are reduced. If no elements are selected for
    a value, the value is NaN. Without a mask, the second result is None. With `double`, the reduction runs in double
    precision. SiteError is raised if the reduction does not apply to the region.
    """
    if double or (mask is not None and not (region.is_floating_point() or region.is_complex())):
        if region.is_complex():
            raise SiteError(
                f"{site!r} is {region.dtype}, which cannot be converted to real double precision. Call "
                "tap('name', torch.view_as_real(tensor)) in the model's forward(), and use the site 'name'."
            )
        region = region.to(torch.float32 if region.device.type == "mps" else torch.float64)  # mps lacks float64
    kept = reduced_axes(site, axes, reduce)
    name: Any = reduce[1] if isinstance(reduce, tuple) else reduce
    if mask is not None and (callable(name) or name not in _UNSELECTED):
        raise SiteError(
            f"With `where`, the reduction at {site!r} must be one of {', '.join(map(repr, _UNSELECTED))}; got {name!r}."
        )
    if kept != axes and region.dtype in (torch.float16, torch.bfloat16):
        region = region.float()  # sums easily overflow half precision

    def apply(tensor: Tensor, name: Any) -> Tensor:
        if kept == axes:
            return tensor.abs() if name == "norm" else tensor  # one element is its own sum, mean and maximum
        if isinstance(reduce, tuple):
            return einops.reduce(tensor, reduce[0], name)
        over = [number for number, axis in enumerate(axes) if axis not in kept]
        return _BUILT_IN[name](tensor, dim=over)  # type: ignore[no-any-return]

    try:
        if mask is None:
            return apply(region, name), None
        counts = apply(mask.long(), "sum")
        value = apply(torch.where(mask, region, _UNSELECTED[name]), "sum" if name == "mean" else name)
        value = value / counts.clamp(min=1) if name == "mean" else value
        return torch.where(counts > 0, value, math.nan), counts
    except (einops.EinopsError, RuntimeError, TypeError) as fault:
        raise SiteError(
            f"reduce={reduce!r} cannot be applied to {site!r}, a {region.dtype} region with axes ({', '.join(axes)}). "
            f"{str(fault).strip()}"
        ) from fault
