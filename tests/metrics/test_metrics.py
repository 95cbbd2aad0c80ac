"""Metrics against their formulas written out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from models import build
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    Normal,
    OneHotCategorical,
    TransformedDistribution,
)
from torch.distributions.transforms import TanhTransform

from chanpatch.errors import DistributionError, MetricError
from chanpatch.metrics import (
    Metric,
    action_flip,
    action_probability,
    at_position,
    entropy,
    kl_divergence,
    log_probability,
    logit_difference,
    normalized_effect,
    total_variation,
    value,
)
from chanpatch.metrics.measured import compares, measured

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, 4, generator=GENERATOR) * 2
OTHER = torch.randn(5, 4, generator=GENERATOR) * 2
PROBS, OTHER_PROBS = LOGITS.softmax(-1), OTHER.softmax(-1)
ROWS = torch.arange(5)
PER_INPUT = torch.tensor([0, 3, 1, 1, 2])
COMPARING: list[Metric] = [kl_divergence, total_variation, action_flip]
ONE_OUTPUT: list[Metric] = [logit_difference(0, 2), log_probability([0, 1]), action_probability(PER_INPUT), entropy]


@pytest.mark.parametrize("metric", ONE_OUTPUT[:2])
def test_an_output_without_rows_has_a_metric_without_numbers(metric: Metric) -> None:
    assert metric(LOGITS[:0]).shape == (0,)


def test_a_logit_difference_is_the_difference_of_two_logits() -> None:
    torch.testing.assert_close(logit_difference(0, 2)(LOGITS), LOGITS[:, 0] - LOGITS[:, 2])


def test_a_logit_difference_of_sets_is_the_log_ratio_of_their_probabilities() -> None:
    expected = (PROBS[:, 0] + PROBS[:, 3]).log() - PROBS[:, 1].log()
    torch.testing.assert_close(logit_difference([0, 3], 1)(LOGITS), expected)


def test_a_tensor_of_actions_has_one_for_each_input() -> None:
    expected = LOGITS[ROWS, PER_INPUT] - LOGITS[:, 3]
    torch.testing.assert_close(logit_difference(PER_INPUT, 3)(LOGITS), expected)
    torch.testing.assert_close(action_probability(PER_INPUT)(LOGITS), PROBS[ROWS, PER_INPUT])


def test_the_probability_of_a_set_is_the_sum_of_its_probabilities() -> None:
    torch.testing.assert_close(action_probability([1, 2])(LOGITS), PROBS[:, 1] + PROBS[:, 2])
    torch.testing.assert_close(log_probability((1, 2))(LOGITS), (PROBS[:, 1] + PROBS[:, 2]).log())
    torch.testing.assert_close(log_probability(torch.tensor(1))(LOGITS), PROBS[:, 1].log())


def test_comparisons_equal_their_sums_over_actions() -> None:
    divergence = (OTHER_PROBS * (OTHER_PROBS.log() - PROBS.log())).sum(1)
    torch.testing.assert_close(kl_divergence(LOGITS, baseline=OTHER), divergence)
    torch.testing.assert_close(total_variation(LOGITS, baseline=OTHER), (PROBS - OTHER_PROBS).abs().sum(1) / 2)
    flips = [float(row.argmax() != other.argmax()) for row, other in zip(LOGITS, OTHER, strict=True)]
    assert 0 < sum(flips) < 5
    assert action_flip(LOGITS, baseline=OTHER).tolist() == flips


@pytest.mark.parametrize("metric", COMPARING)
def test_an_output_does_not_differ_from_itself(metric: Metric) -> None:
    assert (metric(LOGITS, baseline=LOGITS) == 0).all()


def test_entropy_equals_its_sum_over_actions() -> None:
    torch.testing.assert_close(entropy(LOGITS), -(PROBS * PROBS.log()).sum(1))


def test_masked_actions_are_neither_nan_nor_counted() -> None:
    masked, other = LOGITS.clone(), OTHER.clone()
    masked[:, 2] = other[:, 2] = -torch.inf
    torch.testing.assert_close(entropy(masked), entropy(masked[:, [0, 1, 3]]))
    torch.testing.assert_close(
        kl_divergence(masked, baseline=other), kl_divergence(masked[:, [0, 1, 3]], baseline=other[:, [0, 1, 3]])
    )
    assert (kl_divergence(masked, baseline=OTHER) == torch.inf).all()
    for metric in (entropy, lambda logits: kl_divergence(logits, baseline=other)):
        leaf = masked.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(metric(leaf).sum(), leaf)
        assert gradient.isfinite().all()


class Named(NamedTuple):
    logits: Tensor
    value: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "distribution": lambda logits: Categorical(logits=logits),
    "probabilities": lambda logits: Categorical(probs=logits.softmax(-1)),
    "one hot": lambda logits: OneHotCategorical(logits=logits),
    "logits and value": lambda logits: (logits, logits[:, 0]),
    "distribution and value": lambda logits: (Categorical(logits=logits), logits[:, 0]),
    "value and distribution": lambda logits: [logits[:, 0], Categorical(logits=logits)],
    "dict of logits": lambda logits: {"logits": logits, "value": logits[:, 0]},
    "dict of a distribution": lambda logits: {"pi": Categorical(logits=logits)},
    "named tuple": lambda logits: Named(logits, logits[:, 0]),
    "object": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_every_kind_of_policy_output_gives_the_numbers_of_its_logits(wrap: Callable[[Tensor], Any]) -> None:
    for metric in ONE_OUTPUT:
        torch.testing.assert_close(metric(wrap(LOGITS)), metric(LOGITS))
    for metric in COMPARING:
        torch.testing.assert_close(metric(wrap(LOGITS), baseline=wrap(OTHER)), metric(LOGITS, baseline=OTHER))


NO_PAIRS: dict[str, Any] = {
    "one tensor": (LOGITS,),
    "a second tensor that is no value": (LOGITS, OTHER),
    "a value of other inputs": (LOGITS, OTHER[:3, 0]),
    "a value with more axes": (LOGITS, OTHER[:, :1, None]),
    "whole numbers": (LOGITS, PER_INPUT),
    "values that come first": (LOGITS[:, 0], LOGITS),
    "a state": (LOGITS, (OTHER, OTHER)),
    "a tuple in a tuple": ((LOGITS, OTHER[:, 0]), OTHER[:, 0]),
    "action, log probability, entropy, value": (LOGITS, LOGITS[:, 0], LOGITS[:, 0], LOGITS[:, :1]),
    "two distributions": (Categorical(logits=LOGITS), Normal(LOGITS, 1.0)),
    "nothing": (),
}


@pytest.mark.parametrize("output", NO_PAIRS.values(), ids=NO_PAIRS)
@pytest.mark.parametrize("of", [tuple, list])
def test_other_tuples_than_logits_and_value_are_refused(output: Any, of: Any) -> None:
    for metric in ONE_OUTPUT:
        with pytest.raises(MetricError, match=r"lambda output: metric\(output\[0\]\)"):
            metric(of(output))
    for metric in COMPARING:
        with pytest.raises(MetricError, match=r"lambda output: metric\(output\[0\]\)"):
            metric(of(output), baseline=of(output))


def test_a_tuple_with_named_logits_is_understood_whatever_else_it_holds() -> None:
    class Many(NamedTuple):
        action: Tensor
        logits: Tensor
        value: Tensor

    torch.testing.assert_close(entropy(Many(PER_INPUT, LOGITS, LOGITS[:, 0])), entropy(LOGITS))


def test_a_policy_of_sb3_is_understood() -> None:
    from stable_baselines3.common import distributions

    output = distributions.CategoricalDistribution(4).proba_distribution(LOGITS)
    torch.testing.assert_close(logit_difference(0, 1)(output), LOGITS[:, 0] - LOGITS[:, 1])


def test_continuous_actions_are_summed_over_their_dimensions() -> None:
    ours, theirs = Normal(LOGITS, PROBS), Normal(OTHER, OTHER_PROBS)
    divergence = (PROBS.log() - OTHER_PROBS.log()) - 0.5 + (OTHER_PROBS**2 + (LOGITS - OTHER) ** 2) / (2 * PROBS**2)
    torch.testing.assert_close(kl_divergence(ours, baseline=theirs), divergence.sum(1))
    joint = kl_divergence(Independent(ours, 1), baseline=Independent(theirs, 1))
    torch.testing.assert_close(joint, divergence.sum(1))
    differential = 0.5 * torch.log(2 * torch.pi * torch.e * PROBS**2)
    torch.testing.assert_close(entropy(ours), differential.sum(1))


@pytest.mark.parametrize("name", ["logits and value", "distribution and value", "value and distribution",
                                  "dict of logits", "named tuple"])  # fmt: skip
def test_the_value_is_found_beside_the_distribution(name: str) -> None:
    assert torch.equal(value(OUTPUTS[name](LOGITS)), LOGITS[:, 0])


def test_a_column_of_values_becomes_one_number_per_input() -> None:
    assert torch.equal(value((LOGITS, LOGITS[:, :1])), LOGITS[:, 0])
    assert torch.equal(value(LOGITS[:, :1]), LOGITS[:, 0])
    assert torch.equal(value(LOGITS[:, 0]), LOGITS[:, 0])


def test_the_value_of_a_policy_is_what_its_head_says() -> None:
    model = build("tuple_output")
    (inputs,) = model.inputs(5)
    hidden = model.module.body(inputs).relu()
    torch.testing.assert_close(value(model.module(inputs)), model.module.value_head(hidden)[:, 0])


def test_one_position_of_a_sequence_is_measured_as_if_it_were_alone() -> None:
    sequences = torch.randn(5, 7, 4, generator=GENERATOR)
    others = torch.randn(5, 7, 4, generator=GENERATOR)
    lengths = torch.tensor([7, 2, 3, 7, 1])
    for position, last, other in (
        (-1, sequences[:, 6], others[:, 6]),
        (2, sequences[:, 2], others[:, 2]),
        (lengths - 1, sequences[ROWS, lengths - 1], others[ROWS, lengths - 1]),
    ):
        for metric in ONE_OUTPUT:
            torch.testing.assert_close(at_position(metric, position)({"logits": sequences}), metric(last))
        for metric in COMPARING:
            there = at_position(metric, position)
            torch.testing.assert_close(there(sequences, baseline=others), metric(last, baseline=other))


def test_a_metric_compares_if_it_has_a_keyword_only_baseline() -> None:
    assert all(compares(metric) and compares(at_position(metric, -1)) for metric in COMPARING)
    assert not any(compares(metric) or compares(at_position(metric, -1)) for metric in [*ONE_OUTPUT, value])
    assert not compares(lambda output, baseline=None: output)


def test_a_module_is_a_metric_that_compares_if_its_forward_does() -> None:
    class Module(nn.Module):
        def forward(self, output: Tensor, *, baseline: Tensor) -> Tensor:
            return total_variation(output, baseline=baseline)

    assert torch.equal(measured(Module(), LOGITS, OTHER), total_variation(LOGITS, baseline=OTHER))


def test_a_metric_whose_baseline_was_given_keeps_it() -> None:
    for metric in COMPARING:
        given = functools.partial(metric, baseline=OTHER)
        assert not compares(given)
        assert not compares(at_position(given, -1))
        assert torch.equal(measured(given, LOGITS, LOGITS), metric(LOGITS, baseline=OTHER))


def test_several_metrics_are_not_measured_as_one() -> None:
    with pytest.raises(MetricError) as caught:
        measured({"entropy": entropy}, LOGITS, OTHER)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "The metric must be a function of the model's output; got dict. Only sweep() accepts a dict of several metrics."
    )


def test_a_metric_is_named_for_what_made_it() -> None:
    names = [metric.__name__ for metric in [*ONE_OUTPUT, at_position(total_variation, 0)]]
    assert names == ["logit_difference", "log_probability", "action_probability", "entropy", "total_variation"]


def test_only_a_metric_that_compares_gets_the_baseline() -> None:
    assert torch.equal(measured(total_variation, LOGITS, OTHER), total_variation(LOGITS, baseline=OTHER))
    assert torch.equal(measured(entropy, LOGITS, OTHER), entropy(LOGITS))


def test_what_is_not_one_number_per_input_is_no_metric() -> None:
    with pytest.raises(MetricError) as caught:
        measured(lambda output: output, LOGITS, OTHER)
    assert str(caught.value) == (
        "The metric returned a torch.float32 tensor of shape (5, 4). A metric must return one number per input, with "
        "shape (batch,), or a single number."
    )
    assert measured(lambda output: output.mean(), LOGITS, OTHER).shape == (1,)


def test_a_normalized_effect_is_one_for_the_clean_run_and_zero_for_the_corrupted_one() -> None:
    clean, corrupted = LOGITS, OTHER[:3]
    metric = logit_difference(0, 1)
    share = normalized_effect(metric, clean, corrupted)
    one, zero = (LOGITS[:, 0] - LOGITS[:, 1]).mean(), (OTHER[:3, 0] - OTHER[:3, 1]).mean()
    torch.testing.assert_close(share(clean).mean(), torch.tensor(1.0))
    assert share(corrupted).mean().abs() < 1e-6
    torch.testing.assert_close(share(OTHER), (OTHER[:, 0] - OTHER[:, 1] - zero) / (one - zero))


@pytest.mark.parametrize("metric", [*ONE_OUTPUT, kl_divergence, total_variation, value])
def test_the_gradient_of_a_metric_equals_finite_differences(metric: Metric) -> None:
    baseline = OTHER.double()

    def of_logits(logits: Tensor) -> Tensor:
        output = logits[:, 0] if metric is value else logits
        return measured(metric, output, baseline)

    assert torch.autograd.gradcheck(of_logits, LOGITS.double().requires_grad_())


@pytest.mark.parametrize("metric", [*ONE_OUTPUT, *COMPARING])
def test_a_metric_inside_vmap_equals_the_loop(metric: Metric) -> None:
    many = torch.randn(3, 5, 4, generator=GENERATOR)
    looped = torch.stack([measured(metric, each, OTHER) for each in many])
    torch.testing.assert_close(torch.vmap(lambda each: measured(metric, each, OTHER))(many), looped)


def test_a_value_and_a_position_inside_vmap_equal_the_loop() -> None:
    many = torch.randn(3, 5, 7, 4, generator=GENERATOR)
    there = at_position(kl_divergence, PER_INPUT)
    looped = torch.stack([there(each, baseline=many[0]) for each in many])
    torch.testing.assert_close(torch.vmap(lambda each: there(each, baseline=many[0]))(many), looped)
    assert torch.equal(torch.vmap(lambda each: value((each, each[:, 0, :1])))(many), many[:, :, 0, 0])


FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an action that the output does not have": (
        lambda: logit_difference(0, [1, 4])(LOGITS),
        MetricError,
        "incorrect includes action 4, but the output has actions 0 to 3.",
    ),
    "a negative action": (
        lambda: action_probability(-1),
        MetricError,
        "actions must contain at least one action and no negative numbers; got -1. Actions are numbered from 0.",
    ),
    "no action": (
        lambda: action_probability([]),
        MetricError,
        "actions must contain at least one action and no negative numbers; got []. Actions are numbered from 0.",
    ),
    "a padded label": (
        lambda: log_probability(torch.tensor([1, -100])),
        MetricError,
        "actions must contain at least one action and no negative numbers; got a torch.int64 tensor of shape (2,). "
        "Actions are numbered from 0.",
    ),
    "an action named twice": (
        lambda: action_probability([1, 1]),
        MetricError,
        "actions is [1, 1], which contains an action twice. List each action once.",
    ),
    "no number": (
        lambda: action_probability("left"),
        MetricError,
        "actions must be an action (an int), a sequence of actions to treat as a single action, or an int64 tensor of "
        "shape (batch,) with one action per input; got 'left'.",
    ),
    "a mask": (
        lambda: action_probability(torch.tensor([True, False])),
        MetricError,
        "actions must be an action (an int), a sequence of actions to treat as a single action, or an int64 tensor of "
        "shape (batch,) with one action per input; got a torch.bool tensor of shape (2,).",
    ),
    "a matrix of actions": (
        lambda: action_probability(torch.zeros(5, 2, dtype=torch.int64)),
        MetricError,
        "actions must be an action (an int), a sequence of actions to treat as a single action, or an int64 tensor of "
        "shape (batch,) with one action per input; got a torch.int64 tensor of shape (5, 2).",
    ),
    "actions of fewer inputs": (
        lambda: logit_difference(torch.tensor([1]), 0)(LOGITS),
        MetricError,
        "correct has one action for each of 1 inputs, but the output has logits for 5 inputs. Pass one action per "
        "input, or a list of actions to treat as a single action.",
    ),
    "a baseline of other inputs": (
        lambda: kl_divergence(LOGITS, baseline=LOGITS[:1]),
        MetricError,
        "The output has shape (5, 4), but the baseline has shape (1, 4). Compare outputs for the same inputs.",
    ),
    "a continuous baseline of other inputs": (
        lambda: kl_divergence(Normal(LOGITS, PROBS), baseline=Normal(LOGITS[:1], PROBS[:1])),
        MetricError,
        "The output has shape (5, 4), but the baseline has shape (1, 4). Compare outputs for the same inputs.",
    ),
    "logits of a sequence": (
        lambda: entropy(LOGITS.view(1, 5, 4)),
        MetricError,
        "The output has logits of shape (1, 5, 4), but this metric needs shape (batch, action). Use "
        "at_position(metric, -1) for the last position.",
    ),
    "logits of one input": (
        lambda: entropy(LOGITS[0]),
        MetricError,
        "The output has logits of shape (4,), but this metric needs shape (batch, action). Reshape the logits to "
        "(batch, action).",
    ),
    "one column": (
        lambda: kl_divergence(LOGITS[:, :1], baseline=LOGITS[:, :1]),
        DistributionError,
        "A tensor of shape (5, 1) contains only one logit per input, so the probability of that action is always 1. If "
        "this is the logit of the second of two actions, return torch.distributions.Bernoulli(logits=...) from the "
        "model.",
    ),
    "one column of named logits": (
        lambda: entropy({"logits": LOGITS[:, :1]}),
        DistributionError,
        "A tensor of shape (5, 1) contains only one logit per input, so the probability of that action is always 1. If "
        "this is the logit of the second of two actions, return torch.distributions.Bernoulli(logits=...) from the "
        "model.",
    ),
    "no distribution": (
        lambda: entropy({"state": LOGITS}),
        DistributionError,
        "The output is a dict of 'state', which contains no action distribution. Expected logits of shape (batch, "
        "action), a torch.distributions object, a tuple with such an object, a pair (logits, value), or a dict with "
        "the key 'logits'. Use a metric that selects one of these from the output.",
    ),
    "a tuple with more than logits and a value": (
        lambda: kl_divergence((LOGITS, LOGITS[:, 0], LOGITS[:, 0]), baseline=LOGITS),
        MetricError,
        "The output is (Tensor, Tensor, Tensor). A metric accepts a tuple that contains one distribution, or a pair "
        "(logits, value) whose value has shape (batch,) or (batch, 1). Select the logits: lambda output: "
        "metric(output[0]).",
    ),
    "logits that are NaN": (
        lambda: action_flip(LOGITS, baseline=LOGITS / 0 * 0),
        DistributionError,
        "The output is a torch.float32 tensor of shape (5, 4) with NaN logits. Find the first NaN activation with "
        "recording(...). A patch may have set values that are too large for later layers.",
    ),
    "logits of continuous actions": (
        lambda: total_variation(Normal(LOGITS, PROBS), baseline=Normal(LOGITS, PROBS)),
        DistributionError,
        "The output's distribution is Normal, but this metric needs a Categorical or OneHotCategorical. For other "
        "distributions, use kl_divergence or entropy.",
    ),
    "an entropy without a formula": (
        lambda: entropy(TransformedDistribution(Normal(LOGITS, PROBS), TanhTransform())),
        DistributionError,
        "torch.distributions has no formula for the entropy of TransformedDistribution. Estimate the entropy from "
        "samples.",
    ),
    "a divergence of two kinds": (
        lambda: kl_divergence(Normal(LOGITS[:, 0], PROBS[:, 0]), baseline=Categorical(logits=LOGITS)),
        DistributionError,
        "torch.distributions has no formula for the KL divergence of Normal. Estimate the KL divergence from samples.",
    ),
    "two values": (
        lambda: value((LOGITS, LOGITS[:, 0], LOGITS[:, 1])),
        MetricError,
        "The output, (Tensor, Tensor, Tensor), contains 2 tensors of shape (batch,) or (batch, 1) that could be the "
        "value, but must contain exactly one. Use a metric that selects the value: lambda output: output[1].",
    ),
    "no value": (
        lambda: value(LOGITS),
        MetricError,
        "The output, a torch.float32 tensor of shape (5, 4), contains 0 tensors of shape (batch,) or (batch, 1) that "
        "could be the value, but must contain exactly one. Use a metric that selects the value: lambda output: "
        "output[1].",
    ),
    "a position of logits without positions": (
        lambda: at_position(entropy, -1)(LOGITS),
        MetricError,
        "The logits in the output have shape (5, 4), but must have axes (batch, position, action).",
    ),
    "a position outside": (
        lambda: at_position(entropy, 5)(LOGITS.view(1, 5, 4)),
        MetricError,
        "position must be between -5 and 4, because the sequences have length 5; got 5.",
    ),
    "positions of fewer inputs": (
        lambda: at_position(entropy, torch.tensor([1, 2]))(LOGITS.view(1, 5, 4)),
        MetricError,
        "position must contain one position for each of 1 inputs; got 2.",
    ),
    "no position": (
        lambda: at_position(entropy, "last"),  # type: ignore[arg-type]
        MetricError,
        "position must be an int or an int64 tensor of shape (batch,); got 'last'.",
    ),
    "an effect that is none": (
        lambda: normalized_effect(logit_difference(0, 1), torch.eye(2), torch.zeros(3, 2)),
        MetricError,
        "The metric's mean is 0 on the clean run and 0 on the corrupted run, so there is no difference to normalize "
        "by. Choose different inputs or a different metric.",
    ),
    "an effect of a metric that compares": (
        lambda: normalized_effect(kl_divergence, LOGITS, OTHER),
        MetricError,
        "normalized_effect() needs a metric without a `baseline` parameter, but this metric has one. Use this metric "
        "directly: it is already 0 if the output equals the baseline.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    fails, kind, message = FAULTS[fault]
    with pytest.raises(kind) as caught:
        fails()
    assert str(caught.value) == message


def test_logits_that_are_nan_are_refused_after_torch_compile_has_turned_validation_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", False)
    with pytest.raises(DistributionError, match="NaN logits"):
        action_flip(LOGITS, baseline=LOGITS * torch.nan)


def test_probabilities_from_logits_in_half_precision_are_computed_in_float32() -> None:
    logits = LOGITS.bfloat16()
    expected = entropy(Categorical(logits=logits.float()))
    assert torch.equal(entropy(logits), expected)
