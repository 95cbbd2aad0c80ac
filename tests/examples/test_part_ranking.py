import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from studies import shipped_points, small_study

from maze.levels import draw_levels, observe, policy_input
from maze.pairs import contrastive_pairs, rotations
from maze.parts import ranking as part
from maze.states import write_mazes
from maze.tables import SITE


def study_with_told_channels(live):
    """Channel 27 tells UP on the made-up selection mazes, channel 13 DOWN or LEFT, and the others nothing."""
    rng = np.random.default_rng(0)
    first = np.arange(160) % 4
    sums = rng.normal(size=(160, 32))
    sums[:, 27] += 5 * (first == 2)
    sums[:, 13] += 5 * (first <= 1)
    sums[:, [channel for channel in range(32) if channel not in live]] = 0
    study = small_study(4, live)
    study.__dict__["selection"] = replace(study.selection, sums=sums, first=first)
    return study


@pytest.fixture(scope="module")
def tables():
    return part.measure(study_with_told_channels(tuple(range(32))))


def test_the_difference_is_the_mean_over_the_rotations_of_the_absolute_one(tables):
    base = draw_levels(1, size=7, seed=0)[0]
    expected = np.zeros(32)
    for pair in rotations(contrastive_pairs()[0]):
        recorded = []
        module = shipped_points().model.get_submodule(SITE)
        hook = module.register_forward_hook(lambda module, inputs, output, kept=recorded: kept.append(output))
        with torch.no_grad():
            shipped_points().model(torch.from_numpy(policy_input(observe(write_mazes(pair, base)))))
        hook.remove()
        sums = recorded[0].double().sum(dim=(2, 3)).numpy()
        expected += np.abs(sums[0] - sums[1]) / 4
    for row in tables["ranking"]:
        assert row["absolute"] == pytest.approx(expected[row["channel"]], abs=1e-3)
    assert [row["rank"] for row in tables["ranking"]] == list(range(1, 33))
    assert sorted(row["rank_five_pairs"] for row in tables["ranking"]) == list(range(1, 33))


def test_a_channel_gets_the_label_or_the_union_that_its_sum_tells(tables):
    labels = {row["channel"]: row["label"] for row in tables["ranking"]}
    assert (labels[27], labels[13]) == ("UP", "LEFT or DOWN")


def test_the_finding_agrees_when_the_first_ten_have_labels_and_says_how_many_others_do(tables):
    changed = copy.deepcopy(tables)
    for row in changed["ranking"]:
        row["label"] = "RIGHT"
    assert part.finding(changed).agrees == "yes"
    assert "of the 16 live channels that it ranks lower, 16 have a label" in part.finding(changed).does_not_follow
    for row in changed["ranking"][:6]:
        row["label"] = None
    changed["ranking"][0]["channel"] = 99
    told = part.finding(changed)
    assert told.agrees == "no"
    assert "99 no label" in told.ours


def test_few_live_channels_are_ranked_and_drawn():
    tables = part.measure(study_with_told_channels((13, 27)))
    assert {row["channel"] for row in tables["ranking"]} == {13, 27}
    assert part.figure(tables).axes
    assert part.finding(tables).agrees == "yes"
