import copy

import numpy as np
import pytest
from studies import from_files, shipped_points

from maze.analysis.part import Study
from maze.measurements import distance as part
from maze.states import read_mazes


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "SIZE", 13)
        patch.setattr(part, "BINS", 3)
        patch.setattr(part, "FEWEST", 4)
        patch.setattr(part, "RESAMPLES", 99)
        patch.setattr("maze.analysis.part.SELECTION_LEVELS", 80)
        patch.setattr("maze.analysis.decision_squares.THRESHOLD_LEVELS", 80)
        yield Study(shipped_points(), {}, 12, seed=0)


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def test_shares_are_counted_in_bins_of_the_distance_and_left_out_for_few_levels(monkeypatch):
    monkeypatch.setattr(part, "FEWEST", 2)
    distance, values = np.array([0.5, 3.9, 4.0, 9.0, 9.5]), np.array([True, False, True, False, False])
    rows = part._shares("mouse", distance, values)
    assert [(row["from"], row["below"], row["n"], row["count"]) for row in rows] == [(0, 4, 2, 1), (8, 12, 2, 0)]


def test_every_bin_has_equally_many_levels_and_those_outside_the_region_are_apart(study, tables):
    mouse = [row for row in tables["shares"] if row["measure"] == part.MOUSE]
    assert [(row["from"], row["n"]) for row in mouse] == [(0, 8), (4, 8), (8, 8)]
    levels = [
        each
        for low in (0, 4, 8)
        for each in study.levels(f"distance from {low}", 8, size=13, cheese=(low, low + 4), mouse="decision square")
    ]
    outside = sum(bool((cell < 8).any()) for cell in read_mazes(levels).cheese)
    (row,) = (
        row
        for row in tables["trends"]
        if (row["measure"], row["cheese"], row["within"]) == (part.MOUSE, part.SPLITS[1], "no strata")
    )
    assert row["n"] == outside < 24


def test_figure_and_finding_are_made_from_the_files(tables, tmp_path):
    back = from_files(tables, tmp_path)
    assert part.finding(back) == part.finding(tables)
    assert len(part.figure(back).axes) == 2


def test_the_finding_changes_with_the_cells_it_is_made_of(tables):
    changed = copy.deepcopy(tables)
    for row in changed["trends"]:
        row |= {"correlation": -0.33, "correlation_low": -0.5, "correlation_high": -0.1}
    found = part.finding(changed)
    assert found.agrees == "yes" and "-0.33" in found.ours
    for row in changed["trends"]:
        row["correlation_high"] = 0.2
    assert part.finding(changed).agrees == "undecided"
    for row in changed["trends"]:
        row |= {"correlation": 0.3, "correlation_low": 0.1, "correlation_high": 0.4}
    assert part.finding(changed).agrees == "no"


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ((0.9, 0.4, 0.4, 0.1), "never rises over the 4 bins"),
        (
            (0.9, 0.2, 0.3, 0.4),
            "rises between bins 2 of 3 times; the lowest is 20% (10% to 30%), with the cheese 4 to",
        ),
    ],
)
def test_a_fall_that_is_not_steady_is_told_as_such(shares, sentence):
    rows = [
        {"from": 4 * place, "below": 4 * place + 4, "n": 50, "share": share, "share_low": 0.1, "share_high": 0.3}
        for place, share in enumerate(shares)
    ]
    assert sentence in part._course(rows)


def test_only_the_correlation_of_the_mouses_choice_over_all_levels_decides(tables):
    changed = copy.deepcopy(tables)
    for row in changed["trends"]:
        decides = (row["measure"], row["cheese"], row["within"]) == (part.MOUSE, part.BOTH, "no strata")
        ends = (-0.33, -0.5, -0.1) if decides else (None,) * 3
        row |= dict(zip(("correlation", "correlation_low", "correlation_high"), ends, strict=True))
    assert part.finding(changed).agrees == "yes"


def test_a_policy_without_thresholds_and_without_variation_is_told_as_such(study, monkeypatch):
    monkeypatch.setattr("maze.analysis.decision_squares.thresholds", lambda _, directions: dict.fromkeys(directions))
    seen = part.squares.at_decision_squares
    monkeypatch.setattr(part.squares, "at_decision_squares", lambda *given: still(seen(*given)))
    tables = part.measure(study)
    assert part.finding(tables).agrees == "undecided"
    assert part.figure(tables).axes


def still(seen):
    """The same levels, on which the mouse always goes to the cheese and no sum varies."""
    return seen._replace(moves=np.eye(4)[seen.cheese], sums=np.ones_like(seen.sums))
