"""Public entry point: the effect of each of many patches on a metric.

The path of a sweep, file by file:

- `sweep`: `sweep()` checks its arguments and collects the numbers into a `SweepResult` (`result`).
- `plan`: `entries_of` makes one `Entry` per label. A `Forward` runs the model on copies of the same inputs, and
  restores the model (`engine.state`). `clean_run` runs it once, unpatched. Entries whose patches begin at one hook
  point form a `Group`.
- `prefix`: a `Prefix` remembers the module calls of the clean run. Later forwards skip those before a group.
- `strategies`: an `Execution` runs each group. It tries the fast strategies, compares two patches of the group with the
  plain loop, and falls back to the loop. `loop` runs the model inside `patched`. `resumed` is a loop that skips the
  prefix. `vmapped` applies each entry's patches to the clean activation, then runs the suffix under `torch.vmap` for a
  chunk of entries.
- `metrics.measured`: `Metrics` measures each output.

`attribution` estimates the same effects by gradients, and `path_patching` splits one by path; both run a `Forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..engine.paths import get
from ..errors import MetricError, SweepError
from ..labels import Patches
from ..metrics.measured import Metric, Metrics
from ..registry.points import HookPoints, traced
from ..results import progress_bar
from .plan import Entry, Forward, clean_run, entries_of
from .result import SweepInterrupted, SweepResult
from .strategies import Execution, Strategy


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
    """Return the effect of each of many patches on a metric, on the same inputs.

    The numbers are those of a loop of forwards inside `patched`. Each forward runs without gradients, and restores
    random number generators, buffers, attributes and training flags. Your own hooks run in every forward. In a forward
    of many patches they get tensors of a `torch.vmap`. If they keep those, use `strategy="resume"` or `"loop"`.

    Args:
        points_or_model: The model, which is traced with the inputs, or its HookPoints.
        inputs: Inputs of the model; each forward gets copies.
        patches: A mapping of labels to patches, each one patch or several that are applied together; or a sequence of
            them, labeled by their sites.
        metric: A function of the model's output that returns one number per input, `(batch,)`, or one number; or
            several by name. A keyword-only parameter `baseline` gets the unpatched output.
        controls: Patches to rank the others among, in the same form, such as `matched_channels(...).patches(verb)`.
        strategy: `"loop"` runs the model once per patch. `"resume"` skips the modules before a patch. `"vmap"` also
            runs the modules after it for many patches at a time. `"auto"` takes, at each hook point, the fastest one
            that gives the numbers of the loop for two of its patches; it loops if dropout or batch norm is training.
        max_bytes: Approximate memory for the activations of one forward of many patches, and again for the remembered
            outputs of modules before the patches. One patch at a time always runs.
        check_nan: Whether NaN that a patch introduces is an error.
        progress: Whether to show a progress bar; by default on a terminal, after two seconds, if tqdm is installed.
        keywords: Keyword inputs of the model.

    Raises:
        HookPointError, SiteError: If a site does not exist; all faults at once.
        SweepError: If there are no patches, two have one label, or `max_bytes` or the strategy is not possible.
        MetricError: If a metric returns something else.
        EditError, NaNError, UnreachedError, UnsupportedModelError: As for `patched`.
        SweepInterrupted: On Ctrl-C, with the result of the finished patches.

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
        raise SweepError(f"max_bytes is {max_bytes!r}; it is a positive number of bytes, such as 2**28.")
    with torch.inference_mode(False):
        points = traced(points_or_model, inputs, keywords)
        forward = Forward(points, inputs, keywords, check_nan=check_nan)
        asked = entries_of(points, patches, "patches")
        others = [] if controls is None else entries_of(points, controls, "controls", len(asked))
        no_p = getattr(controls, "no_p", "")
        output, groups = clean_run(forward, [*asked, *others], 0 if strategy == "loop" else max_bytes)
        metrics = Metrics(metric, output, _count(points, output))
        _refuse_attributes(metrics, output, forward)
        with progress_bar(progress, len(asked) + len(others), "patch") as advance:
            execution = Execution(forward, output, strategy, max_bytes, metrics, advance)
            try:
                for group in groups:
                    execution.run(group)
            except KeyboardInterrupt as stop:
                partial = replace(_result(asked, others, execution, metrics), complete=False, no_p=no_p)
                raise SweepInterrupted(partial, len(asked)) from stop
    return replace(_result(asked, others, execution, metrics), no_p=no_p)


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
    before = metrics.baseline
    if not again or not all(torch.allclose(again[name], before[name], equal_nan=True) for name in before):
        names = ", ".join(f"'{attribute}'" for _, attribute in forward.rebound)
        raise MetricError(
            f"A metric reads more than the output: one of {names}, which each forward sets on its module and "
            "sweep() restores before it calls the metric. Let the model return the tensor that the metric needs."
        )


def _count(points: HookPoints, output: Any) -> int | None:
    """Return the number of rows in an output; None if its batch axis is not known."""
    for point in points.values():
        if not point.module and point.side == "out" and point.batch_axis is not None:
            with suppress(LookupError, AttributeError, TypeError):  # another output than in the trace
                return int(get(output, point.path).shape[point.batch_axis])
    return None


def _result(asked: Sequence[Entry], others: Sequence[Entry], execution: Execution, metrics: Metrics) -> SweepResult:
    rows, baseline = execution.rows, {name: before.numpy() for name, before in metrics.baseline.items()}

    def part(entries: Sequence[Entry], controls: SweepResult | None) -> SweepResult:
        done = [entry for entry in entries if entry.number in rows]
        values = {
            name: np.array([rows[entry.number][name].numpy() for entry in done]).reshape(-1, len(before))
            for name, before in baseline.items()
        }
        labels, patches = tuple(entry.label for entry in done), tuple(entry.patches for entry in done)
        return SweepResult(labels, patches, values, baseline, controls, tuple(execution.done))

    return part(asked, part(others, None) if others else None)
