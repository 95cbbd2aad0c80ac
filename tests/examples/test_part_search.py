import copy

import pytest
from studies import shipped_points, small_study

from chanpatch.statistics import auc
from maze.parts import search as part
from maze.tables import SITE


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


def test_a_channel_is_chosen_on_its_own_mazes_and_scored_on_others(study, tables):
    levels = study.levels("search choice", 3 * 16, size=25, cheese="in distribution", mouse="anywhere")
    opened, labels = part.open_to(part.Direction.UP, levels, 16)
    sums = part._all_sums(study.points, opened)[SITE]
    areas = [auc(sums[:, channel], labels).estimate for channel in range(32)]
    (row,) = (row for row in tables["hook_points"] if (row["hook_point"], row["direction"]) == (SITE, "UP"))
    assert areas[row["channel"]] == max(areas)
    assert row["n_in"] == row["n_out"] == 12


def test_the_contrast_is_over_all_channels_that_are_searched(study, tables):
    levels = study.levels("search choice", 2, size=25)
    many = sum(sums.shape[1] for sums in part._all_sums(study.points, levels).values())
    assert {row["searched"] for row in tables["contrast"]} == {many}
    assert len(tables["contrast"]) == part.SHOWN


@pytest.mark.parametrize(
    ("highest", "knowing", "agrees"),
    [(SITE, 4, "yes"), (SITE, 2, "in part"), ("embedder.fc", 4, "in part"), ("embedder.fc", 0, "no")],
)
def test_the_finding_agrees_when_relu3_differs_most_and_tells_all_directions(tables, highest, knowing, agrees):
    changed = copy.deepcopy(tables)
    changed["contrast"][0]["site"] = f"Site('{highest}', channel=27)"
    filled = {name: 0.9 for name in ("in", "in_high", "out", "out_high")} | {"out_low": 0.8, "in_low": 0.4}
    for row in changed["hook_points"]:
        row |= filled
    for row in [row for row in changed["hook_points"] if row["hook_point"] == SITE][:knowing]:
        row["in_low"] = 0.85
    assert part.finding(changed).agrees == agrees


def test_areas_that_could_not_be_estimated_are_left_out(tables):
    empty = copy.deepcopy(tables)
    for row in empty["hook_points"]:
        row["out"] = None
    assert part.finding(empty).agrees == "not comparable"
    assert part.figure(tables).axes
