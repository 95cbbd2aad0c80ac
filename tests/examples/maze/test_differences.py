"""How the policies that stand side by side differ, told from their tables."""

import pytest

from chanpatch.statistics import difference_interval, wilson_interval
from maze.analysis.cells import cells
from maze.report.differences import differences, side_by_side

GOES = "channel for UP high, cheese in distribution: the mouse goes UP"


def decision(goes, n):
    """A policy's tables of the decision square, on which it goes UP so often when the channel is high."""
    row = {"direction": "UP", "split": "in distribution", "squares": "accepted", "n": n}
    shares = {**cells("goes", wilson_interval(goes, n)), **dict.fromkeys(nothing("to_cheese"))}
    return {"choices": [row | shares], "matched": []}


def nothing(prefix):
    return [f"{prefix}{end}" for end in ("", "_low", "_high")]


MAIN, CONTROL, SEED = decision(90, 100), decision(30, 50), decision(85, 100)
MEASURED = {"imitation": {"decision": MAIN}, "control": {"decision": CONTROL}, "seed1": {"pair": {}}}


def test_of_every_figure_that_two_policies_have_there_is_the_difference_of_independent_figures():
    main, control = differences(MEASURED)
    expected = difference_interval(wilson_interval(30, 50), wilson_interval(90, 100))
    assert (main["figure"], main["policy"], main["n"], main["value"]) == (GOES, "imitation", 100, 0.9)
    assert main["difference"] is None
    assert (control["policy"], control["n"], control["n_main"]) == ("control", 50, 100)
    assert [control[name] for name in nothing("difference")] == [expected.estimate, expected.low, expected.high]


def test_one_policy_differs_from_none():
    assert differences({"mine": {"decision": MAIN}}) == []


def test_a_part_that_only_another_policy_has_gives_no_rows():
    assert differences({"imitation": {}, "control": {"decision": CONTROL}}) == []


def test_the_table_has_a_column_for_every_policy_with_figures_and_says_how_many_intervals_leave_out_zero():
    text, (row,) = side_by_side(differences({**MEASURED, "seed2": {"decision": SEED}}))
    assert row == {
        "part": "decision",
        "figure": GOES,
        "imitation": "0.900 (0.826 to 0.945), n=100",
        "control": "0.600, difference -0.300 (-0.445 to -0.155), n=50",
        "seed2": "0.850, difference -0.050 (-0.144 to +0.044), n=100",
    }
    assert "1 of 2 intervals leave out 0" in text


@pytest.mark.parametrize("policy", ["imitation", "control"])
def test_a_figure_without_an_interval_is_left_out(policy):
    without = {**MEASURED[policy], "decision": decision(30, 50)}
    without["decision"]["choices"][0]["goes_low"] = None
    assert {row["policy"] for row in differences(MEASURED | {policy: without})} <= {"imitation"}


def test_the_area_of_a_direction_is_that_over_all_mazes():
    row = {"direction": "LEFT", "split": "out of distribution", "n": 300}
    sums = {"goals": [row | cells("cheese", wilson_interval(80, 100))], "transfer": [], "precise": []}
    rows = differences({"imitation": {"sums": sums}, "control": {"sums": sums}})
    assert {each["figure"] for each in rows} == {"AUC of the channel for LEFT, cheese out of distribution"}
    assert [(each["n"], each["value"]) for each in rows] == [(300, 0.8)] * 2
