"""Gradient estimates against products written by hand, finite differences and real forwards."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import tqdm.auto
from models import Model
from scipy.stats import rankdata
from torch import Tensor, nn

from chanpatch import (
    HookPoints,
    Patch,
    Site,
    edit,
    hook_points,
    mean_ablate,
    patch_in,
    patched,
    recording,
    resample_ablate,
    steer,
    sweep,
    zero_ablate,
)
from chanpatch.errors import (
    HookPointError,
    MetricError,
    NaNError,
    SiteError,
    StatisticsError,
    SweepError,
    UnsupportedModelError,
)  # fmt: skip
from chanpatch.metrics import Metric, action_flip, action_probability, kl_divergence, logit_difference, value
from chanpatch.metrics.measured import measured
from chanpatch.sweeps import Attribution, attribution

GENERATOR = torch.Generator().manual_seed(0)
MLP = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
for parameter in MLP.parameters():
    parameter.data = torch.randn(parameter.shape, generator=GENERATOR, dtype=torch.float64)
INPUTS, OTHERS = torch.randn(2, 8, 4, generator=GENERATOR, dtype=torch.float64)
POINTS = hook_points(MLP, INPUTS)
METRIC = logit_difference(0, 1)


def split(*names: str) -> list[Site]:
    return [site for name in names for site in POINTS.site(name).split("feature")]


def exact(points: HookPoints, inputs: tuple[Any, ...], patches: Patch | list[Patch], metric: Metric) -> float:
    with torch.no_grad():
        clean = points.model(*inputs)
        with patched(points, patches):
            output = points.model(*inputs)
        return float((measured(metric, output, clean) - measured(metric, clean, clean)).mean())


def effects(result: Attribution) -> dict[Any, float]:
    return dict(zip(result.labels, result.effect().tolist(), strict=True))


def gradient_at_1() -> Tensor:
    """The gradient of the mean logit difference at hook point '1', (batch, feature)."""
    hidden = MLP[:2](INPUTS).detach().requires_grad_()
    logits = MLP[2:](hidden)
    return torch.autograd.grad((logits[:, 0] - logits[:, 1]).mean(), hidden)[0]


def test_an_estimate_is_the_change_times_the_gradient_summed_over_the_region() -> None:
    result = attribution(POINTS, INPUTS, patches=map(zero_ablate, split("1")), metric=METRIC, verify=0)
    expected = (-MLP[:2](INPUTS) * gradient_at_1()).sum(0).tolist()
    assert effects(result) == pytest.approx({f"1, feature={n}": expected[n] for n in range(6)})


REFERENCE = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)
WHOLE, PAIR = POINTS.site("1"), POINTS.site("1", feature=[4, 2])
PATCHES: dict[str, Patch] = {
    "mean_ablate": mean_ablate(PAIR, REFERENCE[:, :2]),
    "resample_ablate": resample_ablate(WHOLE, REFERENCE, seed=1),
    "patch_in": patch_in(WHOLE, MLP[:2](OTHERS).detach()),
    "steer": steer(PAIR, torch.tensor([[1.0, -2.0]], dtype=torch.float64), 3.0),
    "own function": edit(WHOLE, lambda activation: activation.square() + activation.mean()),
    "with context": edit(PAIR, lambda activation, *, context: activation * context.rows.view(-1, 1)),
    "some rows": zero_ablate(WHOLE, where=lambda context: (context.rows % 3 == 0).view(-1, 1)),
    "some elements": zero_ablate(PAIR, where=torch.tensor([[True, False]])),
    "nothing": edit(WHOLE, lambda activation: activation),
}


@pytest.mark.parametrize("name", PATCHES)
def test_the_change_is_that_of_the_edit_whichever_it_is(name: str) -> None:
    patch = PATCHES[name]
    with torch.no_grad(), patched(POINTS, patch), recording(POINTS, "1") as cache:
        MLP(INPUTS)
    expected = ((cache["1"] - MLP[:2](INPUTS)) * gradient_at_1()).sum().item()
    result = attribution(POINTS, INPUTS, patches={name: patch}, metric=METRIC, verify=0)
    assert effects(result) == {name: pytest.approx(expected, abs=1e-12)}


def test_patches_at_one_place_do_not_disturb_each_other() -> None:
    alone = {name: effects(attribution(POINTS, INPUTS, patches={name: patch}, metric=METRIC, verify=0))[name]
             for name, patch in PATCHES.items()}  # fmt: skip
    together = attribution(POINTS, INPUTS, patches=PATCHES, metric=METRIC, verify=0)
    assert effects(together) == pytest.approx(alone, abs=1e-12)


def test_estimates_are_exact_where_the_metric_is_linear_in_the_activation() -> None:
    result = attribution(POINTS, INPUTS, patches=map(zero_ablate, split("3", "4")), metric=METRIC)
    assert len(result) == result.sample == 8
    np.testing.assert_allclose(result.effect(), result.exact, atol=1e-12)
    assert result.rank_correlation == pytest.approx(1.0)


def test_on_every_model_the_estimate_equals_the_finite_difference_of_a_small_step(model: Model) -> None:
    module = model.module.double()
    torch.manual_seed(1)
    inputs = tuple(tensor.double() for tensor in model.inputs(3))
    points = hook_points(module, *inputs)
    point = points[model.site]
    channels = points.site(model.site).split("channel" if "channel" in point.axes else "feature")[:3]
    ones = torch.ones([1] * len(point.axes), dtype=torch.float64)
    result = attribution(points, *inputs, patches=[steer(site, ones, 1e-6) for site in channels], metric=METRIC)
    assert np.abs(result.effect()).max() > 0
    np.testing.assert_allclose(result.effect(), result.exact, rtol=1e-3, atol=1e-11)
    assert result.exact[0] == pytest.approx(exact(points, inputs, result.patches[0], METRIC), abs=1e-15)


def test_with_many_steps_a_patch_that_is_alone_has_its_exact_effect() -> None:
    for patch in (zero_ablate(POINTS.site("1", feature=2)), PATCHES["patch_in"], PATCHES["own function"]):
        goal = exact(POINTS, (INPUTS,), patch, METRIC)
        errors = [
            abs(float(attribution(POINTS, INPUTS, patches=[patch], metric=METRIC, steps=steps).effect()[0]) - goal)
            for steps in (1, 8, 64)
        ]
        assert errors[0] > 0.01 > errors[1] > 20 * errors[2]


def test_with_many_steps_the_estimates_of_a_hook_point_add_up_to_the_effect_of_all_patches_together() -> None:
    patches = [zero_ablate(site) for site in split("1")]
    result = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, steps=50, verify=0)
    assert result.effect().sum() == pytest.approx(exact(POINTS, (INPUTS,), patches, METRIC), abs=1e-4)


def test_patches_that_overlap_go_along_lines_of_their_own() -> None:
    patches = {"zero": zero_ablate(WHOLE), "other": PATCHES["patch_in"], "elsewhere": zero_ablate(POINTS.site("3"))}
    result = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, steps=50)
    np.testing.assert_allclose(result.effect(), result.exact, atol=1e-3)


def test_gradients_switched_off_and_frozen_parameters_change_nothing() -> None:
    patches = [zero_ablate(site) for site in split("1", "3")]
    expected = effects(attribution(POINTS, INPUTS, patches=patches, metric=METRIC))
    try:
        MLP.requires_grad_(False)
        with torch.no_grad():
            frozen = effects(attribution(POINTS, INPUTS, patches=patches, metric=METRIC))
    finally:
        MLP.requires_grad_(True)
    with torch.inference_mode():
        inferred = effects(attribution(POINTS, INPUTS * 1, patches=patches, metric=METRIC))
    assert frozen == expected
    assert inferred == expected


class Noisy(nn.Module):
    """Draws numbers, counts its batches, writes into its input and ends in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        vector.mul_(2)
        return self.head(self.drop(self.relu(self.norm(self.fc(vector)))))


def test_nothing_is_left_of_an_attribution() -> None:
    torch.manual_seed(0)
    module, inputs = Noisy(), torch.randn(8, 4)
    points, given = hook_points(module, inputs), inputs.clone()
    module.fc.weight.grad = torch.ones(6, 4)
    state, before = torch.get_rng_state(), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    attribution(points, inputs, patches=map(zero_ablate, points.site("norm").split("feature")), metric=METRIC, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(inputs, given)
    assert torch.equal(module.fc.weight.grad, torch.ones(6, 4))
    assert module.head.weight.grad is None
    assert module.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_in_train_mode_estimates_and_exact_effects_share_their_random_draws() -> None:
    torch.manual_seed(0)
    module, inputs = Noisy(), torch.randn(8, 4)
    points = hook_points(module, inputs)
    result = attribution(
        points, inputs, patches=map(zero_ablate, points.site("drop").split("feature")), metric=logit_difference(0, 1)
    )
    np.testing.assert_allclose(result.effect(), result.exact, atol=1e-5)


def test_the_receipt_holds_the_largest_and_a_random_sample() -> None:
    patches = [zero_ablate(site) for site in split("0", "1", "2", "3", "4")]
    result = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, verify=5, seed=3)
    assert result.drawn.sum() == result.sample == 5
    run = ~np.isnan(result.exact)
    largest = np.argsort(-np.abs(result.effect()), kind="stable")[:5]
    assert run[largest].all()
    assert (np.delete(run, largest) == np.delete(result.drawn, largest)).all()
    for row in np.flatnonzero(run):
        assert result.exact[row] == pytest.approx(exact(POINTS, (INPUTS,), result.patches[row], METRIC))
    again = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, verify=5, seed=3)
    other = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, verify=5, seed=4)
    assert (again.drawn == result.drawn).all()
    assert (other.drawn != result.drawn).any()


def test_the_rank_correlation_is_that_of_the_ranks_in_the_random_sample() -> None:
    patches = [zero_ablate(site) for site in split("0", "1", "2", "3", "4")]
    result = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, verify=12)
    ranks = [rankdata(each[result.drawn]) for each in (result.effect(), result.exact)]
    assert result.rank_correlation == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert 0 < result.rank_correlation < 1
    few = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, verify=2)
    assert np.isnan(few.rank_correlation)


def test_rows_are_in_the_order_given_and_turn_into_records() -> None:
    import pandas

    patches = [*map(zero_ablate, split("0", "1", "2"))]
    result = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, verify=2)
    assert [patch.site for patch in result.patches] == [patch.site for patch in patches]
    largest = np.argsort(-np.abs(result.effect()), kind="stable")[:3]
    top = result.top(3)
    assert (top.labels, top.patches) == tuple(
        tuple(each[row] for row in largest) for each in (result.labels, result.patches)
    )
    np.testing.assert_array_equal(top.effect(), result.effect()[largest])
    assert top.to_records() == [result.to_records()[row] for row in largest]
    first = top.to_records()[0]
    assert first == {
        "label": top.labels[0],
        "effect": top.effect()[0],
        "exact": top.exact[0],
        "drawn": bool(top.drawn[0]),
    }
    assert {record["exact"] is None for record in result.to_records()} == {True, False}
    assert isinstance(result.to_pandas(), pandas.DataFrame)
    assert list(result.to_pandas().columns) == ["label", "effect", "exact", "drawn"]


def test_an_attribution_prints_as_a_table_with_its_receipt() -> None:
    result = attribution(POINTS, INPUTS, patches=map(zero_ablate, split("0", "1", "2", "3")), metric=METRIC, verify=6)
    lines = repr(result).splitlines()
    assert lines[0] == "22 patches, effects estimated from the unpatched run's gradient, 8 inputs"
    assert lines[1].split() == ["label", "effect", "exact", "drawn"]
    assert lines[2].startswith(result.top(1).labels[0])
    assert lines[-2:] == [
        "... 2 more",
        f"Spearman rank correlation with the exact effects of 6 random patches: {result.rank_correlation:.2f}",
    ]
    steps = attribution(POINTS, INPUTS, patches=[zero_ablate(WHOLE)], metric=METRIC, steps=3, verify=0)
    assert repr(steps).splitlines()[0] == "1 patch, effects estimated from gradients at 3 steps, 8 inputs"
    assert len(repr(steps).splitlines()) == 3


def test_a_site_that_the_metric_does_not_depend_on_has_no_effect(tuple_output: Model) -> None:
    points = hook_points(tuple_output.module, *tuple_output.inputs(4))
    patches = {"value": zero_ablate(points.site("value_head")), "logits": zero_ablate(points.site("policy_head"))}
    inputs = tuple_output.inputs(4)
    of_logits = attribution(points, *inputs, patches=patches, metric=METRIC)
    assert effects(of_logits)["value"] == 0 != effects(of_logits)["logits"]
    of_value = attribution(points, *inputs, patches=patches, metric=value)
    assert effects(of_value)["logits"] == 0
    np.testing.assert_allclose(of_value.effect(), of_value.exact, atol=1e-6)


def test_a_metric_with_one_number_for_all_inputs_is_not_divided_by_their_number() -> None:
    patches = [zero_ablate(site) for site in split("1")]
    each = attribution(POINTS, INPUTS, patches=patches, metric=METRIC, verify=2)
    mean = attribution(POINTS, INPUTS, patches=patches, metric=lambda output: METRIC(output).mean(), verify=2)
    assert effects(mean) == pytest.approx(effects(each))


def test_keyword_inputs_reach_the_model() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, vector: Tensor, *, scale: Tensor) -> Tensor:
            return self.fc(vector) * scale

    torch.manual_seed(0)
    module, vector, scale = Keyword(), torch.randn(5, 4), torch.full((5, 1), 7.0)
    points = hook_points(module, vector, scale=scale)
    result = attribution(points, vector, scale=scale, patches=[zero_ablate(points.site("fc"))], metric=METRIC)
    logits = module.fc(vector).detach() * 7
    assert result.effect()[0] == pytest.approx(float((logits[:, 1] - logits[:, 0]).mean()), rel=1e-5)


def sure(inputs: Tensor) -> HookPoints:
    """A model that is sure of its actions."""
    torch.manual_seed(1)
    with torch.no_grad():
        module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
        module[2].weight.copy_(40 * torch.eye(3))
        module[2].bias.copy_(torch.tensor([60.0, 0.0, 0.0]))
    return hook_points(module, inputs)


INSTEAD = "Use more steps (steps=20), a metric based on logits (logit_difference), or sweep()."


def test_estimates_of_about_zero_beside_real_effects_are_warned_about() -> None:
    inputs = INPUTS.float()
    points = sure(inputs)
    patches = {number: edit(points.site("1", feature=number), lambda region: region * 0 - 2) for number in (0, 1)}
    with pytest.warns(RuntimeWarning) as caught:
        result = attribution(points, inputs, patches=patches, metric=action_probability(0))
    assert [str(warning.message) for warning in caught] == [
        "The estimates are about zero at '1', but verified patches there change the metric by up to 1. Either the "
        "metric is flat at the clean activations (for example, a probability near 0 or 1, or a divergence from the "
        f"clean output), or a later operation blocks gradients (.detach(), argmax or rounding). {INSTEAD}"
    ]
    assert caught[0].filename == __file__
    assert np.abs(result.exact).max() > 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribution(points, inputs, patches=patches, metric=METRIC)
        attribution(points, inputs, patches=patches, metric=action_probability(0), steps=100)
        attribution(points, inputs, patches=patches, metric=action_probability(0), verify=0)  # there is no receipt


def test_a_divergence_from_the_clean_run_needs_steps() -> None:
    patch = zero_ablate(POINTS.site("1", feature=2))
    with pytest.warns(RuntimeWarning, match="The estimates are about zero at '1', .* Use more steps"):
        flat = attribution(POINTS, INPUTS, patches=[patch], metric=kl_divergence)
    assert flat.effect()[0] == pytest.approx(0, abs=1e-9)
    steps = attribution(POINTS, INPUTS, patches=[patch], metric=kl_divergence, steps=50)
    assert steps.effect()[0] == pytest.approx(steps.exact[0], rel=1e-3)
    assert steps.exact[0] > 0.01


def test_a_gradient_that_is_cut_before_a_patch_with_an_effect_is_warned_about_by_hook_point() -> None:
    class Cut(nn.Module):
        def forward(self, vector: Tensor) -> Tensor:
            return vector.detach()

    inputs = INPUTS.float()
    points = hook_points(nn.Sequential(nn.Linear(4, 3), Cut(), nn.Linear(3, 3)), inputs)
    patches = [zero_ablate(site) for name in ("0", "1") for site in points.site(name).split("feature")]
    with pytest.warns(RuntimeWarning, match="The estimates are about zero at '0', but verified"):
        result = attribution(points, inputs, patches=patches, metric=METRIC)
    assert result.exact.all() and np.count_nonzero(result.effect()) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribution(points, inputs, patches=patches[3:], metric=METRIC)


def test_estimates_in_another_order_than_the_exact_effects_are_warned_about() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2)).double()
    with torch.no_grad():
        model[1].weight[0], model[1].weight[1] = torch.linspace(0.1, 1.0, 12), 0
    points = hook_points(model, inputs := torch.ones(4, 12).double())

    def metric(output: Tensor) -> Tensor:
        return output[:, 0] - output[:, 0].pow(2)  # each larger push turns around later

    patches = {n: steer(points.site("0", feature=n), torch.full((1, 1), 9.0).double()) for n in range(12)}
    with torch.no_grad():
        model[1].bias.zero_()
        model[0].weight.zero_(), model[0].bias.zero_()
    with pytest.warns(RuntimeWarning) as caught:
        result = attribution(points, inputs, patches=patches, metric=metric)
    assert result.rank_correlation < 0.5
    assert [str(warning.message) for warning in caught] == [
        f"The estimates rank the patches differently from the exact effects: the rank correlation is "
        f"{result.rank_correlation:.2f} over 12 random patches. {INSTEAD}"
    ]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)


TOKENS = hook_points(Tokens(), torch.tensor([1, 2]))


def attributed(patches: Any, metric: Metric = METRIC, **options: Any) -> Callable[[], Attribution]:
    return lambda: attribution(POINTS, INPUTS, patches=patches, metric=metric, **options)


FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no patches": (
        attributed([]),
        SweepError,
        "There are no patches: the mapping or sequence is empty. Pass at least one patch.",
    ),
    "several sites": (
        attributed({"both": [zero_ablate(WHOLE), zero_ablate(WHOLE)]}),
        SweepError,
        "The label 'both' has 2 patches, but estimates need one patch per label. Give each patch or receiver its own "
        "label, or use sweep() or path_patch() to patch several sites together.",
    ),
    "one label twice": (
        attributed([zero_ablate(WHOLE), steer(WHOLE, torch.ones(1, 6, dtype=torch.float64))]),
        SweepError,
        "Two of the patches have the same site, 1, and therefore the same label. Pass a dict that maps labels to "
        "patches.",
    ),
    "no hook point": (
        attributed([zero_ablate(Site("5"))]),
        HookPointError,
        "No hook point named '5'. (12 hook points; print the HookPoints to list them.)",
    ),
    "neither a model nor its hook points": (
        lambda: attribution([], INPUTS, patches=[zero_ablate(Site("1"))], metric=METRIC),  # type: ignore[arg-type]
        TypeError,
        "Expected HookPoints or a torch.nn.Module, not list.",
    ),
    "no steps": (
        attributed([zero_ablate(WHOLE)], steps=0),
        SweepError,
        "steps must be a whole number, at least 1; got 0.",
    ),
    "a part of a step": (
        attributed([zero_ablate(WHOLE)], steps=2.5),
        SweepError,
        "steps must be a whole number, at least 1; got 2.5.",
    ),
    "a function that makes patches": (
        attributed(zero_ablate),
        TypeError,
        "Expected a Patch, such as zero_ablate(Site('conv1')); got function.",
    ),
    "several metrics": (
        attributed([zero_ablate(WHOLE)], {"difference": METRIC}),  # type: ignore[arg-type]
        MetricError,
        "The metric must be a function of the model's output; got dict. Only sweep() accepts a dict of several "
        "metrics.",
    ),
    "a count below zero": (
        lambda: attributed([zero_ablate(WHOLE)])().top(-1),
        StatisticsError,
        "The first argument to top() must be the number of rows to return, at least 0; got -1. To choose a metric, "
        "pass metric='name'.",
    ),
    "a metric without a gradient": (
        attributed([zero_ablate(WHOLE)], action_flip),
        MetricError,
        "The metric has no gradient, because it is a count (such as action_flip) or leaves the autograd graph (for "
        "example, through .detach(), .item() or numpy). Use a differentiable metric, or sweep().",
    ),
    "tokens": (
        lambda: attribution(
            TOKENS, torch.tensor([1, 2]), patches=[edit(TOKENS.site(".in[0]"), torch.clone)], metric=METRIC
        ),
        SiteError,
        "'.in[0]' has dtype torch.int64, so it has no gradient. Patch a later hook point.",
    ),
}


def test_a_model_is_traced_with_the_inputs() -> None:
    patches = [zero_ablate(Site("1", feature=0)), zero_ablate(Site("1", feature=1))]
    both = [attribution(each, INPUTS, patches=patches, metric=METRIC) for each in (POINTS.model, POINTS)]
    assert both[0].labels == both[1].labels
    assert np.array_equal(both[0].effect(), both[1].effect())


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_estimated_is_refused(fault: str) -> None:
    fails, kind, message = FAULTS[fault]
    with pytest.raises(kind) as caught:
        fails()
    assert str(caught.value) == message


def test_a_single_patch_is_an_attribution_of_one() -> None:
    (effect,) = attributed(zero_ablate(WHOLE))().exact
    assert effect == pytest.approx(exact(POINTS, (INPUTS,), zero_ablate(WHOLE), METRIC))


def test_a_baseline_of_the_users_own_is_kept() -> None:
    metric = functools.partial(kl_divergence, baseline=MLP(OTHERS).detach())
    patches = [zero_ablate(site) for site in split("1")]
    result = attribution(POINTS, INPUTS, patches=patches, metric=metric, steps=100)
    by_label = dict(zip(result.labels, result.exact, strict=True))
    for site, patch in zip(split("1"), patches, strict=True):
        expected = exact(POINTS, (INPUTS,), patch, metric)
        assert by_label[f"1, feature={site.indices[0][1][0]}"] == pytest.approx(expected)
    assert result.effect().sum() == pytest.approx(exact(POINTS, (INPUTS,), zero_ablate(WHOLE), metric), rel=1e-2)


@pytest.mark.parametrize(("steps", "verify"), [(1, 4), (3, 2), (3, 20), (2, 0)])
def test_one_bar_counts_the_steps_and_the_verifying_forwards(
    steps: int, verify: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings, file=io.StringIO())
            bars.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    patches = [*map(zero_ablate, split("1", "3")), steer(POINTS.site("1"), torch.ones(1, 6).double())]
    attribution(POINTS, INPUTS, patches=patches, metric=METRIC, steps=steps, verify=verify, progress=True)
    lines = 3  # the last one overlaps the units of its hook point
    assert [bar.total for bar in bars] == [min(2 * verify, len(patches)) + (steps * lines if steps > 1 else 0)]
    assert [bar.n for bar in bars] == [bars[0].total]
    attribution(POINTS, INPUTS, patches=patches, metric=METRIC, progress=False)
    assert len(bars) == 1


@pytest.mark.parametrize("measurements", range(1, 9))
def test_an_interrupt_goes_through_and_leaves_nothing_of_the_runs(measurements: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    before = copy.deepcopy(model.state_dict())
    points = hook_points(model, INPUTS)
    count = itertools.count(1)

    def interrupted(output: Tensor) -> Tensor:
        if next(count) == measurements:
            raise KeyboardInterrupt
        return METRIC(output)

    patches = [*map(zero_ablate, points.site("0").split("feature"))]
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        attribution(points, INPUTS, patches=patches, metric=interrupted, steps=3, verify=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_patch_that_brings_nan_in_is_an_error_and_nan_that_was_there_is_not() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    points = hook_points(model, INPUTS)
    with pytest.raises(NaNError, match=r"Patch\(Site\('1', feature=2\)"):
        attribution(points, INPUTS, patches=edit(points.site("1", feature=2), lambda a: a * torch.nan), metric=METRIC)
    inputs = INPUTS.clone()
    inputs[0] = torch.nan
    patches = [edit(site, lambda region: region * 0.5) for site in points.site("1").split("feature")]
    result = attribution(points, inputs, patches=patches, metric=lambda output: output[:, 0], verify=0)
    assert np.isnan(result.effect()).all()


class WritesInPlace(nn.Module):
    """Reads its stream again after the ReLU has written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.relu, self.layer = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.embed(vector)
        return self.head(stream + self.layer(self.relu(stream)))


def test_an_input_that_is_written_into_in_place_is_warned_about_and_leaves_exact_effects_right() -> None:
    model, vectors = WritesInPlace(), torch.randn(5, 4)
    points = hook_points(model, vectors)
    patches = [zero_ablate(site) for name in ("relu.in[0]", "layer") for site in points.site(name).split("feature")]
    with pytest.warns(RuntimeWarning, match=r"modifies its input in place.*the estimates are wrong"):
        result = attribution(points, vectors, patches=patches, metric=logit_difference(0, 1), verify=len(patches))
    expected = sweep(points, vectors, patches=patches, metric=logit_difference(0, 1), strategy="loop")
    found = dict(zip(result.labels, result.exact, strict=True))
    np.testing.assert_allclose([found[label] for label in expected.labels], expected.effect(), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the module returns is no such input
        attribution(points, vectors, patches=patches[6:], metric=logit_difference(0, 1))


class PartlyWithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.frozen(vector)
        return self.head(features)


def test_a_site_inside_no_grad_is_refused_by_name() -> None:
    vectors = torch.randn(5, 4)
    points = hook_points(PartlyWithoutGradients(), vectors)
    with pytest.raises(SiteError) as caught:
        attribution(points, vectors, patches=zero_ablate(points.site("frozen")), metric=logit_difference(0, 1))
    assert str(caught.value) == (
        "'frozen' is computed under torch.no_grad(), so it has no gradient. Use sweep(), or patch a later hook point."
    )


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacrev])
def test_a_site_inside_a_transform_is_refused(transform: Any) -> None:
    class Transformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = transform(self.fc)(inputs)
            return output.reshape(len(output), -1)

    inputs = torch.randn(4, 3)
    points = hook_points(Transformed(), inputs)
    with pytest.raises(UnsupportedModelError, match="inside torch.(vmap|func.grad)"):
        attribution(points, inputs, patches=zero_ablate(points.site("fc")), metric=METRIC)
