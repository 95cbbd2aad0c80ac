"""The forward that a sweep, an attribution or a path patch repeats on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.inputs import copied_inputs
from ..engine.moments import Moment, forward_context, published
from ..engine.paths import replace, with_rows
from ..engine.state import undisturbed
from ..patching.cache import ActivationCache
from ..patching.firing import Firing
from ..patching.patch import Patch
from ..patching.recording import run_with_cache
from ..registry.points import HookPoints
from ..registry.sites import Site
from .prefix import Prefix, fresh

_FEWEST_TO_CUT = 8  # inputs; with fewer, a forward of one input saves nothing
_OF_TORCH = frozenset(vars(nn.Module()))


class Forward:
    """The traced method on copies of the same inputs, without side effects."""

    def __init__(
        self,
        points: HookPoints,
        inputs: tuple[Any, ...],
        keywords: Mapping[str, Any],
        *,
        check_nan: bool = True,
        row: int | None = None,
    ) -> None:
        self.points, self.inputs, self.check_nan = points, (inputs, dict(keywords)), check_nan
        self.row = row  # which row of the batch the inputs are; None if they are the whole batch
        self.undisturbed = undisturbed(points.model)
        self.prefix = Prefix(points.model, self.undisturbed.snapshot)
        self.rebound: list[tuple[dict[str, Any], str]] | None = None  # attributes that the first forward set

    def __call__(self) -> Any:
        """Return the model's output."""
        with self.running() as run:
            if self.rebound is not None:
                return run.kept(self.output())
            before = [(vars(module), vars(module).copy()) for module in self.points.model.modules()]
            output = run.kept(self.output())
            self.rebound = [
                (own, name)
                for own, earlier in before
                for name, value in own.items()
                if name not in _OF_TORCH and not callable(value) and earlier.get(name, before) is not value
            ]
            return output

    @contextmanager
    def running(self, skip: int = 0) -> Iterator[undisturbed]:
        """Prepare for one forward, of which the first `skip` module calls do not run; restore the model at the end."""
        rows = published.rows if self.row is None else [self.row]
        with (
            self.undisturbed as run,
            forward_context(step=published.step, rows=rows),
            _usual_attention(),
            self.prefix.skipped(skip) if skip else nullcontext(),
        ):
            yield run

    def output(self) -> Any:
        """Return the model's output, inside `running`."""
        return fresh(self.points.run(*self.inputs))  # a model may return the same dict each time

    def until(self, site: Site, *, skip: int = 0) -> ActivationCache:
        """Return the activation at a site, where the forward ends."""
        args, kwargs = copied_inputs(*self.inputs)
        with self.running(skip):
            cache: ActivationCache = run_with_cache(self.points, *args, sites=site, stop=True, **kwargs)
            return cache

    def fire(self, patches: Sequence[Patch], activation: Tensor) -> tuple[Tensor, list[tuple[Patch, Tensor]]]:
        """Apply patches to the activation at their hook point; return it, and NaN flags of patches that have one."""
        args, kwargs = self.inputs
        inputs, flags = (*args, *kwargs.values()), []
        for patch in patches:
            point = self.points[patch.site.name]
            firing = Firing(patch, point, check_nan=self.check_nan)
            moment = Moment(inputs, point.call or 0, published.step, published.rows, self.points.method)
            activation = firing(activation, moment)
            flags += [] if firing.nan is None else [(patch, firing.nan)]
        return activation, flags

    def ends(self) -> list[Forward]:
        """Return the same forward of the first row, and of the last; nothing if that saves no time."""
        tensors = [*with_rows(self.inputs)]
        count = len(tensors[0][1]) if tensors else 0
        found = []
        for row in (0, count - 1) if count >= _FEWEST_TO_CUT and published.rows is None else ():
            cut: Any = self.inputs
            for path, tensor in tensors:
                cut = replace(cut, path, tensor[row : row + 1]) if len(tensor) == count else cut
            found.append(Forward(self.points, *cut, check_nan=self.check_nan, row=row))
        return found


@contextmanager
def _usual_attention() -> Iterator[None]:
    """Disable torch's fused attention: vmap has no rule for it, and the modules it calls depend on hooks."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
