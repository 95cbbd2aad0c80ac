"""Path patching: the effect of one component on the output along the direct path to chosen receivers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import pair_count
from ..engine.inputs import Inputs, batches
from ..errors import SiteError
from ..metrics.measured import Metric, measured
from ..patching.cache import ActivationCache
from ..patching.contexts import patched
from ..patching.recording import recording
from ..patching.verbs import patch_in
from ..registry.points import HookPoints, site_of, sites_of, traced
from ..registry.sites import HookPoint, Site
from .plan import Forward


def path_patch(
    points_or_model: HookPoints | nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    sender: str | Site | HookPoint,
    receivers: str | Site | HookPoint | Iterable[str | Site | HookPoint],
    *,
    metric: Metric,
    frozen: str | Site | HookPoint | Iterable[str | Site | HookPoint] | None = None,
) -> Tensor:
    """Measure the effect of a sender on a metric along the direct path to the receivers.

    First, the model runs on the clean inputs with the sender's activation patched in from the corrupted run, while
    frozen modules between the sender and the receivers keep their clean activations. The resulting activations at the
    receivers are then patched into a second run on the clean inputs. In that run, nothing is frozen, so the receivers
    affect the output along every path.

    Args:
        points_or_model: The model, which is traced with the clean inputs, or its HookPoints.
        clean: Clean inputs: a tensor `(batch, ...)`, a tuple of positional arguments, or a dict of keyword arguments.
        corrupted: Corrupted inputs in the same form, one for each clean input.
        sender: Hook point at which the path begins.
        receivers: Hook points at which the path ends, such as module inputs. A path may pass through several receivers.
        metric: A function of the model's output, as for `sweep`.
        frozen: Hook points to freeze if they lie between the sender and the last receiver. By default, these are the
            outputs of modules that have weights and contain no other module with weights (such as Linear, Conv2d,
            Embedding, LSTM and MultiheadAttention), except norms. With `()`, nothing is frozen, so every path from the
            sender to the receivers counts. The sender, modules that contain the sender, and receiver modules are never
            frozen.

    Returns:
        A tensor with shape `(batch,)`: the metric in the run with the path patched minus the metric in the clean run.

    Raises:
        HookPointError, SiteError: If a site does not exist, if a receiver does not come after the sender, or if the
            sites frozen by default block every path from the sender to the receivers.
        ContrastError: If `clean` and `corrupted` have different numbers of inputs.
        MetricError: If the metric does not return `(batch,)`.

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
    pair_count(clean, corrupted)
    if not isinstance(receivers, (str, Site, HookPoint)) and not (receivers := [*receivers]):
        raise SiteError("There are no receivers. Pass at least one receiver, such as 'head.in[0]'.")
    sending, receiving = site_of(points, sender), sites_of(points, receivers)
    held = _between(points, sending, receiving, frozen)
    clean_run, corrupted_run = (Forward(points, *batch) for batch in batches([clean, corrupted], 1))
    source = corrupted_run.until(sending)
    whole = [points.site(site.name) for site in receiving]  # the activation may change outside a region
    ends = [*receiving, *whole]
    with recording(points, [sending, *held, *ends]) as cache:
        baseline = clean_run()

    def arriving(held: Sequence[Site]) -> ActivationCache:
        patches = [patch_in(sending, source), *(patch_in(site, cache) for site in held)]
        with patched(points, patches), recording(points, ends) as found:
            clean_run()
        return found

    def moves(found: ActivationCache) -> bool:
        return any(not torch.equal(found[site], cache[site]) for site in whole)

    # Patching in clean activations is not a no-op if a module modifies them in place, so the baseline is patched too.
    before = _measured(clean_run, receiving, cache, metric, baseline)
    received = arriving(held)
    unmoved = not moves(received) and not torch.equal(source[sending], cache[sending])
    if frozen is None and unmoved and moves(arriving([])):
        names = ", ".join(f"'{site.name}'" for site in held[:6]) + ", ..." * (len(held) > 6)
        raise SiteError(
            f"All paths from {sending!r} to the receivers pass through frozen sites: {names}. Choose the sites to "
            "freeze with frozen=[...], or freeze nothing with frozen=()."
        )
    return _measured(clean_run, receiving, received, metric, baseline) - before


def _measured(forward: Forward, sites: Sequence[Site], cache: ActivationCache, metric: Metric, baseline: Any) -> Tensor:
    """Run the model with the cached activations patched in at the sites, and return the metric."""
    with forward.running() as run:
        with patched(forward.points, [patch_in(site, cache) for site in sites]):
            output = run.kept(forward.output())
        return measured(metric, output, baseline)


def _between(points: HookPoints, sender: Site, receivers: Sequence[Site], frozen: Any) -> list[Site]:
    """Check the receivers, and return the sites to freeze. These lie between the sender and the last receiver."""
    order = {name: number for number, name in enumerate(points)}
    before = [site for site in receivers if order[site.name] <= order[sender.name]]
    if before:
        raise SiteError(
            f"The receiver {before[0]!r} does not come after the sender {sender!r} in the forward pass, so no path "
            "connects them. Print the HookPoints to see their execution order."
        )
    whole = [site for site in receivers if not points[site.name].module]
    if whole and frozen is None:
        raise SiteError(
            f"The receiver {whole[0]!r} is the model's final output, where every path ends. Use the module that "
            "computes this output, or the module's input (such as 'head.in[0]'). Alternatively, choose the hook points "
            "to freeze with frozen=[...]."
        )
    start, ends = points[sender.name], [points[site.name] for site in receivers]
    first, last = order[start.name], max(order[end.name] for end in ends)
    # Calls that contain the sender began before the sender ran. For an input, this includes its own module's call.
    exempt = {(each.module, each.call) for each in points.values() if each.side == "in" and order[each.name] <= first}
    exempt -= {(start.module, start.call)} if start.side == "out" else set()
    exempt |= {(end.module, end.call) for end in ends}
    inside = tuple(f"{end.module}." for end in ends if end.side == "out")

    def may_freeze(point: HookPoint) -> bool:
        is_exempt = (point.module, point.call) in exempt or point.module.startswith(inside)
        return first < order[point.name] < last and not is_exempt

    named = _with_weights(points) if frozen is None else frozen
    listed = [named] if isinstance(named, (str, Site, HookPoint)) else list(named)
    return [site for site in (sites_of(points, listed) if listed else ()) if may_freeze(points[site.name])]


def _with_weights(points: HookPoints) -> list[HookPoint]:
    """Return the outputs of modules that have weights, except norms and modules that contain modules with weights."""
    # A parametrization computes weights, not activations.
    weighted = [p for p in points.values() if p.parameters and "parametrizations" not in p.module.split(".")]
    modules = {point.module for point in weighted}
    outputs = [p for p in weighted if p.side == "out" and "norm" not in p.module_type.lower()]
    return [
        point
        for point in outputs
        if not any(other.startswith(f"{point.module}." if point.module else "") for other in modules - {point.module})
    ]
