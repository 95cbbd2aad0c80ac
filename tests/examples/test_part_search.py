import copy

import numpy as np
import pytest
from studies import shipped_points, small_study

from chanpatch.statistics import auc
from maze.analysis.forwards import SITE
from maze.measurements import search as part


@pytest.fixture(scope="module")
def study():
    return small_study(12, tuple(range(32)))


@pytest.fixture(scope="module")
def tables(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "CHOICE_LEVELS", 16)
        patch.setattr(part, "PAIR_LEVELS", 8)
        yield part.measure(study)


def test_every_module_with_channels_is_searched_once_and_no_alias():
    searched = part._searched(shipped_points())
    assert SITE in searched and "embedder.fc" in searched
    assert "embedder.flatten" not in searched and "embedder.block1" not in searched
    assert len(set(searched)) == len(searched)
    assert [name for name in shipped_points() if name in searched] == searched


@pytest.mark.parametrize("hook_point", [SITE, "embedder.fc"])
def test_a_channel_is_chosen_either_way_round_on_its_own_mazes_and_scored_so_on_others(study, tables, hook_point):
    areas = channel_areas(study, "search choice", 16, hook_point)
    (row,) = (row for row in tables["hook_points"] if (row["hook_point"], row["direction"]) == (hook_point, "UP"))
    telling = [abs(each - 0.5) for each in areas]
    assert telling[row["channel"]] == pytest.approx(max(telling))
    assert row["chosen_by"] == pytest.approx(0.5 + max(telling))
    assert row["told_by"] == ("high sums" if areas[row["channel"]] >= 0.5 else "low sums")
    scored = channel_areas(study, "search in", 12, hook_point)[row["channel"]]
    assert row["in"] == pytest.approx(scored if row["told_by"] == "high sums" else 1 - scored)
    assert row["n_in"] == row["n_out"] == 12


def channel_areas(study, purpose, n, hook_point):
    levels = study.levels(purpose, 3 * n, size=25, cheese="in distribution", mouse="anywhere")
    opened, labels = part.open_to(part.Direction.UP, levels, n)
    sums = part._all_sums(study.points, opened)[hook_point]
    return [auc(column, labels).estimate if np.ptp(column) else 0.5 for column in sums.T]


def test_the_contrast_is_over_all_channels_that_are_searched(study, tables):
    levels = study.levels("search choice", 2, size=25)
    many = sum(sums.shape[1] for sums in part._all_sums(study.points, levels).values())
    assert {row["searched"] for row in tables["contrast"]} == {many}
    assert len(tables["contrast"]) == part.SHOWN


@pytest.mark.parametrize(("direction", "knowing", "agrees"), [("UP", 4, "yes"), ("RIGHT", 0, "yes"), ("LEFT", 4, "no")])
def test_the_finding_agrees_when_the_pairs_channel_differs_most(tables, direction, knowing, agrees):
    changed = copy.deepcopy(tables)
    filled = {name: 0.9 for name in ("in", "in_high", "out", "out_high", "out_low")} | {"in_low": 0.85}
    at = [row for row in changed["hook_points"] if row["hook_point"] == SITE]
    for number, row in enumerate(at):
        row |= filled | ({} if number < knowing else {"in_low": 0.6, "in_high": 0.7}) | {"channel": number}
    channels = {row["direction"]: row["channel"] for row in at}
    effect = {"effect": 2.0, "effect_low": 1.5, "effect_high": 2.5}
    changed["contrast"] = [
        changed["contrast"][0] | effect | {"site": f"Site('{SITE}', channel={channels[direction]})", "rank": 1}
    ]
    assert part.finding(changed).agrees == agrees


@pytest.mark.parametrize(
    ("top", "wanted", "stands_out"),
    [
        ((1.5, 2.5), (-1.7, -0.5), None),  # its size reaches the top's
        ((1.5, 2.5), (-1.4, -0.5), False),
        ((-0.1, 2.5), (-1.4, -0.5), None),  # nothing stands out
        ((None, None), (-1.4, -0.5), None),
    ],
)
def test_a_channel_of_other_directions_on_top_counts_against_it_only_beyond_the_intervals(top, wanted, stands_out):
    rows = [
        {"site": name, "effect_low": low, "effect_high": high} for name, (low, high) in (("other", top), ("up", wanted))
    ]
    assert part._stands_out(rows, ["up"]) is stands_out
    first_is_wanted = part._stands_out([rows[0] | {"site": "up"}], ["up"])
    assert first_is_wanted is (True if top == (1.5, 2.5) else None)


def test_the_best_hook_point_is_the_one_of_the_choice_mazes(tables):
    changed = copy.deepcopy(tables)
    for row in changed["hook_points"]:
        row |= {"in": 0.9, "out": 0.9, "chosen_by": 0.8}
    row = changed["hook_points"][-1]
    row |= {"in": 0.6, "chosen_by": 0.81, "told_by": "low sums"}
    told = f"{row['hook_point']} for {row['direction']} channel {row['channel']}, by low sums, AUC 0.600"
    assert told in part.finding(changed).follows


def test_areas_that_could_not_be_estimated_are_left_out(tables):
    empty = copy.deepcopy(tables)
    for row in empty["hook_points"]:
        row["out"] = None
    assert part.finding(empty).agrees == "not comparable"
    assert part.figure(tables).axes
