"""The report's description of the policies that it compares."""

import pytest

from maze.policy.shipped import POLICIES, compared, described, introduction


def sums(channel, area):
    """A policy's tables of the sums, with one direction and its threshold."""
    named = {"direction": "UP", "channel": channel, "n_fit": 500, "n_shifted": 1000}
    ends = {f"{split}_{end}": end == "high" and 1.0 or 0.0 for split in ("fit", "shifted") for end in ("low", "high")}
    return {
        "transfer": [
            {**named, **ends, "quantity": "false-positive rate", "fit": 0.11, "shifted": 0.22},
            {**named, **ends, "quantity": "base rate", "fit": 0.5, "shifted": 0.5},
        ],
        "goals": [
            {**named, "split": split, "n": 1000, "cheese": of, "cheese_low": 0.0, "cheese_high": 1.0}
            for split, of in (("in distribution", area), ("out of distribution", 0.5))
        ],
    }


def ablation(original):
    """A policy's tables of the ablation, with two rows of one place."""
    row = {"cheese": "top left", "n": 250, "original": original, "original_low": 0.0, "original_high": 1.0}
    return {"effects": [row, row]}


IMITATION = {"imitation": {"sums": sums(27, 0.93), "ablation": ablation(0.7), "pair": {}}}
CONTROL = {"control": {"sums": sums(16, 0.74), "ablation": ablation(0.4)}}
SEED = {"seed1": {"sums": sums(3, 0.9)}}


def test_a_run_of_one_policy_names_the_missing_control():
    mine = {"mine": IMITATION["imitation"]}
    assert introduction(mine).endswith("A control policy would show how much.")
    assert list(described(mine)) == [] and compared(mine) == []


def test_the_comparison_holds_the_numbers_of_the_tables():
    assert compared(IMITATION | CONTROL | SEED) == [
        {
            "quantity": "AUC of the sum of the channel for UP at relu3, cheese in distribution",
            "imitation": "0.930 (0.000 to 1.000), channel 27, n=1000",
            "control": "0.740 (0.000 to 1.000), channel 16, n=1000",
            "seed1": "0.900 (0.000 to 1.000), channel 3, n=1000",
        },
        *(
            {"quantity": f"false positives of the threshold on the channel for UP, {where} distribution"}
            | dict.fromkeys(("imitation", "control", "seed1"), share)
            for where, share in (("in", "11.0% (0.0% to 100.0%), n=500"), ("out of", "22.0% (0.0% to 100.0%), n=1000"))
        ),
        {
            "quantity": "P(cheese within 256 steps) of the unchanged policy, cheese top left",
            "imitation": "0.700 (0.000 to 1.000), n=250",
            "control": "0.400 (0.000 to 1.000), n=250",
            "seed1": "not measured",
        },
    ]


def test_the_introduction_names_the_other_differences_of_the_control():
    text = introduction(IMITATION | CONTROL)
    assert "the control saw as many observations, but larger mazes and its own mistakes in the second half only" in text
    assert text.endswith("The control keeps the loss for the mouse's cell.")


@pytest.mark.parametrize("others", [SEED, {"control": {"pair": {}}}])
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
