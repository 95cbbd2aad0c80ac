import copy

import numpy as np
import pytest
from studies import from_files, shipped_points

from maze.analysis.part import Study
from maze.measurements import distance as part


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "SIZE", 13)
        patch.setattr(part, "RESAMPLES", 99)
        patch.setattr("maze.analysis.part.SELECTION_LEVELS", 80)
        patch.setattr("maze.analysis.decision_squares.THRESHOLD_LEVELS", 80)
        yield Study(shipped_points(), {}, 12, seed=0)


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def test_shares_are_counted_in_bins_of_the_distance():
    distance, values = np.array([0.5, 3.9, 4.0, 9.0]), np.array([True, False, True, False])
    rows = part._shares("mouse", distance, values)
    assert [(row["from"], row["below"], row["n"], row["count"]) for row in rows] == [
        (0, 4, 2, 1),
        (4, 8, 1, 1),
        (8, 12, 1, 0),
    ]


def test_every_level_is_in_one_bin(study, tables):
    mouse = [row["n"] for row in tables["shares"] if row["measure"] == part.MOUSE]
    assert sum(mouse) == 2 * study.n


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
    ("shares", "told"),
    [
        ((0.9, 0.4, 0.4, 0.1), "never rises over the 4 bins"),
        (
            (0.9, 0.2, 0.3, 0.4),
            "rises between bins 2 of 3 times; the lowest is 20% (10% to 30%), with the cheese 4 to",
        ),
    ],
)
def test_a_fall_that_is_not_steady_is_told_as_such(shares, told):
    rows = [
        {"from": 4 * place, "below": 4 * place + 4, "n": 50, "share": share, "share_low": 0.1, "share_high": 0.3}
        for place, share in enumerate(shares)
    ]
    assert told in part._course(rows)


def test_a_correlation_that_is_not_known_is_an_open_claim(tables):
    changed = copy.deepcopy(tables)
    for row in changed["trends"]:
        known = row["measure"] == part.MOUSE
        ends = (-0.33, -0.5, -0.1) if known else (None,) * 3
        row |= dict(zip(("correlation", "correlation_low", "correlation_high"), ends, strict=True))
    assert part.finding(changed).agrees == "in part"


def test_a_policy_without_thresholds_and_without_variation_is_told_as_such(study, monkeypatch):
    monkeypatch.setattr("maze.analysis.decision_squares.thresholds", lambda _, directions: dict.fromkeys(directions))
    seen = part.squares.at_decision_squares
    monkeypatch.setattr(part.squares, "at_decision_squares", lambda *given: still(seen(*given)))
    tables = part.measure(study)
    assert part.finding(tables).agrees == "not comparable"
    assert part.figure(tables).axes


def still(seen):
    """The same levels, on which the mouse always goes to the cheese and no sum varies."""
    return seen._replace(moves=np.eye(4)[seen.cheese], sums=np.ones_like(seen.sums))
