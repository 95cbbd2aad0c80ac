import copy

import numpy as np
import pytest
from studies import shipped_points, small_study

from chanpatch.statistics import auc
from maze.analysis import contrasts
from maze.analysis.forwards import SITE, activations
from maze.measurements import search as part


@pytest.fixture(scope="module")
def study():
    return small_study(12, tuple(range(32)))


@pytest.fixture(scope="module")
def tables(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "CHOICE_LEVELS", 16)
        patch.setattr(part, "PAIR_LEVELS", 8)
        patch.setattr(contrasts, "TEXTURES", 2)
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
    assert row["works_by"] == ("high sums" if areas[row["channel"]] >= 0.5 else "low sums")
    scored = channel_areas(study, "search in", 12, hook_point)[row["channel"]]
    assert row["in"] == pytest.approx(scored if row["works_by"] == "high sums" else 1 - scored)
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
    rows = tables["contrast"]
    assert [row["rank"] for row in rows[: part.SHOWN]] == list(range(1, part.SHOWN + 1))
    assert {row["site"] for row in rows if row["direction"] == "UP"} == {f"Site('{SITE}', channel=7)"}
    assert {row["direction"] for row in rows} == {"", "LEFT", "DOWN", "UP", "RIGHT"}
    sizes = [abs(row["effect"] or 0.0) for row in rows]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("p", "effect", "agrees"),
    [(0.05, 1.5, "yes"), (0.051, 1.5, "undecided"), (0.001, -1.5, "no"), (None, 1.5, "undecided")],
)
def test_the_corrected_p_of_the_up_channel_decides(tables, p, effect, agrees):
    changed = copy.deepcopy(tables)
    for row in changed["contrast"]:
        row |= {"p": p, "effect": effect} if row["direction"] == "UP" else {"p": 0.001, "effect": 9.0}
    for row in changed["hook_points"]:
        row |= {name: 0.9 for name in ("in", "in_low", "in_high", "out", "out_low", "out_high")}
    assert part.finding(changed).agrees == agrees


def test_single_activations_are_those_of_our_pair_by_hand(study, tables):
    pairs = [pair for pair in contrasts.drawn_pairs() if (pair.number, pair.turn) == (0, 0)][:4]
    sides = [activations(study.points, [pair.levels[side] for pair in pairs], SITE)[SITE] for side in range(2)]
    difference = (sides[0] - sides[1]).double().mean(dim=0)
    levels = study.levels("search pair background", 12, size=7, mouse="anywhere")
    std = activations(study.points, levels, SITE)[SITE].double().std(dim=0, unbiased=False)
    effect = difference / std.clamp(min=0.5 * float((std**2).mean().sqrt()))
    row, col = divmod(int(effect[7].abs().argmax()), 8)
    own = next(each for each in tables["activations"] if each["of_up_channel"])
    assert own["activation"] == f"{SITE}, channel=7, row={row}, col={col}"
    assert own["effect"] == pytest.approx(float(effect[7, row, col]), rel=1e-3)
    assert [each["rank"] for each in tables["activations"]][: part.SINGLES] == list(range(1, part.SINGLES + 1))


def test_the_best_hook_point_is_the_one_of_the_choice_mazes(tables):
    changed = copy.deepcopy(tables)
    for row in changed["hook_points"]:
        row |= {"in": 0.9, "out": 0.9, "chosen_by": 0.8}
    row = changed["hook_points"][-1]
    row |= {"in": 0.6, "chosen_by": 0.81, "works_by": "low sums"}
    sentence = f"{row['hook_point']} for {row['direction']} channel {row['channel']}, by low sums, AUC 0.600"
    assert sentence in part.finding(changed).follows


def test_areas_that_could_not_be_estimated_are_left_out(tables):
    empty = copy.deepcopy(tables)
    for row in empty["hook_points"]:
        row["out"] = None
    assert part.finding(empty).agrees == "not comparable"
    assert part.figure(tables).axes
