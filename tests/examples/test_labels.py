"""The labels of channels, and what the walls alone explain."""

from dataclasses import replace

import numpy as np
import pytest
from studies import shipped_points, small_study

from chanpatch.statistics import auc
from maze.analysis import labels
from maze.analysis.labels import at_partings, is_reading, labelled_channels
from maze.levels import draw_levels
from maze.paths import Direction, first_steps, legal_moves
from maze.states import read_mazes

TOLD = {0: [Direction.UP], 1: [Direction.LEFT, Direction.DOWN]}  # channels that tell the way
WALLS = 2  # a channel that tells only whether UP is free


@pytest.fixture(scope="module")
def levels():
    return draw_levels(160, size=15, seed=2, cheese="in distribution")


def made_up_sums(levels, seed):
    """Of four channels: two of `TOLD`, one of walls, one dead; and the first steps and legal moves."""
    mazes = read_mazes(levels)
    first = first_steps(mazes, mazes.cheese).argmax(axis=1)
    legal = legal_moves(mazes)[np.arange(len(mazes)), :, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    sums = np.random.default_rng(seed).normal(size=(len(levels), 4))
    for channel, directions in TOLD.items():
        sums[:, channel] += 3 * np.isin(first, directions)
    sums[:, WALLS] += 6 * legal[:, Direction.UP]
    sums[:, 3] = 0
    return sums, first, legal


@pytest.fixture(scope="module")
def selection():
    sums, first, legal = made_up_sums(draw_levels(400, size=15, seed=3, cheese="in distribution", mouse="anywhere"), 0)
    return replace(small_study(4, (0, 1, 2)).selection, sums=sums, first=first, legal=legal)


@pytest.fixture
def labelled(levels, selection, monkeypatch):
    monkeypatch.setattr(labels, "level_sums", lambda points, site, at: made_up_sums(at, 1)[0])
    return labelled_channels(shipped_points(), selection, levels, seed=5)


def test_the_mouse_is_put_where_three_ways_or_more_part_and_nothing_else_is_changed(levels):
    before, after = read_mazes(levels), read_mazes(at_partings(levels, seed=5))
    moves = legal_moves(after)[np.arange(len(after)), :, after.mouse[:, 0], after.mouse[:, 1]]
    assert moves.sum(axis=1).min() >= 3
    np.testing.assert_array_equal(after.grid, before.grid)


def test_channels_get_the_directions_that_their_sums_tell(labelled):
    assert [each.label for each in labelled[:2]] == ["UP", "LEFT or DOWN"]
    assert [labelled[3].label, labelled[3].candidate, labelled[3].n_choice, labelled[3].auc_choice] == [
        None,
        None,
        0,
        None,
    ]


def test_the_area_where_there_is_a_choice_is_that_of_mazes_with_moves_inside_and_outside_the_label(labelled, selection):
    rows = [
        row
        for row in range(len(selection.first))
        if selection.legal[row, [0, 1]].any() and selection.legal[row, [2, 3]].any()
    ]
    expected = auc(selection.sums[rows, 1], np.isin(selection.first[rows], [0, 1]))
    assert (labelled[1].n_choice, labelled[1].auc_choice) == (len(rows), expected)


def test_a_channel_that_notices_walls_only_tells_nothing_where_there_is_a_choice(labelled, selection):
    of_walls = auc(selection.sums[:, WALLS], selection.legal[:, Direction.UP])
    assert of_walls.estimate > 0.95
    assert labelled[WALLS].auc_choice.low < 0.6


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("UP", True),
        ("LEFT or DOWN", True),
        ("UP or RIGHT", True),
        ("DOWN or UP", False),
        ("LEFT or RIGHT", False),
        ("LEFT or DOWN or RIGHT", False),
        (None, False),
    ],
)
def test_a_reading_is_a_direction_or_two_that_are_not_opposite(label, expected):
    assert is_reading(label) is expected
