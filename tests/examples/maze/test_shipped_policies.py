"""The report's description of the policies that it compares."""

import pytest

from maze.policy.shipped import POLICIES, described, introduction

IMITATION, CONTROL = {"imitation": {"sums": {}, "pair": {}}}, {"control": {"sums": {}}}


def test_a_run_of_one_policy_names_the_missing_control():
    mine = {"mine": IMITATION["imitation"]}
    assert introduction(mine).endswith("A control policy would show how much.")
    assert list(described(mine)) == []


def test_the_introduction_names_the_other_differences_of_the_control():
    text = introduction(IMITATION | CONTROL)
    assert "the control saw as many observations, but larger mazes and its own mistakes in the second half only" in text
    assert text.endswith("The control keeps the loss for the mouse's cell.")


@pytest.mark.parametrize("others", [{"seed1": {"sums": {}}}, {"control": {"pair": {}}}])
def test_the_introduction_says_if_the_control_was_not_measured(others):
    assert introduction(IMITATION | others).endswith(
        "This run did not measure the control without that loss, so it does not show how much."
    )


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("imitation", "auxiliary losses taught its middle layers the field of directions"),
        ("control", "imitation without the field of directions but with the mouse's cell, on as many observations"),
        ("reward", "from the imitation policy, so its start was taught directions"),
        ("seed1", "the training of the imitation policy with another seed, directions taught too, on fewer"),
        ("seed2", "the training of the imitation policy with another seed, directions taught too, on fewer"),
    ],
)
def test_each_policy_has_its_description(name, description):
    assert description in dict(described(dict.fromkeys(POLICIES, {"sums": {}})))[name]


def test_a_policy_without_measurements_and_a_missing_policy_by_reward_are_named():
    given = dict(described(IMITATION | {"control": {}}))
    assert list(given) == ["imitation", "control", "reward"]
    assert given["control"].endswith("; not measured in this run.") and given["imitation"].endswith("mouse's cell.")
    assert given["reward"] == "a policy trained by reward is not part of this run."
