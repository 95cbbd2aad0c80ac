"""Channel sums against the same sums by hand, and probes on sums whose truth is known."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from models import build
from scipy.stats import mannwhitneyu
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from chanpatch import ThresholdProbe, channel_sums, errors, hook_points, label_channels, run_with_cache
from chanpatch.probes import linear_probe
from chanpatch.probes.checks import halves
from chanpatch.statistics import auc, mcnemar_exact, wilson_interval

NAMES = ("UP", "DOWN", "LEFT", "RIGHT")


def random(seed=0):
    return np.random.default_rng(seed)


# --- channel sums ---


@pytest.fixture
def cnn():
    model = build("plain_cnn")
    images = torch.randn(10, 3, 8, 8)
    return hook_points(model.module, images[:2]), images, model.module.conv1(images).relu().detach().double()


@pytest.mark.parametrize(
    ("reduce", "by_hand"),
    [
        ("sum", lambda activation: activation.sum((2, 3))),
        ("mean", lambda activation: activation.mean((2, 3))),
        ("max", lambda activation: activation.amax((2, 3))),
        ("norm", lambda activation: activation.square().sum((2, 3)).sqrt()),
    ],
)
def test_channel_sums_are_those_taken_by_hand_whatever_the_batch_size(cnn, reduce, by_hand):
    points, images, activation = cnn
    for batch_size in (3, 64):
        sums = channel_sums(points, images, "relu1", reduce=reduce, batch_size=batch_size)
        assert sums.dtype == np.float64
        np.testing.assert_allclose(sums, by_hand(activation), rtol=1e-6)


def test_a_region_has_the_sums_of_its_own_channels_and_positions(cnn):
    points, images, activation = cnn
    sums = channel_sums(points, images, points.site("relu1", channel=[5, 2], row=slice(3)))
    np.testing.assert_allclose(sums, activation[:, [5, 2], :3].sum((2, 3)), rtol=1e-6)


def test_a_feature_axis_will_do_for_channels_and_has_the_absolute_value_for_a_norm(cnn):
    points, images, _ = cnn
    logits = points.model(images).detach().double()
    np.testing.assert_allclose(channel_sums(points, images, "fc"), logits, rtol=1e-6)
    np.testing.assert_allclose(channel_sums(points, images, "fc", reduce="norm"), logits.abs(), rtol=1e-6)


def test_positions_before_the_batch_axis_are_summed_too():
    model, sequence = nn.LSTM(6, 4), torch.randn(5, 3, 6)
    points = hook_points(model, sequence, axes={".in[0]": ("position", "batch", "feature")})
    by_hand = model(sequence)[0].detach().double().sum(0)
    np.testing.assert_allclose(channel_sums(points, [sequence], ".out[0]"), by_hand, rtol=1e-5)


def test_a_layer_of_a_recurrent_state_has_sums():
    torch.manual_seed(0)
    model, sequence = nn.LSTM(6, 4, 2, batch_first=True), torch.randn(5, 3, 6)
    points = hook_points(model, sequence)
    sums = channel_sums(points, sequence, points.site(".out[1][0]", layer=1), batch_size=2)
    np.testing.assert_allclose(sums, model(sequence)[1][0][1].detach().double(), rtol=1e-5)


def test_inputs_may_be_a_tensor_the_arguments_the_keywords_or_batches_of_these():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, one, other):
            return self.relu(one - other)

    one, other = torch.rand(2, 7, 4)
    points = hook_points(Difference(), one, other, axes={"relu": ("batch", "feature")})
    by_hand = (one - other).relu().double()
    batches = ((one[part], other[part]) for part in (slice(0, 2), slice(2, 7)))
    for inputs in ((one, other), {"one": one, "other": other}, batches):
        np.testing.assert_allclose(channel_sums(points, inputs, "relu", batch_size=3), by_hand)


def test_an_einops_pair_reduces_as_it_says(cnn):
    points, images, activation = cnn
    for pair, by_hand in (
        (("b c h w -> b h", "max"), activation.amax((1, 3))),
        (("b c h w -> c b", lambda region, over: region.square().sum(over)), activation.square().sum((2, 3))),
        (("b c h w -> b", "mean"), activation.mean((1, 2, 3))[:, None]),
    ):
        np.testing.assert_allclose(channel_sums(points, images, "relu1", reduce=pair, batch_size=3), by_hand, rtol=1e-6)


def test_reductions_that_are_none_are_refused(cnn):
    points, images, _ = cnn
    for reduce, message in (
        ("median", "reduce='median': it is 'sum', 'mean', 'max', 'norm' or an einops pair ('b c h w -> b c', 'sum')."),
        (
            ("b c h w -> b c h", "sum"),
            "reduce=('b c h w -> b c h', 'sum') leaves (batch, channel, row) at Site('relu1'); it must leave the batch "
            "and one axis at most.",
        ),
    ):
        with pytest.raises(errors.SiteError) as caught:
            channel_sums(points, images, "relu1", reduce=reduce)
        assert str(caught.value) == message


def test_sums_add_in_double_precision():
    points = hook_points(
        nn.Sequential(nn.Identity()), torch.zeros(2, 1, 3), axes={".in[0]": ("batch", "channel", "col")}
    )
    assert channel_sums(points, torch.tensor([[[1e8, 1.0, -1e8]]]), "0").item() == 1.0


def test_channel_sums_stop_at_the_site_and_leave_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.calls = nn.BatchNorm1d(3), nn.Dropout(), 0

        def forward(self, rows):
            self.drop(self.norm(rows))
            self.calls += 1

    model, rows = Counting(), torch.rand(6, 3)
    points = hook_points(model, rows)
    calls, buffer, state = model.calls, model.norm.running_mean.clone(), torch.get_rng_state()
    channel_sums(points, rows, "drop", batch_size=2)
    assert model.calls == calls and model.training
    assert torch.equal(model.norm.running_mean, buffer) and torch.equal(torch.get_rng_state(), state)


def test_channel_sums_need_no_tqdm(cnn, monkeypatch):
    points, images, activation = cnn
    monkeypatch.setitem(sys.modules, "tqdm", None)
    np.testing.assert_allclose(channel_sums(points, images, "relu1"), activation.sum((2, 3)), rtol=1e-6)


def test_channel_sums_are_those_that_recording_reduces(model):
    points = hook_points(model.module, *model.inputs(3))
    inputs = model.inputs(5)
    recorded = run_with_cache(points, *inputs, sites=model.site, reduce="sum", stop=True)[model.site]
    assert channel_sums(points, inputs, model.site) == pytest.approx(recorded.double().numpy(), rel=1e-4, abs=1e-5)


# --- threshold probes ---


def shifted_sums(positives, negatives, distance, seed=0):
    labels = np.arange(positives + negatives) < positives
    return random(seed).normal(distance * labels), labels


def test_a_probe_finds_the_threshold_between_separated_groups_and_its_side():
    labels = np.arange(40) % 2 == 0
    sums = np.where(labels, 10.0, 30.0) + random().uniform(size=40)
    probe = ThresholdProbe.fit(sums, labels)
    assert probe.direction == "below" and 11 < probe.threshold < 30
    assert (probe.fitted_on, probe.held_out.n) == (20, 20)
    assert (probe.held_out.auc.estimate, probe.held_out.precision.estimate, probe.held_out.recall.estimate) == (1, 1, 1)
    assert np.array_equal(probe.predict(sums), labels)


def fitting_half(sums, labels, seed):
    rows = halves(labels, seed)[0]
    distinct = np.unique(sums[rows])
    return sums[rows], labels[rows], (distinct[1:] + distinct[:-1]) / 2


@pytest.mark.parametrize("sign", [1, -1])
def test_no_threshold_between_two_sums_of_the_fitting_half_has_a_larger_youden_index(sign):
    for seed in range(10):
        sums, labels = shifted_sums(12, 20, distance=sign, seed=seed)
        probe = ThresholdProbe.fit(sums, labels, seed=seed)
        fitted, positive, thresholds = fitting_half(sums, labels, seed)
        above = fitted > thresholds[:, None]
        best = np.abs(above[:, positive].mean(axis=1) - above[:, ~positive].mean(axis=1)).max()
        accepted = probe.predict(fitted)
        assert accepted[positive].mean() - accepted[~positive].mean() == pytest.approx(best)
        assert np.isclose(probe.threshold, thresholds).any()


def test_scores_are_those_of_the_held_out_half_counted_by_hand():
    sums, labels = shifted_sums(40, 60, distance=1.5)
    probe = ThresholdProbe.fit(sums, labels, seed=3)
    scores = probe.held_out
    positives = round(scores.base_rate.estimate * scores.n)
    hits = round(scores.recall.estimate * positives)
    alarms = round(scores.false_positive_rate.estimate * (scores.n - positives))
    assert (scores.n, positives) == (50, 20)
    assert scores.recall == wilson_interval(hits, positives)
    assert scores.precision == wilson_interval(hits, hits + alarms)
    assert scores.acceptance == wilson_interval(hits + alarms, 50)


def test_the_held_out_scores_are_those_of_inputs_that_the_fit_never_saw():
    chances = []
    for seed in range(200):
        labels = random(seed).permutation(np.arange(40) < 20)
        held_out = ThresholdProbe.fit(random(seed + 1000).normal(size=40), labels, seed=seed).held_out
        chances.append(held_out.recall.estimate - held_out.false_positive_rate.estimate)
    assert abs(np.mean(chances)) < 0.05  # on the fitting half it would be about 0.4


@pytest.mark.parametrize(("sign", "side"), [(1, "above"), (-1, "below")])
def test_a_chosen_precision_gives_the_threshold_that_accepts_most_of_the_fitting_half(sign, side):
    for seed in range(10):
        sums, labels = shifted_sums(30, 50, distance=2.0, seed=seed)
        probe = ThresholdProbe.fit_precision(sign * sums, labels, min_precision=0.9, seed=seed)
        fitted, positive, thresholds = fitting_half(sums, labels, seed)
        precise = [threshold for threshold in thresholds if positive[fitted > threshold].mean() >= 0.9]
        assert probe.threshold == pytest.approx(sign * min(precise)) and probe.direction == side


def test_a_probe_for_a_chosen_precision_says_what_it_costs():
    sums, labels = shifted_sums(100, 300, distance=2.0)
    probe = ThresholdProbe.fit_precision(sums, labels, min_precision=0.9)
    assert probe.held_out.precision.estimate > 0.8
    assert 0.05 < probe.held_out.acceptance.estimate < probe.held_out.base_rate.estimate
    assert "chosen for precision of at least 0.9 on 200 inputs" in repr(probe)


def test_a_precision_that_no_threshold_has_is_refused_with_the_best_one():
    labels = np.arange(40) % 2 == 0
    sums = np.where(labels, 1.0, np.arange(40) % 4 == 1)  # no sum is larger than that of half of the negatives
    fitted, _, _ = fitting_half(sums, labels, seed=0)
    accepted = int(fitted.sum())
    with pytest.raises(errors.ProbeError) as caught:
        ThresholdProbe.fit_precision(sums, labels, min_precision=0.99, seed=0)
    assert str(caught.value) == (
        f"No threshold has precision 0.99 on the fitting half. The best is {10 / accepted:.3g}, at sums above 0.5, "
        f"where {accepted} of 20 inputs are accepted. Lower min_precision, or take another channel."
    )


def test_transfer_of_the_same_data_drops_nothing_but_noise():
    sums, labels = shifted_sums(400, 600, distance=1.5)
    transfer = ThresholdProbe.fit(sums, labels).transfer(*shifted_sums(400, 600, distance=1.5, seed=9))
    for drop in transfer.drops.values():
        assert drop.low < 0 < drop.high and abs(drop.estimate) < 0.1


def test_a_base_rate_alone_moves_the_raw_precision_and_not_the_reweighted_one():
    probe = ThresholdProbe.fit(*shifted_sums(200, 600, distance=1.5))
    transfer = probe.transfer(*shifted_sums(3000, 1000, distance=1.5, seed=9))
    assert transfer.shifted.precision.estimate > transfer.fit.precision.estimate + 0.2
    assert abs(transfer.drops["reweighted_precision"].estimate) < 0.1
    base, hits, alarms = 0.25, transfer.shifted.recall.estimate, transfer.shifted.false_positive_rate.estimate
    by_bayes = base * hits / (base * hits + (1 - base) * alarms)
    assert transfer.reweighted_precision.estimate == pytest.approx(by_bayes)


def test_a_signal_that_is_gone_under_shift_drops_recall_and_area():
    probe = ThresholdProbe.fit(*shifted_sums(300, 300, distance=3.0))
    drops = probe.transfer(*shifted_sums(300, 300, distance=0.0, seed=9)).drops
    assert drops["recall"].low > 0.5 and drops["auc"].low > 0.3
    assert drops["false_positive_rate"].low > -0.1


def test_the_area_under_shift_keeps_the_side_that_was_fitted():
    sums, labels = shifted_sums(100, 100, distance=2.0)
    probe = ThresholdProbe.fit(-sums, labels)
    assert probe.transfer(sums, labels).shifted.auc == auc(-sums, labels)


def test_where_nothing_is_accepted_under_shift_the_precision_is_unknown():
    probe = ThresholdProbe.fit(*shifted_sums(50, 50, distance=2.0))
    transfer = probe.transfer(np.full(20, -9.0) + np.arange(20) / 100, np.arange(20) < 10)
    assert math.isnan(transfer.shifted.precision.estimate) and math.isnan(transfer.reweighted_precision.estimate)
    assert (transfer.reweighted_precision.low, transfer.reweighted_precision.high) == (0.0, 1.0)


def test_the_tables_of_a_probe_and_of_a_transfer_name_every_quantity():
    labels = np.arange(40) % 2 == 0
    sums = np.where(labels, 30.0, 10.0) + np.arange(40) / 100
    probe = ThresholdProbe.fit(sums, labels)
    lines = repr(probe).splitlines()
    assert lines[0].startswith("Sums above 20.") and lines[0].endswith(
        ": chosen for true- minus false-positive rate on 20 inputs, scored on 20 others"
    )
    assert lines[2:4] == [
        "AUC                          1.000 (0.722 to 1.000)",
        "precision                    1.000 (0.722 to 1.000)",
    ]
    transfer = probe.transfer(sums, labels)
    assert "raw precision (confounded by the base rate)  1.000 (0.722 to 1.000)  1.000 (0.839 to 1.000)" in repr(
        transfer
    )
    frame = transfer.to_pandas().set_index("quantity")
    assert frame.loc["AUC", "drop"] == 0 and math.isnan(
        frame.loc["raw precision (confounded by the base rate)", "drop"]
    )
    assert probe.to_pandas().columns.tolist() == ["quantity", "estimate", "low", "high", "n"]


# --- labels of channels ---


def direction_channels(inputs, seed=0):
    """Six channels: UP, DOWN or LEFT, noise, constant, not RIGHT, low for UP."""
    directions = random(seed).integers(4, size=inputs)
    sums = random(seed + 1).normal(size=(inputs, 6))
    sums[:, 0] += 3 * (directions == 0)
    sums[:, 1] += 3 * np.isin(directions, (1, 2))
    sums[:, 3] = 7.0
    sums[:, 4] += 3 * (directions != 3)
    sums[:, 5] -= 3 * (directions == 0)
    return sums, directions


def test_each_channel_gets_the_label_or_the_union_that_it_was_made_from():
    sums, directions = direction_channels(400)
    labelled = label_channels(sums, directions, names=NAMES, seed=0)
    assert [each.label for each in labelled] == [
        "UP",
        "DOWN or LEFT",
        None,
        None,
        "UP or DOWN or LEFT",
        "DOWN or LEFT or RIGHT",
    ]
    assert (labelled.chosen_on, labelled.scored_on) == (200, 200)


@pytest.mark.parametrize("penalty", [0.0, 0.02, 0.3])
def test_the_candidate_has_the_largest_area_less_the_penalty_of_all_unions_on_the_first_half(penalty):
    sums, directions = random().normal(size=(80, 5)), random(1).integers(4, size=80)
    labelled = label_channels(sums, directions, names=NAMES, seed=4, penalty=penalty)
    first, second = halves(directions[:, None] == np.arange(4), seed=4)
    unions = [union for size in (1, 2, 3) for union in itertools.combinations(range(4), size)]
    for channel, each in enumerate(labelled):
        areas = [roc_auc_score(np.isin(directions[first], union), sums[first, channel]) for union in unions]
        best = unions[int(np.argmax([area - penalty * len(union) for area, union in zip(areas, unions, strict=True)]))]
        assert each.candidate == " or ".join(NAMES[number] for number in best)
        assert each.auc == auc(sums[second, channel], np.isin(directions[second], best))


def test_the_p_value_is_that_of_the_mann_whitney_test_on_the_held_out_half():
    sums, directions = direction_channels(60)
    sums = sums + 4 * random(8).normal(size=sums.shape)
    labelled = label_channels(sums, directions, names=NAMES, seed=0)
    _, second = halves(directions[:, None] == np.arange(4), seed=0)
    for each in labelled:
        member = np.isin(directions[second], [NAMES.index(name) for name in each.candidate.split(" or ")])
        values = sums[second, each.channel]
        expected = mannwhitneyu(values[member], values[~member], alternative="greater", method="exact").pvalue
        assert each.p == pytest.approx(expected, abs=0.015)


def test_noise_gets_a_label_no_more_often_than_the_level_says():
    directions = np.arange(60) % 4
    wrong = [
        any(
            each.label
            for each in label_channels(
                random(seed).normal(size=(60, 4)), directions, names=NAMES, seed=seed, permutations=199
            )
        )
        for seed in range(200)
    ]
    assert np.mean(wrong) < 0.09


def test_a_dead_channel_has_no_label_and_says_so():
    sums, directions = direction_channels(100)
    dead = label_channels(sums, directions, names=NAMES, seed=0)[3]
    assert (dead.label, dead.candidate, dead.auc, dead.note) == (None, None, None, "dead: its sum does not vary")
    assert math.isnan(dead.p) and math.isnan(dead.adjusted_p)


def test_where_all_channels_are_dead_none_has_a_label():
    labelled = label_channels(np.ones((40, 2)), np.arange(40) % 4, names=NAMES, seed=0)
    assert [each.note for each in labelled] == ["dead: its sum does not vary"] * 2


def test_labels_may_be_booleans_of_which_an_input_has_none_or_several():
    generator = random()
    flags = generator.integers(2, size=(300, 2)).astype(bool)
    sums = generator.normal(size=(300, 2)) + 3 * np.stack([flags[:, 1], flags.any(axis=1)], axis=1)
    labelled = label_channels(sums, flags, names=("cheese", "corner"), seed=0)
    assert [each.label for each in labelled] == ["corner", "cheese or corner"]


def test_benjamini_hochberg_adjusts_less_than_holm():
    sums, directions = direction_channels(100)
    holm = label_channels(sums, directions, names=NAMES, seed=0)
    other = label_channels(sums, directions, names=NAMES, seed=0, correction="benjamini-hochberg")
    assert all(one.adjusted_p >= two.adjusted_p for one, two in zip(holm, other, strict=True) if one.auc)
    assert [each.p for each in holm if each.auc] == [each.p for each in other if each.auc]


def test_labels_print_as_a_table_with_the_labelled_channels_first_and_as_records():
    sums, directions = direction_channels(400)
    labelled = label_channels(np.concatenate([sums, sums, sums], axis=1), directions, names=NAMES, seed=0)
    lines = repr(labelled).splitlines()
    assert lines[0] == (
        "18 channels: 12 with a label, 3 without, 3 dead; chosen on 200 inputs, scored on 200 others, "
        "p adjusted by holm"
    )
    assert lines[1].split() == ["channel", "label", "candidate", "auc", "low", "high", "p", "adjusted", "p", "note"]
    assert lines[-1] == "... 2 more"
    assert [each.channel for each in labelled.best("UP")] == [0, 6, 12]
    frame = labelled.to_pandas()
    assert frame["label"].tolist()[:4] == ["UP", "DOWN or LEFT", "no label", "no label"]
    assert frame["note"].tolist()[2] == "not above the permuted labels"


# --- linear probes ---


def test_a_linear_probe_tells_what_no_single_channel_tells():
    sums = random().normal(size=(300, 5))
    labels = sums[:, :4].sum(axis=1) > 1
    probe = linear_probe(sums, labels)
    assert probe.accuracy.estimate > 0.93 and probe.auc.estimate > 0.98
    assert probe.base_rate == (~labels).mean()
    assert probe.gain.low > 0 and probe.p < 1e-6
    assert max(auc(sums[:, channel], labels).estimate for channel in range(5)) < 0.85


def test_a_linear_probe_is_cross_validated_logistic_regression_written_out():
    sums = random().normal(size=(60, 3))
    labels = sums[:, 0] + random(1).normal(size=60) > 0.4
    scores = np.empty(60)
    for rest, part in StratifiedKFold(4, shuffle=True, random_state=7).split(sums, labels):
        middle, spread = sums[rest].mean(axis=0), sums[rest].std(axis=0)
        model = LogisticRegression().fit((sums[rest] - middle) / spread, labels[rest])
        scores[part] = model.decision_function((sums[part] - middle) / spread)
    probe = linear_probe(sums, labels, folds=4, seed=7)
    right, base = (scores > 0) == labels, ~labels
    assert probe.accuracy == wilson_interval(int(right.sum()), 60)
    assert probe.auc.estimate == pytest.approx(roc_auc_score(labels, scores))
    assert probe.p == mcnemar_exact(int((right & ~base).sum()), int((~right & base).sum()))


def test_a_linear_probe_of_noise_is_no_better_than_the_base_rate():
    gains = [linear_probe(random(seed).normal(size=(80, 4)), np.arange(80) % 4 == 0).gain for seed in range(20)]
    assert np.mean([gain.low > 0 for gain in gains]) <= 0.1 and np.mean([gain.estimate for gain in gains]) < 0.01


def test_a_linear_probe_prints_as_a_table():
    labels = np.arange(80) % 4 == 0
    probe = linear_probe(random().normal(size=(80, 2)) + 9 * labels[:, None], labels)
    lines = repr(probe).splitlines()
    assert lines[0] == "Linear probe, 5 folds of 80 inputs"
    assert lines[3].split() == ["base", "rate", "0.75", "80"]
    assert probe.to_pandas()["quantity"].tolist() == ["accuracy", "base rate", "gain", "AUC"]


def test_a_missing_scikit_learn_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(errors.MissingPackageError) as caught:
        linear_probe(np.zeros((20, 2)), np.arange(20) < 10)
    assert str(caught.value) == "scikit-learn is not installed: pip install scikit-learn"


# --- what is refused ---

LABELS = np.arange(20) % 2 == 0
SUMS = np.arange(20.0)


def plain():
    model = build("plain_cnn")
    return hook_points(model.module, *model.inputs(2))


def test_a_model_is_traced_with_the_first_batch_and_no_batch_is_lost():
    model, images = nn.Conv2d(3, 8, 3), torch.randn(10, 3, 5, 5)
    expected = channel_sums(hook_points(model, images), images, ".out", batch_size=4)
    for inputs in (images, iter(images.split(4)), list(images.split(4))):
        assert np.array_equal(channel_sums(model, inputs, ".out", batch_size=4), expected)


def test_sums_of_neither_a_model_nor_its_hook_points_are_refused():
    with pytest.raises(TypeError, match=r"^Expected HookPoints or a torch\.nn\.Module, not list\.$"):
        channel_sums([], torch.zeros(2, 2), "")


def test_a_model_without_any_batch_cannot_be_traced():
    with pytest.raises(
        errors.BatchAxisError, match="There are no inputs to trace the model with. Give one batch at least."
    ):
        channel_sums(nn.Linear(2, 2), [], "")


REFUSED = {
    "a batch on another axis": (
        lambda: channel_sums(
            hook_points(nn.LSTM(3, 4), torch.randn(70, 10, 3)).select(".*[0]"), torch.randn(70, 10, 3), ".out[0]"
        ),
        "The model takes its batch on axis 1 of its first input, but inputs stand on axis 0. Wrap the model in a "
        "module that takes the batch first.",
    ),
    "several layers": (
        lambda: channel_sums(
            hook_points(nn.LSTM(3, 4, 2, batch_first=True), torch.randn(9, 7, 3)), torch.randn(9, 7, 3), ".out[1][0]"
        ),
        "Site('.out[1][0]') has 2 layers, each with features of its own: name one, as in layer=0.",
    ),
    "a sum to predict from that is not finite": (
        lambda: ThresholdProbe.fit(SUMS, LABELS).predict([[1.0, math.nan]]),
        "sums[0, 1] is not finite: leave that input out.",
    ),
    "an empty batch": (
        lambda: channel_sums(plain(), torch.zeros(2, 3, 8, 8), "relu1", batch_size=0),
        "batch_size is 0, but a batch has at least one input.",
    ),
    "no inputs": (
        lambda: channel_sums(plain(), torch.zeros(0, 3, 8, 8), "relu1"),
        "inputs is empty: give at least one input.",
    ),
    "a site without channels": (
        lambda: channel_sums(
            hook_points(nn.Identity(), torch.zeros(2, 3), axes={".out": ("batch", "row")}), torch.zeros(2, 3), ".out"
        ),
        "Site('.out') has axes (batch, row). Channel sums need the batch and one axis named channel or feature; "
        "hook_points(..., axes={...}) names axes.",
    ),
    "a site whose batch axis is not proved": (
        lambda: channel_sums(hook_points(nn.Linear(3, 2), torch.zeros(3)), torch.zeros(2, 3), ".out"),
        "Site('.out') has axes (feature), and its batch axis is not proved. Channel sums need the batch and one axis "
        "named channel or feature; hook_points(..., axes={...}) names axes.",
    ),
    "sums of many channels": (
        lambda: ThresholdProbe.fit(np.zeros((20, 2)), LABELS),
        "sums has shape (20, 2), but its axes must be (input), none of length 0.",
    ),
    "sums of one channel": (
        lambda: label_channels(SUMS, LABELS, names=NAMES, seed=0),
        "sums has shape (20,), but its axes must be (input, channel), none of length 0.",
    ),
    "a sum that is not finite": (
        lambda: linear_probe(np.where(np.eye(20, 2), math.inf, 0), LABELS),
        "sums[0, 0] is not finite: leave that input out.",
    ),
    "labels that are no booleans": (
        lambda: ThresholdProbe.fit(SUMS, LABELS.astype(int)),
        "labels is int64 of shape (20,): give one boolean for each of the 20 inputs, such as directions == 0.",
    ),
    "too few of a label": (
        lambda: ThresholdProbe.fit(SUMS, SUMS < 3),
        "There are 3 positives and 17 negatives, but at least 4 of each are needed.",
    ),
    "too few of a label under shift": (
        lambda: ThresholdProbe.fit(SUMS, LABELS).transfer(SUMS, SUMS < 1),
        "There are 1 positives and 19 negatives, but at least 2 of each are needed.",
    ),
    "a channel that does not vary": (
        lambda: ThresholdProbe.fit(np.full(20, 3.0), LABELS),
        "All 10 sums of the fitting half are 3: a channel that does not vary has no threshold.",
    ),
    "a precision in percent": (
        lambda: ThresholdProbe.fit_precision(SUMS, LABELS, min_precision=99),
        "min_precision is 99, but a precision lies between 0 and 1, such as 0.99.",
    ),
    "a negative seed": (
        lambda: ThresholdProbe.fit(SUMS, LABELS, seed=-1),
        "seed is -1, but it must be a whole number from 0 on.",
    ),
    "one name": (
        lambda: label_channels(SUMS[:, None], LABELS[:, None], names=["UP"], seed=0),
        "names is ('UP',): give two to ten different names, one per label.",
    ),
    "a label without a name": (
        lambda: label_channels(SUMS[:, None], np.arange(20) % 5, names=NAMES, seed=0),
        "labels holds 4, but the 4 names have the numbers 0 to 3.",
    ),
    "labels of another number of inputs": (
        lambda: label_channels(SUMS[:, None], np.arange(19) % 4, names=NAMES, seed=0),
        "labels is int64 of shape (19,): for 20 inputs and 4 names give (20,) whole numbers from 0 on, "
        "or (20, 4) booleans.",
    ),
    "a label that is too rare": (
        lambda: label_channels(SUMS[:, None], np.minimum(np.arange(20), 3), names=NAMES, seed=0),
        "Label 'UP' is on 1 of 20 inputs, but four with and four without it are needed, half of them to choose by and "
        "half to score. Leave it out, or give more inputs.",
    ),
    "permutations that cannot reach the level": (
        lambda: label_channels(
            random().normal(size=(20, 30)), np.arange(20) % 4, names=NAMES, seed=0, permutations=199
        ),
        "permutations is 199, with which no adjusted p-value of 30 channels can reach 0.05: give at least 599.",
    ),
    "a level in percent": (
        lambda: label_channels(SUMS[:, None], np.arange(20) % 4, names=NAMES, seed=0, level=5),
        "level is 5, but it must lie between 0 and 1, such as 0.05.",
    ),
    "an unknown correction": (
        lambda: label_channels(SUMS[:, None], np.arange(20) % 4, names=NAMES, seed=0, correction="bonferroni"),
        "correction='bonferroni': it is one of 'holm', 'benjamini-hochberg'.",
    ),
    "one fold": (
        lambda: linear_probe(SUMS[:, None], LABELS, folds=1),
        "folds is 1, but cross-validation needs at least two.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_probe_can_be_fitted_to_is_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(errors.ProbeError) as caught:
        call()
    assert str(caught.value) == message


class Complex(nn.Module):
    def forward(self, vector: Tensor) -> Tensor:
        return torch.complex(vector, 2 * vector)


def test_sums_of_complex_activations_are_refused_where_half_of_them_would_be_lost() -> None:
    points = hook_points(nn.Sequential(Complex()), torch.randn(2, 3), axes={"0": ("batch", "feature")})
    with pytest.raises(errors.SiteError, match="complex64.*view_as_real"):
        channel_sums(points, torch.randn(2, 3), "0")


class Bank(nn.Module):
    """Looks every input up among keys that all of them share."""

    def __init__(self):
        super().__init__()
        self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, vector, keys):
        return self.head(torch.softmax(self.query(vector) @ keys.T, -1) @ keys)


def test_an_input_that_the_trace_shows_to_have_no_batch_is_not_cut_where_it_is_as_long_as_there_are_inputs():
    model, vectors, keys = Bank(), torch.randn(20, 4), torch.randn(20, 4)
    points = hook_points(model, vectors[:3], keys)
    expected = model(vectors, keys).detach()
    np.testing.assert_allclose(channel_sums(points, (vectors, keys), "head", batch_size=6), expected, atol=1e-6)


def test_a_site_that_names_rows_is_refused_since_each_batch_has_rows_of_its_own(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    with pytest.raises(errors.ProbeError, match="names rows.*leave batch= out"):
        channel_sums(points, *plain_cnn.inputs(6), points.site("relu1", batch=[0, 2]))
