import pytest

from maze.analysis.cells import above, below, shown, verdict


@pytest.mark.parametrize(
    ("claims", "agrees"),
    [
        ((True, True), "yes"),
        ((True, None), "in part"),
        ((True, False), "in part"),
        ((None, None), "undecided"),
        ((None, False), "no"),
        ((), "not comparable"),
    ],
)
def test_a_result_disagrees_only_where_a_claim_is_contradicted(claims, agrees):
    assert verdict(*claims) == agrees


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.2, 0.3, True), (-0.3, 0.05, False), (0.0, 0.3, None), (None, None, None)]
)
def test_an_interval_on_both_sides_of_the_limit_leaves_a_claim_open(low, high, expected):
    row = {"x": 0.1, "x_low": low, "x_high": high}
    assert above(row, "x", 0.1) is expected
    assert below(row, "x", 0.1) is (None if expected is None else not expected)


@pytest.mark.parametrize("end", [None, float("nan")])
def test_an_estimate_without_an_interval_is_told_as_such(end):
    assert shown({"x": 0.8, "x_low": end, "x_high": end}, "x", ".2f") == "0.80 (no interval)"
