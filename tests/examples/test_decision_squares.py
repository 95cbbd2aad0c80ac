import numpy as np
import pytest
import torch
from studies import BEST, shipped_points, small_study

from chanpatch import hook_points, recording
from maze.analysis.cells import cells, shown
from maze.analysis.decision_squares import (
    CHEESE_TO_CORNER,
    DISTANCES,
    TO_CHEESE,
    TO_CORNER,
    Decisions,
    at_decision_squares,
    joined,
    precise_threshold,
    strata,
    threshold_rows,
    thresholds,
)
from maze.analysis.estimates import intervals, share
from maze.analysis.forwards import SITE
from maze.analysis.part import Study
from maze.analysis.selection import Selection
from maze.levels import draw_levels, observe, policy_input
from maze.measurements import ablation
from maze.measurements.decision import _limit
from maze.paths import Direction, first_steps, legal_moves
from maze.policy.network import ACTIONS, load_policy, new_policy
from maze.states import mazes_from_pictures, read_mazes, write_mazes

FORK = """
    .....
    .####
    .....
    .#.##
    M#C..
"""


def test_a_decision_has_the_ways_the_moves_and_the_distances_of_its_maze():
    points = shipped_points()
    mazes = mazes_from_pictures(FORK).moved(mouse=(2, 0))
    levels = write_mazes(mazes, draw_levels(1, size=3, seed=0)[0])
    seen = at_decision_squares(points, levels)
    assert (seen.cheese[0], seen.corner[0]) == (Direction.RIGHT, Direction.UP)
    with torch.no_grad():
        probs = points.model(torch.from_numpy(policy_input(observe(levels))))[0].probs[0].numpy()
    expected = [probs[list(ACTIONS[each])].sum() for each in Direction]
    expected[Direction.LEFT] = -1  # off the edge
    np.testing.assert_allclose(seen.moves[0], expected, rtol=1e-5)
    assert seen.distance(TO_CHEESE)[0] == 4 and seen.distance(TO_CORNER)[0] == 6
    straight = [np.hypot(4, 2), np.hypot(2, 2), np.hypot(2, 4)]
    np.testing.assert_allclose(seen.distances[0, [DISTANCES.index(CHEESE_TO_CORNER), 3, 4]], straight)


def test_an_illegal_move_is_never_the_chosen_one():
    seen = decisions(moves=[[-1, 0, -1, 0]], cheese=[1], corner=[3])
    assert seen.chosen.tolist() == [Direction.DOWN]


def test_joined_decisions_are_those_of_all_parts_in_order():
    parts = [decisions(moves=np.eye(4)[[each]], cheese=[each], corner=[3]) for each in (0, 2)]
    assert joined(parts).chosen.tolist() == [0, 2] and joined(parts).rows([1]).cheese.tolist() == [2]


def test_a_stratum_is_a_pair_of_bins_of_the_two_path_lengths():
    seen = decisions(moves=np.eye(4), cheese=[0] * 4, corner=[1] * 4)
    seen.distances[:, DISTANCES.index(TO_CHEESE)] = [7, 8, 31, 32]
    seen.distances[:, DISTANCES.index(TO_CORNER)] = [0, 8, 0, 100]
    assert strata(seen).tolist() == [0, 5, 8, 15]


def test_the_threshold_says_which_precision_it_could_reach():
    high = np.arange(2000) >= 1000
    mixed = high & (np.arange(2000) % 4 > 0)  # 750 of the 1000 high sums
    assert precise_threshold(high * 9.0, high, seed=0).criterion == "95% confidence in a precision of at least 0.99"
    probe = precise_threshold(high * 9.0, mixed, seed=0)
    assert (probe.threshold, float(probe.criterion.split()[-1]) < 0.99) == (4.5, True)
    (row,) = threshold_rows(small_study(5, (7,)), {Direction.UP: probe})
    assert not row["as_precise_as_asked"] and row["criterion"] == probe.criterion


def test_a_channel_that_does_not_vary_has_no_threshold():
    assert precise_threshold(np.zeros(40), np.arange(40) < 20, seed=0) is None


def test_a_threshold_is_fitted_and_scored_on_mazes_that_its_channel_was_not_chosen_on(monkeypatch):
    monkeypatch.setattr("maze.analysis.decision_squares.THRESHOLD_LEVELS", 60)
    study = small_study(5, (7,))
    where = {"size": 25, "cheese": "in distribution", "mouse": "anywhere"}
    levels = study.levels("threshold", 60, **where)
    assert not set(levels) & set(study.levels("selection", 60, **where))
    mazes = read_mazes(levels)
    free = legal_moves(mazes)[np.arange(60), Direction.UP, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    with torch.no_grad(), recording(study.points, SITE) as cache:
        study.points.model(torch.from_numpy(policy_input(observe(levels))))
    sums = cache[SITE][:, BEST[Direction.UP]].double().sum(dim=(1, 2)).numpy()[free]
    labels = first_steps(mazes, mazes.cheese)[free, Direction.UP]
    expected = precise_threshold(sums, labels, seed=study.seed_for("threshold halves"))
    probe = thresholds(study, [Direction.UP])[Direction.UP]
    assert probe.threshold == pytest.approx(expected.threshold, rel=1e-3)
    assert probe.held_out == expected.held_out
    assert probe.fitted_on + probe.held_out.n == free.sum()


@pytest.mark.parametrize(("name", "given"), [("model_rand_region_5.pth", True), ("another.pth", False)])
def test_on_the_posts_own_network_the_channels_and_the_threshold_are_the_posts(tmp_path, monkeypatch, name, given):
    monkeypatch.setattr("maze.analysis.decision_squares.THRESHOLD_LEVELS", 60)
    torch.manual_seed(0)
    torch.save({"model_state_dict": new_policy(4).state_dict()}, tmp_path / name)
    policy, weights = load_policy(tmp_path / name)
    points = hook_points(policy, torch.from_numpy(policy_input(observe(draw_levels(2, size=9, seed=0)))))
    study = Study(points, weights, 5, seed=0)
    chosen = Selection(SITE, *[np.empty(0)] * 4, dict.fromkeys(Direction, 7), (7,), (7,))
    study.__dict__["selection"] = chosen
    assert [study.channel(direction) for direction in Direction] == ([7, 7, 121, 73] if given else [7] * 4)
    study.__dict__["labels"] = []
    assert list(ablation._roles(study, "top 1", {}).values())[1:] == (
        ["LEFT, DOWN", "UP", "RIGHT"] if given else ["LEFT, DOWN, UP, RIGHT"]
    )
    rows = threshold_rows(study, thresholds(study, [Direction.UP, Direction.RIGHT]))
    assert [row["channel"] for row in rows] == ([121, 73] if given else [7, 7])
    for row in rows:
        chosen = row["threshold"], row["accepts"], row["criterion"], row["n_fit"], row["as_precise_as_asked"]
        assert (chosen == (30.0, "above", "the post's, on its own network", 0, None)) == given
        assert row["n_held_out"] > 0 and (given or row["n_fit"] > 0)
        assert ("the post's, on its own network" in _limit(row)) == given
        assert not (given and "none has 0.99" in _limit(row))


def test_what_cannot_be_estimated_is_none_and_said_so():
    assert intervals(share=share(0, 0)) == cells("share", None) == dict.fromkeys(("share", "share_low", "share_high"))
    assert shown(intervals(share=share(0, 0)), "share", ".0%") == "nothing to estimate"
    assert shown(intervals(share=share(9, 10)), "share", ".0%") == "90% (60% to 98%)"


def decisions(moves, cheese, corner, sums=None):
    n = len(cheese)
    sums = np.zeros((n, 1)) if sums is None else np.asarray(sums, dtype=float)
    return Decisions(
        np.array(cheese), np.array(corner), np.asarray(moves, dtype=float), sums, np.ones((n, len(DISTANCES)))
    )
