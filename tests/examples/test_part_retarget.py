import copy

import numpy as np
import pytest
import torch
from studies import from_files, shipped_points, small_study

from maze.analysis.cells import shown
from maze.analysis.exact import ORIGINAL, Chains, cheese_and_corner
from maze.analysis.tables import action_tables
from maze.levels import draw_levels
from maze.measurements import retarget as part
from maze.states import mazes_from_pictures, read_mazes, write_mazes

BLOCKED = """
    ..C
    .#.
    M#.
"""
NO_WAY = """
    ...
    C#.
    M#.
"""


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "CHOOSING_LEVELS", 8)
        patch.setattr(part, "MULTIPLES", (1, 4))
        yield part.measure(small_study(6, (7,)))


def test_map_cells_count_from_the_top_left_of_the_world():
    mazes = read_mazes(draw_levels(2, size=25, seed=0))
    np.testing.assert_array_equal(part.map_cells(mazes, np.array([[24, 0], [0, 24]])), [[0, 0], [15, 15]])
    small = read_mazes(draw_levels(1, size=5, seed=0))
    np.testing.assert_array_equal(part.map_cells(small, np.array([[2, 2]])), [[8, 8]])  # the middle


def test_the_cheese_channels_are_those_that_the_cheese_raises_most_at_its_cell(tables):
    contrasts = [row["contrast"] for row in tables["channels"]]
    assert contrasts == sorted(contrasts, reverse=True)
    assert [row["chosen"] for row in tables["channels"]] == [True] * 3 + [False] * 29  # 11 of 128 are 3 of 32


def test_targets_are_squares_before_the_cheese_and_not_the_start():
    levels = draw_levels(20, size=7, seed=3)
    kept, targets = part.with_targets(levels, seed=0)
    chains = Chains.of(kept)
    assert (chains.states_at(targets) >= 0).all()
    assert (targets != 0).any(axis=1).all()


def test_levels_with_the_cheese_right_behind_the_only_exit_are_left_out():
    levels = write_mazes(mazes_from_pictures(BLOCKED, NO_WAY), draw_levels(1, size=3, seed=0)[0])
    kept, targets = part.with_targets(levels, seed=0)
    assert kept == levels[:1]
    assert len(targets) == 1


def test_only_the_channels_of_the_level_are_set_and_only_at_its_cell():
    cells, channels = np.array([[2, 3], [4, 5]]), np.array([[7, 1], [0, 9]])
    intervention = part.retargeted(shipped_points(), cells, channels, np.array([1.5, 2.5, 9.0]))
    (patch,) = intervention(np.array([1, 0, 1]))
    activation = torch.zeros(3, 32, 16, 16)
    changed = torch.where(patch.where, patch.edit(activation), activation)
    expected = torch.zeros(3, 32, 16, 16)
    for row, level in enumerate([1, 0, 1]):
        for channel, value in zip(channels[level], (1.5, 2.5), strict=True):
            expected[row, channel, cells[level, 0], cells[level, 1]] = value
    torch.testing.assert_close(changed, expected)


def test_the_magnitude_whose_interval_has_the_highest_low_end_is_the_one_that_is_used(tables):
    lows = [-np.inf if row["effect_low"] is None else row["effect_low"] for row in tables["magnitudes"]]
    best = tables["magnitudes"][int(np.argmax(lows))]
    assert [str(row["multiple"]) for row in tables["against"]] == [best["intervention"]] * 2


def test_a_magnitude_that_does_more_on_average_and_less_for_certain_is_not_taken():
    reached = np.array([[0.1] * 6, [0.18, 0.22] * 3, [0.01, 0.02, 0.03, 0.7, 0.71, 0.72]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "MULTIPLES", (1, 4))
        patch.setattr(part, "p_reached", lambda *_: reached)
        study = small_study(6, (7,))
        levels = study.levels("retarget choosing", 6, size=7)
        rows, multiple = part._magnitudes(study, levels, np.array([2, 3]), np.array([1.0, 2.0]))
    assert rows[1]["effect"] > rows[0]["effect"] and multiple == 1


def test_the_controls_are_compared_over_the_same_levels(tables):
    effects = {row["intervention"]: row["effect"] for row in tables["effects"]}
    assert {row["intervention"]: row["control"] for row in tables["against"]} == part.CONTROLS
    for row in tables["against"]:
        more = effects[row["intervention"]] - effects[row["control"]]
        assert row["own_minus_control"] == pytest.approx(more, abs=1e-9)


def test_with_the_cheese_itself_at_the_target_the_target_is_reached_as_often_as_the_cheese_is_found(tables):
    study = small_study(6, (7,))
    kept, targets = part.with_targets(study.levels("retarget", size=part.SIZE), study.seed_for("retarget targets"))
    moved = write_mazes(read_mazes(kept).moved(cheese=targets), kept)
    chains = Chains.of(moved)
    found = cheese_and_corner(chains, action_tables(shipped_points(), chains)[ORIGINAL])[0]
    (row,) = (row for row in tables["effects"] if row["intervention"] == part.MOVED)
    assert row["modified"] == pytest.approx(found.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("effect_low", "beyond_low", "of_the_cheese", "agrees"),
    [
        (0.1, 0.1, 0.16, "yes"),
        (0.1, -0.1, 0.16, "in part"),
        (0.1, 0.1, 0.5, "in part"),  # less than half of what the cheese itself does
        (-0.1, 0.1, 0.16, "undecided"),
    ],
)
def test_the_finding_agrees_when_the_target_is_reached_more_often_than_with_other_channels_and_half_as_with_the_cheese(
    tables, effect_low, beyond_low, of_the_cheese, agrees
):
    changed = copy.deepcopy(tables)
    changed["effects"][0] |= {"effect": 0.15, "effect_low": effect_low, "effect_high": 0.2}
    changed["effects"][-1] |= {"effect": of_the_cheese, "effect_low": 0.1, "effect_high": 0.6}
    changed["against"][0] |= {"own_minus_control_low": beyond_low, "own_minus_control_high": 0.2}
    finding = part.finding(changed)
    assert finding.agrees == agrees
    assert shown(changed["effects"][0], "effect", "+.3f") in finding.ours
    assert f"the one channel does {0.15 / of_the_cheese:.0%} of that" in finding.ours


def test_where_the_cheese_itself_draws_no_mouse_a_mark_cannot_draw_it_as_a_cheese_does(tables):
    changed = copy.deepcopy(tables)
    changed["effects"][0] |= {"effect": 0.15, "effect_low": 0.1, "effect_high": 0.2}
    changed["effects"][-1] |= {"effect": 0.02, "effect_low": -0.1, "effect_high": 0.1}
    changed["against"][0] |= {"own_minus_control_low": 0.1, "own_minus_control_high": 0.2}
    finding = part.finding(changed)
    assert finding.agrees == "in part" and "; the one channel" not in finding.ours


def test_the_finding_says_when_the_largest_multiple_was_taken(tables):
    changed = copy.deepcopy(tables)
    for multiple, said in ((4, True), (1, False)):
        changed["against"][0]["multiple"] = multiple
        assert ("the largest multiple tried" in part.finding(changed).ours) == said


def test_the_figure_shows_the_magnitudes_and_the_effects(tables):
    assert len(part.figure(tables).axes) == 2


def test_the_finding_and_the_figure_are_made_from_files(tables, tmp_path):
    read = from_files(tables, tmp_path)
    assert part.finding(read) == part.finding(tables)
    part.figure(read)
