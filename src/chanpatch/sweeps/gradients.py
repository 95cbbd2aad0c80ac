"""The runs behind an attribution, all on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.regions import Positions, written
from ..engine.state import undisturbed
from ..errors import MetricError, SiteError
from ..metrics.measured import Metric, measured
from ..patching.contexts import patched
from ..patching.patch import Patch
from ..patching.recording import recording
from ..patching.verbs import edit, patch_in
from ..registry.points import HookPoints
from .flatness import log_odds, warn_of_shared_memory


class Runs:
    """The runs of the model on the same inputs, of which nothing is left.

    Attributes:
        baseline: The unpatched output.
        inputs: Number of inputs.
    """

    def __init__(self, points: HookPoints, inputs: tuple[Any, ...], keywords: dict[str, Any], metric: Metric) -> None:
        self._points, self._given, self._metric = points, (inputs, keywords), metric
        self.baseline: Any = None
        self._clean = torch.empty(0)

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return len(self._clean)

    @property
    def rounding(self) -> float:
        """How much of a change in the metric may be rounding."""
        return 1e-6 * float(self._clean.abs().max())

    def differences(self, patches: Sequence[Patch]) -> list[Tensor]:
        """Return what each patch does to its region in the clean run: each is applied, and taken back."""
        changes = [_Change() for _ in patches]
        applied = [
            each
            for patch, change in zip(patches, changes, strict=True)
            for each in (edit(patch.site, change.note), patch, edit(patch.site, change.undo))
        ]
        with undisturbed(self._points.model) as run:
            self.baseline = run.kept(self._output())
            self._clean = self._measured(self.baseline)
        with undisturbed(self._points.model), patched(self._points, applied):
            self._compare(self._output(), {patch.site.name for patch in patches})
        return [change.difference for change in changes]

    def gradients(self, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return the clean activations, the gradients of the metric there, and those of the log odds of the action.

        The log odds of the most probable action never saturate, so that they tell how steep a metric could be. They are
        left out where the output is no distribution over actions.
        """
        names = tuple(names)
        watched = [edit(self._points.site(name), _differentiable) for name in names]
        with (
            undisturbed(self._points.model),
            torch.enable_grad(),
            patched(self._points, watched),
            recording(self._points, names, detach=False) as cache,
        ):
            output = self._output()
            clean = {name: cache[name] for name in names}
            cut = [name for name, activation in clean.items() if not activation.requires_grad]
            if cut:
                raise SiteError(
                    f"'{cut[0]}' is computed under torch.no_grad(), through which no gradient flows. sweep() its "
                    "patches, or patch what comes after it."
                )
            self._compare(output, names)
            odds = log_odds(output)
            slopes = {} if odds is None else _gradients(odds, clean)
            gradients = _gradients(self._measured(output), clean)
        return {name: activation.detach() for name, activation in clean.items()}, gradients, slopes

    def mean_gradient(
        self,
        name: str,
        clean: Tensor,
        changes: Iterable[tuple[Positions, Tensor]],
        steps: int,
        advance: Callable[[int], object],
    ) -> Tensor:
        """Return the mean of the metric's gradient along the line from the clean activation to the changed one."""
        moved = torch.zeros_like(clean)
        for positions, difference in changes:
            moved = written(moved, positions, difference)
        total = torch.zeros_like(clean)
        for step in range(steps):
            there = (clean + moved * ((step + 0.5) / steps)).requires_grad_()
            with (
                undisturbed(self._points.model),
                torch.enable_grad(),
                patched(self._points, patch_in(self._points.site(name), there)),
            ):
                total += _gradients(self._measured(self._output()), {name: there})[name]
            advance(1)
        return total / steps

    def exact(self, patch: Patch) -> float:
        """Return what the patch changes in the metric, by a real forward."""
        with undisturbed(self._points.model), patched(self._points, patch):
            return float((self._measured(self._output()) - self._clean).double().mean())

    def _compare(self, output: Any, names: Iterable[str]) -> None:
        """Warn if the model computes something else where regions were replaced by their equals."""
        found = self._measured(output).detach()
        precision = 1e-2 if found.dtype in (torch.float16, torch.bfloat16) else 1e-4
        if not torch.allclose(found, self._clean, precision, precision * float(self._clean.abs().max()), True):
            warn_of_shared_memory(names)

    def _output(self) -> Any:
        return self._points.run(*self._given)

    def _measured(self, output: Any) -> Tensor:
        return measured(self._metric, output, self.baseline)


class _Change:
    """What one patch did to its region."""

    def __init__(self) -> None:
        self._before = self.difference = torch.empty(0)

    def note(self, region: Tensor) -> Tensor:
        self._before = region.clone()
        return region

    def undo(self, region: Tensor) -> Tensor:
        before, self._before = self._before, torch.empty(0)  # one region per patch is enough to keep
        self.difference = region - before
        return before


def _differentiable(activation: Tensor) -> Tensor:
    """Return the activation as a node that nothing inside the module was computed from."""
    return activation.clone() if activation.requires_grad else activation.detach().requires_grad_()


def _gradients(values: Tensor, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of the sum at each activation; zero where nothing depends on it."""
    if not values.requires_grad:
        raise MetricError(
            "The metric has no gradient: it counts (action_flip), or leaves the graph (.detach(), .item(), numpy). "
            "Take one that has a gradient, or sweep() the patches."
        )
    found = torch.autograd.grad(values.sum(), [*activations.values()], retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(activation) if gradient is None else gradient
        for (name, activation), gradient in zip(activations.items(), found, strict=True)
    }
