"""The call that sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.hooks import refuse_unhookable
from ..errors import MetricError, SweepError
from ..metrics.measured import Metric, Metrics
from ..patching.patch import Patches
from ..registry.points import HookPoints
from ..registry.trace import traced
from ..results import progress_bar
from .execution import Execution, Strategy
from .forward import Forward
from .plan import Entry, clean_run, entries_of
from .prefix import Prefix
from .result import SweepInterrupted, SweepResult, Swept


def sweep(
    points_or_model: HookPoints | nn.Module,
    *inputs: Any,
    patches: Patches,
    metric: Metric | Mapping[str, Metric],
    controls: Patches | None = None,
    strategy: Strategy = "auto",
    max_bytes: int = 2**28,
    check_nan: bool = True,
    progress: bool | None = None,
    **keywords: Any,
) -> SweepResult:
    """Return what each of many patches does to a metric, on the same inputs.

    The numbers are those of a loop of forwards inside `patched`. Every forward runs under restored random number
    generators, buffers and training flags, and without gradients. A model that counts its calls in an attribute of its
    own, or changes with them, is not put back. Hooks of others run in every forward; in one of many patches they get
    tensors of a `torch.vmap`, which must not be kept: where they do that, take `strategy="resume"` or `"loop"`.

    Args:
        points_or_model: The model, which is traced with the inputs, or its HookPoints: then their method is run.
        inputs: What the model takes; every forward gets copies.
        patches: By label, one or several that are applied together; or a sequence of them, whose labels are then made
            of their sites: `[zero_ablate(site) for site in points.site("conv1").split("channel")]`.
        metric: A function of the model's output that returns one number per input, `(batch,)`, or one number; or
            several by name. One with a keyword-only parameter `baseline` gets the unpatched output too.
        controls: Patches to rank the others among, as `patches`.
        strategy: `"loop"` runs the model once per patch. `"resume"` does not run again what comes before a patch.
            `"vmap"` does so too, and runs what comes after for many patches at a time. `"auto"` takes the fastest
            one, at each hook point anew, that gives the numbers of the loop for two of its patches, and the loop where
            none does, or where dropout or batch norm is in training mode.
        max_bytes: About how much the activations of one forward of many patches may take, and again what is kept of
            the model before the patches. One patch at a time runs whatever it takes.
        check_nan: Whether NaN that a patch brings in is an error.
        progress: Whether to show a bar; None for one on a terminal, after two seconds, where tqdm is installed.
        keywords: Keyword inputs of the model.

    Raises:
        HookPointError, SiteError: If a site does not exist; all faults at once.
        SweepError: If there are no patches, two have one label, max_bytes is no number of bytes, or the strategy that
            was asked for is not possible.
        MetricError: If a metric returns something else.
        EditError: If the result of an edit does not fit its region; NaNError if it brings NaN in.
        UnreachedError: If a patch never ran.
        UnsupportedModelError: If the model ignores hooks.
        SweepInterrupted: On Ctrl-C, with the result of the patches that were done.

    Example:
        >>> from chanpatch import hook_points, zero_ablate
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> observations = torch.randn(16, 4)
        >>> points = hook_points(model, observations)
        >>> channels = points.site("1").split("feature")
        >>> result = sweep(points, observations, patches=[zero_ablate(site) for site in channels],
        ...                metric=lambda output: output[:, 0] - output[:, 1])
        >>> result.values["metric"].shape
        (8, 16)
        >>> result.groups[0].strategy
        'vmap'
    """
    if strategy not in ("auto", "vmap", "resume", "loop"):
        raise SweepError(f"strategy is {strategy!r}; it is 'auto', 'vmap', 'resume' or 'loop'.")
    if type(max_bytes) is not int or max_bytes < 1:
        raise SweepError(f"max_bytes is {max_bytes!r}; it is a whole number of bytes from 1 on, such as 2**28.")
    with torch.inference_mode(False):
        points = traced(points_or_model, inputs, keywords)
        refuse_unhookable(points.model)
        forward = Forward(points, inputs, keywords, check_nan=check_nan)
        asked = entries_of(forward, patches, "patches")
        others = [] if controls is None else entries_of(forward, controls, "controls")
        entries = [*asked, *(Entry(number, *rest) for number, (_, *rest) in enumerate(others, len(asked)))]
        taps = {patch.site.point.module for entry in entries for patch in entry.patches
                if patch.site.point is not None and patch.site.point.side == "tap"}  # fmt: skip
        prefix = Prefix(forward.model, taps, 0 if strategy == "loop" else max_bytes)
        output, groups = clean_run(forward, entries, prefix)
        metrics = Metrics(metric, output, forward.count())
        _refuse_attributes(metrics, output, forward)
        rows: dict[int, dict[str, Tensor]] = {}
        done: list[Swept] = []
        with progress_bar(progress, len(entries), "patch") as advance:

            def keep(entry: Entry, measured: dict[str, Tensor]) -> None:
                advance(entry.number not in rows)
                rows[entry.number] = measured

            execution = Execution(forward, prefix, output, strategy, max_bytes, metrics, keep)
            try:
                for group in groups:
                    done.append(execution.run(group))
            except KeyboardInterrupt as stop:
                partial = _result(asked, others, rows, metrics, done, complete=False)
                raise SweepInterrupted(partial, len(asked)) from stop
    return _result(asked, others, rows, metrics, done, complete=True)


def _refuse_attributes(metrics: Metrics, output: Any, forward: Forward) -> None:
    """Raise if a metric reads an attribute that each forward sets: it is restored before the metric is called."""
    if not forward.rebound:
        return
    with forward.undisturbed:  # restores the attributes
        for attributes, name in forward.rebound:
            attributes[name] = None
        try:
            again = metrics(output)
        except Exception:  # any error here means that a metric read an attribute
            again = {}
    for name, before in metrics.baseline.items():
        if name not in again or not torch.allclose(again[name], before, equal_nan=True):
            names = ", ".join(f"'{attribute}'" for _, attribute in forward.rebound)
            raise MetricError(
                f"A metric reads more than the output: one of {names}, which each forward sets on its module and "
                "sweep() restores before it calls the metric. Let the model return the tensor that the metric needs."
            )


def _result(
    asked: Sequence[Entry],
    others: Sequence[Entry],
    rows: Mapping[int, Mapping[str, Tensor]],
    metrics: Metrics,
    groups: Sequence[Swept],
    *,
    complete: bool,
) -> SweepResult:
    """Return the rows that are there as a result; controls are numbered after the others."""

    def part(entries: Sequence[Entry], offset: int, controls: SweepResult | None) -> SweepResult:
        there = [entry for entry in entries if entry.number + offset in rows]
        values = {
            name: np.array([rows[entry.number + offset][name].numpy() for entry in there]).reshape(-1, len(before))
            for name, before in metrics.baseline.items()
        }
        baseline = {name: before.numpy() for name, before in metrics.baseline.items()}
        labels, patches = tuple(entry.label for entry in there), tuple(entry.patches for entry in there)
        return SweepResult(labels, patches, values, baseline, controls, tuple(groups), complete)

    return part(asked, 0, part(others, len(asked), None) if others else None)
