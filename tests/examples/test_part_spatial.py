import copy

import numpy as np
import pytest
import torch
from studies import shipped_points, small_study

from chanpatch import run_with_cache
from maze.analysis.forwards import SITE, level_sums
from maze.levels import observe, policy_input
from maze.measurements import spatial as part
from maze.paths import Direction
from maze.states import FREE, read_mazes, write_mazes


@pytest.fixture(scope="module")
def study():
    return small_study(6, (23, 30, 24, 8, 7))


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def centre(row, col, cells=8):
    """Of a square of the world on the map, whose row 0 is at the top, in cells."""
    return cells - (row + 0.5) * cells / 25, (col + 0.5) * cells / 25


def test_the_mouse_is_seen_where_the_map_has_it(study):
    levels = study.levels("spatial", 4, size=25, cheese="in distribution", mouse="anywhere")
    mazes = read_mazes(levels)
    away = mazes.moved(mouse=[np.argwhere(grid == FREE)[0] for grid in mazes.grid])
    for maze, changed in enumerate((observe(levels) != observe(write_mazes(away, levels))).any(axis=-1)):
        row, col = centre(*mazes.mouse[maze])
        top, left = int(8 * row - 1.28), int(8 * col - 1.28)  # a square is 2.56 pixels wide
        assert (mazes.mouse[maze] == away.mouse[maze]).all() or changed[top : top + 4, left : left + 4].any()
        cells = np.argwhere(part._within(8, 1)[tuple(mazes.mouse[maze])])
        expected = [(i, j) for i in range(8) for j in range(8) if np.hypot(i + 0.5 - row, j + 0.5 - col) <= 1]
        assert list(map(tuple, cells.tolist())) == expected


def test_shares_are_ratios_of_sums_over_all_mazes_by_hand(study, tables):
    levels = study.levels("spatial", size=25, cheese="in distribution", mouse="anywhere")
    inputs = torch.from_numpy(policy_input(observe(levels)))
    with torch.no_grad():
        maps = run_with_cache(shipped_points(), inputs, sites=SITE, stop=True)[SITE][:, 30].double().numpy()
    mazes, around, elsewhere = read_mazes(levels), 0.0, 0.0
    for maze, activation in enumerate(maps):
        free = [tuple(cell) for cell in np.argwhere(mazes.grid[maze] == FREE) if (cell != mazes.mouse[maze]).any()]
        places = [tuple(mazes.mouse[maze]), *free]
        sums = []
        for place in places:
            row, col = centre(*place)
            sums.append(
                sum(activation[i, j] for i in range(8) for j in range(8) if np.hypot(i + 0.5 - row, j + 0.5 - col) <= 2)
            )
        around += sums[0]
        elsewhere += np.mean(sums[1:])
    (row,) = (row for row in tables["shares"] if (row["channel"], row["distance"]) == (30, 2))
    assert row["share"] == pytest.approx(around / maps.sum(), abs=1e-4)
    assert row["elsewhere"] == pytest.approx(elsewhere / maps.sum(), abs=1e-4)
    assert row["difference"] == pytest.approx((around - elsewhere) / maps.sum(), abs=1e-4)


def test_only_the_channels_of_directions_are_ranked_among_the_others(tables):
    for row in tables["shares"]:
        controls = [
            other["difference"]
            for other in tables["shares"]
            if other["distance"] == row["distance"] and other["role"] == "control"
        ]
        if row["role"] == "control":
            assert row["rank"] is None and row["channel"] == 23
        else:
            assert row["controls"] == 1
            assert row["rank"] == 1 + sum(each >= row["difference"] for each in controls)


def test_one_channel_may_stand_for_several_directions_without_controls():
    tables = part.measure(small_study(3, (7,), dict.fromkeys(Direction, 7)))
    assert {row["role"] for row in tables["shares"]} == {"LEFT and DOWN and UP and RIGHT"}
    assert all(row["rank"] is None for row in tables["shares"])
    assert part.figure(tables).axes and "There are no other channels" in part.finding(tables).follows


def test_without_an_active_channel_the_finding_says_so(tables):
    silent = {**tables, "shares": []}
    assert part.finding(silent).agrees == "not comparable"
    assert part.figure(silent).axes


@pytest.mark.parametrize(
    ("share", "difference", "agrees"),
    [(0.95, 0.2, "yes"), (0.85, 0.2, "undecided"), (0.5, 0.2, "no")],
)
def test_the_finding_agrees_when_nearly_all_of_the_sum_lies_around_the_mouse(tables, share, difference, agrees):
    changed = copy.deepcopy(tables)
    for row in changed["shares"]:
        row |= {"share_low": share - 0.04, "share_high": share + 0.1}
        row |= {"difference_low": difference - 0.05, "difference_high": difference + 0.15}
    assert part.finding(changed).agrees == agrees


def test_the_finding_is_of_two_cells_and_the_lowest_fraction_decides(tables):
    found = part.finding(tables)
    assert found.ours.startswith("Fraction of the sum within 2 map cells (6.2 squares) of the mouse")
    row = next(row for row in tables["shares"] if (row["channel"], row["distance"]) == (7, 2))
    assert f"UP (channel 7) {row['share']:.3f}" in found.ours and f"rank {row['rank']} of 2" in found.ours
    other = copy.deepcopy(tables)
    for row in other["shares"]:
        lowest = (row["channel"], row["distance"]) == (24, 2)
        row |= {"share": 0.8 if lowest else 0.99, "share_low": 0.7 if lowest else 0.98, "share_high": 0.85}
    assert part.finding(other).agrees == "no"


def test_the_curve_rises_to_the_whole_sum(tables):
    for channel in (7, 23):
        curve = [row["share"] for row in tables["shares"] if row["channel"] == channel]
        assert len(curve) == len(part.DISTANCES) and curve == sorted(curve) and curve[-1] > 0.8


def test_the_figure_draws_the_maze_with_the_highest_sum(study, tables):
    levels = study.levels("spatial", size=25, cheese="in distribution", mouse="anywhere")
    level = levels[int(level_sums(study.points, SITE, levels)[:, 7].argmax())]
    grey = observe([level])[0].mean(axis=-1).round()
    read = [list(bytes.fromhex(row["grey"][1:])) for row in tables["pixels"]]
    np.testing.assert_array_equal(read, grey)
    label = part.figure(tables).axes[0].get_xlabel()
    assert label.startswith("channel 7 (UP) in the maze of all with the highest sum")
