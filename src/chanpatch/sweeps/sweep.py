"""Public entry point: measure the effects of many patches. docs/architecture.md follows a sweep, file by file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.paths import get
from ..engine.workers import cut, spread
from ..errors import ExecutorError, MetricError, SweepError
from ..labels import Patches, no_p_among
from ..metrics.measured import Metric, Metrics
from ..registry.points import HookPoints, traced
from ..results import progress_bar
from .plan import Entry, Forward, clean_run, entries_of
from .result import SweepInterrupted, SweepResult, Swept
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
    executor: Executor | None = None,
    progress: bool | None = None,
    **keywords: Any,
) -> SweepResult:
    """Measure the effect of each of many patches on a metric, on the same inputs.

    The numbers equal those from a loop that runs the model inside `patched` for each patch. Each forward pass runs
    without gradients. Afterwards, random number generators, buffers, attributes and training flags are restored. Your
    own hooks run in every forward pass. If your hooks store tensors, use `strategy="resume"` or `"loop"`, because with
    the other strategies, a hook may receive the tensors for many patches in one call.

    Args:
        points_or_model: The model, which is traced with the inputs, or its HookPoints.
        inputs: Positional inputs to the model. Each forward pass receives copies of the inputs.
        patches: A mapping from labels to patches, or a sequence of patches, which are labeled by their sites. Each
            label has one patch, or several patches that are applied together.
        metric: A function of the model's output, or a dict of such functions. Each function returns one number per
            input, with shape `(batch,)`, or a single number. If a function has a keyword-only parameter `baseline`,
            the unpatched output is passed to that parameter.
        controls: Control patches in the same form as `patches`, used to rank the effects, such as
            `matched_channels(...).patches(zero_ablate)`.
        strategy: `"loop"` runs the model once per patch. `"resume"` skips the modules before a patch. `"vmap"` also
            runs the modules after a hook point for many patches at a time. `"fold"` runs patches at one or several hook
            points as extra rows in the batch. `"auto"` compares at least two of the patches with the
            loop, and uses the fastest strategy that gives the same numbers. Therefore, edits and `where` functions may
            run several times per patch. If dropout or batch norm is in training mode, `"auto"` uses the loop.
        max_bytes: Approximate memory limit for the activations in one batched forward pass and, separately, for stored
            outputs of modules before the patches. A single patch always runs, even above the limit.
        check_nan: Whether to raise NaNError if a patch introduces NaN.
        executor: Executor whose workers share the patches, such as a `ProcessPoolExecutor` that spawns its workers or
            dask's `client.get_executor()`. Each worker has its own copy of objects that your functions modify.
        progress: Whether to show a progress bar. None shows a bar on a terminal or in a notebook if tqdm is installed.
        keywords: Keyword inputs to the model.

    Raises:
        HookPointError, SiteError: If sites do not exist. One error lists all missing sites.
        SweepError: If there are no patches, if two patches share a label, if `max_bytes` is invalid, or if the strategy
            fails.
        MetricError: If a metric returns neither one number per input nor a single number.
        EditError, NaNError, UnreachedError, UnsupportedModelError: Same as in `patched`.
        ExecutorError: If a function cannot be sent to workers, or if workers are lost. In the second case, `partial`
            contains the result for the finished patches, and the same call with a new executor runs only the rest.
        SweepInterrupted: On Ctrl-C; the exception contains the result for the finished patches.

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
        'fold'
    """
    if strategy not in ("auto", "fold", "vmap", "resume", "loop"):
        raise SweepError(f"strategy must be 'auto', 'fold', 'vmap', 'resume' or 'loop'; got {strategy!r}.")
    if type(max_bytes) is not int or max_bytes < 1:
        raise SweepError(f"max_bytes must be a positive integer, such as 2**28; got {max_bytes!r}.")
    with torch.inference_mode(False):
        points = traced(points_or_model, inputs, keywords)
        asked = entries_of(points, patches, "patches")
        others = [] if controls is None else entries_of(points, controls, "controls", len(asked))
        call, found = _Call(points, inputs, keywords, metric, strategy, max_bytes, check_nan), _Found()
        with progress_bar(progress, len(asked) + len(others), "patch") as advance:
            try:
                if executor is None:
                    _run(call, [*asked, *others], found, advance)
                else:
                    _spread(executor, call, [*asked, *others], found, advance)
            except (KeyboardInterrupt, ExecutorError) as stop:
                if not found.baseline:
                    raise
                partial = replace(_result(asked, others, found), complete=False)
                if isinstance(stop, KeyboardInterrupt):
                    raise SweepInterrupted(partial, len(asked)) from stop
                stop.partial = partial
                raise
    return _result(asked, others, found)


class _Call(NamedTuple):
    """The arguments of a sweep that are the same for all patches."""

    points: HookPoints
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]
    metric: Metric | Mapping[str, Metric]
    strategy: Strategy
    max_bytes: int
    check_nan: bool


@dataclass
class _Found:
    """Results so far: metrics on the unpatched output, metrics by entry number, and strategies by group position."""

    baseline: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    done: dict[Any, Swept] = field(default_factory=dict)


def _run(call: _Call, entries: Sequence[Entry], found: _Found, advance: Callable[[int], object]) -> None:
    """Run entries, and add their metrics and the strategies to `found`."""
    points, inputs, keywords, metric, strategy, max_bytes, check_nan = call
    forward = Forward(points, inputs, keywords, check_nan=check_nan)
    store = strategy != "loop" and (strategy != "auto" or forward.is_heavy(len(entries)))
    output, groups, seen = clean_run(forward, entries, 0 if strategy == "loop" else max_bytes, store=store)
    metrics = Metrics(metric, output, _count(points, output))
    _refuse_attributes(metrics, output, forward)
    found.baseline = metrics.baseline
    execution = Execution(forward, output, strategy, max_bytes, metrics, advance, found.rows, found.done)
    execution.run(groups, seen)


def _spread(
    executor: Executor, call: _Call, entries: Sequence[Entry], found: _Found, advance: Callable[[int], object]
) -> None:
    """Run entries in workers. Each part contains patches at neighboring hook points, and is run as a separate sweep."""
    order = {name: number for number, name in enumerate(call.points)}
    first = {entry.number: min(order[patch.site.name] for patch in entry.patches) for entry in entries}
    parts = cut(sorted(entries, key=lambda entry: first[entry.number]), executor)

    def add(number: int, part: _Found) -> None:
        found.baseline = part.baseline
        found.rows |= part.rows
        found.done |= {(number, position): swept for position, swept in part.done.items()}
        advance(len(part.rows))

    labels = [[entry.label for entry in part] for part in parts]
    spread(executor, _part, call, parts, labels, add, model=call.points.model)


def _part(call: _Call, entries: Sequence[Entry]) -> _Found:
    with torch.inference_mode(False):
        _run(call, entries, found := _Found(), lambda count: None)
    return found


def _refuse_attributes(metrics: Metrics, output: Any, forward: Forward) -> None:
    """Raise MetricError if a metric reads an attribute that each forward pass sets and that `sweep` then restores."""
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
            f"A metric appears to read attributes of the model ({names}), not only the model's output. Each forward "
            "pass sets these attributes, but sweep() restores them before it calls the metric. Make the model return "
            "the tensor that the metric needs."
        )


def _count(points: HookPoints, output: Any) -> int | None:
    """Return the number of rows in an output, or None if the output's batch axis is unknown."""
    for point in points.values():
        if not point.module and point.side == "out" and point.batch_axis is not None:
            with suppress(LookupError, AttributeError, TypeError):  # the output differs from the traced output
                return int(get(output, point.path).shape[point.batch_axis])
    return None


def _result(entries: Sequence[Entry], others: Sequence[Entry], found: _Found) -> SweepResult:
    """Return the result for the entries that have finished, with `others` as the control entries."""
    done = [entry for entry in entries if entry.number in found.rows]
    baseline = {name: before.numpy() for name, before in found.baseline.items()}
    groups: dict[tuple[str, str], Swept] = {}
    for position in sorted(found.done):
        each = found.done[position]
        before = groups.setdefault((each.point, each.strategy), replace(each, patches=0))
        groups[each.point, each.strategy] = replace(before, patches=before.patches + each.patches)
    return SweepResult(
        labels=tuple(entry.label for entry in done),
        patches=tuple(entry.patches for entry in done),
        values={
            name: np.array([found.rows[entry.number][name].numpy() for entry in done]).reshape(-1, len(before))
            for name, before in baseline.items()
        },
        baseline=baseline,
        controls=_result(others, [], found) if others else None,
        groups=tuple(groups.values()),
        no_p=no_p_among(entry.patches for entry in others),
    )
