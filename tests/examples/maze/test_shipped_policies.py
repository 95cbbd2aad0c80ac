"""What a report says of the policies that stand side by side."""

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


def test_of_one_policy_alone_it_is_said_that_a_control_would_tell_how_much_was_taught():
    mine = {"mine": IMITATION["imitation"]}
    assert introduction(mine).startswith("One policy only.")
    assert list(described(mine)) == [] and compared(mine) == []


def test_what_remains_without_the_teaching_is_told_in_the_numbers_of_the_tables():
    assert compared(IMITATION | CONTROL | SEED) == [
        {
            "quantity": "AUC of the sum of the channel for UP at relu3, cheese in distribution",
            "imitation": "0.930 (0.000 to 1.000), channel 27, n=1000",
            "control": "0.740 (0.000 to 1.000), channel 16, n=1000",
            "seed1": "0.900 (0.000 to 1.000), channel 3, n=1000",
        },
        *(
            {"quantity": f"false positives of the threshold on the channel for UP, {where} distribution"}
            | dict.fromkeys(("imitation", "control", "seed1"), told)
            for where, told in (("in", "11.0% (0.0% to 100.0%), n=500"), ("out of", "22.0% (0.0% to 100.0%), n=1000"))
        ),
        {
            "quantity": "P(cheese within 256 steps) of the unchanged policy, cheese top left",
            "imitation": "0.700 (0.000 to 1.000), n=250",
            "control": "0.400 (0.000 to 1.000), n=250",
            "seed1": "not measured",
        },
    ]


def test_the_first_paragraph_says_what_remains_without_the_teaching():
    told = introduction(IMITATION | CONTROL)
    assert "with an AUC of 0.740 (0.000 to 1.000) against 0.930 (0.000 to 1.000) for UP. But" in told


def test_what_else_differs_between_the_control_and_the_policy_under_study_is_told():
    told = introduction(IMITATION | CONTROL)
    assert "the control saw as many observations, but larger mazes and its own mistakes in the second half only" in told
    assert told.endswith("the control keeps the loss that teaches the mouse's cell.")


def test_without_a_control_it_stays_open_how_much_was_taught():
    assert introduction(IMITATION | SEED).endswith(
        "No policy without that teaching stands beside it here, so how much was taught stays open."
    )


def test_a_control_without_measurements_leaves_open_what_remains():
    assert introduction(IMITATION | {"control": {"pair": {}}}).endswith(
        "What remains without it stays open here: no sums, no ablation of the control policy."
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("imitation", "auxiliary losses taught its middle layers the field of directions"),
        ("control", "imitation without the field of directions but with the mouse's cell, on as many observations"),
        ("reward", "from the imitation policy, so its start was taught directions"),
        ("seed1", "the run of the imitation policy with another seed, directions taught too, on fewer"),
        ("seed2", "the run of the imitation policy with another seed, directions taught too, on fewer"),
    ],
)
def test_each_policy_is_called_what_it_is(name, what):
    assert what in dict(described(dict.fromkeys(POLICIES, {"sums": {}})))[name]


def test_a_policy_without_measurements_and_a_missing_policy_by_reward_are_told():
    told = dict(described(IMITATION | {"control": {}}))
    assert list(told) == ["imitation", "control", "reward"]
    assert told["control"].endswith("; not measured in this run.") and told["imitation"].endswith("mouse's cell.")
    assert told["reward"] == "no policy trained by reward stands beside them in this run."
