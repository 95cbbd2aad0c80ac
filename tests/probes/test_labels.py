"""Labels of channels whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, rankdata
from sklearn.metrics import roc_auc_score

from chanpatch import errors, label_channels
from chanpatch.probes import labels as labels_file
from chanpatch.statistics import auc
from chanpatch.statistics.resampling import halves

NAMES = ("UP", "DOWN", "LEFT", "RIGHT")
LABELS = np.arange(20) % 2 == 0
SUMS = np.arange(20.0)


def random(seed=0):
    return np.random.default_rng(seed)


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


def test_noise_gets_a_label_no_more_often_than_the_level_says(monkeypatch):
    monkeypatch.setattr(labels_file, "PERMUTATIONS", 199)
    directions = np.arange(60) % 4
    wrong = [
        any(
            each.label for each in label_channels(random(seed).normal(size=(60, 4)), directions, names=NAMES, seed=seed)
        )
        for seed in range(200)
    ]
    assert np.mean(wrong) < 0.09


def test_one_of_many_channels_can_be_labelled_and_so_many_permutations_are_drawn_that_any_level_can_be_reached():
    sums = random().normal(size=(60, 600))
    sums[:, 7] += 9 * (np.arange(60) % 2)
    labelled = label_channels(sums, np.arange(60) % 2, names=("EVEN", "ODD"))
    assert labelled[7].adjusted_p == 1 / 10_000 and labelled[7].label == "ODD"
    assert "<0.001" in repr(labelled).splitlines()[2]
    strict = label_channels(sums[:, 6:8], np.arange(60) % 2, names=("EVEN", "ODD"), level=5e-5)
    assert strict[1].adjusted_p == 1 / 20_000 and strict[1].label == "ODD"


def test_the_adjusted_p_is_the_share_of_permutations_in_which_any_channel_stands_out_as_much():
    sums, directions = direction_channels(60)
    sums = sums + 4 * random(8).normal(size=sums.shape)
    labelled = label_channels(sums, directions, names=NAMES, seed=0)
    _, second = halves(directions[:, None] == np.arange(4), seed=0)
    ranks = rankdata(sums[second], axis=0)
    members = np.array([np.isin(directions[second], [NAMES.index(name) for name in each.candidate.split(" or ")])
                        for each in labelled])  # fmt: skip
    orders = [random(seed).permutation(30) for seed in range(2000)]
    drawn = np.array([[member[order] @ ranks[:, row] for row, member in enumerate(members)] for order in orders])
    unit = drawn.std(axis=0)
    largest = ((drawn - drawn.mean(axis=0)) / unit).max(axis=1)
    for row, each in enumerate(labelled):
        own = (members[row] @ ranks[:, row] - drawn[:, row].mean()) / unit[row]
        assert each.adjusted_p == pytest.approx(np.mean(largest >= own), abs=0.05)
        assert each.adjusted_p >= each.p


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
    assert label_channels(sums, flags.astype(int), names=("cheese", "corner")) == labelled


def test_labels_print_as_a_table_with_the_labelled_channels_first_and_as_records():
    sums, directions = direction_channels(400)
    labelled = label_channels(np.concatenate([sums] * 4, axis=1), directions, names=NAMES, seed=0)
    lines = repr(labelled).splitlines()
    assert lines[0] == (
        "24 channels: 16 with a label, 4 without, 4 dead; chosen on 200 inputs, scored on 200 others, "
        "p adjusted for all channels"
    )
    assert lines[1].split() == ["channel", "label", "candidate", "auc", "low", "high", "p", "adjusted", "p", "note"]
    assert lines[-1] == "... 4 more"
    assert [each.channel for each in labelled.best("UP")] == [0, 6, 12, 18]
    frame = labelled.to_pandas()
    assert frame["label"].tolist()[:4] == ["UP", "DOWN or LEFT", "no label", "no label"]
    assert frame["note"].tolist()[2] == "not significant under label permutation"


REFUSED = {
    "sums of one channel": (
        lambda: label_channels(SUMS, LABELS, names=NAMES, seed=0),
        "sums must be a nonempty array with axes (input, channel); got shape (20,).",
    ),
    "one name": (
        lambda: label_channels(SUMS[:, None], LABELS[:, None], names=["UP"], seed=0),
        "names must contain two to ten different strings, one per label; got ('UP',).",
    ),
    "names that are numbers": (
        lambda: label_channels(SUMS[:, None], np.arange(20) % 2, names=range(2), seed=0),  # type: ignore[arg-type]
        "names must contain two to ten different strings, one per label; got (0, 1).",
    ),
    "an infinite penalty": (
        lambda: label_channels(SUMS[:, None], np.arange(20) % 4, names=NAMES, seed=0, penalty=float("inf")),
        "penalty must be finite and not negative, such as 0.02; got inf.",
    ),
    "a label without a name": (
        lambda: label_channels(SUMS[:, None], np.arange(20) % 5, names=NAMES, seed=0),
        "labels contains 4, but the 4 names have indices 0 to 3.",
    ),
    "labels of another number of inputs": (
        lambda: label_channels(SUMS[:, None], np.arange(19) % 4, names=NAMES, seed=0),
        "labels has dtype int64 and shape (19,). For 20 inputs and 4 names, pass nonnegative integers of shape (20,) "
        "or booleans of shape (20, 4).",
    ),
    "a label that is too rare": (
        lambda: label_channels(SUMS[:, None], np.minimum(np.arange(20), 3), names=NAMES, seed=0),
        "1 of 20 inputs have label 'UP', but at least four inputs must have the label and at least four must not. "
        "Omit the label, or pass more inputs.",
    ),
    "a level in percent": (
        lambda: label_channels(SUMS[:, None], np.arange(20) % 4, names=NAMES, seed=0, level=5),
        "level must be greater than 0 and less than 1, such as 0.05; got 5.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_channel_can_be_labelled_by_is_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(errors.ProbeError) as caught:
        call()
    assert str(caught.value) == message
